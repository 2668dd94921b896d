"""Published eviction policies to measure ours against; none of them knows that blocks form prompts.

``Fifo``, ``Lfu``, ``S3Fifo`` (Yang et al., SOSP 2023), ``Sieve`` (Zhang et al., NSDI 2024), ``WTinyLfu``
(Einziger et al., 2017) and ``Gdsf`` (Cherkasova 1998, with cost = size). Written for comparison: they
keep the interface and its promises about pins, not its promise about parents, and not our memory
limits per node. The interface tells no capacity, so shares are of what is resident.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

Order = OrderedDict[int, None]


class Baseline:
    """Residents, pins and uses; a subclass keeps an order of the nodes that may go.

    A pinned node leaves the order and enters it again with its uses at the last unpin.
    """

    def __init__(self) -> None:
        self._names: dict[int, int] = {}  # node -> identity
        self._uses: dict[int, int] = {}
        self._pins: dict[int, int] = {}

    def admit(self, node: int, *, parent: int = -1, nbytes: int, identity: int | None = None) -> None:
        assert 0 <= node != parent, f"node {node} cannot be its own parent"
        assert node not in self, f"node {node} is in the tier already"
        self._names[node] = node if identity is None else identity
        self._uses[node] = 0
        self._came(node)
        self._enter(node)

    def touch(self, node: int) -> None:
        assert node in self, f"node {node} is not in the tier"
        self._uses[node] += 1
        if node not in self._pins:
            self._used(node)

    def pin(self, node: int) -> None:
        assert node in self, f"node {node} is not in the tier"
        if node not in self._pins:
            self._leave(node)
        self._pins[node] = self._pins.get(node, 0) + 1

    def unpin(self, node: int) -> None:
        pins = self._pins.get(node, 0)
        assert pins, f"node {node} is not pinned"
        if pins > 1:
            self._pins[node] = pins - 1
        else:
            del self._pins[node]
            self._enter(node)

    def remove(self, node: int) -> None:
        assert node in self, f"node {node} is not in the tier"
        assert node not in self._pins, f"node {node} is pinned"
        self._leave(node)
        self._gone(node)
        del self._uses[node]
        del self._names[node]

    def victim(self) -> int | None:
        """See ``EvictionPolicy``."""
        raise NotImplementedError

    def __contains__(self, node: int) -> bool:
        return node in self._names

    def __len__(self) -> int:
        return len(self._names)

    def _came(self, node: int) -> None:
        """A block entered the tier (and will be put into the order)."""

    def _gone(self, node: int) -> None:
        """A block left the tier (and is out of the order)."""

    def _enter(self, node: int) -> None:
        raise NotImplementedError

    def _used(self, node: int) -> None:
        """A node of the order was used."""

    def _leave(self, node: int) -> None:
        raise NotImplementedError


class Fifo(Baseline):
    """First in, first out."""

    def __init__(self) -> None:
        super().__init__()
        self._order: Order = OrderedDict()

    def victim(self) -> int | None:
        return next(iter(self._order), None)

    def _enter(self, node: int) -> None:
        self._order[node] = None

    def _leave(self, node: int) -> None:
        del self._order[node]


class Sieve(Fifo):
    """A hand sweeps from old to new; it spares what was used since it came by. Nodes never move.

    ``_order`` is what the hand has before it. It starts again at the oldest as soon as it has passed
    all, before newer nodes come.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed: Order = OrderedDict()  # older than the hand, spared

    def victim(self) -> int | None:
        while True:
            node = next(iter(self._order), None)
            if node is None or not self._uses[node]:
                return node
            self._uses[node] = 0
            self._leave(node)
            self._passed[node] = None
            self._turn_back()

    def remove(self, node: int) -> None:
        super().remove(node)
        self._turn_back()

    def _leave(self, node: int) -> None:
        self._order.pop(node, None)
        self._passed.pop(node, None)

    def _turn_back(self) -> None:
        if not self._order:
            self._order, self._passed = self._passed, self._order


class _ByPriority(Baseline):
    """The node with the lowest priority goes; a heap with entries that are dropped when outdated."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[float, int, int]] = []
        self._valid: dict[int, tuple[float, int, int]] = {}
        self._now = 0

    def _priority(self, node: int) -> float:
        raise NotImplementedError

    def victim(self) -> int | None:
        heap = self._heap
        while heap:
            if self._valid.get(heap[0][2]) is heap[0]:
                return heap[0][2]
            heapq.heappop(heap)
        return None

    def _enter(self, node: int) -> None:
        self._now += 1
        entry = self._valid[node] = (self._priority(node), self._now, node)
        heapq.heappush(self._heap, entry)

    _used = _enter

    def _leave(self, node: int) -> None:
        del self._valid[node]


class Lfu(_ByPriority):
    """Fewest uses since it came; of equals the least recently used."""

    def _priority(self, node: int) -> float:
        return self._uses[node]


class Gdsf(_ByPriority):
    """Uses above an age that rises to the priority of every victim: frequency that fades."""

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def _priority(self, node: int) -> float:
        return self._age + self._uses[node] + 1

    def remove(self, node: int) -> None:
        if node == self.victim():
            self._age = max(self._age, self._valid[node][0])
        super().remove(node)


class S3Fifo(Baseline):
    """A small queue for newcomers (10 %), a main queue, and ghosts that go straight to the main one."""

    SMALL_SHARE = 0.1
    USES_MAX = 3

    def __init__(self) -> None:
        super().__init__()
        self._small: Order = OrderedDict()
        self._main: Order = OrderedDict()
        self._ghosts: Order = OrderedDict()
        self._promoted: set[int] = set()

    def victim(self) -> int | None:
        """See ``EvictionPolicy``."""
        while True:
            if self._small and (len(self._small) > self.SMALL_SHARE * len(self) or not self._main):
                node = next(iter(self._small))
                if not self._uses[node]:
                    return node
                del self._small[node]
                self._uses[node] = 0
                self._promoted.add(node)
                self._main[node] = None
            elif self._main:
                node = next(iter(self._main))
                if not self._uses[node]:
                    return node
                self._uses[node] = min(self._uses[node], self.USES_MAX) - 1
                self._main.move_to_end(node)
            else:
                return None

    def _came(self, node: int) -> None:
        if self._names[node] in self._ghosts:
            del self._ghosts[self._names[node]]
            self._promoted.add(node)

    def _gone(self, node: int) -> None:
        if node in self._promoted:
            self._promoted.discard(node)
            return
        self._ghosts[self._names[node]] = None
        while len(self._ghosts) > len(self):
            self._ghosts.popitem(last=False)

    def _enter(self, node: int) -> None:
        (self._main if node in self._promoted else self._small)[node] = None

    def _leave(self, node: int) -> None:
        self._small.pop(node, None)
        self._main.pop(node, None)


class WTinyLfu(Baseline):
    """A window (1 %) before a segmented LRU; a newcomer must be used more often than whom it replaces."""

    WINDOW_SHARE = 0.01
    PROTECTED_SHARE = 0.8

    def __init__(self) -> None:
        super().__init__()
        self._window: Order = OrderedDict()
        self._probation: Order = OrderedDict()
        self._protected: Order = OrderedDict()
        self._sketch = FrequencySketch()
        self._chosen: int | None = None
        self._is_full = False

    def victim(self) -> int | None:
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> int | None:
        window_max = max(1.0, self.WINDOW_SHARE * len(self))
        if not self._is_full:  # the first search tells the capacity: all before it was filling
            self._is_full = True
            while len(self._window) > window_max:
                self._probation[self._window.popitem(last=False)[0]] = None
        rival = self._main_victim()
        candidate = next(iter(self._window), None)
        if rival is None or candidate is None or len(self._window) <= window_max:
            return candidate if rival is None else rival
        count = self._sketch.count
        if count(self._names[candidate]) <= count(self._names[rival]):
            return candidate
        del self._window[candidate]
        self._probation[candidate] = None
        return rival

    def _main_victim(self) -> int | None:
        return next(iter(self._probation or self._protected), None)

    def _enter(self, node: int) -> None:
        self._chosen = None
        self._sketch.add(self._names[node])
        self._window[node] = None

    def _used(self, node: int) -> None:
        self._chosen = None
        self._sketch.add(self._names[node])
        if node in self._window:
            self._window.move_to_end(node)
            return
        self._probation.pop(node, None)
        self._protected[node] = None
        self._protected.move_to_end(node)
        if len(self._protected) > self.PROTECTED_SHARE * len(self):
            demoted, _ = self._protected.popitem(last=False)
            self._probation[demoted] = None

    def _leave(self, node: int) -> None:
        self._chosen = None
        self._window.pop(node, None)
        self._probation.pop(node, None)
        self._protected.pop(node, None)


class FrequencySketch:
    """Count-min with four rows of counters up to 15, halved every ``SAMPLE`` additions."""

    WIDTH = 1 << 16
    SAMPLE = 10 * WIDTH
    COUNT_MAX = 15
    _SEEDS = (0x9E37_79B9_7F4A_7C15, 0xC2B2_AE3D_27D4_EB4F, 0x1656_67B1_9E37_79F9, 0xD6E8_FEB8_6659_FD93)

    def __init__(self) -> None:
        self._rows = [bytearray(self.WIDTH) for _ in self._SEEDS]
        self._added = 0

    def _places(self, identity: int) -> list[int]:
        return [((identity + 1) * seed >> 40) % self.WIDTH for seed in self._SEEDS]

    def add(self, identity: int) -> None:
        for row, place in zip(self._rows, self._places(identity), strict=True):
            if row[place] < self.COUNT_MAX:
                row[place] += 1
        self._added += 1
        if self._added >= self.SAMPLE:
            self._added //= 2
            self._rows = [bytearray((np.frombuffer(row, dtype=np.uint8) >> 1).tobytes()) for row in self._rows]

    def count(self, identity: int) -> int:
        return min(row[place] for row, place in zip(self._rows, self._places(identity), strict=True))


BASELINES: dict[str, Callable[[], Baseline]] = {
    "fifo": Fifo,
    "lfu": Lfu,
    "s3-fifo": S3Fifo,
    "sieve": Sieve,
    "w-tinylfu": WTinyLfu,
    "gdsf": Gdsf,
}
"""By the names of reports."""
