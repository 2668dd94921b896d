"""Which class of I/O is served next: a queue per class and a guaranteed share. Pure.

The rule. DEMAND goes before WRITE, WRITE before BACKGROUND, that before IDLE; within a class first come,
first served.
So that nothing starves, a lower class that waits while bytes of a higher one are served earns a share
of them (``SHARES``); once it has earned ``QUANTUM_BYTES`` it is served one request out of turn, whose
bytes are then owed back. On average a waiting class gets its share of the bandwidth, never more than
one request at a time, and nothing is lost while it has nothing to do.

In flight, a class together with those below it is kept to a part of the bounds (``IN_FLIGHT_PARTS``), so
that a demand read finds room in the device at once instead of waiting for a background request to end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Generic, TypeVar

from cascade_aio.abc.storage import Priority

T = TypeVar("T")

SHARES = {Priority.DEMAND: 0.0, Priority.WRITE: 1 / 8, Priority.BACKGROUND: 1 / 16, Priority.IDLE: 1 / 32}
"""Part of the bytes of higher classes that a waiting class earns."""

QUANTUM_BYTES = 64 << 10
"""Earnings at which a lower class is served out of turn: small against one large request."""

IN_FLIGHT_PARTS = {Priority.DEMAND: 1.0, Priority.WRITE: 0.75, Priority.BACKGROUND: 0.5, Priority.IDLE: 0.25}
"""Part of the bounds on requests and bytes in flight that a class and those below it may fill together."""

CHARGE_BYTES_MIN = 4096
"""A request costs at least one page, also one that moves no bytes (a sync)."""


_PRIORITIES = tuple(Priority)  # iterating the enumeration itself costs microseconds per request


class ServiceQueues(Generic[T]):
    """First-in-first-out queues of one item type per ``Priority``, with the rule above."""

    __slots__ = ("_earned", "_queues", "_size")

    def __init__(self) -> None:
        self._queues: tuple[deque[T], ...] = tuple(deque() for _ in _PRIORITIES)
        self._earned = [0.0 for _ in _PRIORITIES]
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, priority: Priority, item: T) -> None:
        self._queues[priority].append(item)
        self._size += 1

    def move(self, item: T, before: Priority, after: Priority) -> None:
        """Put ``item``, which waits in class ``before``, at the end of class ``after``."""
        queue = self._queues[before]
        queue.remove(item)
        if not queue:
            self._earned[before] = 0.0
        self._queues[after].append(item)

    def head(self, priority: Priority) -> T:
        return self._queues[priority][0]

    def pop(self, priority: Priority) -> T:
        """Remove the first item; a class that has nothing to do earns nothing."""
        item = self._queues[priority].popleft()
        self._size -= 1
        if not self._queues[priority]:
            self._earned[priority] = 0.0
        return item

    def waiting(self, priority: Priority) -> int:
        return len(self._queues[priority])

    def choose(self, blocked: Collection[Priority] = ()) -> Priority | None:
        """The class to serve next among those not ``blocked`` (no room in flight); ``None`` if there is none."""
        chosen: Priority | None = None
        for priority in _PRIORITIES:
            if not self._queues[priority] or priority in blocked:
                continue
            if chosen is None:
                chosen = priority
            elif self._earned[priority] >= QUANTUM_BYTES:
                return priority
        return chosen

    def charge(self, served: Priority, nbytes: int) -> None:
        """Account for a request of ``nbytes`` of class ``served``; call it before its item is popped."""
        if len(self._queues[served]) == self._size:
            return  # no other class waits
        cost = max(nbytes, CHARGE_BYTES_MIN)
        if any(self._queues[priority] for priority in _PRIORITIES if priority < served):
            self._earned[served] -= cost
        for priority in _PRIORITIES:
            if priority > served and self._queues[priority]:
                self._earned[priority] += cost * SHARES[priority]
