"""Which blocks have a copy on one device: the GPU tier's half of the catalog.

What it is: copies by row, the eviction policy of the device's arena, and the *fences* that keep a copy in its place
while kernels that its reader enqueued may still look at it. A row exists for the arena of the node and the disk alone:
a copy on a device is never the only one, and goes with its row.

Life of a copy (``core.lifecycle``): *filling* until every piece of it is enqueued, *sealed* from then on. What reads it
is ordered behind the pieces' events, so a sealed copy may be leased before its bytes have arrived. The upload holds the
copy until the host has seen its end. Synchronous, one event loop.
"""

from __future__ import annotations

import asyncio
import collections
import warnings
from collections.abc import Callable
from copy import copy as copied

from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.core.index import BlockIndex
from cascade_aio.core.lifecycle import CopyEvent, CopyState, advance
from cascade_aio.errors import BrokenTierError, ConfigError
from cascade_aio.model import BlockId
from cascade_aio.store.catalog import Copy
from cascade_aio.store.room import ArenaRoom
from cascade_aio.tiers.gpu.lanes import Ticket
from cascade_aio.tiers.gpu.tier import DeviceExtent, GpuTier

FENCES_ASKED = 2
"""Fences that are asked at each new one, so that there are few: a microsecond each."""

FENCE_POLL_S = 0.001
"""While somebody waits for room, fences are asked this often."""

_PASSED_OVER_MAX = 16
"""Offers of the policy that ``evict_one`` passes over."""


class DeviceCopy:
    """A copy of a block's payload on a device. ``holds`` counts those who need its bytes to stay."""

    __slots__ = (
        "_failure", "_waiters", "block_id", "chunk_crcs", "digest", "extent", "header_bytes", "holds", "host_mark",
        "key_bytes", "leases", "meta", "payload_bytes", "pieces", "row", "state", "used", "value_bytes",
        "value_offset",
    )  # fmt: skip

    def __init__(self, extent: DeviceExtent, host: Copy) -> None:
        self.extent = extent
        self.block_id: BlockId = host.block_id
        self.digest = host.digest
        self.key_bytes = host.key_bytes
        self.value_bytes = host.value_bytes
        self.value_offset = host.value_offset
        self.payload_bytes = host.value_offset + host.value_bytes
        self.header_bytes = host.header_bytes
        self.chunk_crcs = host.chunk_crcs
        self.meta = host.meta
        self.row = -1
        self.holds = 0
        self.leases = 0
        self.state = CopyState.FILLING
        self.used = 0
        self.host_mark = 0
        """``Catalog.uses`` of the node's arena at the last use."""
        self.pieces: list[tuple[int, int, Ticket | None]] = []
        """(first byte, end, ticket) of what is enqueued, in order; no ticket: it is there. Empty again once all is."""
        self._failure: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def sealed(self) -> bool:
        """Every piece is enqueued; also of a copy that was dropped and is still leased."""
        return self.state is not CopyState.FILLING

    @property
    def landed(self) -> bool:
        """Every byte is there, as the host has seen."""
        return self.sealed and not self.pieces

    def has(self, start: int, stop: int) -> bool:
        """Whether the payload's bytes ``start`` up to ``stop`` are enqueued."""
        if self.state is not CopyState.FILLING or start >= stop:
            return True
        covered = sum(
            min(end, stop) - max(first, start) for first, end, _ in self.pieces if first < stop and start < end
        )
        return covered == stop - start

    def last_ticket(self, start: int, stop: int) -> Ticket | None:
        """Of the pieces with these bytes, the one that ends last; ``None``: all are there. Pieces end in order."""
        for first, end, ticket in reversed(self.pieces):
            if first < stop and start < end and ticket is not None and not ticket.finished:
                return ticket
        return None

    def enqueued(self, start: int, stop: int, ticket: Ticket | None) -> None:
        self.pieces.append((start, stop, ticket))
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No more of it will come: whoever waits for what is not enqueued gets ``error``."""
        self._failure = error
        self._wake()

    async def wait(self, start: int, stop: int) -> None:
        """Return once these bytes are enqueued. Raises what the promotion failed with. May be cancelled."""
        while not self.has(start, stop):
            if self._failure is not None:
                raise copied(self._failure)  # each its own: a traceback keeps the frames of whoever it passed
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class DeviceCatalog:
    """Resident copies of one device and their eviction policy, kept in step."""

    def __init__(self, tier: GpuTier, index: BlockIndex, policy: EvictionPolicy, explain: Callable[[], str]) -> None:
        self.tier = tier
        self.copies: dict[int, DeviceCopy] = {}
        self.hot: dict[bytes, DeviceCopy] = {}
        self.demote: Callable[[DeviceCopy], bool] = lambda copy: False
        """Asked before a copy is evicted: ``True``: it is being copied to the node's arena, and held meanwhile."""
        self.on_room: Callable[[], None] = lambda: None
        self.uses = 0
        self.copy_bytes = 0
        self.pinned_bytes = 0
        self.evicted_blocks = 0
        self.evicted_bytes = 0
        self.fences_refused = 0
        self._index = index
        self._policy = policy
        self._fences: collections.deque[tuple[int, DeviceCopy]] = collections.deque()
        self._polling: asyncio.TimerHandle | None = None
        self.room: ArenaRoom[DeviceExtent] = ArenaRoom(
            tier, self, self._relieve, explain, place=f"the arena of device {tier.driver.ordinal}", setting="gpu_bytes"
        )
        tier.on_broken = self._on_broken

    # -- copies -----------------------------------------------------------------------------------

    def admit(self, copy: DeviceCopy, row: int) -> None:
        """Every piece of ``copy`` is enqueued: it is the resident copy of ``row`` from now on."""
        assert row not in self.copies, row
        copy.state = advance(copy.state, CopyEvent.SEAL)
        copy.row = row
        self.copies[row] = copy
        self.hot[copy.block_id] = copy
        self.note_use(copy)
        self.copy_bytes += copy.extent.nbytes
        index = self._index
        self._policy.admit(row, parent=index.parent_row(row), nbytes=copy.extent.nbytes, identity=index.identity(row))
        if copy.holds:
            self._policy.pin(row)
            self.pinned_bytes += copy.extent.nbytes
        else:
            self.on_room()

    def hold(self, copy: DeviceCopy) -> None:
        copy.holds += 1
        if copy.holds == 1 and copy.row >= 0:
            self._policy.pin(copy.row)
            self.pinned_bytes += copy.extent.nbytes

    def release(self, copy: DeviceCopy) -> None:
        copy.holds -= 1
        if copy.holds:
            return
        if copy.row >= 0:
            self._policy.unpin(copy.row)
            self.pinned_bytes -= copy.extent.nbytes
        else:
            self._free(copy)
        self.on_room()

    def note_use(self, copy: DeviceCopy) -> None:
        self.uses += 1
        copy.used = self.uses

    def touch(self, copy: DeviceCopy, host_mark: int) -> None:
        """It was used, when the node's arena counted ``host_mark`` uses."""
        self.note_use(copy)
        copy.host_mark = host_mark
        if copy.row >= 0:
            self._policy.touch(copy.row)

    def evict_one(self, *, unused_since: int | None = None) -> bool:
        """Drop the coldest copy that nobody holds; with ``unused_since``, the coldest not used after it."""
        passed_over: list[int] = []
        try:
            while (row := self._policy.victim()) is not None:
                copy = self.copies[row]
                if unused_since is not None and copy.used > unused_since:
                    if len(passed_over) == _PASSED_OVER_MAX:
                        return False
                    self._policy.pin(row)
                    passed_over.append(row)
                elif not self.demote(copy):
                    self.evict(copy)
                    return True
            return False
        finally:
            for row in passed_over:
                self._policy.unpin(row)

    def evict(self, copy: DeviceCopy) -> None:
        """Drop this very copy, which nobody holds."""
        assert copy.holds == 0, copy.row
        self.evicted_blocks += 1
        self.evicted_bytes += copy.extent.nbytes
        self._detach(copy, CopyEvent.EVICT)

    def drop(self, row: int) -> None:
        """The block is gone from the store: no new leases; its memory stays while somebody holds it."""
        copy = self.copies.get(row)
        if copy is not None:
            self._detach(copy, CopyEvent.LOSE)

    def _detach(self, copy: DeviceCopy, event: CopyEvent) -> None:
        row, copy.row = copy.row, -1
        copy.state = advance(copy.state, event)
        del self.copies[row]
        del self.hot[copy.block_id]
        self.copy_bytes -= copy.extent.nbytes
        if copy.holds:
            self._policy.unpin(row)
            self.pinned_bytes -= copy.extent.nbytes
        self._policy.remove(row)
        if not copy.holds:
            self._free(copy)
            self.on_room()

    def _free(self, copy: DeviceCopy) -> None:
        copy.state = advance(copy.state, CopyEvent.ABORT if copy.state is CopyState.FILLING else CopyEvent.EVICTED)
        self.tier.free(copy.extent)

    # -- fences -----------------------------------------------------------------------------------

    def fence(self, copy: DeviceCopy, stream: int) -> None:
        """Hold ``copy`` until all that ``stream`` has now is done."""
        if self.tier.broken is not None:
            return
        for _ in range(FENCES_ASKED):
            if not self._pass_first():
                break
        try:
            event = self.tier.fence(stream)
        except (BrokenTierError, ConfigError) as error:
            if self.tier.broken is None:
                self.fences_refused += 1
                warnings.warn(
                    f"the stream {stream:#x} of a device lease cannot be waited for ({error}): destroy streams after "
                    "the leases that were taken for them",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        self.hold(copy)
        self._fences.append((event, copy))

    def ask_fences(self) -> None:
        """Let go of what fences held that have been passed."""
        for _ in range(len(self._fences)):
            if not self._pass_first():
                self._fences.rotate(-1)  # another stream's may be further

    @property
    def fences(self) -> int:
        return len(self._fences)

    def _pass_first(self) -> bool:
        if not self._fences:
            return False
        event, copy = self._fences.popleft()  # first: asking a device that is lost settles all the others
        if not self.tier.passed(event):
            self._fences.appendleft((event, copy))
            return False
        self.release(copy)
        return True

    def _relieve(self) -> None:
        """Only held copies are left, and somebody waits."""
        self.ask_fences()
        if self._fences and self._polling is None:
            self._polling = asyncio.get_running_loop().call_later(FENCE_POLL_S, self._poll)

    def _poll(self) -> None:
        self._polling = None
        self.ask_fences()
        self.on_room()  # whoever still waits relieves again

    # -- the end ----------------------------------------------------------------------------------

    def _on_broken(self) -> None:
        """The device is lost: nobody finds a copy on it any more."""
        assert self.tier.broken is not None
        for row in list(self.copies):
            self.drop(row)
        self.ask_fences()
        self.room.close(BrokenTierError(str(self.tier.broken)))

    async def settle(self) -> None:
        """Return when no fence is left. Cancelled, it stops waiting."""
        while self._fences:
            self.ask_fences()
            await asyncio.sleep(FENCE_POLL_S)

    def close(self) -> None:
        """Forget the copies that nobody holds."""
        if self._polling is not None:
            self._polling.cancel()
        for copy in list(self.copies.values()):
            if not copy.holds:
                self._detach(copy, CopyEvent.LOSE)

    def statistics(self) -> dict[str, object]:
        return {
            **self.tier.statistics(),
            "blocks": len(self.copies),
            "copy_bytes": self.copy_bytes,
            "pinned_bytes": self.pinned_bytes,
            "evicted_blocks": self.evicted_blocks,
            "evicted_bytes": self.evicted_bytes,
            "waits_for_room": self.room.waited,
            "fences": len(self._fences),
            "fences_refused": self.fences_refused,
        }
