"""Blocks on their way from another rank's arena into ours.

``bring`` looks a block up, takes the extent, has the bytes transferred and verified, and admits the copy: from then
on it is a copy like any other, also for other ranks, who may find it here. It writes nothing: the block is
durable, or will be, where it was put. ``join`` is for names that this store has never heard of: one transfer
per name however many ask, a task of the store that ends when the last of them has gone.

What is asked for in one turn of the loop is looked up together. Whatever goes wrong is a miss of this tier.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from copy import copy as copied

from cascade_aio.abc.storage import PAGE_BYTES, Priority, Urgency
from cascade_aio.core.remote_directory import Listing
from cascade_aio.errors import CascadeError, ClosedError, DigestConflictError, InternalError, TierFullError
from cascade_aio.model import BLOCK_ID_BYTES, PREFIX_KEY_BYTES
from cascade_aio.segments.format import RecordHeader
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.store.naming import Name
from cascade_aio.store.room import Claim
from cascade_aio.tiers.directory_format import directory_name
from cascade_aio.tiers.remote.tier import RemoteTier
from cascade_aio.tiers.shm import Extent

COPIES_TRIED_MAX = 2
"""Ranks asked for one block before the next tier is."""

LOOKED_UP_MAX = 4096
"""Answers of look-ups that are kept for the reads that are likely to follow; beyond, the oldest go."""

FetchWaiter = asyncio.Future[Copy | None]
"""Of a copy, with one hold for the waiter, who ends it by ``Catalog.release`` or ``Fetcher.leave``; ``None``: no
rank has it."""


class _Flight:
    """A name on its way. ``wanted`` while anybody waits."""

    __slots__ = ("claim", "task", "urgency", "waiters")

    def __init__(self, urgency: Urgency, claim: Claim | None) -> None:
        self.urgency = urgency
        self.claim = claim
        self.waiters: set[FetchWaiter] = set()
        self.task: asyncio.Task[None] | None = None


class Fetcher:
    """All transfers of one store. Loop thread only."""

    def __init__(self, context: StoreContext, tier: RemoteTier) -> None:
        self._context = context
        self._catalog = context.catalog
        self._tier = tier
        self._flights: dict[bytes, _Flight] = {}
        self._looked_up: dict[bytes, list[Listing]] = {}
        self._asked: dict[bytes, list[asyncio.Future[list[Listing]]]] = {}

    @property
    def serves(self) -> bool:
        """Whether there is any other rank to ask."""
        return self._tier.serves

    async def lookup(self, names: Sequence[bytes]) -> list[list[Listing]]:
        """Which other ranks have the block of each name (block id or prefix key). A hint."""
        return await self._tier.lookup([directory_name(name) for name in names])

    async def sizes(self, names: Sequence[bytes]) -> dict[bytes, int]:
        """Bytes of the record of each of ``names`` that another rank has. A read that follows need not look it up."""
        found = {name: listings for name, listings in zip(names, await self.lookup(names), strict=True) if listings}
        looked_up = self._looked_up
        for name, listings in found.items():
            looked_up.pop(name, None)
            looked_up[name] = listings
        while len(looked_up) > LOOKED_UP_MAX:
            del looked_up[next(iter(looked_up))]
        return {name: listings[0].record_bytes for name, listings in found.items()}

    async def bring(self, name: bytes, urgency: Urgency, claim: Claim | None) -> Copy | None:
        """The block of ``name`` from another rank, admitted to the catalog and not held; ``None`` if none has it.

        Raises ``TierFullError`` without room for it. May be cancelled: what a rank may still write to stays taken.
        """
        known = self._looked_up.pop(name, None)
        if known is not None and (copy := await self._bring_one_of(known, name, urgency, claim)) is not None:
            return copy
        return await self._bring_one_of(await self._find(name), name, urgency, claim)

    async def _bring_one_of(
        self, listings: Sequence[Listing], name: bytes, urgency: Urgency, claim: Claim | None
    ) -> Copy | None:
        context = self._context
        for listing in listings[:COPIES_TRIED_MAX]:
            if len(name) == BLOCK_ID_BYTES and listing.block_id != name:
                continue  # an id names one block: whatever else an entry says is wrong
            if listing.record_bytes > context.shm.capacity_bytes:
                continue
            extent = await context.room.reserve(
                listing.record_bytes,
                demand=True,
                wait_s=context.config.put_wait_seconds_max,
                urgency=urgency,
                claim=claim,
            )
            header = await self._tier.read(listing, extent.memory, functools.partial(self._free, extent))
            if header is not None:
                return self._admit(header, extent, name)
        return None

    def _free(self, extent: Extent) -> None:
        self._context.shm.free(extent)
        if not self._context.closed:
            self._context.room.freed()

    def _admit(self, header: RecordHeader, extent: Extent, name: bytes) -> Copy | None:
        """The verified copy becomes this store's, unless the block is here already or was deleted here."""
        context, catalog = self._context, self._catalog
        copy = Copy(
            extent,
            header_bytes=header.header_pages * PAGE_BYTES,
            digest=header.digest,
            key_bytes=header.key_bytes,
            value_bytes=header.value_bytes,
            value_offset=header.value_offset,
            chunk_crcs=header.chunk_crcs,
            meta=header.meta,
        )
        copy.described = copy.fetched = True
        copy.stamp = header.stamp  # a deletion, here or heard of, is to be measured against its record
        context.disk.clock.observe(header.stamp, context.platform.clock.wall_ns())
        try:
            row = catalog.row_of(header.digest, header.key_bytes, header.value_bytes)
            if row < 0 and context.merger.facts.is_live(copy.block_id, header.stamp):
                row = catalog.index.add(header.digest, header.key_bytes, header.value_bytes)
        except (DigestConflictError, TierFullError):  # the index: it knows another block, or no more
            row = -1
        if row < 0 or row in catalog.copies:
            self._free(extent)
            return None if row < 0 else catalog.copies[row]
        catalog.admit(copy, row)
        self._take_names(copy, header, name)
        return copy

    def _take_names(self, copy: Copy, header: RecordHeader, name: bytes) -> None:
        """The names that the header tells, and the one that was asked for."""
        context = self._context
        names = [Name(copy.block_id, *binding) for binding in header.bindings if binding.key != binding.parent]
        if len(name) == PREFIX_KEY_BYTES and not any(known.key == name for known in names):
            names.append(Name(copy.block_id, name, None, context.new_stamp(copy.block_id)))
        for known in names:
            context.merger.hearsay = True  # whether these names are durable only their writer knows
            try:
                context.merger.names.claim(known)
            except TierFullError:
                break  # no room for more names: the block is found by its id

    # -- names nobody here has heard of -------------------------------------------------------

    def join(self, name: bytes, *, priority: Priority = Priority.DEMAND, claim: Claim | None = None) -> FetchWaiter:
        """Wait for the block of ``name``, starting its transfer if there is none. Below DEMAND with a ``claim``."""
        flight = self._flights.get(name)
        if flight is None:
            flight = self._flights[name] = _Flight(Urgency(priority), claim)
            flight.task = self._context.tasks.spawn(self._run(name, flight), name="cascade-fetch")
        else:
            self._context.counters.single_flight_joins += 1
            flight.urgency.rise(priority)
        waiter: FetchWaiter = self._context.loop.create_future()
        flight.waiters.add(waiter)
        return waiter

    def hurry(self, name: bytes) -> None:
        """Somebody waits for ``name`` now."""
        flight = self._flights.get(name)
        if flight is not None:
            flight.urgency.rise(Priority.DEMAND)

    def leave(self, name: bytes, waiter: FetchWaiter) -> None:
        """The waiter gives up: its hold ends if it was granted; the transfer too if nobody else wants it."""
        if waiter.done() and not waiter.cancelled():
            if waiter.exception() is None and (copy := waiter.result()) is not None:
                self._catalog.release(copy)
            return
        flight = self._flights.get(name)
        if flight is not None and waiter in flight.waiters:
            flight.waiters.discard(waiter)
            if not flight.waiters and flight.task is not None:
                flight.task.cancel()
                del self._flights[name]
        waiter.cancel()

    async def _run(self, name: bytes, flight: _Flight) -> None:
        try:
            outcome: Copy | Exception | None = await self.bring(name, flight.urgency, flight.claim)
        except asyncio.CancelledError:
            self._settle(name, flight, ClosedError("the store was closed while the block was being read"))
            raise
        except (CascadeError, OSError) as error:
            outcome = error
        except BaseException as error:
            self._settle(name, flight, InternalError(f"fetching a block failed: {error!r}; please report this"))
            raise
        self._settle(name, flight, outcome)

    def _settle(self, name: bytes, flight: _Flight, outcome: Copy | Exception | None) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]
        for waiter in flight.waiters:
            if waiter.done():
                continue
            if isinstance(outcome, Exception):
                waiter.set_exception(copied(outcome))
                continue
            if outcome is not None:
                self._catalog.hold(outcome)
            waiter.set_result(outcome)

    # -- lookups of one turn ------------------------------------------------------------------

    async def _find(self, name: bytes) -> list[Listing]:
        """Where ``name`` is listed; asked together with what others ask in this turn."""
        if not self.serves:
            return []
        if not self._asked:
            self._context.loop.call_soon(self._ask)
        future: asyncio.Future[list[Listing]] = self._context.loop.create_future()
        self._asked.setdefault(name, []).append(future)
        return await future

    def _ask(self) -> None:
        asked, self._asked = self._asked, {}
        self._context.tasks.spawn(self._answer(asked), name="cascade-lookup")

    async def _answer(self, asked: dict[bytes, list[asyncio.Future[list[Listing]]]]) -> None:
        answers: list[list[Listing]] = [[] for _ in asked]
        try:
            answers = await self.lookup(list(asked))
        finally:
            for futures, answer in zip(asked.values(), answers, strict=True):
                for future in futures:
                    if not future.done():
                        future.set_result(answer)
