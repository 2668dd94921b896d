"""Conformance suite of ``EvictionPolicy``: subclass it, give ``make_policy``, run it with pytest.

Every implementation, shipped or yours, promises what is tested here, whatever order it evicts in.

    class TestMine(EvictionConformance):
        def make_policy(self) -> EvictionPolicy:
            return Mine()
"""

from __future__ import annotations

import random

import pytest

from cascade_aio.abc.eviction import EvictionPolicy

BLOCK_BYTES = 1 << 20


class EvictionConformance:
    """Subclass and override ``make_policy``; clear ``respects_parents`` for a policy that ignores them,
    ``least_recent_first`` for one that prefers another order even among unrelated nodes."""

    respects_parents = True
    least_recent_first = True

    def make_policy(self) -> EvictionPolicy:
        raise NotImplementedError("return a new, empty policy")

    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return self.make_policy()

    def drain(self, policy: EvictionPolicy) -> list[int]:
        """Evict until nothing may go; the nodes in order."""
        gone = []
        while (node := policy.victim()) is not None:
            policy.remove(node)
            gone.append(node)
        return gone

    def test_an_empty_policy_has_no_victim(self, policy: EvictionPolicy) -> None:
        assert policy.victim() is None
        assert len(policy) == 0
        assert 0 not in policy

    def test_unrelated_nodes_leave_in_order_of_use(self, policy: EvictionPolicy) -> None:
        for node in range(6):
            policy.admit(node, nbytes=BLOCK_BYTES)
        policy.touch(0)
        policy.touch(3)
        order = self.drain(policy)
        assert order == [1, 2, 4, 5, 0, 3] if self.least_recent_first else sorted(order) == list(range(6))

    def test_a_victim_stays_until_removed_and_is_given_again(self, policy: EvictionPolicy) -> None:
        policy.admit(7, nbytes=BLOCK_BYTES)
        policy.admit(8, nbytes=BLOCK_BYTES)
        assert policy.victim() == policy.victim() == 7
        assert 7 in policy
        assert len(policy) == 2
        policy.remove(7)
        assert 7 not in policy
        assert len(policy) == 1
        assert policy.victim() == 8

    def test_pins_are_counted(self, policy: EvictionPolicy) -> None:
        policy.admit(1, nbytes=BLOCK_BYTES)
        policy.pin(1)
        policy.pin(1)
        assert policy.victim() is None
        policy.unpin(1)
        assert policy.victim() is None
        assert 1 in policy
        policy.unpin(1)
        assert policy.victim() == 1

    def test_pinned_nodes_are_passed_over(self, policy: EvictionPolicy) -> None:
        for node in range(10):
            policy.admit(node, nbytes=BLOCK_BYTES)
        for node in (0, 1, 2, 5):
            policy.pin(node)
        order = self.drain(policy)
        assert order == [3, 4, 6, 7, 8, 9] if self.least_recent_first else sorted(order) == [3, 4, 6, 7, 8, 9]
        for node in (0, 1, 2, 5):
            policy.unpin(node)
        assert sorted(self.drain(policy)) == [0, 1, 2, 5]

    def test_a_number_may_come_back_as_another_node(self, policy: EvictionPolicy) -> None:
        for _ in range(3):
            policy.admit(0, nbytes=BLOCK_BYTES)
            policy.admit(1, parent=0, nbytes=2 * BLOCK_BYTES)
            assert len(policy) == 2
            assert sorted(self.drain(policy)) == [0, 1]
            policy.admit(1, nbytes=BLOCK_BYTES)
            policy.admit(0, parent=1, nbytes=BLOCK_BYTES)
            assert sorted(self.drain(policy)) == [0, 1]

    def test_children_leave_before_their_parents(self, policy: EvictionPolicy) -> None:
        if not self.respects_parents:
            pytest.skip("this policy ignores parents by design")
        parents = {0: -1, 1: 0, 2: 1, 3: 1, 4: 3, 5: -1, 6: 5}
        for node, parent in parents.items():
            policy.admit(node, parent=parent, nbytes=BLOCK_BYTES)
        order = self.drain(policy)
        assert sorted(order) == sorted(parents)
        assert all(order.index(node) < order.index(parent) for node, parent in parents.items() if parent >= 0)

    def test_a_parent_counts_from_the_moment_it_enters(self, policy: EvictionPolicy) -> None:
        if not self.respects_parents:
            pytest.skip("this policy ignores parents by design")
        policy.admit(2, parent=1, nbytes=BLOCK_BYTES)
        policy.admit(1, parent=0, nbytes=BLOCK_BYTES)
        policy.admit(0, nbytes=BLOCK_BYTES)
        policy.touch(2)
        assert self.drain(policy) == [2, 1, 0]

    def test_a_pinned_child_holds_its_ancestors(self, policy: EvictionPolicy) -> None:
        if not self.respects_parents:
            pytest.skip("this policy ignores parents by design")
        for node in range(4):
            policy.admit(node, parent=node - 1, nbytes=BLOCK_BYTES)
        policy.pin(2)
        assert self.drain(policy) == [3]
        policy.unpin(2)
        assert self.drain(policy) == [2, 1, 0]

    def test_links_in_a_circle_do_not_make_nodes_immortal(self, policy: EvictionPolicy) -> None:
        policy.admit(0, parent=2, nbytes=BLOCK_BYTES)
        policy.admit(1, parent=0, nbytes=BLOCK_BYTES)
        policy.admit(2, parent=1, nbytes=BLOCK_BYTES)
        assert sorted(self.drain(policy)) == [0, 1, 2]

    def test_a_deleted_parent_leaves_its_children(self, policy: EvictionPolicy) -> None:
        for node in range(3):
            policy.admit(node, parent=node - 1, nbytes=BLOCK_BYTES)
        policy.remove(1)
        assert sorted(self.drain(policy)) == [0, 2]

    @pytest.mark.parametrize("seed", range(5))
    def test_the_promises_hold_under_random_events(self, seed: int) -> None:
        """Two policies fed the same events give the same victims, and no victim breaks a promise."""
        rng = random.Random(seed)
        policies = [self.make_policy(), self.make_policy()]
        parent_of: dict[int, int] = {}
        pins: dict[int, int] = {}
        for _ in range(2000):
            node = rng.randrange(40)
            action = rng.choice(("admit", "touch", "pin", "unpin", "remove", "victim", "victim"))
            if action == "victim":
                victims = {policy.victim() for policy in policies}
                assert len(victims) == 1, "the same events gave different victims"
                self._check_victim(victims.pop(), parent_of, pins)
            elif action == "admit" and node not in parent_of:
                parent_of[node] = rng.randrange(node) if node and rng.random() < 0.8 else -1
                for policy in policies:
                    policy.admit(node, parent=parent_of[node], nbytes=BLOCK_BYTES)
            elif node in parent_of and _is_allowed(action, pins.get(node, 0)):
                for policy in policies:
                    getattr(policy, action)(node)
                pins[node] = pins.get(node, 0) + {"pin": 1, "unpin": -1}.get(action, 0)
                if action == "remove":
                    del parent_of[node]
            assert all(len(policy) == len(parent_of) for policy in policies)
            assert all((node in policy) == (node in parent_of) for policy in policies)

    def _check_victim(self, victim: int | None, parent_of: dict[int, int], pins: dict[int, int]) -> None:
        held = set(parent_of.values()) if self.respects_parents else set()
        free = {node for node in parent_of if not pins.get(node) and node not in held}
        assert victim in free if free else victim is None


def _is_allowed(action: str, pins: int) -> bool:
    return pins > 0 if action == "unpin" else pins == 0 if action == "remove" else action in ("touch", "pin")
