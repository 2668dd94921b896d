"""How long blocks stay unused, by class: counted on a sample of all blocks, evicted ones too.

A *life* begins with a use of a block and ends with the next one. ``ReuseSample`` follows the lives of
the blocks whose hash falls under a threshold, whether they are resident or not, so what it learns
does not depend on what was evicted (a policy that learns from its own hits only confirms itself).
At most ``LIVES_MAX`` lives are open; when there are more, half of the blocks leave the sample.

Invariants: the order of ``_open`` is the order of beginnings. A life weighs 1 when it begins and half
of that for every ``LIVES_HALF`` lives since, whether it has ended or not: a change of traffic is
forgotten in bounded time, and open and ended lives of one time stay comparable.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from cascade_aio.core.policies.ages import AGE_CENTRES, AGES, age_edges
from cascade_aio.core.policies.kinds import LEARNT

Counts = npt.NDArray[np.float64]
Lives = npt.NDArray[np.int64]

LIVES_MAX = 1 << 14
"""Open lives: about 2.5 MiB."""
EXPIRED_MAX = 1 << 11
"""Lives given up as not coming back per call: 0.3 ms."""
LEAVING_PER_USE = 64
"""Blocks that leave a sample that was halved, per use of one that stays: a stop for all of them would be felt."""
LIVES_HALF = 1 << 17
"""Eight times the open lives: less forgets what comes back rarely before it came back."""

_HASHES = 1 << 64


class ReuseSample:
    """Counts of reuse by class and age. Not thread-safe; nothing blocks; no event costs more than O(log n)
    apart from a halving of the sample, O(LIVES_MAX), which happens at most 64 times."""

    def __init__(self, *, lives_max: int = LIVES_MAX) -> None:
        self._lives_max = lives_max
        self.threshold = _HASHES
        """A hash below it is in the sample."""
        self._open: dict[int, int] = {}  # hash -> beginning * LEARNT + class
        self._edges = age_edges()
        self._reused = np.zeros((LEARNT, AGES))
        self._lost = np.zeros((LEARNT, AGES))
        self._ended = array("i")
        self._leaving: list[int] = []
        self._settled_at = 0

    def use(self, hashed: int, kind: int, now: int) -> None:
        """A block of the sample was used at event ``now`` and is of class ``kind`` from now on."""
        lives = self._open
        life = lives.pop(hashed, None)
        if life is not None:
            began, before = divmod(life, LEARNT)
            self._ended.append(before * AGES + bisect_right(self._edges, now - began) - 1)
        lives[hashed] = now * LEARNT + kind
        if len(lives) > self._lives_max and not self._leaving:
            self._halve(now)
        if self._leaving:
            for _ in range(min(LEAVING_PER_USE, len(self._leaving))):
                lives.pop(self._leaving.pop(), None)

    def reclassify(self, hashed: int, kind: int) -> None:
        """The running life of a block of the sample turned out to be of class ``kind``."""
        life = self._open.get(hashed)
        if life is not None:
            self._open[hashed] = life - life % LEARNT + kind

    def settle(self, now: int, horizon: int) -> None:
        """Count what has ended. Lives older than ``horizon`` events end unused, up to ``EXPIRED_MAX`` per call."""
        self._settle(now)
        self._expire(now - horizon)

    def open_lives(self) -> Lives:
        """The open lives as they are now, for ``counts``."""
        return np.fromiter(self._open.values(), dtype=np.int64, count=len(self._open))

    def counts(self, now: int, lives: Lives) -> tuple[Counts, Counts]:
        """``(reused, unused)``, each of shape (``LEARNT``, ``AGES``): lives that ended with a reuse at an
        age, and lives last seen unused at an age, of ``lives`` that were open at event ``now``."""
        began, kinds = np.divmod(lives, LEARNT)
        ages = now - began
        buckets = np.searchsorted(self._edges, ages, side="right") - 1
        weights = 0.5 ** (ages / self._half_events)
        unused = np.bincount(kinds * AGES + buckets, weights, LEARNT * AGES).reshape(LEARNT, AGES)
        return self._reused, self._lost + unused

    def __len__(self) -> int:
        """Open lives."""
        return len(self._open)

    @property
    def _half_events(self) -> float:
        return LIVES_HALF * (_HASHES / self.threshold)

    def _settle(self, now: int) -> None:
        """Let the counts decay until now and add what ended since the last time."""
        half = self._half_events
        decay = 0.5 ** ((now - self._settled_at) / half)
        ended = np.bincount(np.array(self._ended, dtype=np.int64), minlength=LEARNT * AGES)
        ended_weights = ended.reshape(LEARNT, AGES) * 0.5 ** (AGE_CENTRES / half)
        self._reused = self._reused * decay + ended_weights
        self._lost = self._lost * decay
        del self._ended[:]
        self._settled_at = now

    def _expire(self, oldest: int) -> None:
        for _ in range(min(EXPIRED_MAX, len(self._open))):
            hashed = next(iter(self._open))
            began, kind = divmod(self._open[hashed], LEARNT)
            if began >= oldest:
                return
            del self._open[hashed]
            self._lost[kind, AGES - 1] += 0.5 ** ((self._settled_at - began) / self._half_events)

    def _halve(self, now: int) -> None:
        """Drop the upper half of the hashes, and of the weight of what was counted with them."""
        self._settle(now)
        self.threshold //= 2
        self._leaving = [hashed for hashed in self._open if hashed >= self.threshold]
        self._reused *= 0.5
        self._lost *= 0.5
