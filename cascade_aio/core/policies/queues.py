"""The evictable nodes, in one queue per class and age bucket, and which queue loses next.

Every queue is a doubly linked list through columns shared by all; a node is in one queue or in none.
As time passes nodes move to the queue of the next age (each at most ``AGES`` times in a life, so O(1)
amortised). The queues that may have nodes are bits of one integer in the order of eviction: the next
victim is in that of the lowest bit, whatever the number of nodes.

Invariants: a queue is ordered by last use, oldest first, up to nodes put at its front because their
last child left; bit r of ``_waiting`` is set if the queue of rank r has a node (and until a search finds
it empty: queues empty and fill again much more often than they are searched); no queue of a lower rank
than ``_least`` has a node.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np

from cascade_aio.core.policies.ages import AGES, age_edges
from cascade_aio.core.policies.kinds import CLASSES
from cascade_aio.core.policies.orders import LEAST_RECENT, Order

MOVES_MAX = 512
"""Nodes that change their age bucket per call: about half a millisecond."""
NODE_BYTES = 18
"""Memory per node: tick, two links and the queue number."""

_QUEUES = CLASSES * AGES
assert _QUEUES < 1 << 16, "a queue number has two bytes"


class AgedQueues:
    """Slots (1, 2, …; 0 is none) by class and age. ``ensure`` before a new slot is used."""

    def __init__(self) -> None:
        self.tick = array("q", bytes(8))
        """Last use of every slot, in events; set by the owner before a slot is queued."""
        self._prev = array("I", bytes(4))
        self._next = array("I", bytes(4))
        self.queue = array("H", bytes(2))
        """Where every slot is: queue number + 1, or 0 for none."""
        self._heads = array("I", bytes(4 * _QUEUES))
        self._tails = array("I", bytes(4 * _QUEUES))
        self._edges = age_edges()
        self._leave_age = np.tile(np.append(self._edges[1:], 1 << 62), CLASSES)
        self._order = LEAST_RECENT
        self._rank_of = self._order.rank_of
        self._waiting = 0
        self._least = _QUEUES
        self._least_queue = 0
        """The queue of that rank, if there is one: mostly the next victim is where the last one was."""

    def ensure(self, slots: int) -> None:
        """Make room for slots below ``slots``."""
        grown = slots - len(self.tick)
        if grown > 0:
            for column in (self.tick, self._prev, self._next, self.queue):
                column.frombytes(bytes(grown * column.itemsize))

    def set_order(self, order: Order) -> None:
        """Evict from the queues in this order from now on. O(queues), 0.1 ms."""
        self._order = order
        self._rank_of = order.rank_of
        filled = np.asarray(self._heads)[order.queues] != 0
        self._waiting = int.from_bytes(np.packbits(filled, bitorder="little").tobytes(), "little")
        self._search()

    def append(self, slot: int, kind: int) -> None:
        """Queue a slot that was used just now."""
        self._append(slot, kind * AGES)

    def put_back(self, slot: int, kind: int, now: int) -> None:
        """Queue a slot used earlier, before the others of its age: its children went, it goes next."""
        number = kind * AGES + bisect_right(self._edges, now - self.tick[slot]) - 1
        head = self._heads[number]
        self.queue[slot] = number + 1
        self._prev[slot] = 0
        self._next[slot] = head
        self._heads[number] = slot
        if head:
            self._prev[head] = slot
        else:
            self._tails[number] = slot
            self._has_node(number)

    def unlink(self, slot: int) -> None:
        """Take ``slot`` out of the queue that it is in. O(1)."""
        number = self.queue[slot] - 1
        before, after = self._prev[slot], self._next[slot]
        self.queue[slot] = 0
        if before:
            self._next[before] = after
        else:
            self._heads[number] = after
        if after:
            self._prev[after] = before
        else:
            self._tails[number] = before

    def first(self) -> int:
        """The slot to evict next, 0 if none is queued."""
        return self._heads[self._least_queue] or self._search()

    def take_first(self) -> int:
        """Take the slot to evict next (there is one) out of its queue."""
        slot = self.first()
        number = self._least_queue
        after = self._heads[number] = self._next[slot]
        self.queue[slot] = 0
        if after:
            self._prev[after] = 0
        else:
            self._tails[number] = 0
        return slot

    def is_above_first(self, kind: int) -> bool:
        """Whether a node of class ``kind``, used now, would be in a denser queue than the next to go."""
        return not self.first() or self._rank_of[kind * AGES] > self._least

    def advance(self, now: int) -> None:
        """Move nodes that have grown older to the queues of their age, at most ``MOVES_MAX``."""
        heads = np.asarray(self._heads)
        filled = np.flatnonzero(heads)
        due = filled[np.asarray(self.tick)[heads[filled]] + self._leave_age[filled] <= now]
        tick, edges, moves = self.tick, self._edges, MOVES_MAX
        for number in due[::-1].tolist():
            kind_at, leave_age = number - number % AGES, edges[number % AGES + 1]
            slot = self._heads[number]
            while slot and moves and now - tick[slot] >= leave_age:
                self.unlink(slot)
                self._append(slot, kind_at + bisect_right(edges, now - tick[slot]) - 1)
                moves -= 1
                slot = self._heads[number]

    def _append(self, slot: int, number: int) -> None:
        tail = self._tails[number]
        self.queue[slot] = number + 1
        self._prev[slot] = tail
        self._next[slot] = 0
        self._tails[number] = slot
        if tail:
            self._next[tail] = slot
        else:
            self._heads[number] = slot
            self._has_node(number)

    def _has_node(self, number: int) -> None:
        """A queue was empty and is not any more."""
        rank = self._rank_of[number]
        self._waiting |= 1 << rank
        if rank < self._least:
            self._least = rank
            self._least_queue = number

    def _search(self) -> int:
        """Find the first queue that has a node; its first slot, 0 if all are empty."""
        waiting, queue_at, heads = self._waiting, self._order.queue_at, self._heads
        while waiting:
            rank = (waiting & -waiting).bit_length() - 1
            number = queue_at[rank]
            if heads[number]:
                self._waiting, self._least, self._least_queue = waiting, rank, number
                return heads[number]
            waiting ^= 1 << rank
        self._waiting, self._least = 0, _QUEUES
        return 0
