"""The bytes: incompressible blocks from a seed, in one aligned piece of memory.

A ``Pool`` is one anonymous mapping of ``count`` blocks one after the other, so that the raw limits can
write the very same bytes as one stream, straight from page-aligned memory. A block is key then value,
half each. ``stamp`` makes every block of the pool new content without generating it anew: it writes a
number into the first bytes of each key. Memory belongs to the pool until ``close``.
"""

from __future__ import annotations

import mmap
import pathlib
import struct
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STAMP = struct.Struct("<QQQ")
"""Seed, round and block index at the head of each key: 24 bytes of 64 KiB or more."""


class Pool:
    """``count`` blocks of ``block_bytes`` (a multiple of 2 pages), filled from ``seed``, or with the first
    bytes of the file ``content`` (``EOFError`` if it is too short)."""

    def __init__(self, block_bytes: int, count: int, seed: int, content: pathlib.Path | None = None) -> None:
        assert count > 0
        assert block_bytes % (2 * mmap.PAGESIZE) == 0, block_bytes
        self.block_bytes = block_bytes
        self.count = count
        self.seed = seed
        self._map = mmap.mmap(-1, block_bytes * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        if content is not None:
            self._load(content)
            return
        words = np.frombuffer(self.view, dtype=np.uint64)
        random = np.random.default_rng(seed)
        step = 1 << 20
        for start in range(0, len(words), step):
            part = words[start : start + step]
            part[:] = random.integers(0, 1 << 64, size=len(part), dtype=np.uint64)
        del words

    def _load(self, content: pathlib.Path) -> None:
        rest = self.view
        with content.open("rb", buffering=0) as file:
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise EOFError(f"{content.name} is {len(rest)} bytes too short for {self.count} blocks")
                rest = rest[count:]

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.count

    def parts(self, index: int) -> tuple[memoryview, memoryview]:
        """Key and value of block ``index``: views, no copy."""
        start = index * self.block_bytes
        middle = start + self.block_bytes // 2
        return self.view[start:middle], self.view[middle : start + self.block_bytes]

    def stamp(self, round_number: int) -> None:
        """Make all blocks content of round ``round_number``; the same number gives the same bytes again."""
        for index in range(self.count):
            _STAMP.pack_into(self.view, index * self.block_bytes, self.seed, round_number, index)

    def equals(self, index: int, key: Buffer, value: Buffer) -> bool:
        """Whether ``key`` and ``value`` are, byte for byte, block ``index`` as it is stamped now."""
        mine = self.parts(index)
        return all(
            np.array_equal(np.frombuffer(found, np.uint8), np.frombuffer(expected, np.uint8))
            for found, expected in zip((key, value), mine, strict=True)
        )

    def close(self) -> None:
        """Give the memory back at once, even if a view of it survives somewhere; such a view reads zeros."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self.view.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def scratch_memory(nbytes: int) -> memoryview:
    """Page-aligned, zeroed, really touched memory that lives as long as views of it do."""
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(mapped)
    np.frombuffer(view, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
    np.frombuffer(view, dtype=np.uint8)[:: mmap.PAGESIZE] = 0
    return view
