"""Belady's rule under the prefix constraint: evict the leaf whose next use is furthest away.

Needs the whole trace beforehand, so it only bounds what a policy could reach in a replay of that
trace. (It is the greedy rule; with the constraint an optimum could differ from it by a little.)
"""

from __future__ import annotations

import heapq

from cascade_aio.core.replay import ReplayTrace

_NEVER = 1 << 60


class Clairvoyant:
    """An ``EvictionPolicy`` for ``replay`` of ``trace`` alone: it knows when each node is used next.

    O(log n) per event. A pinned node is passed over, as in every policy.
    """

    def __init__(self, trace: ReplayTrace) -> None:
        self._uses: list[list[int]] = [[] for _ in range(trace.nodes)]
        for number in range(len(trace.chains) - 1, -1, -1):
            for node in trace.chains[number]:
                self._uses[node].append(number)  # popped from the end: earliest first
        self._next = [_NEVER] * trace.nodes
        self._children = [0] * trace.nodes
        self._parent = trace.parents
        self._resident = bytearray(trace.nodes)
        self._pins: dict[int, int] = {}
        self._count = 0
        self._heap: list[tuple[int, int, int]] = []
        self._order = 0

    def admit(self, node: int, *, parent: int = -1, nbytes: int, identity: int | None = None) -> None:
        assert not self._resident[node], f"node {node} is in the tier already"
        self._resident[node] = 1
        self._count += 1
        if parent >= 0:
            self._children[parent] += 1
        self.touch(node)

    def touch(self, node: int) -> None:
        uses = self._uses[node]
        assert uses, f"node {node} is used more often than in the trace"
        uses.pop()
        self._next[node] = uses[-1] if uses else _NEVER
        self._offer(node)

    def pin(self, node: int) -> None:
        self._pins[node] = self._pins.get(node, 0) + 1

    def unpin(self, node: int) -> None:
        self._pins[node] -= 1
        if not self._pins[node]:
            del self._pins[node]
            self._offer(node)

    def remove(self, node: int) -> None:
        assert self._resident[node], f"node {node} is not in the tier"
        self._resident[node] = 0
        self._count -= 1
        parent = self._parent[node]
        if parent >= 0:
            self._children[parent] -= 1
            self._offer(parent)

    def victim(self) -> int | None:
        while self._heap:
            further, _, node = self._heap[0]
            if self._may_go(node) and -further == self._next[node]:
                return node
            heapq.heappop(self._heap)
        return None

    def __contains__(self, node: int) -> bool:
        return 0 <= node < len(self._resident) and bool(self._resident[node])

    def __len__(self) -> int:
        return self._count

    def _may_go(self, node: int) -> bool:
        return bool(self._resident[node]) and not self._children[node] and node not in self._pins

    def _offer(self, node: int) -> None:
        if self._may_go(node):
            self._order -= 1  # of equals the one offered last: the end of a chain before its middle
            heapq.heappush(self._heap, (-self._next[node], self._order, node))
