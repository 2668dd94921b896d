"""The shm tier's memory: extents of any size in the arena, handed out once their pages are there.

What it is: the pure ``ExtentAllocator`` joined to real memory. First touch of a page costs 10 to 40
times a warm write, so worker threads populate the arena piece by piece in the background, and an
extent is never handed out before its pages exist. Who may stay in the tier is not decided here
(``store.room``), nor what the bytes mean (``segments.format``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cascade_aio.abc.storage import PAGE_BYTES, ByteEngine, Storage
from cascade_aio.core.extents import ExtentAllocator
from cascade_aio.tiers.arena import Arena

_FIRST_PIECE_BYTES = 16 << 20
"""The first pieces are small, so that the first puts start early."""

_PIECE_BYTES_MAX = 128 << 20
"""Pieces double up to this size; each occupies one byte worker for about 0.2 s when cold."""


@dataclasses.dataclass(slots=True, eq=False)
class Extent:
    """One allocation: ``memory`` is writable, page-aligned, and exclusively its holder's until freed."""

    offset: int
    memory: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.memory)


class ShmTier:
    """Extents in an arena. Synchronous besides ``prefault``; owned by one event loop."""

    def __init__(self, arena: Arena, engine: ByteEngine, storage: Storage, *, register: bool) -> None:
        self._arena = arena
        self._engine = engine
        self._storage = storage
        self._register = register
        self._allocator = ExtentAllocator(granule_bytes=PAGE_BYTES)
        self.capacity_bytes = len(arena.memory)
        self._taken_over = False
        self.huge_bytes = 0
        """How much of what is ready lies in huge pages: direct I/O is twice as fast there."""

    @property
    def memory(self) -> memoryview:
        """All of the arena, for who registers it."""
        return self._arena.memory

    @property
    def ready_bytes(self) -> int:
        """How much of the arena has been populated and can be allocated."""
        return self._allocator.capacity_bytes

    @property
    def allocated_bytes(self) -> int:
        return self._allocator.allocated_bytes

    @property
    def largest_free_bytes(self) -> int:
        return self._allocator.largest_free_bytes

    def take_over(self, extents: Sequence[tuple[int, int]]) -> list[Extent]:
        """Start with what a former owner left: all pages are there, these (offset, bytes) are in use.

        They ascend and do not overlap. Returns them as extents, in the same order. Before ``prefault``.
        """
        self._allocator.take_over(self.capacity_bytes, extents)
        self._taken_over = True
        memory = self._arena.memory
        return [Extent(offset, memory[offset : offset + nbytes]) for offset, nbytes in extents]

    async def prefault(self, on_room: Callable[[], None]) -> None:
        """Populate the whole arena in worker threads, calling ``on_room`` as room appears.

        One that was taken over is only mapped in, and can be used meanwhile.

        Then announces it to the I/O engine for registered buffers. Cancellation stops between
        pieces; what is populated stays usable.
        """
        start = 0
        piece_bytes = _FIRST_PIECE_BYTES
        memory = self._arena.memory
        while start < self.capacity_bytes:
            nbytes = min(piece_bytes, self.capacity_bytes - start)
            self.huge_bytes += await self._engine.prefault(memory[start : start + nbytes])
            if not self._taken_over:
                self._allocator.add_region(start, nbytes)
                on_room()
            start += nbytes
            piece_bytes = min(2 * piece_bytes, _PIECE_BYTES_MAX)
        if self._register:
            await self._storage.register_memory(memory)

    def allocate(self, nbytes: int) -> Extent | None:
        """An extent of exactly ``nbytes`` (a multiple of PAGE_BYTES), or ``None`` without room for it."""
        assert nbytes % PAGE_BYTES == 0, nbytes
        offset = self._allocator.allocate(nbytes)
        if offset is None:
            return None
        return Extent(offset, self._arena.memory[offset : offset + nbytes])

    def free(self, extent: Extent) -> None:
        """Take the extent back. Nobody may read or write it any more."""
        self._allocator.free(extent.offset)
        extent.memory = memoryview(b"")

    def statistics(self) -> dict[str, object]:
        allocator = self._allocator
        return {
            "arena": self._arena.description,
            "capacity_bytes": self.capacity_bytes,
            "ready_bytes": allocator.capacity_bytes,
            "huge_page_bytes": self.huge_bytes,
            "allocated_bytes": allocator.allocated_bytes,
            "free_bytes": allocator.free_bytes,
            "largest_free_bytes": allocator.largest_free_bytes,
            "fragmentation": allocator.fragmentation,
        }

    def close(self) -> None:
        self._arena.close()
