"""What one connection holds of the store: leases, reservations, streams; and its limits.

Numbers are the connection's own, so nobody can name what belongs to another. Everything is given back
by ``give_back``, whatever state the connection was in. Loop thread only; must not know sockets.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable

from cascade_aio.config import format_size
from cascade_aio.core.leases import LeaseLedger
from cascade_aio.daemon.protocol import Grant
from cascade_aio.errors import ProtocolError, ThrottledError, TierFullError
from cascade_aio.model import BlockId, Tier
from cascade_aio.store.block import Block
from cascade_aio.store.catalog import Copy
from cascade_aio.store.putting import Draft
from cascade_aio.store.store import StoreParts
from cascade_aio.store.streaming import BlockStream
from cascade_aio.tiers.directory import ClientPins
from cascade_aio.tiers.shm import Extent


@dataclasses.dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one connection."""

    leases: int
    pinned_bytes: int
    reserved_bytes: int
    streams: int
    reserve_wait_s: float


@dataclasses.dataclass(slots=True, eq=False)
class Reservation:
    """An extent that a client fills. ``known``: what its prefix named when it was made."""

    number: int
    draft: Draft
    extent: Extent
    known: BlockId | None
    on_end: Callable[[], None]
    """Called once, when it is sealed or given up."""
    slot: int = -1
    """In the shared directory, while the client may write."""


class Holdings:
    """See the module's text."""

    def __init__(self, parts: StoreParts, quota: Quota, pins: ClientPins | None) -> None:
        self._parts = parts
        self._publisher = parts.context.publisher
        self.pins = pins
        """The client's pin table; ``None``: it has none, every lease is a number."""
        self._quota = quota
        self._ledger = LeaseLedger(leases_max=quota.leases)
        self._blocks: dict[int, Block] = {}
        self._reservations: dict[int, Reservation] = {}
        self._streams: dict[int, BlockStream] = {}
        self._numbers = 0
        self.reserved_bytes = 0
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    def __bool__(self) -> bool:
        """Whether the client may use anything of it: it may also pin, without a word, as long as it has its table."""
        return bool(self._blocks or self._reservations) or (self.pins is not None and self.pins.is_alive())

    @property
    def leases(self) -> int:
        return len(self._blocks)

    @property
    def pinned_bytes(self) -> int:
        """Arena that the leases pin, each copy counted once."""
        return self._ledger.pinned_bytes

    # -- leases ---------------------------------------------------------------------------------

    def grant(self, block: Block) -> Grant:
        """Note ``block`` as this connection's lease. Over the limit it is released and ``TierFullError``
        or ``LeaseError`` raised."""
        copy = block.leased_copy
        assert isinstance(copy, Copy), "the service's own store"
        extent, tier = copy.extent, block.tier
        slot = -1 if self._publisher is None or self.pins is None else self._publisher.slot_of(copy)
        if slot >= 0:
            assert self.pins is not None, "who has a slot has a table"
            if not self.pins.may_give(slot, extent.nbytes):
                block.release()
                raise self._over_quota(self.pins.given_bytes)
            self.pins.pin(slot, extent.nbytes)
            block.release()
            return _grant(0, slot, copy, tier, complete=True)
        try:
            fresh = 0 if self._ledger.count(extent.offset) else extent.nbytes
            if self._blocks and self.pinned_bytes + fresh > self._quota.pinned_bytes:
                raise self._over_quota(self.pinned_bytes)
            number = self._ledger.take(extent.offset, extent.nbytes)
        except BaseException:
            block.release()
            raise
        self._blocks[number] = block
        return _grant(number, -1, copy, tier, complete=block.complete)

    def _over_quota(self, leased_bytes: int) -> TierFullError:
        return TierFullError(
            f"this client leases {format_size(leased_bytes)} and may lease {format_size(self._quota.pinned_bytes)}; "
            "release blocks sooner, or start the service with a larger pinned_bytes_per_client_max"
        )

    def block(self, number: int) -> Block:
        """Raises ``ProtocolError`` for a lease that is none of this connection."""
        block = self._blocks.get(number)
        if block is None:
            raise ProtocolError(f"lease {number} is none of this connection")
        return block

    def release(self, number: int) -> None:
        """Raises ``ProtocolError`` for a lease that is none of this connection."""
        block = self._blocks.pop(number, None)
        if block is None:
            raise ProtocolError(f"lease {number} is none of this connection")
        self._ledger.release(number)
        block.release()

    def revoke(self, grant: Grant) -> None:
        """Take back a grant that the client never learned of."""
        if grant.lease:
            self.release(grant.lease)
        elif self.pins is not None:
            self.pins.unpin(grant.slot)

    # -- reservations ---------------------------------------------------------------------------

    async def admit_reservation(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more fit this connection's share; they count as reserved from then on.

        One reservation is always allowed. Raises ``TierFullError`` after ``reserve_wait_s``.
        """
        if not self._waiting and self._fits(nbytes):
            self.reserved_bytes += nbytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, turn))
        try:
            async with asyncio.timeout(self._quota.reserve_wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # admitted in the very turn in which the wait ended
                self.reserved_bytes -= nbytes
            elif (nbytes, turn) in self._waiting:
                self._waiting.remove((nbytes, turn))
            self._admit()
            if isinstance(error, TimeoutError):
                raise TierFullError(
                    f"this client has reserved {format_size(self.reserved_bytes)} and may reserve "
                    f"{format_size(self._quota.reserved_bytes)}; seal reservations sooner, or start the service with "
                    "a larger reserved_bytes_per_client_max"
                ) from None
            raise

    def _fits(self, nbytes: int) -> bool:
        return not self.reserved_bytes or self.reserved_bytes + nbytes <= self._quota.reserved_bytes

    def _admit(self) -> None:
        """First come, first served."""
        while self._waiting and self._fits(self._waiting[0][0]):
            nbytes, turn = self._waiting.popleft()
            self.reserved_bytes += nbytes
            if turn.done():  # its waiter was cancelled in this turn
                self.reserved_bytes -= nbytes
            else:
                turn.set_result(None)

    def dismiss_reservation(self, nbytes: int) -> None:
        """What ``admit_reservation`` counted is not reserved any more."""
        self.reserved_bytes -= nbytes
        self._admit()

    def add_reservation(
        self, draft: Draft, extent: Extent, known: BlockId | None, on_end: Callable[[], None]
    ) -> Reservation:
        """A reservation whose bytes were admitted before."""
        self._numbers += 1
        made = self._reservations[self._numbers] = Reservation(self._numbers, draft, extent, known, on_end)
        if self._publisher is not None and self.pins is not None:
            made.slot = self._publisher.begin_filling(self.pins, extent)
        return made

    def take_reservation(self, number: int) -> Reservation:
        """It is the caller's now, who calls ``end_reservation``. Raises ``ProtocolError`` for one that is none."""
        reservation = self._reservations.pop(number, None)
        if reservation is None:
            raise ProtocolError(f"reservation {number} is none of this connection")
        return reservation

    def drop_reservation(self, number: int) -> None:
        """Free it unused. Raises ``ProtocolError`` for one that is none of this connection."""
        self.end_reservation(self.take_reservation(number), sealed=False)

    def filled(self, reservation: Reservation) -> None:
        """The client writes no more. Repeated calls do nothing."""
        if reservation.slot >= 0:
            assert self._publisher is not None, "who has a slot has a directory"
            assert self.pins is not None, "who has a slot has a table"
            self._publisher.end_filling(self.pins, reservation.slot)
            reservation.slot = -1

    def end_reservation(self, reservation: Reservation, *, sealed: bool) -> None:
        """``sealed``: the extent is the catalog's now; else it is free again."""
        self.filled(reservation)
        if not sealed:
            self._parts.context.shm.free(reservation.extent)
            self._parts.context.room.freed()
        self.dismiss_reservation(reservation.draft.record_bytes)
        reservation.on_end()

    def _leave_behind(self, reservation: Reservation) -> None:
        """Its slot stays FILLING, pinned by the client, and its extent allocated: the next owner fences it."""
        self.dismiss_reservation(reservation.draft.record_bytes)
        reservation.on_end()

    # -- streams --------------------------------------------------------------------------------

    def add_stream(self, stream: BlockStream) -> int:
        """Raises ``ThrottledError`` at the limit."""
        if len(self._streams) >= self._quota.streams:
            raise ThrottledError(f"this client has {len(self._streams)} streams open, the most it may; close some")
        self._numbers += 1
        self._streams[self._numbers] = stream
        return self._numbers

    def stream(self, number: int) -> BlockStream:
        """Raises ``ProtocolError`` for one that is none of this connection."""
        stream = self._streams.get(number)
        if stream is None:
            raise ProtocolError(f"stream {number} is none of this connection")
        return stream

    def take_stream(self, number: int) -> BlockStream:
        """It is the caller's to close. Raises as ``stream``."""
        stream = self.stream(number)
        del self._streams[number]
        return stream

    # -- the end --------------------------------------------------------------------------------

    async def close_streams(self) -> None:
        while self._streams:
            _, stream = self._streams.popitem()
            await stream.aclose()

    def give_back(self, *, pins: bool = True) -> None:
        """Release every lease, free every reservation, void every pin. Repeated calls do nothing.

        Without ``pins`` those stay, for the service that comes after this one: the client may live on, read what it
        has pinned, and write into what it was lent to fill. So those extents are not free, here or for the next.
        """
        for number in list(self._blocks):
            self.release(number)
        for number in list(self._reservations):
            if pins:
                self.drop_reservation(number)
            else:
                self._leave_behind(self.take_reservation(number))
        table, self.pins = self.pins, None
        if table is not None and self._publisher is not None and pins:
            self._publisher.close_client(table)


def _grant(lease: int, slot: int, copy: Copy, tier: Tier, *, complete: bool) -> Grant:
    return Grant(
        lease,
        slot,
        copy.block_id,
        copy.extent.offset,
        copy.header_bytes,
        copy.key_bytes,
        copy.value_offset,
        copy.value_bytes,
        copy.meta,
        tier,
        complete,
    )
