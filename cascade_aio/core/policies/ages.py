"""Ages: the number of uses of any block since a block's own last use, in buckets of growing width.

A clock that needs no clock.
"""

from __future__ import annotations

import numpy as np

AGES = 36
AGE_FIRST = 64
"""Width of the youngest bucket, in events: about one prompt."""
AGE_RATIO = 1.45
"""Growth of the bucket bounds: 36 buckets reach 3e7 events; finer ones gain less than they cost in noise."""


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
