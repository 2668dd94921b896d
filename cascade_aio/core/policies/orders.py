"""Orders of eviction: which queue (class * ``AGES`` + age) loses first.

``LEAST_RECENT`` and ``LEAST_USED`` are what simple policies do, expressed in our queues;
``by_density`` is what was learnt. Any of them can rule the same queues at any moment.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from cascade_aio.core.policies.ages import AGES
from cascade_aio.core.policies.kinds import CLASSES, LEARNT_OF_CLASS, uses_levels


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Queues, first to lose first, in the forms that ``AgedQueues`` looks things up in. Shared, so not changed."""

    queues: npt.NDArray[np.int64]
    queue_at: list[int]
    """By rank; the inverse of ``rank_of``."""
    rank_of: list[int]


_CLASS, _AGE = np.divmod(np.arange(CLASSES * AGES), AGES)
_OLDEST_FIRST = np.lexsort((_CLASS, -_AGE))


def _order(worth: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> Order:
    """By what each queue is worth; of equals the older queue, then the lower class."""
    queues = _OLDEST_FIRST[np.argsort(worth[_OLDEST_FIRST], kind="stable")]
    rank = np.empty(len(queues), dtype=np.int64)
    rank[queues] = np.arange(len(queues))
    return Order(queues, queues.tolist(), rank.tolist())


LEAST_RECENT = _order(np.zeros(CLASSES * AGES))
LEAST_USED = _order(uses_levels()[_CLASS])
"""Fewest uses first, those before an eviction included; of equals the least recent one."""
KEEP_OLD = _order(uses_levels()[_CLASS] * AGES - (AGES - 1 - _AGE))
"""Fewest uses first, and of equals the most recent one: what is there stays, as in W-TinyLFU. The best one
can do for what is read in the same order again and again."""


def by_density(density: npt.NDArray[np.float64]) -> Order:
    """Least dense first (by learnt group and age)."""
    return _order(density[LEARNT_OF_CLASS].ravel())
