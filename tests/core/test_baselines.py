"""The policies we compare with: promises about pins, and the behaviour that names each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.cli.trace_mix import MixPlan, mixed_trace
from cascade_aio.core.baselines import BASELINES, FrequencySketch, Gdsf, Lfu, S3Fifo, Sieve, WTinyLfu
from cascade_aio.core.eviction import Lru
from cascade_aio.testing.eviction import BLOCK_BYTES, EvictionConformance


class _Baseline(EvictionConformance):
    respects_parents = False
    least_recent_first = False
    name = ""

    def make_policy(self) -> EvictionPolicy:
        return BASELINES[self.name]()


class TestFifoConforms(_Baseline):
    name = "fifo"


class TestLfuConforms(_Baseline):
    name = "lfu"


class TestS3FifoConforms(_Baseline):
    name = "s3-fifo"


class TestSieveConforms(_Baseline):
    name = "sieve"


class TestWTinyLfuConforms(_Baseline):
    name = "w-tinylfu"


class TestGdsfConforms(_Baseline):
    name = "gdsf"


def _admit(policy: EvictionPolicy, *nodes: int) -> None:
    for node in nodes:
        policy.admit(node, nbytes=BLOCK_BYTES)


def _drain(policy: EvictionPolicy) -> list[int]:
    gone = []
    while (node := policy.victim()) is not None:
        policy.remove(node)
        gone.append(node)
    return gone


def test_every_baseline_has_a_conformance_class() -> None:
    tested = {cls.name for cls in _Baseline.__subclasses__()}
    assert tested == set(BASELINES)


def test_fifo_ignores_uses() -> None:
    policy = BASELINES["fifo"]()
    _admit(policy, 0, 1, 2)
    policy.touch(0)
    assert _drain(policy) == [0, 1, 2]


def test_lfu_evicts_the_least_used() -> None:
    policy = Lfu()
    _admit(policy, 0, 1, 2)
    for node in (0, 0, 1):
        policy.touch(node)
    assert _drain(policy) == [2, 1, 0]


def test_gdsf_lets_frequency_fade() -> None:
    """A node with three uses outlives newcomers only until their age has risen above it."""
    policy = Gdsf()
    _admit(policy, 0)
    policy.touch(0)
    policy.touch(0)
    survived = 0
    for node in range(1, 10):
        _admit(policy, node)
        victim = policy.victim()
        assert victim is not None
        policy.remove(victim)
        if victim == 0:
            break
        survived += 1
    assert 2 <= survived < 9


def test_sieve_spares_a_used_node_once_and_does_not_move_it() -> None:
    policy = Sieve()
    _admit(policy, 0, 1, 2)
    policy.touch(0)
    assert policy.victim() == 1
    policy.remove(1)
    assert _drain(policy) == [2, 0]


def test_s3_fifo_sends_a_ghost_to_the_main_queue() -> None:
    policy = S3Fifo()
    _admit(policy, *range(10))
    policy.remove(0)
    _admit(policy, 0)  # was evicted without a use: comes back into the main queue
    order = _drain(policy)
    assert order[-1] == 0


def test_w_tinylfu_refuses_a_newcomer_that_is_used_less() -> None:
    policy = WTinyLfu()
    _admit(policy, *range(200))
    for node in range(200):
        policy.touch(node)
    assert policy.victim() is not None  # the window now has its share
    _admit(policy, *range(200, 210))
    victims = []
    for _ in range(8):
        victim = policy.victim()
        assert victim is not None
        policy.remove(victim)
        victims.append(victim)
    assert all(victim >= 198 for victim in victims)


def test_the_sketch_counts_and_forgets() -> None:
    sketch = FrequencySketch()
    for _ in range(8):
        sketch.add(42)
    assert sketch.count(42) == 8
    assert sketch.count(43) == 0
    for number in range(FrequencySketch.SAMPLE):
        sketch.add(number % 50 + 1000)
    assert sketch.count(42) <= 4


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_under_pins_never_offers_them(name: str) -> None:
    policy = BASELINES[name]()
    _admit(policy, *range(20))
    for node in range(0, 20, 2):
        policy.pin(node)
    assert sorted(_drain(policy)) == list(range(1, 20, 2))


@pytest.mark.parametrize(
    ("theirs", "make_policy"), [("LRU", Lru), ("FIFO", BASELINES["fifo"]), ("LFU", Lfu), ("Sieve", Sieve)]
)
def test_hits_equal_those_of_libcachesim(theirs: str, make_policy: Callable[[], EvictionPolicy]) -> None:
    """As plain object caches, block by block, without the prefix rule."""
    library = pytest.importorskip("libcachesim", reason="libcachesim is not installed; it only cross-checks baselines")
    trace = mixed_trace(MixPlan(sessions=200))
    capacity = trace.capacity(0.05)
    policy, cache = make_policy(), getattr(library, theirs)(capacity)
    hits = expected = 0
    for node in (node for chain in trace.chains for node in chain):
        request = library.Request()
        request.obj_id, request.obj_size = node, 1
        expected += cache.get(request)
        if node in policy:
            hits += 1
            policy.touch(node)
            continue
        if len(policy) >= capacity:
            victim = policy.victim()
            assert victim is not None
            policy.remove(victim)
        policy.admit(node, nbytes=BLOCK_BYTES)
    assert hits == expected > 0
