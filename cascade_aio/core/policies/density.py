"""From counts of reuse to densities: expected hits per unit of occupancy.

Keeping a block of age ``a`` until age ``b`` earns a hit with the probability that its reuse falls
between, and costs the time that it stays. The density of a block is the best ratio of the two over
all ``b``: the Gittins index of the "keep on or drop" decision (Gittins 1979; Aggarwal et al. and
Beckmann et al., "LHD", NSDI 2018, use hit densities for caching). Unlike recency it may *rise* with
age: while a user reads an answer no next turn can come, and a block about to be asked for again is
worth more than one that was used a moment ago.

Hazards are estimated in steps, each a prior for the next, so that a class seen rarely behaves like its
kin: a power law of age (which makes the order LRU), all blocks together, blocks by number of uses (the
*shape* over age), a factor for each group (``kinds``), and at last each interval within a group. Pure
functions of arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cascade_aio.core.policies.ages import AGE_CENTRES, AGE_WIDTHS, AGES
from cascade_aio.core.policies.kinds import GROUPS, LEARNT, LEARNT_USES_BOUNDS, TURNS_MAX, group_of_learnt

Table = npt.NDArray[np.float64]

POOL_LIVES = 800.0
"""Lives (per age) that the power law weighs against all blocks, and all blocks against a shape: lives
come in bunches (the blocks of a turn return together), so these are some thirty turns."""
FACTOR_REUSES = 60.0
"""Reuses that a shape weighs against a group, and a group against one of its intervals: two or three turns."""
INTERVAL_LIVES = 200.0
"""Lives (per age) that a group weighs against one of its intervals."""
PRIOR_HAZARD = 0.3
"""Probability of reuse per doubling of age before anything is known; only its constancy matters."""
PRIOR_POWER = 0.5
"""Until more is known a block used four times as often is taken to return this power of four times as likely."""
HAZARD_MAX = 0.9
SHAPES_USES = 3
"""Levels of uses with a shape of their own; more share the last one."""

_POWER_LAW = PRIOR_HAZARD * AGE_WIDTHS / (AGE_CENTRES + AGE_WIDTHS)


def _members(count: int, part_of: npt.NDArray[np.int64]) -> Table:
    members: Table = (np.arange(count)[:, None] == part_of).astype(np.float64)
    return members


_GROUP_OF_LEARNT = group_of_learnt()
_IN_GROUP = _members(GROUPS, _GROUP_OF_LEARNT)
_LEVEL_OF_GROUP = np.maximum(np.arange(GROUPS) // 2 - TURNS_MAX + 1, 0)
_SHAPE_OF_GROUP = np.minimum(_LEVEL_OF_GROUP, SHAPES_USES - 1) * 2 + np.arange(GROUPS) % 2
_IN_SHAPE = _members(2 * SHAPES_USES, _SHAPE_OF_GROUP)
_PRIOR_FACTOR = np.asarray((1.0, 1.5, *LEARNT_USES_BOUNDS))[_LEVEL_OF_GROUP] ** PRIOR_POWER


def hazards(reused: Table, unused: Table) -> Table:
    """Probability of reuse within each age bucket for a life that reached it.

    Arguments and result have shape (``LEARNT``, ``AGES``): lives that ended with a reuse in the bucket,
    and lives that were last seen unused in it (they were at risk for half of it).
    """
    ended = reused + unused
    at_risk = np.cumsum(ended[:, ::-1], axis=1)[:, ::-1] - unused * 0.5
    group = _group_hazards(_IN_GROUP @ reused, _IN_GROUP @ at_risk)
    own = _scaled(group[_GROUP_OF_LEARNT], reused, at_risk, 1.0)
    return np.minimum(_smooth((reused + INTERVAL_LIVES * own) / (at_risk + INTERVAL_LIVES)), HAZARD_MAX)


def _group_hazards(reused: Table, at_risk: Table) -> Table:
    """The same without regard to intervals; shape (``GROUPS``, ``AGES``)."""
    all_reused, all_at_risk = reused.sum(axis=0), at_risk.sum(axis=0)
    level = min((all_reused.sum() + 1.0) / ((all_at_risk * _POWER_LAW).sum() + 1.0), 1.0)
    pool = _smooth((all_reused + POOL_LIVES * level * _POWER_LAW) / (all_at_risk + POOL_LIVES))
    shape_reused, shape_at_risk = _IN_SHAPE @ reused, _IN_SHAPE @ at_risk
    factor = (shape_reused.sum(axis=1) + FACTOR_REUSES) / (shape_at_risk @ pool + FACTOR_REUSES)
    shapes = _smooth((shape_reused + POOL_LIVES * factor[:, None] * pool) / (shape_at_risk + POOL_LIVES))
    return _scaled(shapes[_SHAPE_OF_GROUP], reused, at_risk, _PRIOR_FACTOR)


def _scaled(hazard: Table, reused: Table, at_risk: Table, prior_factor: Table | float) -> Table:
    """Each row of ``hazard`` times the factor that its reuses ask for, as far as there are enough of them."""
    expected = (at_risk * hazard).sum(axis=1)
    factor = (reused.sum(axis=1) + FACTOR_REUSES * prior_factor) / (expected + FACTOR_REUSES)
    scaled: Table = np.minimum(hazard * factor[:, None], HAZARD_MAX)
    return scaled


def densities(hazard: Table) -> Table:
    """Best expected hits per event of occupancy from the start of each age bucket on, by row."""
    zero = np.zeros((len(hazard), 1))
    survival = np.cumprod(np.hstack([zero + 1.0, 1.0 - hazard]), axis=1)[:, :-1]
    hits = np.cumsum(np.hstack([zero, survival * hazard]), axis=1)
    time = np.cumsum(np.hstack([zero, survival * (1.0 - hazard / 2) * AGE_WIDTHS]), axis=1)
    density = np.empty_like(hazard)
    for age in range(AGES):
        gained = hits[:, age + 1 :] - hits[:, age : age + 1]
        density[:, age] = (gained / (time[:, age + 1 :] - time[:, age : age + 1])).max(axis=1)
    return density


def _smooth(hazard: Table) -> Table:
    """Each bucket's hazard per event with half of its weight from its neighbours: the bounds of ages are ours."""
    rate = hazard / AGE_WIDTHS
    padded = np.concatenate([rate[..., :1], rate, rate[..., -1:]], axis=-1)
    smoothed: Table = (0.25 * padded[..., :-2] + 0.5 * rate + 0.25 * padded[..., 2:]) * AGE_WIDTHS
    return smoothed


assert _PRIOR_FACTOR.shape == (GROUPS,)
assert _GROUP_OF_LEARNT.shape == (LEARNT,)
