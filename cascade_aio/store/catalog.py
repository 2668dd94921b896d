"""What the store knows: the index of all blocks, and which of them have a copy in the arena.

Synchronous and owned by the event loop: every method is a step from one consistent state to
another, without I/O. Invariants:

* a row of the index exists exactly while the block has at least one copy (arena or disk);
* a copy is pinned in the eviction policy exactly while somebody holds it (a lease, the segment
  writer until it is durable, a relocation);
* an extent goes back to the allocator when its copy has left the catalog *and* nobody holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.core.index import BlockIndex
from cascade_aio.core.lifecycle import CopyEvent, CopyState, advance
from cascade_aio.errors import DigestConflictError
from cascade_aio.model import BLOCK_ID_BYTES, BlockId
from cascade_aio.segments.arrival import Arrival
from cascade_aio.segments.facts import Location
from cascade_aio.segments.format import payload_bytes_of
from cascade_aio.segments.table import SegmentTable
from cascade_aio.store.naming import NameKeeper
from cascade_aio.tiers.shm import Extent, ShmTier

_PASSED_OVER_MAX = 16
"""Offers of the policy that ``Catalog.evict_one`` passes over: tens of microseconds."""


class Copy:
    """A sealed copy of a block in the arena. ``holds`` counts those who need its bytes to stay."""

    __slots__ = (
        "arrival",
        "block_id",
        "chunk_crcs",
        "described",
        "digest",
        "extent",
        "fetched",
        "header_bytes",
        "holds",
        "key_bytes",
        "leases",
        "loading",
        "meta",
        "rewarmed",
        "row",
        "slot",
        "stamp",
        "state",
        "stranded",
        "used",
        "value_bytes",
        "value_offset",
    )

    def __init__(
        self,
        extent: Extent,
        *,
        header_bytes: int,
        digest: bytes,
        key_bytes: int,
        value_bytes: int,
        value_offset: int,
        chunk_crcs: tuple[int, ...],
        meta: bytes,
    ) -> None:
        self.extent = extent
        self.header_bytes = header_bytes
        self.digest = digest
        self.block_id = BlockId(digest[:BLOCK_ID_BYTES])
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes
        self.value_offset = value_offset
        self.chunk_crcs = chunk_crcs
        self.meta = meta
        self.row = -1
        self.holds = 0
        self.leases = 0
        self.stamp = 0
        """Stamp of the newest record that was queued from this copy."""
        self.stranded = False
        """The segment writer gave it up: held, because it is the only copy, until it is dropped."""
        self.state = CopyState.FILLING
        self.used = 0
        """``Catalog.uses`` at the last use: admission, get, end of a lease."""
        self.slot = -1
        """Where the arena's directory lists it; -1: nowhere."""
        self.described = False
        """Whether its header pages say what it is, as a record's do: so of what was read from disk."""
        self.rewarmed = False
        """It was in the arena when the store was opened."""
        self.fetched = False
        """It came from another rank's arena."""
        self.arrival: Arrival | None = None
        """What is there of a copy that is being read, or was not read to its end; ``None``: all of it."""
        self.loading: Callable[[], None] | None = None
        """While it is being read: called when nobody but the reading holds it any more."""

    def key_view(self) -> memoryview:
        """Read-only view of the key part."""
        start = self.header_bytes
        return self.extent.memory[start : start + self.key_bytes].toreadonly()

    def value_view(self) -> memoryview:
        """Read-only view of the value part."""
        start = self.header_bytes + self.value_offset
        return self.extent.memory[start : start + self.value_bytes].toreadonly()


class CopyPublisher(Protocol):
    """Who lists copies in the arena's directory, where other processes find and pin them. Never suspends.

    A copy that a client has pinned is held by the publisher until the client lets go.
    """

    def publish(self, copy: Copy) -> None:
        """It is resident from now on."""
        ...

    def withdraw(self, copy: Copy) -> bool:
        """It is to be evicted. ``False``: a client has it pinned; it is held now."""
        ...

    def retire(self, copy: Copy) -> None:
        """It is no longer to be had; held if a client has it pinned."""
        ...

    def awaken(self, copy: Copy) -> None:
        """It was dormant, and is resident from now on."""
        ...


class CopyWatcher(Protocol):
    """Who is told of readable copies and has no say: what shows them to other ranks. Never suspends."""

    def appeared(self, copy: Copy) -> None:
        """It is readable from now on."""
        ...

    def gone(self, copy: Copy) -> None:
        """It no longer is, whether or not it ever was; its memory may be another's right after."""
        ...


class Catalog:
    """Index, resident copies and the shm eviction policy, kept in step with each other."""

    def __init__(
        self,
        shm: ShmTier,
        segments: SegmentTable,
        shm_policy: EvictionPolicy,
        disk_policy: EvictionPolicy | None,
        *,
        blocks_max: int,
    ) -> None:
        self.index = BlockIndex(capacity_max=blocks_max)
        self.names = NameKeeper(self.index)
        self.shm = shm
        self.segments = segments
        self.shm_policy = shm_policy
        self.disk_policy = disk_policy
        self.copies: dict[int, Copy] = {}
        self.hot: dict[bytes, Copy] = {}
        self.dormant: dict[int, Copy] = {}
        """Copies that a former owner of the arena left, by row: not verified yet, so nobody may read them. They take
        room and may be evicted like others."""
        self.publisher: CopyPublisher | None = None
        self.watcher: CopyWatcher | None = None
        self.copy_bytes = 0
        self.pinned_bytes = 0
        self.evicted_blocks = 0
        self.evicted_bytes = 0
        self.uses = 0
        """Uses of copies so far: a clock without time. A copy with ``used <= mark`` was not used since ``mark``."""
        self.on_room: Callable[[], None] = lambda: None
        self.on_forget: Callable[[int], None] = lambda row: None

    def adopt_index(self, index: BlockIndex) -> None:
        """Start from a checkpoint's index instead of an empty one. Before anything else happened."""
        assert not self.copies, "the catalog is in use"
        assert not len(self.index), "the catalog is in use"
        self.index = self.names.index = index
        for number, stamp in index.newest_stamps().items():
            entry = self.segments.get(number)
            if entry is not None:
                entry.newest_stamp = stamp
        for row in index.rows_by_stamp():  # as if written in this order
            self._admit_on_disk(row)

    # -- rows ---------------------------------------------------------------------------------

    def row_of(self, digest: bytes, key_bytes: int, value_bytes: int) -> int:
        """The row of this very block, or -1. Raises ``DigestConflictError`` for a different block of the same id."""
        row = self.index.find(digest[:BLOCK_ID_BYTES])
        if row >= 0:
            lengths = self.index.lengths(row)
            if lengths != (key_bytes, value_bytes) or self.index.digest(row) != digest:
                raise DigestConflictError(
                    f"block {digest[:BLOCK_ID_BYTES].hex()} is stored with key and value of {lengths[0]} and "
                    f"{lengths[1]} bytes and digest {self.index.digest(row).hex()}, and was now given {key_bytes} "
                    f"and {value_bytes} bytes with digest {digest.hex()}: the same bytes split differently, or a "
                    "collision; put one of the two under another key/value split"
                )
        return row

    def drop_row(self, row: int) -> None:
        """Forget the block entirely; a held copy keeps its extent until it is released."""
        copy = self.copies.get(row) or self.dormant.get(row)
        if copy is not None:
            self._detach(copy, CopyEvent.LOSE)
        self._leave_disk(row)
        self._remove(row)

    def _remove(self, row: int) -> None:
        self.on_forget(row)
        contested = self.names.contested(row)
        self.index.remove(row)
        self.names.freed(contested)

    def _forget_if_gone(self, row: int) -> None:
        if not self.is_in_arena(row) and self.index.location(row) is None:
            self._remove(row)

    # -- arena copies -------------------------------------------------------------------------

    def is_in_arena(self, row: int) -> bool:
        """Whether the arena has the block's bytes, readable now or once they are verified."""
        return row in self.copies or row in self.dormant

    def admit(self, copy: Copy, row: int) -> None:
        """Seal ``copy`` as the resident copy of ``row``: readable from now on."""
        assert row not in self.copies, row
        if self.dormant and (stale := self.dormant.get(row)) is not None:
            self._detach(stale, CopyEvent.LOSE)  # the bytes came by another way, before anybody asked for these
        copy.row = row
        self._seal(copy)
        self._account_in_arena(copy)
        if self.publisher is not None:
            self.publisher.publish(copy)
        if self.watcher is not None:
            self.watcher.appeared(copy)

    def lay_by(self, copy: Copy, row: int) -> None:
        """``copy`` was found in the arena and is not verified: dormant from now on."""
        assert not self.is_in_arena(row), row
        copy.row = row
        self.dormant[row] = copy
        self._account_in_arena(copy)

    def awaken(self, copy: Copy) -> None:
        """A dormant copy has been verified: readable from now on."""
        del self.dormant[copy.row]
        copy.rewarmed = True
        self._seal(copy)
        self.shm_policy.touch(copy.row)
        if self.publisher is not None:
            self.publisher.awaken(copy)
        if self.watcher is not None:
            self.watcher.appeared(copy)

    def reject(self, copy: Copy) -> None:
        """A copy does not count (a dormant one: it is damaged); its row goes too if the block is nowhere else."""
        row = copy.row
        self._detach(copy, CopyEvent.LOSE)
        self._forget_if_gone(row)

    def _seal(self, copy: Copy) -> None:
        copy.state = advance(copy.state, CopyEvent.SEAL)
        self.note_use(copy)
        self.copies[copy.row] = copy
        self.hot[copy.block_id] = copy

    def _account_in_arena(self, copy: Copy) -> None:
        row = copy.row
        self.copy_bytes += copy.extent.nbytes
        index = self.index
        self.shm_policy.admit(
            row, parent=index.parent_row(row), nbytes=copy.extent.nbytes, identity=index.identity(row)
        )
        if copy.holds:
            self.shm_policy.pin(row)
            self.pinned_bytes += copy.extent.nbytes
        else:
            self.on_room()  # nobody needs it to stay: whoever waits for room may have its place

    def hold(self, copy: Copy) -> None:
        copy.holds += 1
        if copy.holds == 1 and copy.row >= 0:
            self.shm_policy.pin(copy.row)
            self.pinned_bytes += copy.extent.nbytes

    def release(self, copy: Copy) -> None:
        copy.holds -= 1
        if copy.holds:
            if copy.loading is not None:
                copy.loading()
            return
        if copy.row >= 0:
            self.shm_policy.unpin(copy.row)
            self.pinned_bytes -= copy.extent.nbytes
        else:
            self._free(copy)
        self.on_room()

    def evict_one(self, *, unused_since: int | None = None) -> bool:
        """Drop the coldest copy that nobody holds; with ``unused_since``, the coldest not used after it. False if
        there is none.

        A policy that ranks by more than age may offer what was just used while older copies wait behind it:
        those offers are passed over, the first ``_PASSED_OVER_MAX`` of them.
        """
        passed_over: list[int] = []
        try:
            while (row := self.shm_policy.victim()) is not None:
                copy = self.copies.get(row) or self.dormant[row]
                if unused_since is not None and copy.used > unused_since:
                    if len(passed_over) == _PASSED_OVER_MAX:
                        return False
                    self.shm_policy.pin(row)
                    passed_over.append(row)
                elif self.evict(copy):
                    return True
            return False
        finally:
            for row in passed_over:
                self.shm_policy.unpin(row)

    def evict(self, copy: Copy) -> bool:
        """Drop this very copy, which is in the arena and nobody holds: the policy is told, not asked.

        ``False`` if a client has it pinned: it is held now.
        """
        row = copy.row
        assert copy.holds == 0, row
        if copy.slot >= 0 and self.publisher is not None and not self.publisher.withdraw(copy):
            return False
        self.evicted_blocks += 1
        self.evicted_bytes += copy.extent.nbytes
        self._detach(copy, CopyEvent.EVICT)
        self._forget_if_gone(row)
        return True

    def note_use(self, copy: Copy) -> None:
        """Right now ``copy`` is the one used last."""
        self.uses += 1
        copy.used = self.uses

    def _detach(self, copy: Copy, event: CopyEvent) -> None:
        if copy.slot >= 0 and self.publisher is not None:
            self.publisher.retire(copy)
        if self.watcher is not None:
            self.watcher.gone(copy)
        row, copy.row = copy.row, -1
        if self.dormant.pop(row, None) is None:
            copy.state = advance(copy.state, event)
            del self.copies[row]
            del self.hot[copy.block_id]
        self.copy_bytes -= copy.extent.nbytes
        if copy.holds:
            self.shm_policy.unpin(row)
            self.pinned_bytes -= copy.extent.nbytes
        self.shm_policy.remove(row)
        if copy.stranded:
            copy.stranded = False
            copy.holds -= 1
        if not copy.holds:
            self._free(copy)
            self.on_room()

    def forget_copies(self) -> None:
        """The arena is closed: let go of its memory, but for copies that somebody still holds."""
        for copy in (*self.copies.values(), *self.dormant.values()):
            if not copy.holds:
                copy.extent.memory = memoryview(b"")
        self.copies.clear()
        self.dormant.clear()
        self.hot.clear()

    def _free(self, copy: Copy) -> None:
        copy.state = advance(copy.state, CopyEvent.ABORT if copy.state is CopyState.FILLING else CopyEvent.EVICTED)
        self.shm.free(copy.extent)

    # -- disk copies --------------------------------------------------------------------------

    def place(self, row: int, location: Location, stamp: int) -> None:
        """The newest durable record of ``row`` is there now; the one before it is dead."""
        before = self.index.location(row)
        if before is not None:
            self._account(row, before, -1)
        self.index.place(row, location.segment, location.page, location.header_pages, stamp)
        self._account(row, location, +1)
        entry = self.segments.get(location.segment)
        if entry is not None:
            entry.newest_stamp = max(entry.newest_stamp, stamp)
        self._admit_on_disk(row)

    def is_own(self, segment: int) -> bool:
        """Whether this store's writer, or one it has adopted, wrote the segment."""
        entry = self.segments.get(segment)
        return entry is not None and entry.own

    def note_stamp(self, row: int, stamp: int) -> None:
        """There is a record of ``row`` with this stamp elsewhere: what was deleted before it is there all the same."""
        location = self.index.location(row)
        assert location is not None, row
        self.index.place(row, *location, max(stamp, self.index.stamp(row)))

    def _admit_on_disk(self, row: int) -> None:
        """The disk budget is about own segments: dropping what others wrote gives no byte back."""
        policy, location = self.disk_policy, self.index.location(row)
        if policy is None or location is None:
            return
        entry = self.segments.get(location[0])
        own = entry is not None and entry.own
        if own and row not in policy:
            index, nbytes = self.index, self.record_bytes(row, location[2])
            policy.admit(row, parent=index.parent_row(row), nbytes=nbytes, identity=index.identity(row))
        elif not own and row in policy:
            policy.remove(row)

    def own_row(self, row: int) -> None:
        """The segment of its record has been adopted: it counts in the disk budget."""
        self._admit_on_disk(row)

    def record_bytes(self, row: int, header_pages: int) -> int:
        """What the block's record takes in an extent and in a segment."""
        return header_pages * PAGE_BYTES + payload_bytes_of(*self.index.lengths(row))

    def stored_bytes(self, row: int) -> int:
        """What the record of a block that is on disk, or dormant, takes."""
        dormant = self.dormant.get(row)
        if dormant is not None:
            return dormant.extent.nbytes
        location = self.index.location(row)
        assert location is not None, row
        return self.record_bytes(row, location[2])

    def _account(self, row: int, location: tuple[int, int, int], sign: int) -> None:
        """Keep the segment's live bytes."""
        entry = self.segments.get(location[0])
        if entry is not None:
            entry.live_bytes += sign * self.record_bytes(row, location[2])

    def newest_stamp(self, row: int) -> int:
        """Stamp of the newest record of ``row``, durable or queued; 0 for none."""
        copy = self.copies.get(row)
        return max(self.index.stamp(row), 0 if copy is None else copy.stamp)

    def unplace(self, row: int) -> None:
        """The disk copy is gone or not to be trusted; the row goes too if the arena has none."""
        self._leave_disk(row)
        self._forget_if_gone(row)

    def _leave_disk(self, row: int) -> None:
        location = self.index.location(row)
        if location is not None:
            self._account(row, location, -1)
            self.index.unplace(row)
            if self.disk_policy is not None and row in self.disk_policy:
                self.disk_policy.remove(row)

    def touch(self, row: int) -> None:
        """The block was used: both tiers' heat."""
        copy = self.copies.get(row)
        if copy is not None:
            self.note_use(copy)
            self.shm_policy.touch(row)
        if self.disk_policy is not None and row in self.disk_policy:
            self.disk_policy.touch(row)
