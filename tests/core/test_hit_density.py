"""HitDensity: the conformance suite, what it learns, its bounds on memory and time, its parts."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest

from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.core.policies import HitDensity
from cascade_aio.core.policies.ages import AGES, age_edges
from cascade_aio.core.policies.density import Table, densities, hazards
from cascade_aio.core.policies.duel import JUDGE_USES, SLOTS_MAX, Duel
from cascade_aio.core.policies.ghosts import TICK_EVENTS, GhostTable
from cascade_aio.core.policies.hit_density import NODE_BYTES
from cascade_aio.core.policies.kinds import (
    CLASSES,
    COUNT_MAX,
    GROUPS,
    LEARNT,
    LEARNT_OF_CLASS,
    LEARNT_USES_BOUNDS,
    USES_BOUNDS,
    mean_interval,
)
from cascade_aio.core.policies.orders import LEAST_USED, by_density
from cascade_aio.core.policies.reuse import ReuseSample
from cascade_aio.core.replay import ReplayTrace, replay
from cascade_aio.testing.eviction import BLOCK_BYTES, EvictionConformance

_MIX = 0x9E37_79B9_7F4A_7C15
_U64 = (1 << 64) - 1


class TestHitDensityConforms(EvictionConformance):
    def make_policy(self) -> EvictionPolicy:
        return HitDensity()


class TestHitDensityThatLearnsConforms(EvictionConformance):
    """The same promises once the order of eviction comes from what was seen."""

    least_recent_first = False

    def make_policy(self) -> EvictionPolicy:
        policy = HitDensity()
        _Tier(policy, capacity=100).serve(_scan_and_sessions(requests=1500, seed=3))
        while (node := policy.victim()) is not None:
            policy.remove(node)
        return policy


class _Tier:
    """A tier of ``capacity`` blocks whose rows are reused, as the store reuses them."""

    def __init__(self, policy: HitDensity, capacity: int) -> None:
        self.policy, self.capacity = policy, capacity
        self.rows: dict[int, int] = {}
        self.names: dict[int, int] = {}
        self.free: list[int] = []
        self.hits = self.blocks = 0

    def serve(self, requests: Sequence[Sequence[int]]) -> None:
        for chain in requests:
            hits = next((n for n, name in enumerate(chain) if name not in self.rows), len(chain))
            self.hits += hits
            self.blocks += len(chain)
            for name in reversed(chain):
                if name in self.rows:
                    self.policy.touch(self.rows[name])
            for before, name in zip((None, *chain), chain, strict=False):
                if name not in self.rows:
                    row = self.free.pop() if self.free else len(self.rows)
                    parent = -1 if before is None else self.rows[before]
                    self.policy.admit(row, parent=parent, nbytes=BLOCK_BYTES, identity=name)
                    self.rows[name], self.names[row] = row, name
            while len(self.rows) > self.capacity:
                victim = self.policy.victim()
                assert victim is not None
                self.policy.remove(victim)
                self.free.append(victim)
                del self.rows[self.names.pop(victim)]


class _Renamed(HitDensity):
    """Gives blocks the names they have elsewhere."""

    def __init__(self, names: dict[int, int]) -> None:
        super().__init__()
        self._names = names

    def admit(self, node: int, *, parent: int = -1, nbytes: int, identity: int | None = None) -> None:
        super().admit(node, parent=parent, nbytes=nbytes, identity=self._names[node])


def _scan_and_sessions(*, requests: int, seed: int) -> list[list[int]]:
    """Ten sessions of eight blocks that return now and then, between long prompts that never do."""
    rng = random.Random(seed)
    made: list[list[int]] = []
    for number in range(requests):
        if number % 2:
            start = 1000 + number * 100
            made.append(list(range(start, start + 16)))
        else:
            session = rng.randrange(10)
            made.append(list(range(session * 8, session * 8 + 8)))
    return made


class TestLearning:
    def test_a_scan_does_not_flush_the_working_set(self) -> None:
        """Sessions of 80 blocks fit 100; between two visits of one pass 240 blocks, enough for any LRU to lose it."""
        tier = _Tier(HitDensity(), capacity=100)
        requests = _scan_and_sessions(requests=4000, seed=1)
        tier.serve(requests[:1000])
        tier.hits = tier.blocks = 0
        tier.serve(requests[1000:])
        assert tier.hits / tier.blocks > 0.9 / 3, "sessions are a third of all blocks and should nearly all be hits"

    def test_what_was_hot_once_is_not_protected_for_ever(self) -> None:
        tier = _Tier(HitDensity(), capacity=100)
        tier.serve(_scan_and_sessions(requests=2000, seed=1))
        moved = [[name + 10**6 for name in chain] for chain in _scan_and_sessions(requests=4000, seed=2)]
        tier.serve(moved)
        assert not any(name in tier.rows for name in range(80))

    def test_an_evicted_block_is_recognised_under_another_row(self) -> None:
        """Used twice with an eviction between: the ghost tells, and it outlives one that was used once."""
        policy = HitDensity()
        _Tier(policy, capacity=50).serve(_scan_and_sessions(requests=2000, seed=5))
        while (node := policy.victim()) is not None:
            policy.remove(node)
        policy.admit(1, nbytes=BLOCK_BYTES, identity=8)  # of a session, evicted above
        policy.admit(2, nbytes=BLOCK_BYTES, identity=77_777_777)
        assert policy.victim() == 2

    def test_without_identities_it_is_leaf_first_lru(self) -> None:
        policy = HitDensity()
        for node in range(5000):
            policy.admit(node, nbytes=BLOCK_BYTES)
        assert [_evict(policy) for _ in range(100)] == list(range(100))

    def test_admission_turns_newcomers_away_once_they_proved_useless(self) -> None:
        policy = HitDensity()
        tier = _Tier(policy, capacity=80)
        assert policy.would_stay(identity=1)
        tier.serve(_scan_and_sessions(requests=4000, seed=1))
        session = next(name for name in range(80) if name in tier.rows)
        before = (len(policy), policy.victim())
        assert not policy.would_stay(identity=88_888_888)
        assert (len(policy), policy.victim()) == before
        while (node := policy.victim()) is not None and node != tier.rows[session]:
            policy.remove(node)
        policy.remove(tier.rows[session])
        policy.admit(5000, nbytes=BLOCK_BYTES, identity=99_999_999)
        assert policy.victim() == 5000
        assert policy.would_stay(identity=session)

    def test_row_numbers_do_not_matter(self) -> None:
        """Rows that are reused, as in a store, and rows of their own give the same hits."""
        requests = _scan_and_sessions(requests=1500, seed=9)
        tier = _Tier(HitDensity(), capacity=90)
        tier.serve(requests)
        trace = ReplayTrace("same")
        names: dict[int, int] = {}
        for chain in requests:
            trace.add(chain, [1] * len(chain))
            names.update(zip(trace.chains[-1], chain, strict=True))
        count = replay(trace, _Renamed(names), capacity_blocks=90)
        assert (count.hit_blocks, count.blocks) == (tier.hits, tier.blocks)

    def test_two_uses_without_another_between_are_one(self) -> None:
        once, twice = HitDensity(), HitDensity()
        for policy in (once, twice):
            policy.admit(0, nbytes=BLOCK_BYTES, identity=1)
        twice.touch(0)
        for policy in (once, twice):
            policy.admit(1, nbytes=BLOCK_BYTES, identity=2)
        assert once.victim() == twice.victim() == 0


class TestBounds:
    @pytest.mark.slow
    def test_a_million_nodes_cost_what_is_promised(self) -> None:
        """≤ 90 bytes per node, and events that do not slow down with the number of nodes."""
        policy = HitDensity()
        small_s = _churn(policy, 0, 50_000)
        for node in range(50_000, 1_000_000):
            policy.admit(node, parent=node - 1 if node % 20 else -1, nbytes=BLOCK_BYTES, identity=node)
        large_s = _churn(policy, 1_000_000, 50_000)
        assert len(policy) == 1_000_000 + 50_000
        assert policy.nbytes <= 90 * len(policy)
        assert policy.nbytes >= NODE_BYTES * len(policy)
        assert large_s < 5 * small_s

    def test_a_wild_row_number_is_refused(self) -> None:
        with pytest.raises(AssertionError, match="beyond any index"):
            HitDensity().admit(1 << 40, nbytes=BLOCK_BYTES)

    def test_misuse_is_refused(self) -> None:
        policy = HitDensity()
        policy.admit(3, nbytes=BLOCK_BYTES)
        with pytest.raises(AssertionError, match="in the tier already"):
            policy.admit(3, nbytes=BLOCK_BYTES)
        with pytest.raises(AssertionError, match="own parent"):
            policy.admit(4, parent=4, nbytes=BLOCK_BYTES)
        with pytest.raises(AssertionError, match="not in the tier"):
            policy.touch(4)
        with pytest.raises(AssertionError, match="not pinned"):
            policy.unpin(3)
        policy.pin(3)
        with pytest.raises(AssertionError, match="is pinned"):
            policy.remove(3)

    def test_bytes_are_counted(self) -> None:
        policy = HitDensity()
        policy.admit(0, nbytes=100)
        policy.admit(1, parent=0, nbytes=11)
        assert policy.admitted_bytes == 111
        policy.remove(1)
        assert policy.admitted_bytes == 100


class TestGhosts:
    def test_a_ghost_is_taken_once(self) -> None:
        table = GhostTable(1 << 10)
        table.put(12345 << 40, 3, 2, 10 * TICK_EVENTS + 5)
        assert table.look(12345 << 40) == (3, 2, 10 * TICK_EVENTS)
        assert table.take(12345 << 40) == (3, 2, 10 * TICK_EVENTS)
        assert table.take(12345 << 40) == (0, 0, 0)

    def test_a_later_ghost_replaces_one_of_the_same_place(self) -> None:
        table = GhostTable(1 << 10)
        table.put(1 << 40 | 5, COUNT_MAX, COUNT_MAX, 0)
        table.put(2 << 40 | 5, 1, 1, 0)
        assert table.look(1 << 40 | 5) == (0, 0, 0)
        assert table.look(2 << 40 | 5) == (1, 1, 0)

    def test_it_never_grows(self) -> None:
        table = GhostTable(1000)
        before = table.nbytes
        for number in range(10_000):
            table.put(number * _MIX & _U64, 1, 1, number << 20)
        assert table.nbytes == before == 1024 * 8


class TestKinds:
    def test_the_mean_interval_forgets_old_uses_and_is_bounded(self) -> None:
        trait = 0
        for uses in range(1, 100):
            trait = mean_interval(uses, trait, 1000)
        assert trait == mean_interval(1, 0, 1000)
        for uses in range(100, 250):
            trait = mean_interval(uses, trait, 1 << 60)
        assert mean_interval(1, 0, 1000) < trait <= COUNT_MAX
        assert mean_interval(1, 0, 1) < mean_interval(1, 0, 2) < mean_interval(1, 0, 3)

    def test_every_class_is_learnt_in_one_group_of_its_own_grain(self) -> None:
        assert set(LEARNT_USES_BOUNDS) <= set(USES_BOUNDS)
        assert sorted(set(LEARNT_OF_CLASS.tolist())) == list(range(LEARNT))
        assert CLASSES > LEARNT > GROUPS


class TestDuel:
    def test_a_simple_order_rules_while_it_has_more_hits(self) -> None:
        """Sixty blocks used again and again between ones that never return: LFU keeps them, LRU does not, and
        the learnt order is LRU still."""
        duel, rng = Duel(), random.Random(1)
        uses: dict[int, int] = {}
        for now in range(40 * JUDGE_USES):
            name = rng.randrange(60) if rng.random() < 0.3 else 1000 + now
            uses[name] = uses.get(name, 0) + 1
            duel.use(name, 10 if uses[name] < 2 else CLASSES - 2, now, resident=4 * 80)
        assert duel.ruler is LEAST_USED

    def test_the_learnt_order_rules_when_none_is_better(self) -> None:
        duel = Duel()
        for now in range(20 * JUDGE_USES):
            duel.use(now % 50, 10, now, resident=4 * 80)
        assert duel.ruler is None

    def test_shadows_are_bounded(self) -> None:
        duel = Duel()
        for number in range(50_000):
            hashed = number * _MIX & _U64
            if hashed < duel.threshold:
                duel.use(hashed, 0, number, resident=number)
        assert duel.threshold <= (1 << 64) * 2 * SLOTS_MAX // 50_000


class TestReuseSample:
    def test_a_reuse_is_counted_at_its_age_under_the_class_of_the_life(self) -> None:
        sample = ReuseSample()
        sample.use(7, 4, now=10)
        sample.use(7, 5, now=10 + 100)
        reused, unused = _counts(sample, now=111)
        age = int(np.searchsorted(age_edges(), 100, side="right")) - 1
        assert reused[4, age] == pytest.approx(1.0, abs=0.01)
        assert reused.sum() == pytest.approx(1.0, abs=0.01)
        assert unused[5, 0] == pytest.approx(1.0, abs=0.01)

    def test_lives_are_bounded_and_the_sample_stays_representative(self) -> None:
        sample = ReuseSample(lives_max=100)
        for number in range(10_000):
            hashed = number * _MIX & _U64
            if hashed < sample.threshold:
                sample.use(hashed, number % 2, now=number)
            assert len(sample) <= 100
        _, unused = _counts(sample, now=10_000)
        assert unused[0].sum() == pytest.approx(unused[1].sum(), rel=0.6)
        assert unused[2:].sum() == 0.0

    def test_old_lives_end_unused(self) -> None:
        sample = ReuseSample()
        sample.use(1, 0, now=1)
        _, unused = _counts(sample, now=1000, horizon=100)
        assert len(sample) == 0
        assert unused[0, AGES - 1] == pytest.approx(1.0, abs=0.05)


class TestDensity:
    def test_without_counts_the_order_is_least_recent_first(self) -> None:
        empty = np.zeros((LEARNT, AGES))
        order = by_density(densities(hazards(empty, empty)))
        once = order.queues[order.queues < 2 * AGES]  # among blocks used once; uses count in favour of the others
        ages = (once % AGES).tolist()
        assert ages == sorted(ages, reverse=True)

    def test_a_pause_before_reuse_makes_density_rise_with_age(self) -> None:
        """All lives of a class end at one age: shortly before it a block is worth most, after it nothing."""
        reused, unused = np.zeros((LEARNT, AGES)), np.zeros((LEARNT, AGES))
        reused[0, 20] = 10_000.0
        density = densities(hazards(reused, unused))[0]
        assert density[0] < density[10] < density[19] < density[20] * 1.5
        assert density[25] < density[19] / 2

    def test_a_class_that_returns_more_often_is_denser(self) -> None:
        reused, unused = np.zeros((LEARNT, AGES)), np.zeros((LEARNT, AGES))
        reused[:, 10] = 100.0
        unused[:, AGES - 1] = 100.0
        unused[0, AGES - 1] = 10_000.0
        density = densities(hazards(reused, unused))
        assert density[0, 0] < density[2, 0] / 5

    def test_hazards_are_probabilities(self) -> None:
        rng = np.random.default_rng(0)
        hazard = hazards(rng.exponential(10, (LEARNT, AGES)), rng.exponential(10, (LEARNT, AGES)))
        assert ((hazard >= 0) & (hazard < 1)).all()
        assert np.isfinite(densities(hazard)).all()


def _counts(sample: ReuseSample, *, now: int, horizon: int = 1 << 30) -> tuple[Table, Table]:
    sample.settle(now, horizon)
    return sample.counts(now, sample.open_lives())


def _evict(policy: HitDensity) -> int:
    victim = policy.victim()
    assert victim is not None
    policy.remove(victim)
    return victim


def _churn(policy: HitDensity, first: int, count: int) -> float:
    """CPU seconds to admit ``count`` nodes in chains of twenty and to use them all again."""
    gc.collect()
    started_s = time.process_time()
    for node in range(first, first + count):
        policy.admit(node, parent=node - 1 if node % 20 else -1, nbytes=BLOCK_BYTES, identity=node)
    for node in range(first + count - 1, first - 1, -1):
        policy.touch(node)
    return time.process_time() - started_s
