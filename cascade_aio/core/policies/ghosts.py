"""What is remembered of evicted blocks: how often each was used, in eight bytes per entry.

A direct-mapped table: an identity has one place, and a later ghost there replaces an earlier one.
So it is bounded whatever the traffic, forgets at random with age, and never allocates after it was
made. It must not know policies, nodes or time.
"""

from __future__ import annotations

import numpy as np

ENTRY_BYTES = 8
ENTRIES_MIN = 1 << 16
"""512 KiB: a small tier remembers far more blocks than it holds, which is what it needs most."""
ENTRIES_MAX = 1 << 24

COUNT_MAX = 255
_COUNT_BITS = 8
_TAG_SHIFT = 2 * _COUNT_BITS
_TAG_MASK = ((1 << 64) - 1) >> _TAG_SHIFT << _TAG_SHIFT


class GhostTable:
    """Counts of evicted blocks by 64-bit hash. ``entries`` is rounded up to a power of two.

    A hash must be well mixed in all bits: the low ones choose the place, the high 48 tell blocks of
    one place apart (a mistaken identity, one in 2 ** 32 or rarer, only misjudges one block).
    """

    def __init__(self, entries: int = ENTRIES_MIN) -> None:
        bounded = min(max(entries, 1), ENTRIES_MAX)
        self._mask = (1 << (bounded - 1).bit_length()) - 1
        # Zeroed by the kernel page by page as it is used: a table of 64 MiB takes no time to make.
        self._table = memoryview(np.zeros(self._mask + 1, dtype=np.uint64))

    def put(self, hashed: int, uses: int, turn: int) -> None:
        """Remember ``uses`` (at least 1) and ``turn``, both at most ``COUNT_MAX``."""
        self._table[hashed & self._mask] = hashed & _TAG_MASK | uses << _COUNT_BITS | turn

    def take(self, hashed: int) -> tuple[int, int]:
        """``(uses, turn)`` of a remembered block, which is forgotten, or ``(0, 0)``."""
        place = hashed & self._mask
        entry = self._table[place]
        if not entry or (entry ^ hashed) & _TAG_MASK:
            return (0, 0)
        self._table[place] = 0
        return entry >> _COUNT_BITS & COUNT_MAX, entry & COUNT_MAX

    def look(self, hashed: int) -> tuple[int, int]:
        """Like ``take``, and the block stays remembered."""
        entry = self._table[hashed & self._mask]
        if not entry or (entry ^ hashed) & _TAG_MASK:
            return (0, 0)
        return entry >> _COUNT_BITS & COUNT_MAX, entry & COUNT_MAX

    def __len__(self) -> int:
        """Places in the table, used or not: the bound on ghosts."""
        return self._mask + 1

    @property
    def nbytes(self) -> int:
        return len(self._table) * ENTRY_BYTES
