"""Promotion: blocks on their way into a device's arena, one way per block however many want it.

From the node's arena it is one copy, enqueued in the turn in which it is asked for, several blocks in one call of the
driver. From disk or another rank the block is read into the node's arena, and each piece goes on to the device as soon
as it is verified, while the next is read; so reading, copying and the consumer overlap. Such a promotion is a task of
the store: a caller who gives up leaves the memory in good hands; with the last of them gone it is cancelled.

Who waits for what: the host waits until pieces are *enqueued*, streams wait for their events, and only a lease without
a stream waits for the bytes. The source is held until the host has seen the end of the copy.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from copy import copy as copied
from typing import TYPE_CHECKING, NamedTuple

from cascade_aio.abc.device import DeviceError
from cascade_aio.errors import BlockNotFoundError, BrokenTierError, CascadeError, ClosedError, InternalError
from cascade_aio.model import BlockId
from cascade_aio.segments.buffers import page_padded
from cascade_aio.segments.pieces import layered_pieces, plain_pieces
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.store.device_catalog import DeviceCatalog, DeviceCopy
from cascade_aio.tiers.gpu.lanes import Ticket
from cascade_aio.tiers.gpu.pinning import wait_all
from cascade_aio.tiers.gpu.tier import DeviceExtent

if TYPE_CHECKING:
    from cascade_aio.store.getting import Getter

Waiter = asyncio.Future[DeviceCopy]
"""Of a copy, with one hold for the waiter, who ends it by ``DeviceCatalog.release`` or ``Promoter.leave``."""


class _Planned(NamedTuple):
    """A block that can be copied now: its source, and where it goes."""

    row: int
    host: Copy
    extent: DeviceExtent
    payload: memoryview


class _Promotion:
    """A block on its way. ``early`` waiters want its first piece, the others all of them."""

    __slots__ = ("copy", "early", "layered", "task", "waiters")

    def __init__(self, *, layered: bool) -> None:
        self.layered = layered
        self.waiters: set[Waiter] = set()
        self.early: set[Waiter] = set()
        self.copy: DeviceCopy | None = None
        self.task: asyncio.Task[None] | None = None


class Promoter:
    """All promotions to one device."""

    def __init__(self, context: StoreContext, getter: Getter, devices: DeviceCatalog) -> None:
        self._context = context
        self._catalog = context.catalog
        self._getter = getter
        self._devices = devices
        self._tier = devices.tier
        self._promotions: dict[BlockId, _Promotion] = {}
        self.promoted_blocks = 0
        self.single_flight_joins = 0

    def __len__(self) -> int:
        return len(self._promotions)

    # -- at once ----------------------------------------------------------------------------------

    def start_now(self, rows: Sequence[int]) -> None:
        """Enqueue the copies of those of ``rows`` that can be: in the node's arena, page-locked, with room, and not on
        their way. One call of the driver for all."""
        planned: list[_Planned] = []
        for row in rows:
            host = self._catalog.copies.get(row)
            if host is None or row in self._devices.copies or host.block_id in self._promotions:
                continue
            payload = _payload(host)
            if len(payload) and self._tier.can_copy_now(payload):
                # Held from here on: making room for the next one evicts neither it nor its source.
                extent = self._devices.room.reserve_now(page_padded(len(payload)))
                if extent is not None:
                    self._catalog.hold(host)
                    planned.append(_Planned(row, host, extent, payload))
        if planned:
            self._submit(planned)

    def _submit(self, planned: list[_Planned]) -> None:
        copies: list[DeviceCopy] = []
        for plan in planned:
            copy = DeviceCopy(plan.extent, plan.host)
            self._devices.hold(copy)
            copies.append(copy)

        def ended(error: DeviceError | None) -> None:
            for plan, copy in zip(planned, copies, strict=True):
                copy.pieces.clear()
                self._catalog.release(plan.host)
                self._devices.release(copy)

        try:
            ticket = self._tier.start_upload([(plan.extent.pointer, plan.payload) for plan in planned], ended)
        except BrokenTierError:
            ended(None)  # nothing was enqueued: the extents go back
            raise
        if ticket.finished:  # the device failed in this very call
            self._tier.check()
        for plan, copy in zip(planned, copies, strict=True):
            copy.enqueued(0, copy.payload_bytes, ticket)
            self._devices.admit(copy, plan.row)
        self.promoted_blocks += len(planned)

    # -- in time ----------------------------------------------------------------------------------

    def join(self, name: BlockId, *, early: bool) -> Waiter:
        """Wait for the block ``name`` (an id), starting its promotion if there is none."""
        promotion = self._promotions.get(name)
        if promotion is None:
            promotion = self._promotions[name] = _Promotion(layered=early)
            promotion.task = self._context.tasks.spawn(self._run(name, promotion), name=f"cascade-promote-{name}")
            promotion.task.add_done_callback(functools.partial(self._ended, name, promotion))
        else:
            self.single_flight_joins += 1
        waiter: Waiter = self._context.loop.create_future()
        if early and promotion.copy is not None and promotion.copy.pieces:
            self._devices.hold(promotion.copy)
            waiter.set_result(promotion.copy)
        else:
            (promotion.early if early else promotion.waiters).add(waiter)
        return waiter

    def leave(self, name: BlockId, waiter: Waiter) -> None:
        """The waiter gives up: undo its hold if it was granted; cancel the promotion if nobody else wants it."""
        if waiter.done() and not waiter.cancelled():
            if waiter.exception() is None:
                self._devices.release(waiter.result())
            return
        promotion = self._promotions.get(name)
        if promotion is not None and (waiter in promotion.waiters or waiter in promotion.early):
            promotion.waiters.discard(waiter)
            promotion.early.discard(waiter)
            leased = promotion.copy is not None and promotion.copy.leases
            if not promotion.waiters and not promotion.early and not leased and promotion.task is not None:
                promotion.task.cancel()
                del self._promotions[name]  # a newcomer starts afresh, the cancelled task drains by itself
        waiter.cancel()

    async def _run(self, name: BlockId, promotion: _Promotion) -> None:
        """Never raises but on cancellation; the outcome goes to the waiters."""
        try:
            copy = await self._bring(name, promotion)
        except asyncio.CancelledError:
            raise  # ``_ended`` tells, also for a task that never began
        except (CascadeError, OSError) as error:
            self._settle(name, promotion, error)
        except BaseException as error:
            self._settle(name, promotion, InternalError(f"promoting a block failed: {error!r}; please report this"))
            raise
        else:
            self._settle(name, promotion, copy)

    def _ended(self, name: BlockId, promotion: _Promotion, task: asyncio.Task[None]) -> None:
        """A task that was cancelled, perhaps before its first step, has told nobody."""
        if task.cancelled():
            self._settle(name, promotion, ClosedError("the store was closed while the block was being promoted"))

    def _settle(self, name: BlockId, promotion: _Promotion, outcome: DeviceCopy | Exception) -> None:
        if self._promotions.get(name) is promotion:
            del self._promotions[name]
        for waiter in (*promotion.waiters, *promotion.early):
            if waiter.done():
                continue
            if isinstance(outcome, DeviceCopy):
                self._devices.hold(outcome)
                waiter.set_result(outcome)
            else:
                waiter.set_exception(copied(outcome))
        if isinstance(outcome, DeviceCopy):
            self._devices.release(outcome)

    async def _bring(self, name: BlockId, promotion: _Promotion) -> DeviceCopy:
        """The block, every piece of it enqueued; held once for the caller."""
        self._tier.check()
        host = await self._find(name)
        try:
            extent = await self._devices.room.reserve(
                page_padded(max(1, host.value_offset + host.value_bytes)),
                demand=True,
                wait_s=self._context.config.put_wait_seconds_max,
            )
        except BaseException:
            self._catalog.release(host)
            raise
        copy = promotion.copy = DeviceCopy(extent, host)
        self._devices.hold(copy)
        tickets: list[Ticket] = []
        try:
            await self._enqueue(promotion, copy, host, tickets)
            row = self._catalog.index.find(name)
            if row < 0 or self._catalog.index.digest(row) != copy.digest:
                raise BlockNotFoundError(f"block {name} was deleted or evicted while it was being promoted")
            copy.chunk_crcs, copy.meta = host.chunk_crcs, host.meta
            self._devices.admit(copy, row)
        except BaseException as error:
            if self._promotions.get(name) is promotion:
                del self._promotions[name]  # whoever asks again once told of the failure starts afresh
            copy.fail(ClosedError("the promotion was cancelled") if not isinstance(error, Exception) else error)
            await _ended(tickets)
            self._devices.release(copy)
            self._catalog.release(host)
            raise
        self.promoted_blocks += 1
        self._let_go(copy, host, tickets)
        return copy

    async def _find(self, name: BlockId) -> Copy:
        """The copy in the node's arena, of which more may still be arriving; held once for the caller."""
        block = self._getter.try_hot(name)
        if block is None:
            block = await self._getter.load(name, early=True)
        with block:
            host: Copy = block.leased_copy  # type: ignore[assignment] # an embedded store's
            self._catalog.hold(host)
        return host

    async def _enqueue(self, promotion: _Promotion, copy: DeviceCopy, host: Copy, tickets: list[Ticket]) -> None:
        """Enqueue piece after piece as they are verified; without page-locking each has arrived before the next."""
        tier, header_bytes = self._tier, host.header_bytes
        record_bytes = header_bytes + page_padded(copy.payload_bytes)
        arriving = host.arrival is not None and not host.arrival.complete
        if promotion.layered:
            pieces = layered_pieces(header_bytes, record_bytes, copy.value_offset)
        else:
            pieces = plain_pieces(header_bytes, record_bytes) if arriving else [(0, record_bytes)]
        memory = host.extent.memory
        direct = await tier.prepare(memory[header_bytes : header_bytes + copy.payload_bytes])
        for first, end in pieces:
            start, stop = max(first - header_bytes, 0), min(end - header_bytes, copy.payload_bytes)
            if start >= stop:
                continue
            if host.arrival is not None:
                await host.arrival.wait(start, stop)
            source = memory[header_bytes + start : header_bytes + stop]
            if direct:
                ticket = tier.start_upload([(copy.extent.pointer + start, source)], _nothing)
                tickets.append(ticket)
                copy.enqueued(start, stop, ticket)
            else:
                await tier.upload([(copy.extent.pointer + start, source)])
                copy.enqueued(start, stop, None)
            self._give_early(promotion, copy)

    def _give_early(self, promotion: _Promotion, copy: DeviceCopy) -> None:
        early, promotion.early = promotion.early, set()
        for waiter in early:
            if not waiter.done():
                self._devices.hold(copy)
                waiter.set_result(copy)

    def _let_go(self, copy: DeviceCopy, host: Copy, tickets: list[Ticket]) -> None:
        """The source and the copy stay as they are until the last piece has ended. One hold on the copy is left."""

        def ended(error: DeviceError | None) -> None:
            copy.pieces.clear()
            self._devices.release(copy)
            self._catalog.release(host)

        self._devices.hold(copy)
        if not tickets or tickets[-1].finished:
            ended(None)
        else:
            tickets[-1].on_end = ended


async def _ended(tickets: list[Ticket]) -> None:
    """Return when nobody touches the memory any more; how it ended does not matter any more."""
    try:
        await wait_all(tickets)
    except (DeviceError, asyncio.CancelledError):  # the cause of giving up is about to be raised
        return


def _nothing(error: DeviceError | None) -> None:
    """A piece that is not the last."""


def _payload(host: Copy) -> memoryview:
    return host.extent.memory[host.header_bytes : host.header_bytes + host.value_offset + host.value_bytes]
