"""Kinds: what is known about a block when it is used, as one small number by which blocks are compared.

A block used once is told apart by the *turn* of its conversation that made it; one used more often by
its uses and by the mean *interval* between them (a block of a popular document and the fourth turn of
a chat were both used four times, and only one of them comes back within a minute). Both also by
whether the block ends its prompt: a partly filled tail is almost never asked for again.

There are two grains. Queues tell ``CLASSES`` apart; what is learnt is learnt for ``LEARNT`` groups of
them, because a class of its own would see too few lives.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

TURNS_MAX = 5
USES_BOUNDS = (3, 4, 6, 9, 14, 23, 46)
"""Uses from which on a block (used at least twice) counts as one level more."""
LEARNT_USES_BOUNDS = (3, 6, 14)
"""The same for what is learnt; a part of ``USES_BOUNDS``."""
INTERVALS = 8
COUNT_MAX = 255
"""Largest number of uses, and largest trait, that is kept."""
MEAN_OVER_MAX = 20
"""The mean interval is over about so many uses: older ones fade."""

_INTERVAL_FIRST = 7 * 8  # intervals up to 2 ** 7 events are one level
_INTERVAL_STEP = 10  # a level is 2 ** (10 / 8) wide: the last one begins at 55,000 events
_USES_LEVELS = len(USES_BOUNDS) + 1
_LEARNT_LEVELS = len(LEARNT_USES_BOUNDS) + 1

CLASSES = 2 * (TURNS_MAX + _USES_LEVELS * INTERVALS)
LEARNT = 2 * (TURNS_MAX + _LEARNT_LEVELS * INTERVALS)
GROUPS = 2 * (TURNS_MAX + _LEARNT_LEVELS)
"""What is learnt without regard to intervals, as the prior of what is learnt with it."""

CLASS_OF_TURN = tuple(2 * (min(max(turn, 1), TURNS_MAX) - 1) for turn in range(COUNT_MAX + 1))
CLASS_OF_USES = tuple(2 * (TURNS_MAX + bisect_right(USES_BOUNDS, uses) * INTERVALS) for uses in range(COUNT_MAX + 1))
CLASS_OF_INTERVAL = tuple(
    2 * min(max((trait - _INTERVAL_FIRST) // _INTERVAL_STEP, 0), INTERVALS - 1) for trait in range(COUNT_MAX + 1)
)
"""The class of a block is ``CLASS_OF_TURN[trait]`` after one use, else ``CLASS_OF_USES[uses] +
CLASS_OF_INTERVAL[trait]``; plus one for the end of a prompt. Looked up, as every event does it."""


def mean_interval(uses: int, trait: int, events: int) -> int:
    """The trait after one more use, ``events`` (≥ 1) after the one before; until then there were ``uses``.

    A trait is about eight times the binary logarithm of the interval, plus 8, at most ``COUNT_MAX``.
    """
    bits = events.bit_length()
    latest = (bits << 3) + (events << 3 >> bits - 1 & 7)
    if latest > COUNT_MAX:
        latest = COUNT_MAX
    if uses == 1:
        return latest
    return trait + (latest - trait) // (uses if uses < MEAN_OVER_MAX else MEAN_OVER_MAX)


def uses_levels() -> npt.NDArray[np.int64]:
    """By class: 0 for one use, then the level of uses."""
    kinds = np.arange(CLASSES) // 2
    return np.where(kinds < TURNS_MAX, 0, (kinds - TURNS_MAX) // INTERVALS + 1)


def _learnt_of_class() -> npt.NDArray[np.int64]:
    kinds, ends = np.divmod(np.arange(CLASSES), 2)
    uses_level, interval = np.divmod(kinds - TURNS_MAX, INTERVALS)
    first_uses = np.asarray((2, *USES_BOUNDS))[uses_level]
    level = np.searchsorted(LEARNT_USES_BOUNDS, first_uses, side="right")
    return 2 * np.where(kinds < TURNS_MAX, kinds, TURNS_MAX + level * INTERVALS + interval) + ends


LEARNT_OF_CLASS = _learnt_of_class()


def group_of_learnt() -> npt.NDArray[np.int64]:
    kinds, ends = np.divmod(np.arange(LEARNT), 2)
    return 2 * np.where(kinds < TURNS_MAX, kinds, TURNS_MAX + (kinds - TURNS_MAX) // INTERVALS) + ends
