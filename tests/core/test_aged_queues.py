"""AgedQueues against a model that looks at every node: the next one to go, whatever happened before."""

from __future__ import annotations

import random

import numpy as np

from cascade_aio.core.policies.ages import AGES, age_edges
from cascade_aio.core.policies.kinds import CLASSES, LEARNT
from cascade_aio.core.policies.orders import KEEP_OLD, LEAST_RECENT, LEAST_USED, Order, by_density
from cascade_aio.core.policies.queues import MOVES_MAX, AgedQueues

_SLOTS = 60
_EVENTS = 2000


class _Model:
    """Every queue a list, first to go first."""

    def __init__(self) -> None:
        self.queues: list[list[int]] = [[] for _ in range(CLASSES * AGES)]
        self.order: Order = LEAST_RECENT

    def first(self) -> int:
        return next((self.queues[number][0] for number in self.order.queue_at if self.queues[number]), 0)

    def unlink(self, slot: int) -> None:
        next(queue for queue in self.queues if slot in queue).remove(slot)


def _age(now: int, tick: int) -> int:
    return int(np.searchsorted(age_edges(), now - tick, side="right")) - 1


def test_the_next_to_go_is_that_of_a_search_through_all() -> None:
    rng = random.Random(5)
    orders = (LEAST_RECENT, LEAST_USED, KEEP_OLD, by_density(np.random.default_rng(5).random((LEARNT, AGES))))
    queues, model = AgedQueues(), _Model()
    queues.ensure(_SLOTS + 1)
    queued: set[int] = set()
    taken = 0
    for now in range(1, _EVENTS):
        kind, slot = rng.randrange(CLASSES), rng.randrange(1, _SLOTS + 1)
        happening = rng.random()
        if happening < 0.05:
            model.order = rng.choice(orders)
            queues.set_order(model.order)
        elif happening < 0.40 and queued:  # runs of victims empty queues, which must not be looked at again
            first = model.first()
            assert queues.take_first() == first
            model.unlink(first)
            queued.remove(first)
            taken += 1
        elif slot in queued:
            queues.unlink(slot)
            model.unlink(slot)
            queued.remove(slot)
        elif happening < 0.7:
            queues.tick[slot] = now
            queues.append(slot, kind)
            model.queues[kind * AGES].append(slot)
            queued.add(slot)
        else:
            queues.tick[slot] = rng.randrange(now)
            queues.put_back(slot, kind, now)
            model.queues[kind * AGES + _age(now, queues.tick[slot])].insert(0, slot)
            queued.add(slot)
        first = model.first()
        assert queues.first() == first
        above = not first or model.order.rank_of[kind * AGES] > model.order.rank_of[queues.queue[first] - 1]
        assert queues.is_above_first(kind) == above
    assert taken > _EVENTS // 10


def test_nodes_grow_older_and_no_more_than_promised_at_once() -> None:
    queues = AgedQueues()
    count = MOVES_MAX + 100
    queues.ensure(count + 1)
    for slot in range(1, count + 1):
        queues.tick[slot] = slot
        queues.append(slot, 0)
    now = count + age_edges()[3]
    queues.advance(now)
    moved = [slot for slot in range(1, count + 1) if queues.queue[slot] - 1 == _age(now, slot)]
    assert moved == list(range(1, MOVES_MAX + 1))
    queues.advance(now)
    assert all(queues.queue[slot] - 1 == _age(now, slot) for slot in range(1, count + 1))
    assert queues.first() == 1
