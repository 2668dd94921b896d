"""The bytes that are stored, and the comparison of every byte that comes back.

``Source`` is page-aligned memory with ``count`` blocks, loaded from a generated file or made from a seed. A *stamp*
makes all of them new content without making them anew (``bench.data``). Names follow from seed, stamp and index, so
that another process of the same run knows them too. Not thread-safe: nothing may be under way while it is stamped.
"""

from __future__ import annotations

import ctypes
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from bench.data import Pool

NAME_DIGITS = 32


class Source(Pool):
    """``count`` blocks of ``block_bytes``; with ``path``, its first bytes are their content."""

    def __init__(self, block_bytes: int, count: int, seed: int, path: pathlib.Path | None = None) -> None:
        super().__init__(block_bytes, count, seed, path)
        self.stamped = -1

    def stamp(self, round_number: int) -> None:
        super().stamp(round_number)
        self.stamped = round_number

    def block(self, index: int) -> memoryview:
        """Block ``index`` as it is stamped now."""
        return self.view[index * self.block_bytes : (index + 1) * self.block_bytes]

    def name(self, round_number: int, index: int) -> str:
        """The name of block ``index`` of round ``round_number``."""
        text = f"{self.seed}/{self.block_bytes}/{round_number}/{index}"
        return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]

    def matches(self, index: int, pieces: Sequence[memoryview | bytes]) -> bool:
        """Whether ``pieces``, one after the other, are block ``index`` as it is stamped now."""
        return same_bytes(self.block(index), pieces)


def same_bytes(expected: memoryview, pieces: Sequence[memoryview | bytes]) -> bool:
    """Whether ``pieces``, one after the other, are ``expected``: lengths and every byte, by ``memcmp``."""
    offset = 0
    for piece in pieces:
        found = np.frombuffer(piece, np.uint8)
        wanted = np.frombuffer(expected[offset : offset + len(found)], np.uint8)
        if len(wanted) != len(found) or _libc.memcmp(found.ctypes.data, wanted.ctypes.data, len(found)) != 0:
            return False
        offset += len(found)
    return offset == len(expected)


_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
