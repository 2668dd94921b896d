"""Ages and classes: the two coordinates in which blocks are compared.

An age is the number of uses of any block since a block's own last use: a clock that needs no clock.
Ages fall into ``AGES`` buckets of growing width. A class is what is known about a block when it is
used: how often it was (``uses``), the turn of its conversation that made it (``turn``), and whether
it ended its prompt (``is_last``: a partly filled tail is almost never asked for again).
"""

from __future__ import annotations

USES_MAX = 6
"""Uses told apart; more count as this many."""
TURNS_MAX = 5
CLASSES = USES_MAX * TURNS_MAX * 2
AGES = 40
AGE_FIRST = 64
"""Width of the youngest bucket, in events: about one prompt."""
AGE_RATIO = 1.4
"""Growth of the bucket bounds: 40 buckets reach 3e7 events; finer ones gain less than they cost in noise."""


def class_of(uses: int, turn: int, is_last: bool) -> int:
    """The class, 0 to ``CLASSES`` - 1. ``uses`` and ``turn`` start at 1."""
    return ((min(uses, USES_MAX) - 1) * TURNS_MAX + min(turn, TURNS_MAX) - 1) * 2 + is_last


def age_edges() -> list[int]:
    """Lower bounds of the buckets; the last one has no upper bound."""
    edges = [0]
    bound = float(AGE_FIRST)
    while len(edges) < AGES:
        edges.append(int(bound))
        bound *= AGE_RATIO
    return edges
