"""All policies by name, and the sweep of policies × capacities over a trace that reports are made of.

Pure. A policy that knows chains is driven leaf first, as the store does; one that does not sees blocks
in the order of the prompt, as its authors meant it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.core.baselines import BASELINES
from cascade_aio.core.clairvoyant import Clairvoyant
from cascade_aio.core.eviction import Lru, PrefixLru
from cascade_aio.core.policies import HitDensity
from cascade_aio.core.replay import ReplayCount, ReplayTrace, replay
from cascade_aio.errors import ConfigError

OURS = "hit-density"
OPTIMUM = "clairvoyant"
REFERENCE = "lru"
SHARES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.40)
"""Capacities of the reports, as shares of a trace's different blocks."""

_CHAIN_BLIND: dict[str, Callable[[], EvictionPolicy]] = {REFERENCE: Lru, **BASELINES}
_CHAIN_AWARE: dict[str, Callable[[], EvictionPolicy]] = {
    "leaf-lru": lambda: PrefixLru(protected_share_max=0.0),
    "prefix-lru": PrefixLru,
    OURS: HitDensity,
}
SIMPLE = (*_CHAIN_BLIND, "leaf-lru")
"""The policies whose best is to be matched at every point."""
POLICIES = (*_CHAIN_BLIND, *_CHAIN_AWARE, OPTIMUM)


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """One policy at one capacity on one trace."""

    trace: str
    policy: str
    share: float
    capacity_blocks: int
    count: ReplayCount


def make_policy(policy: str) -> EvictionPolicy:
    """A new, empty one of that name. Raises ``ConfigError`` for an unknown name, and for the clairvoyant one,
    which needs a trace."""
    maker = _CHAIN_AWARE.get(policy) or _CHAIN_BLIND.get(policy)
    if maker is None:
        raise ConfigError(f"policy {policy!r} is none of {', '.join((*_CHAIN_BLIND, *_CHAIN_AWARE))}")
    return maker()


def run_policy(trace: ReplayTrace, policy: str, capacity_blocks: int) -> ReplayCount:
    """Replay ``trace`` through the policy called ``policy``. Raises ``ConfigError`` for an unknown name."""
    if policy == OPTIMUM:
        return replay(trace, Clairvoyant(trace), capacity_blocks=capacity_blocks)
    if policy not in POLICIES:
        raise ConfigError(f"policy {policy!r} is none of {', '.join(POLICIES)}")
    leaf_first = policy in _CHAIN_AWARE
    return replay(trace, make_policy(policy), capacity_blocks=capacity_blocks, leaf_first=leaf_first)


def sweep(trace: ReplayTrace, policies: Iterable[str], shares: Iterable[float]) -> Iterator[Score]:
    """All policies at all ``shares`` (0 < share ≤ 1) of the different blocks of ``trace``, one by one."""
    wanted = list(shares)
    for share in wanted:
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"a capacity of {share:.2%} of the blocks must be above 0 % and at most 100 %")
    for policy in policies:
        for share in wanted:
            capacity = trace.capacity(share)
            yield Score(trace.name, policy, share, capacity, run_policy(trace, policy, capacity))


def gap_closed(ours: float, reference: float, optimum: float) -> float | None:
    """Which part of the way from ``reference`` to ``optimum`` is behind us; ``None`` if there is none."""
    return (ours - reference) / (optimum - reference) if optimum > reference else None
