"""What is remembered of evicted blocks: how often and when each was used, in eight bytes per entry.

A direct-mapped table: an identity has one place, and a later ghost there replaces an earlier one.
So it is bounded whatever the traffic, forgets at random with age, and never allocates after it was
made. It must not know policies, nodes or time.
"""

from __future__ import annotations

import numpy as np

from cascade_aio.core.policies.kinds import COUNT_MAX

ENTRY_BYTES = 8
ENTRIES_MIN = 1 << 16
"""512 KiB: a small tier remembers far more blocks than it holds, which is what it needs most."""
ENTRIES_MAX = 1 << 24

TICK_EVENTS = 64
"""Grain in which the time of the last use is kept; it is told wrongly after 2 ** 30 events."""

_TRAIT_BITS = 8
_TICK_SHIFT = 16
_TICK_MASK = (1 << 24) - 1
_TAG_SHIFT = 40
_TAG_MASK = ((1 << 64) - 1) >> _TAG_SHIFT << _TAG_SHIFT
_NOTHING = (0, 0, 0)


class GhostTable:
    """Uses, trait (see ``kinds``) and last use of evicted blocks by 64-bit hash. ``entries`` is rounded up
    to a power of two.

    A hash must be well mixed in all bits: the low ones choose the place, the high 24 tell blocks of
    one place apart (a mistaken identity, one in 16 million, only misjudges one block).
    """

    def __init__(self, entries: int = ENTRIES_MIN) -> None:
        bounded = min(max(entries, 1), ENTRIES_MAX)
        self._mask = (1 << (bounded - 1).bit_length()) - 1
        # Zeroed by the kernel page by page as it is used: a table of 64 MiB takes no time to make.
        self._table = memoryview(np.zeros(self._mask + 1, dtype=np.uint64))

    def put(self, hashed: int, uses: int, trait: int, tick: int) -> None:
        """Remember ``uses`` (at least 1) and ``trait``, both at most ``COUNT_MAX``, and the event of the last use."""
        self._table[hashed & self._mask] = (
            hashed & _TAG_MASK | (tick // TICK_EVENTS & _TICK_MASK) << _TICK_SHIFT | uses << _TRAIT_BITS | trait
        )

    def take(self, hashed: int) -> tuple[int, int, int]:
        """``(uses, trait, tick)`` of a remembered block, which is forgotten, or zeros."""
        place = hashed & self._mask
        entry = self._table[place]
        if not entry or (entry ^ hashed) & _TAG_MASK:
            return _NOTHING
        self._table[place] = 0
        return (
            entry >> _TRAIT_BITS & COUNT_MAX,
            entry & COUNT_MAX,
            (entry >> _TICK_SHIFT & _TICK_MASK) * TICK_EVENTS,
        )

    def look(self, hashed: int) -> tuple[int, int, int]:
        """Like ``take``, and the block stays remembered."""
        found = self.take(hashed)
        if found[0]:
            self.put(hashed, *found)
        return found

    def __len__(self) -> int:
        """Places in the table, used or not: the bound on ghosts."""
        return self._mask + 1

    @property
    def nbytes(self) -> int:
        return len(self._table) * ENTRY_BYTES
