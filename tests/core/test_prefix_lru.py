"""Eviction policies: the shared conformance suite, PrefixLru against a slow model, its own rules."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.core import eviction
from cascade_aio.core.eviction import NODE_BYTES, PASSES_PER_SEARCH_MAX, SHARED_ROUNDS, Lru, PrefixLru
from cascade_aio.testing.eviction import EvictionConformance


class TestPrefixLruConforms(EvictionConformance):
    def make_policy(self) -> EvictionPolicy:
        return PrefixLru()


class TestPrefixLruWithoutProtectionConforms(EvictionConformance):
    def make_policy(self) -> EvictionPolicy:
        return PrefixLru(protected_share_max=0.0)


class TestLruConforms(EvictionConformance):
    respects_parents = False

    def make_policy(self) -> EvictionPolicy:
        return Lru()


class SlowModel:
    """The rules of PrefixLru written down with dicts and one full scan per search."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.now = 0
        self.tick: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self.parent: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self.known_children: dict[int, set[int]] = {}
        self.rounds: dict[int, int] = {}
        self.protected: set[int] = set()

    def children(self, node: int) -> list[int]:
        return [child for child, parent in self.parent.items() if parent == node]

    def use(self, node: int) -> None:
        self.now += 1
        self.tick[node] = self.now
        self.renew(node)

    def renew(self, node: int) -> None:
        self.rounds[node] = SHARED_ROUNDS
        self.protected.discard(node)

    def forget(self, node: int) -> None:
        if node not in self.tick and not self.children(node):
            self.known_children.pop(node, None)

    def admit(self, node: int, parent: int, nbytes: int) -> None:
        above = parent
        while above in self.tick and above != node:
            above = self.parent[above]
        if above == node:
            parent = -1
        self.size[node] = nbytes
        self.parent[node] = parent
        self.pins[node] = 0
        self.use(node)
        if parent >= 0:
            self.known_children.setdefault(parent, set()).add(node)
            self.renew(parent)

    def unpin(self, node: int) -> None:
        self.pins[node] -= 1
        if not self.pins[node]:
            self.use(node)

    def remove(self, node: int) -> None:
        parent = self.parent.pop(node)
        tick = self.tick.pop(node)
        del self.size[node], self.pins[node]
        self.protected.discard(node)
        if parent in self.tick:
            self.tick[parent] = max(self.tick[parent], tick)
        self.forget(parent)
        self.forget(node)

    def victim(self) -> int | None:
        for passes in range(PASSES_PER_SEARCH_MAX + 1):
            free = [node for node in self.tick if not self.pins[node] and not self.children(node)]
            if not free:
                return None
            node = min(free, key=self.tick.__getitem__)
            lives_on = sum(self.size[other] for other in self.protected | {node})
            shared = len(self.known_children.get(node, ())) >= 2
            fits = lives_on <= self.share * sum(self.size.values())
            if not (shared and self.rounds[node] and fits):
                return node
            if passes == PASSES_PER_SEARCH_MAX:
                self.rounds[node] = 0
                return node
            rounds = self.rounds[node] - 1
            self.use(node)
            self.rounds[node] = rounds
            self.protected.add(node)
        raise AssertionError("unreachable")


NODES = 12
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("admit", "admit", "touch", "pin", "unpin", "remove", "victim", "evict", "evict")),
        st.integers(0, NODES - 1),
        st.integers(-1, NODES - 1),
        st.integers(1, 4),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS, share=st.sampled_from((0.0, 0.3, 0.5, 1.0)))
def test_prefix_lru_agrees_with_the_slow_model(events: list[tuple[str, int, int, int]], share: float) -> None:
    policy, model = PrefixLru(protected_share_max=share), SlowModel(share)
    for action, node, parent, size in events:
        resident = node in model.tick
        if action == "admit" and not resident and parent != node:
            policy.admit(node, parent=parent, nbytes=size)
            model.admit(node, parent, size)
        elif action == "touch" and resident:
            policy.touch(node)
            model.use(node)
        elif action == "pin" and resident:
            policy.pin(node)
            model.pins[node] += 1
        elif action == "unpin" and resident and model.pins[node]:
            policy.unpin(node)
            model.unpin(node)
        elif action == "remove" and resident and not model.pins[node]:
            policy.remove(node)
            model.remove(node)
        elif action in ("victim", "evict"):
            victim = policy.victim()
            assert victim == model.victim()
            if action == "evict" and victim is not None:
                policy.remove(victim)
                model.remove(victim)
        assert len(policy) == len(model.tick)
        assert policy.admitted_bytes == sum(model.size.values())
        assert policy.protected_bytes == sum(model.size[other] for other in model.protected)
        assert policy.protected_bytes <= policy.admitted_bytes
    while (victim := policy.victim()) is not None:
        assert victim == model.victim()
        policy.remove(victim)
        model.remove(victim)
    assert all(model.pins[node] or model.children(node) for node in model.tick)


def test_a_parent_inherits_the_heat_of_its_children() -> None:
    policy = PrefixLru()
    policy.admit(0, nbytes=1)
    policy.admit(1, parent=0, nbytes=1)
    policy.admit(2, nbytes=1)
    policy.touch(1)
    policy.remove(1)
    assert policy.victim() == 2, "the parent of a hot child is hotter than an older stranger"


def test_inherited_heat_is_not_lost_when_a_colder_child_leaves() -> None:
    policy = PrefixLru(protected_share_max=0.0)
    policy.admit(0, nbytes=1)
    policy.admit(1, parent=0, nbytes=1)
    policy.admit(2, nbytes=1)
    policy.admit(3, parent=0, nbytes=1)
    policy.remove(3)
    policy.remove(1)
    assert policy.victim() == 2, "the parent is as hot as its hottest child was"


def test_a_shared_prefix_outlives_strangers_but_not_for_ever() -> None:
    policy = PrefixLru()
    policy.admit(0, nbytes=1)
    for child in (1, 2):
        policy.admit(child, parent=0, nbytes=1)
        policy.remove(child)
    age = 0
    for stranger in range(10, 200):
        policy.admit(stranger, nbytes=1)
        if len(policy) > 8:
            victim = policy.victim()
            assert victim is not None
            policy.remove(victim)
            if victim == 0:
                age = stranger
                break
    assert age, "the shared node was never evicted"
    assert age - 10 > (SHARED_ROUNDS + 1) * 7, "it got less than its rounds"


def test_protected_bytes_stay_below_their_share() -> None:
    policy = PrefixLru(protected_share_max=0.25)
    for prefix in range(100):
        policy.admit(prefix, nbytes=10)
        for child in (1000, 1001):
            policy.admit(child, parent=prefix, nbytes=1)
            policy.remove(child)
    total, stranger, protected = policy.admitted_bytes, 5000, set()
    while (victim := policy.victim()) is not None and victim < 5000:
        assert policy.protected_bytes <= 0.25 * total
        protected.add(policy.protected_bytes)
        policy.remove(victim)
        policy.admit(stranger, nbytes=10)
        stranger += 1
    assert max(protected) == 250, "the share was not used"


def test_a_tier_of_shared_nodes_gives_a_victim_after_bounded_passes() -> None:
    policy = PrefixLru(protected_share_max=1.0)
    for prefix in range(1000):
        policy.admit(prefix, nbytes=1)
        for child in (2000, 2001):
            policy.admit(child, parent=prefix, nbytes=1)
            policy.remove(child)
    assert policy.victim() == policy.victim() == PASSES_PER_SEARCH_MAX


@pytest.mark.parametrize("make", [PrefixLru, Lru])
def test_many_pins_do_not_slow_the_search(make: Callable[[], EvictionPolicy]) -> None:
    """Looks at what the next search would meet, not at the time: pinned nodes are out of the way."""
    policy = make()
    for node in range(20_000):
        policy.admit(node, nbytes=1)
    for node in range(19_000):
        policy.pin(node)
    assert policy.victim() == 19_000
    if isinstance(policy, PrefixLru):
        assert policy._next[0] == 19_001, "pinned nodes are still in the way of the next search"
    for node in range(19_000):
        policy.unpin(node)
    assert policy.victim() == 19_000


def test_a_parent_placed_far_along_the_cold_end_stays_evictable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "PLACE_STEPS_MAX", 1)
    policy = PrefixLru()
    for chain in range(0, 30, 3):
        for node in range(chain, chain + 3):
            policy.admit(node, parent=node - 1 if node > chain else -1, nbytes=1)
    for leaf in range(2, 30, 3):
        policy.touch(leaf)
    assert policy.victim() == 2, "all inner nodes are parked now"
    for middle in range(1, 30, 3):
        policy.remove(middle)
    gone = []
    while (victim := policy.victim()) is not None:
        policy.remove(victim)
        gone.append(victim)
    assert gone[:1] == [0]
    assert sorted(gone) == sorted([*range(0, 30, 3), *range(2, 30, 3)])
    assert sorted(gone[:10]) == list(range(0, 30, 3)), "roots are colder than the touched leaves"


def test_programmer_errors_are_assertions() -> None:
    policies: list[EvictionPolicy] = [PrefixLru(), Lru()]
    for policy in policies:
        policy.admit(3, nbytes=1)
        policy.pin(3)
        for call in (
            partial(policy.admit, 3, nbytes=1),
            partial(policy.remove, 3),
            partial(policy.touch, 2),
            partial(policy.remove, 4),
            partial(policy.unpin, 4),
            partial(policy.admit, 5, parent=5, nbytes=1),
        ):
            with pytest.raises(AssertionError):
                call()


def test_memory_per_node() -> None:
    policy = PrefixLru()
    for node in range(100_000):
        policy.admit(node, parent=node - 1 if node % 50 else -1, nbytes=1 << 20)
    columns = [value for value in vars(policy).values() if hasattr(value, "itemsize")]
    assert sum(column.itemsize for column in columns) == NODE_BYTES
    assert sum(column.buffer_info()[1] * column.itemsize for column in columns) == policy.nbytes
    assert policy.nbytes <= 75 * 100_000


def test_shared_prefixes_beat_plain_lru_on_a_session_workload() -> None:
    """Sessions share one of a few system prompts; more block hits than plain LRU at equal space."""

    def hits(policy: EvictionPolicy) -> int:
        rng = random.Random(7)
        found = 0
        for session in range(600):
            prompt = rng.randrange(6)
            chain = [prompt * 8 + i for i in range(8)] + [1000 + session * 12 + i for i in range(12)]
            for turn in (14, 20):
                for node in reversed(chain[:turn]):
                    if node in policy:
                        found += 1
                        policy.touch(node)
                for i, node in enumerate(chain[:turn]):
                    if node not in policy:
                        while len(policy) >= 60:
                            victim = policy.victim()
                            assert victim is not None
                            policy.remove(victim)
                        policy.admit(node, parent=chain[i - 1] if i else -1, nbytes=1)
        return found

    assert hits(PrefixLru()) > hits(Lru())
