"""Ages and classes: the two coordinates in which blocks are compared.

An age is the number of uses of any block since a block's own last use: a clock that needs no clock.
Ages fall into ``AGES`` buckets of growing width. A class is what is known about a block when it is
used: how often it was (``uses``), the turn of its conversation that made it (``turn``), and whether
it ended its prompt (``is_last``: a partly filled tail is almost never asked for again).
"""

from __future__ import annotations

import numpy as np

USES_MAX = 6
"""Uses told apart; more count as this many."""
TURNS_MAX = 5
CLASSES = USES_MAX * TURNS_MAX * 2
AGES = 40
AGE_FIRST = 64
"""Width of the youngest bucket, in events: about one prompt."""
AGE_RATIO = 1.4
"""Growth of the bucket bounds: 40 buckets reach 3e7 events; finer ones gain less than they cost in noise."""


CLASS_OF_USES = tuple((min(max(uses, 1), USES_MAX) - 1) * TURNS_MAX * 2 for uses in range(256))
CLASS_OF_TURN = tuple((min(max(turn, 1), TURNS_MAX) - 1) * 2 for turn in range(256))
"""A class is ``CLASS_OF_USES[uses] + CLASS_OF_TURN[turn] + is_last``: looked up, as every event does it."""


def age_edges() -> list[int]:
    """Lower bounds of the buckets; the last one has no upper bound."""
    edges = [0]
    bound = float(AGE_FIRST)
    while len(edges) < AGES:
        edges.append(int(bound))
        bound *= AGE_RATIO
    return edges


AGE_EDGES = np.asarray(age_edges(), dtype=np.float64)
AGE_WIDTHS = np.diff(np.append(AGE_EDGES, AGE_EDGES[-1] * AGE_RATIO))
AGE_CENTRES = AGE_EDGES + AGE_WIDTHS / 2
