"""Which order of eviction would have had the most hits lately: small shadow caches on a sample of blocks.

A model may be wrong about traffic it was not made for. So the learnt order runs against three simple
ones: each rules a *shadow*, a cache of names without blocks, which sees the uses of one block in
2 ** shift (chosen by hash) and holds as large a part of the tier's blocks. All shadows see the same
uses, so their hits can be compared whoever rules the tier. A simple order takes over while it leads by
more than chance explains.

Bounded: a shadow holds at most ``SLOTS_MAX`` names; when the tier outgrows that, the sample is halved.
Must not know the tier, its nodes or how orders are made.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from cascade_aio.core.policies.orders import KEEP_OLD, LEAST_RECENT, LEAST_USED, Order
from cascade_aio.core.policies.queues import AgedQueues

SLOTS_MAX = 1024
SHIFT_MIN = 2
"""At most a quarter of all blocks are in the sample: what a small tier pays for, per event, is this share."""
JUDGE_USES = 256
"""Sampled uses between two judgements."""
MEMORY = 0.98
"""Weight that hits keep from one judgement to the next: half is forgotten in 34 (some 9,000 sampled uses)."""
MARGIN = 1.0
"""Lead that a simple order needs over the learnt one, in square roots of its hits."""

_HASHES = 1 << 64
_SIMPLE = (LEAST_USED, KEEP_OLD, LEAST_RECENT)  # in the order of the shadows


class _Shadow(Protocol):
    hits: int

    def use(self, hashed: int, kind: int, now: int, room: int) -> None: ...
    def advance(self, now: int) -> None: ...
    def shrink(self, threshold: int) -> None: ...


class _RecencyShadow:
    """Leaf-first LRU: chains are used from their end, so plain LRU keeps parents longer than children."""

    def __init__(self) -> None:
        self.hits = 0
        self._names: OrderedDict[int, None] = OrderedDict()

    def use(self, hashed: int, kind: int, now: int, room: int) -> None:
        names = self._names
        while len(names) > room:
            names.popitem(last=False)
        if hashed in names:
            self.hits += 1
            names.move_to_end(hashed)
        else:
            names[hashed] = None

    def advance(self, now: int) -> None:
        """Its order does not depend on ages."""

    def shrink(self, threshold: int) -> None:
        self._names = OrderedDict.fromkeys(name for name in self._names if name < threshold)


class _QueueShadow:
    """The tier's own queues, for sampled names, under any order."""

    def __init__(self, order: Order) -> None:
        self.hits = 0
        self._queues = AgedQueues()
        self._slots: dict[int, int] = {}
        self._names = [0]
        self._free: list[int] = []
        self.set_order(order)

    def set_order(self, order: Order) -> None:
        self._queues.set_order(order)

    def use(self, hashed: int, kind: int, now: int, room: int) -> None:
        queues, slots = self._queues, self._slots
        while len(slots) > room:  # of uses before this one: what the newest is may still turn out
            slot = queues.take_first()
            del slots[self._names[slot]]
            self._free.append(slot)
        held = slots.get(hashed)
        if held is None:
            slot = slots[hashed] = self._new_slot(hashed)
        else:
            slot = held
            self.hits += 1
            queues.unlink(slot)
        queues.tick[slot] = now
        queues.append(slot, kind)

    def reclassify(self, hashed: int, kind: int, now: int) -> None:
        slot = self._slots.get(hashed)
        if slot is not None:
            self._queues.unlink(slot)
            self._queues.put_back(slot, kind, now)

    def advance(self, now: int) -> None:
        self._queues.advance(now)

    def shrink(self, threshold: int) -> None:
        for name, slot in [(name, slot) for name, slot in self._slots.items() if name >= threshold]:
            self._queues.unlink(slot)
            del self._slots[name]
            self._free.append(slot)

    def _new_slot(self, hashed: int) -> int:
        if self._free:
            slot = self._free.pop()
            self._names[slot] = hashed
            return slot
        self._names.append(hashed)
        self._queues.ensure(len(self._names))
        return len(self._names) - 1


class Duel:
    """The shadows and their scores. Deterministic; ``use`` is O(1) amortised but for a rare halving of the
    sample, O(``SLOTS_MAX``)."""

    def __init__(self) -> None:
        self._shift = SHIFT_MIN
        self.threshold = _HASHES >> SHIFT_MIN
        """A hash below it is in the sample."""
        self._learnt = _QueueShadow(LEAST_RECENT)
        self._queued = (self._learnt, _QueueShadow(LEAST_USED), _QueueShadow(KEEP_OLD))
        self._shadows: tuple[_Shadow, ...] = (*self._queued, _RecencyShadow())
        self._scores = [0.0] * len(self._shadows)
        self._to_shrink: list[_Shadow] = []
        self._uses = 0
        self.ruler: Order | None = None
        """The simple order that should rule now; ``None`` for the learnt one."""

    def set_learnt(self, order: Order) -> None:
        self._learnt.set_order(order)

    def use(self, hashed: int, kind: int, now: int, resident: int, *, is_full: bool = True) -> bool:
        """A block of the sample was used and is of class ``kind`` from now on, at event ``now``, in a tier of
        ``resident`` blocks. Whether it was time for a judgement and ``ruler`` has changed.

        Until the tier ``is_full`` (has evicted something) the shadows evict nothing either: a sample is never
        exactly its share of the tier, and what they lost by that would count."""
        room = (resident >> self._shift) + 1
        if room > SLOTS_MAX:
            self._shift += 1
            self.threshold //= 2
            self._to_shrink = list(self._shadows)
            return False
        if self._to_shrink:  # one at a time, for the sake of who waits
            self._to_shrink.pop().shrink(self.threshold)
        if not is_full:
            room = 2 * SLOTS_MAX
        for shadow in self._shadows:
            shadow.use(hashed, kind, now, room)
        self._uses += 1
        return self._uses % JUDGE_USES == 0 and self._judge(now)

    def reclassify(self, hashed: int, kind: int, now: int) -> None:
        """A block of the sample turned out to be of class ``kind`` (it does not end its prompt)."""
        for shadow in self._queued:
            shadow.reclassify(hashed, kind, now)

    def _judge(self, now: int) -> bool:
        for number, shadow in enumerate(self._shadows):
            shadow.advance(now)
            self._scores[number] = self._scores[number] * MEMORY + shadow.hits
            shadow.hits = 0
        learnt, *simple = self._scores
        lead = max(simple)
        before, self.ruler = self.ruler, None
        if lead > learnt + MARGIN * max(learnt, 1.0) ** 0.5:
            self.ruler = _SIMPLE[simple.index(lead)]
        return before is not self.ruler
