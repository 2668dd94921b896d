"""From counts of reuse to an order of eviction: expected hits per unit of occupancy.

Keeping a block of age ``a`` until age ``b`` earns a hit with the probability that its reuse falls
between, and costs the time that it stays. The density of a block is the best ratio of the two over
all ``b``: the Gittins index of the "keep on or drop" decision (Gittins 1979; Aggarwal et al. and
Beckmann et al., "LHD", NSDI 2018, use hit densities for caching). Unlike recency it may *rise* with
age: while a user reads an answer no next turn can come, and a block about to be asked for again is
worth more than one that was used a moment ago.

Hazards are estimated in three steps, each a prior for the next, so that a class seen rarely behaves
like its kin: a power law of age (which makes the order LRU), all blocks together, blocks by number of
uses (the *shape* over age), and a factor of its own for each class. Pure functions of arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cascade_aio.core.policies.ages import AGE_CENTRES, AGE_WIDTHS, AGES, CLASSES, TURNS_MAX, USES_MAX

Table = npt.NDArray[np.float64]

POOL_LIVES = 800.0
"""Lives (per age) that the power law weighs against all blocks, and all blocks against a shape: lives
come in bunches (the blocks of a turn return together), so these are some thirty turns."""
FACTOR_REUSES = 60.0
"""Reuses that a shape weighs against a class: two or three turns."""
PRIOR_HAZARD = 0.3
"""Probability of reuse per doubling of age before anything is known; only its constancy matters."""
HAZARD_MAX = 0.9
SHAPE_USES = 3
"""Uses with a shape of their own; more share the last one."""

_POWER_LAW = PRIOR_HAZARD * AGE_WIDTHS / (AGE_CENTRES + AGE_WIDTHS)


def _shapes() -> npt.NDArray[np.int64]:
    kinds = np.arange(CLASSES)
    uses = kinds // (2 * TURNS_MAX)
    return np.minimum(uses, SHAPE_USES - 1) * 2 + kinds % 2


_SHAPE_OF_CLASS = _shapes()
_IN_SHAPE = (np.arange(2 * SHAPE_USES)[:, None] == _SHAPE_OF_CLASS).astype(np.float64)
assert USES_MAX >= SHAPE_USES


def hazards(reused: Table, unused: Table) -> Table:
    """Probability of reuse within each age bucket for a life that reached it, by class.

    Both arguments have shape (``CLASSES``, ``AGES``): lives that ended with a reuse in the bucket,
    and lives that were last seen unused in it (they were at risk for half of it).
    """
    ended = reused + unused
    at_risk = np.cumsum(ended[:, ::-1], axis=1)[:, ::-1] - unused * 0.5
    all_reused, all_at_risk = reused.sum(axis=0), at_risk.sum(axis=0)
    level = min((all_reused.sum() + 1.0) / ((all_at_risk * _POWER_LAW).sum() + 1.0), 1.0)
    pool = _smooth((all_reused + POOL_LIVES * level * _POWER_LAW) / (all_at_risk + POOL_LIVES))
    shape_reused, shape_at_risk = _IN_SHAPE @ reused, _IN_SHAPE @ at_risk
    factor = (shape_reused.sum(axis=1) + FACTOR_REUSES) / (shape_at_risk @ pool + FACTOR_REUSES)
    shapes = _smooth((shape_reused + POOL_LIVES * factor[:, None] * pool) / (shape_at_risk + POOL_LIVES))
    own = shapes[_SHAPE_OF_CLASS]
    factor = (reused.sum(axis=1) + FACTOR_REUSES) / ((at_risk * own).sum(axis=1) + FACTOR_REUSES)
    hazard: Table = np.minimum(own * factor[:, None], HAZARD_MAX)
    return hazard


def densities(hazard: Table) -> Table:
    """Best expected hits per event of occupancy from the start of each age bucket on, by class."""
    zero = np.zeros((len(hazard), 1))
    survival = np.cumprod(np.hstack([zero + 1.0, 1.0 - hazard]), axis=1)[:, :-1]
    hits = np.cumsum(np.hstack([zero, survival * hazard]), axis=1)
    time = np.cumsum(np.hstack([zero, survival * (1.0 - hazard / 2) * AGE_WIDTHS]), axis=1)
    density = np.empty_like(hazard)
    for age in range(AGES):
        gained = hits[:, age + 1 :] - hits[:, age : age + 1]
        density[:, age] = (gained / (time[:, age + 1 :] - time[:, age : age + 1])).max(axis=1)
    return density


def eviction_order(density: Table) -> npt.NDArray[np.int64]:
    """Queue numbers (class * ``AGES`` + age), least dense first; of equals the older, then the lower class."""
    queues = np.arange(density.size)
    return np.lexsort((queues // AGES, -(queues % AGES), density.ravel()))


def _smooth(hazard: Table) -> Table:
    """Each bucket's hazard per event with half of its weight from its neighbours: the bounds of ages are ours."""
    rate = hazard / AGE_WIDTHS
    padded = np.concatenate([rate[..., :1], rate, rate[..., -1:]], axis=-1)
    smoothed: Table = (0.25 * padded[..., :-2] + 0.5 * rate + 0.25 * padded[..., 2:]) * AGE_WIDTHS
    return smoothed
