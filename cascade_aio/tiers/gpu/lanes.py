"""Lanes: streams of one kind of copy each, and word of how far they have got.

What it is: each lane is a stream of its own, first in, first out. A ``Ticket`` is the end of one submission: an event
that streams of others can be made to wait for, and a callback for the host. The driver's host function only *wakes*
(an eventfd, read by the loop); what has ended is asked of the events, because a device that is lost wakes nobody. The
host function runs in a stream beside the lane, so that copies never wait for the host.

Invariants: tickets of a lane end in order, each exactly once, with an error if the device failed; a callback runs on
the loop, and after it nobody touches the copy's memory any more. Must not know what is copied, or why.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
from collections.abc import Callable, Sequence

from cascade_aio.abc.device import DeviceDriver, DeviceError, DeviceMemoryError, MemoryCopy

WATCH_S = 0.25
"""A device that is lost never wakes us: while something is in flight, the events are asked this often."""

EVENTS_KEPT_MAX = 256
"""Events that are kept for the next submission instead of being destroyed."""

OnEnd = Callable[[DeviceError | None], None]


def _ignore(error: DeviceError | None) -> None:
    """Nobody waits on the host for this submission."""


class Ticket:
    """The end of one submission. ``event`` is recorded behind it; ``on_end`` is called once, on the loop. Numbers
    ascend within a lane."""

    __slots__ = ("_waiters", "error", "event", "finished", "number", "on_end")

    def __init__(self, number: int, event: int, on_end: OnEnd) -> None:
        self.number = number
        self.event = event
        self.on_end = on_end
        self.finished = False
        self.error: DeviceError | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def finish(self, error: DeviceError | None) -> None:
        self.finished, self.error = True, error
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
        self.on_end(error)

    async def watched(self) -> None:
        """Return at the end. May be cancelled. Raises ``DeviceError``."""
        await self._end()
        if self.error is not None:
            raise self.error

    async def wait(self) -> None:
        """Return at the end. A cancelled caller, whose memory it is, waits on, then raises. Raises ``DeviceError``."""
        cancelled: asyncio.CancelledError | None = None
        while not self.finished:
            try:
                await self._end()
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        if self.error is not None:
            raise self.error

    async def _end(self) -> None:
        if not self.finished:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter


class _Lane:
    __slots__ = ("armed", "bell", "pending", "stream")

    def __init__(self, stream: int, bell: int) -> None:
        self.stream = stream
        self.bell = bell  # the stream of the host function
        self.pending: collections.deque[Ticket] = collections.deque()
        self.armed = False


class Lanes:
    """Named lanes of one device. Belongs to the loop that made it; synchronous but for ``drain``."""

    def __init__(self, driver: DeviceDriver, names: Sequence[str], on_failure: Callable[[DeviceError], None]) -> None:
        """``on_failure`` is called once, before any ticket ends with the error."""
        self._driver = driver
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._events: list[int] = []
        self._lanes: dict[str, _Lane] = {}
        self.failure: DeviceError | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None
        self.submissions = 0
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            for name in names:
                self._lanes[name] = _Lane(driver.create_stream(), driver.create_stream())
        except BaseException:
            self._destroy()
            raise
        self._loop.add_reader(self._event_fd, self._on_wake)

    @property
    def in_flight(self) -> int:
        return sum(len(lane.pending) for lane in self._lanes.values())

    def submit(
        self,
        name: str,
        copies: Sequence[MemoryCopy],
        on_end: OnEnd = _ignore,
        *,
        after: int | None = None,
        behind: Ticket | None = None,
    ) -> Ticket:
        """Enqueue copies, behind everything that the stream ``after`` has now, and the submission ``behind``.

        Raises ``DeviceError`` when nothing was enqueued; ``on_end`` is not called then. Whatever fails later is the
        ticket's.
        """
        if self.failure is not None:
            raise self.failure
        driver, lane = self._driver, self._lanes[name]
        event = self._event()
        try:
            if after is not None:
                driver.record(event, after)
                driver.wait(lane.stream, event)
            if behind is not None and not behind.finished:
                driver.wait(lane.stream, behind.event)
            driver.copy(copies, lane.stream)
        except DeviceError as error:
            self._events.append(event)
            if error.lost:
                self.fail(error)
            elif isinstance(error, DeviceMemoryError):
                self.refuse(error)
            raise
        self.submissions += 1
        ticket = Ticket(self.submissions, event, on_end)
        lane.pending.append(ticket)
        try:
            driver.record(event, lane.stream)
        except DeviceError as error:
            self.fail(error)  # the copies run, and nobody could tell when they end
            return ticket
        self._arm(lane)
        if self._watch is None and lane.pending:
            self._watch = self._loop.call_later(WATCH_S, self._look)
        return ticket

    def order(self, stream: int, ticket: Ticket) -> None:
        """What is enqueued in ``stream`` from now on runs after ``ticket``. Raises ``DeviceError``."""
        if not ticket.finished:
            self._driver.wait(stream, ticket.event)
        elif ticket.error is not None:
            raise ticket.error

    def fence(self, stream: int) -> int:
        """An event behind everything that ``stream`` has now; ``retire`` it once it is done."""
        event = self._event()
        self._driver.record(event, stream)
        return event

    def is_done(self, event: int) -> bool:
        return self._driver.is_done(event)

    def retire(self, event: int) -> None:
        """The event is done and nobody will look at it again."""
        if len(self._events) < EVENTS_KEPT_MAX:
            self._events.append(event)
        else:
            self._driver.destroy_event(event)

    def refuse(self, error: DeviceError) -> None:
        """Nothing new is taken, ``error`` says why; what is in flight ends as it will."""
        if self.failure is None:
            self.failure = error
            self._on_failure(error)

    def fail(self, error: DeviceError) -> None:
        """The device cannot be used any more: every ticket ends with ``error``, and so does whatever comes."""
        self.refuse(error)
        for lane in self._lanes.values():
            pending, lane.pending = lane.pending, collections.deque()
            for ticket in pending:
                self._events.append(ticket.event)
                ticket.finish(error)
        self._settle()

    async def drain(self) -> None:
        """Return when nothing is in flight. Cancelled, it stops waiting."""
        while self.in_flight:
            self._idle = self._loop.create_future()
            await self._idle

    def close(self) -> None:
        """Nothing may be in flight. Repeated calls do nothing."""
        if self._event_fd < 0:
            return
        assert not self.in_flight, "drain first"
        self._loop.remove_reader(self._event_fd)
        self._destroy()

    def _destroy(self) -> None:
        fd, self._event_fd = self._event_fd, -1
        if self._watch is not None:
            self._watch.cancel()
        with contextlib.suppress(DeviceError):  # of a device that is lost: then they are gone
            for event in self._events:
                self._driver.destroy_event(event)
            for lane in self._lanes.values():
                self._driver.destroy_stream(lane.stream)
                self._driver.destroy_stream(lane.bell)
        self._lanes.clear()
        os.close(fd)

    def _event(self) -> int:
        return self._events.pop() if self._events else self._driver.create_event()

    def _arm(self, lane: _Lane) -> None:
        """Be woken when the first of the lane ends; one host function at a time. Where that is refused, the watch
        finds out, only later."""
        if lane.pending and not lane.armed:
            try:
                self._driver.wait(lane.bell, lane.pending[0].event)
                self._driver.notify(lane.bell, self._event_fd)
                lane.armed = True
            except DeviceError as error:
                if error.lost:
                    self.fail(error)

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # somebody looked already
            os.eventfd_read(self._event_fd)
        self._reap()

    def _look(self) -> None:
        self._watch = None
        self._reap()
        if self.in_flight:
            self._watch = self._loop.call_later(WATCH_S, self._look)

    def _reap(self) -> None:
        ended: list[Ticket] = []
        try:
            for lane in self._lanes.values():
                woken = False
                while lane.pending and self._driver.is_done(lane.pending[0].event):
                    ended.append(lane.pending.popleft())
                    woken = True
                if woken:
                    lane.armed = False
                    self._arm(lane)
        except DeviceError as error:
            self.fail(error)
        for ticket in ended:
            ticket.finish(None)
            self.retire(ticket.event)
        self._settle()

    def _settle(self) -> None:
        if self._idle is not None and not self._idle.done() and not self.in_flight:
            self._idle.set_result(None)
