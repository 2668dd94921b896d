"""Which parts of the arena are free: a best-fit extent allocator without memory of its own.

It hands out offsets, never touches bytes, and knows nothing of blocks, tiers or mappings. Best fit
with immediate coalescing because blocks of 64 KiB and 80 MiB share one arena: first fit would nibble
at the large holes that the large blocks need.

Invariants: offsets and sizes are multiples of the granule; free extents neither overlap nor touch
(touching ones are one extent); every byte of every region is in exactly one free or one allocated
extent. Cost: O(log n) in the number of free extents, memory proportional to the number of extents.
The same calls give the same offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sortedcontainers import SortedList

from cascade_aio.abc.storage import PAGE_BYTES

_OFFSET_BITS = 44
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1
ARENA_GRANULES_MAX = 1 << _OFFSET_BITS
"""Offsets, counted in granules, share one integer with the size (64 PiB at 4 KiB granules)."""


class Extent(NamedTuple):
    """One extent of the arena: ``offset`` and ``nbytes`` in bytes."""

    offset: int
    nbytes: int
    allocated: bool


class ExtentAllocator:
    """Allocates byte ranges from the regions it was given. Not thread-safe; nothing here blocks."""

    def __init__(self, granule_bytes: int = PAGE_BYTES) -> None:
        assert granule_bytes.bit_count() == 1, "the granule is a power of two"
        self._granule_bytes = granule_bytes
        self._shift = granule_bytes.bit_length() - 1
        # All sizes and offsets below are in granules. A free extent is known by size and place, by
        # its start and by its end: best fit needs the first, coalescing the other two.
        self._by_size: SortedList[int] = SortedList()
        self._free_size_at: dict[int, int] = {}
        self._free_start_before: dict[int, int] = {}
        self._allocated_size_at: dict[int, int] = {}
        self._region_size_at: dict[int, int] = {}
        self._capacity = 0
        self._free = 0

    def add_region(self, offset: int, nbytes: int) -> None:
        """Make ``[offset, offset + nbytes)`` available. Regions must not overlap; adjacent ones join."""
        assert nbytes > 0, "a region has at least one granule"
        assert not (offset | nbytes) & (self._granule_bytes - 1), "regions are whole granules"
        start, size = offset >> self._shift, nbytes >> self._shift
        assert 0 <= start <= ARENA_GRANULES_MAX - size, "beyond the largest arena"
        for known, known_size in self._region_size_at.items():
            assert start + size <= known or known + known_size <= start, f"region at {offset} overlaps another"
        self._note_region(start, size)
        self._capacity += size
        self._free += size
        self._insert_coalesced(start, size)

    def take_over(self, nbytes: int, extents: Iterable[tuple[int, int]]) -> None:
        """Start with one region ``[0, nbytes)`` of which ``extents`` are in use: what a former owner left there.

        ``extents`` are (offset, bytes), ascending, whole granules, apart from each other. Only for an allocator
        without regions; O(n log n).
        """
        assert not self._capacity, "the first region"
        assert nbytes > 0, "a region has at least one granule"
        self._note_region(0, nbytes >> self._shift)
        self._capacity = nbytes >> self._shift
        end = 0
        for offset, length in extents:
            start, size = offset >> self._shift, length >> self._shift
            assert not (offset | length) & (self._granule_bytes - 1), "extents are whole granules"
            assert end <= start, f"extent at {offset} overlaps the one before it"
            self._give(end, start - end)
            self._allocated_size_at[start] = size
            end = start + size
        assert end <= self._capacity, "the last extent ends outside"
        self._give(end, self._capacity - end)

    def _give(self, start: int, size: int) -> None:
        if size:
            self._free += size
            self._insert_coalesced(start, size)

    def allocate(self, nbytes: int) -> int | None:
        """Offset of an extent of at least ``nbytes``, or ``None`` if no free extent is large enough.

        The smallest free extent that fits is used, the lowest among equals.
        """
        assert nbytes > 0, "an extent has at least one byte"
        size = (nbytes + self._granule_bytes - 1) >> self._shift
        by_size = self._by_size
        position = by_size.bisect_left(size << _OFFSET_BITS)
        if position == len(by_size):
            return None
        entry: int = by_size.pop(position)
        start, found = entry & _OFFSET_MASK, entry >> _OFFSET_BITS
        del self._free_size_at[start]
        rest = found - size
        if rest:
            self._free_size_at[start + size] = rest
            self._free_start_before[start + found] = start + size
            by_size.add(rest << _OFFSET_BITS | start + size)
        else:
            del self._free_start_before[start + found]
        self._allocated_size_at[start] = size
        self._free -= size
        return start << self._shift

    def free(self, offset: int) -> int:
        """Give back the extent at ``offset``; returns its bytes. Unknown offsets are assertions."""
        start = offset >> self._shift
        size = self._allocated_size_at.pop(start, 0) if start << self._shift == offset else 0
        assert size, f"no extent is allocated at offset {offset}"
        self._free += size
        self._insert_coalesced(start, size)
        return size << self._shift

    def nbytes_at(self, offset: int) -> int:
        """Bytes of the extent allocated at ``offset`` (rounded up to the granule)."""
        size = self._allocated_size_at.get(offset >> self._shift, 0)
        assert size, f"no extent is allocated at offset {offset}"
        return size << self._shift

    @property
    def granule_bytes(self) -> int:
        return self._granule_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._capacity << self._shift

    @property
    def free_bytes(self) -> int:
        return self._free << self._shift

    @property
    def allocated_bytes(self) -> int:
        return (self._capacity - self._free) << self._shift

    @property
    def largest_free_bytes(self) -> int:
        """The largest request that ``allocate`` can satisfy now."""
        return (self._by_size[-1] >> _OFFSET_BITS) << self._shift if self._by_size else 0

    @property
    def extents(self) -> int:
        """How many extents there are, free and allocated: memory held is proportional to it."""
        return len(self._free_size_at) + len(self._allocated_size_at)

    @property
    def fragmentation(self) -> float:
        """``1 - largest_free_bytes / free_bytes``: 0.0 when the free space is one extent (or none)."""
        return 1.0 - self.largest_free_bytes / self.free_bytes if self._free else 0.0

    def iter_extents(self) -> Iterator[Extent]:
        """All extents by offset; a snapshot (O(n log n)), for tests, statistics and recovery."""
        shift = self._shift
        found = [Extent(start << shift, size << shift, False) for start, size in self._free_size_at.items()]
        found += [Extent(start << shift, size << shift, True) for start, size in self._allocated_size_at.items()]
        return iter(sorted(found))

    def _insert_coalesced(self, start: int, size: int) -> None:
        end = start + size
        before = self._free_start_before.pop(start, None)
        if before is not None:
            self._by_size.remove((start - before) << _OFFSET_BITS | before)
            start = before
        after_size = self._free_size_at.pop(end, None)
        if after_size is not None:
            self._by_size.remove(after_size << _OFFSET_BITS | end)
            end += after_size
        self._free_size_at[start] = end - start
        self._free_start_before[end] = start
        self._by_size.add((end - start) << _OFFSET_BITS | start)

    def _note_region(self, start: int, size: int) -> None:
        # Regions are joined so that an arena prefaulted in thousands of steps is checked against few.
        after = self._region_size_at.pop(start + size, 0)
        for known, known_size in self._region_size_at.items():
            if known + known_size == start:
                self._region_size_at[known] = known_size + size + after
                return
        self._region_size_at[start] = size + after
