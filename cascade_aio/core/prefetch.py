"""What to read ahead of a consumer, and how far: events in, actions out. Pure.

A *position* is a place in the list of wanted blocks, in the order in which they will be needed. The
planner asks for the size of one position at a time (``next_position``), answers each event with the
actions it calls for, and keeps a *window*: bytes of blocks that were started or have landed and that
the consumer has not taken yet. A plan without a consumer (``streaming=False``) counts only what is
being read; where the rest finds room is then the arena's question.

The window, in bytes, moves inside ``WindowBounds`` at the end of each *epoch* (one window's worth of
blocks taken, or landed without a consumer):

* the consumer had to wait, and the last growth brought bandwidth (or none was tried yet): double it;
* the consumer never waited and never used the near half of the window: take a quarter off;
* without a consumer: double it while that brings bandwidth.

A window that was full is filled again in steps (``REFILL_BYTES_MAX``), not block by block: what is asked for
together lies together on disk and is read, verified and told of as one. A consumer that waits ends that.

It is never below twice the largest block seen (one is consumed from while the next lands), but for
the upper bound; and one block may always be under way, however large.

Refused room pauses the plan until something is taken or given back. Must not know: blocks, names,
extents, queues, clocks (times are arguments).
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

MIB = 1 << 20
START_BYTES = 32 * MIB
"""First window: 10 ms of a device of 3 GB/s, and more than keeps it busy (its latency is below 1 ms)."""
GAIN_MIN = 1.1
"""Growth of the window is worth while if the bandwidth grew by this factor."""
REFILL_BYTES_MAX = 4 * MIB
"""Room that a full window collects before it is filled again: one large request …"""
REFILL_WINDOW_PART = 4
"""… and at most one part in so many of the window."""
BLOCKS_MIN = 2
"""Blocks of the largest size that the window holds at least."""


@dataclasses.dataclass(frozen=True, slots=True)
class WindowBounds:
    """Bounds of the window in bytes; ``0 < bytes_min <= bytes_max``."""

    bytes_min: int
    bytes_max: int

    def __post_init__(self) -> None:
        assert 0 < self.bytes_min <= self.bytes_max, self


class Act(enum.Enum):
    """What the owner of the plan does about a position.

    ``START`` bring it, in the background class. ``CANCEL`` stop bringing it. ``HURRY`` somebody waits for
    it now. ``DROP`` it has landed and is not wanted any more: keep nothing for it.
    """

    START = "start"
    CANCEL = "cancel"
    HURRY = "hurry"
    DROP = "drop"


class Action(NamedTuple):
    act: Act
    position: int


class _State(enum.Enum):
    STARTED = "started"
    LANDED = "landed"


class _Wanted:
    __slots__ = ("nbytes", "state")

    def __init__(self, nbytes: int, state: _State) -> None:
        self.nbytes = nbytes
        self.state = state


class PrefetchPlanner:
    """The plan for one list of ``count`` positions. See the module's text. Each event is O(1) amortised."""

    def __init__(self, count: int, bounds: WindowBounds, *, streaming: bool) -> None:
        self._count = count
        self._bounds = bounds
        self._streaming = streaming
        self._window = min(max(START_BYTES, bounds.bytes_min), bounds.bytes_max)
        self._cursor = 0  # first position that was not described
        self._end = count  # nothing from here on is wanted
        self._head: tuple[int, int] | None = None  # described, waiting for the window
        self._wanted: dict[int, _Wanted] = {}  # in order of position
        self._paused = False
        self._full = False  # and collects room
        self._largest_bytes = 0
        self._ahead_bytes = 0
        self._flight_bytes = 0
        self._landed_bytes = 0
        # The epoch.
        self._epoch_bytes = 0
        self._epoch_stalls = 0
        self._epoch_landed_min: int | None = None
        self._rate_before = 0.0
        self._tried = False
        # Bandwidth: bytes landed and seconds with something under way, in this epoch.
        self._rate_bytes = 0
        self._busy_s = 0.0
        self._busy_since_s: float | None = None
        self._bandwidth = 0.0
        self.stalls = 0
        """How often the consumer asked for what had not landed."""
        self.refusals = 0

    # -- what is so ----------------------------------------------------------------------------

    @property
    def window_bytes(self) -> int:
        return min(max(self._window, BLOCKS_MIN * self._largest_bytes), self._bounds.bytes_max)

    @property
    def ahead_bytes(self) -> int:
        """Bytes that fill the window now."""
        return self._ahead_bytes

    @property
    def in_flight_bytes(self) -> int:
        return self._flight_bytes

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """As last measured, 0.0 before: bytes landed per second in which something was under way."""
        return self._bandwidth

    @property
    def exhausted(self) -> bool:
        """Nothing is left to start and nothing is under way."""
        return self._head is None and self._cursor >= self._end and not self._flight_bytes

    def next_position(self) -> int | None:
        """The position to describe next (``describe``, ``absent``), or ``None`` while nothing more fits."""
        if self._head is not None or self._paused or self._cursor >= self._end:
            return None
        if self._ahead_bytes and self._ahead_bytes >= self.window_bytes:
            return None
        return self._cursor

    # -- the list ------------------------------------------------------------------------------

    def describe(self, position: int, nbytes: int, *, resident: bool, now_s: float) -> list[Action]:
        """``position`` takes ``nbytes`` of arena; ``resident``: it is there already."""
        assert position == self._cursor, (position, self._cursor)
        assert nbytes > 0, nbytes
        self._cursor += 1
        self._largest_bytes = max(self._largest_bytes, nbytes)
        if resident:
            if self._streaming:
                self._enter(position, nbytes, _State.LANDED, now_s)
            return []
        self._head = (position, nbytes)
        return self._advance(now_s)

    def absent(self, position: int) -> None:
        """Nobody has ``position``: a stream ends there, other plans go on behind it."""
        assert position == self._cursor, (position, self._cursor)
        self._cursor += 1
        if self._streaming:
            self._end = self._cursor

    def cancel(self) -> list[Action]:
        """Nothing is wanted any more."""
        self._cursor = self._end = self._count
        self._head = None
        actions = [
            Action(Act.CANCEL if wanted.state is _State.STARTED else Act.DROP, position)
            for position, wanted in self._wanted.items()
        ]
        for position in list(self._wanted):
            self._leave(position)
        return actions

    # -- what was started ----------------------------------------------------------------------

    def landed(self, position: int, now_s: float) -> list[Action]:
        """``position`` is in the arena."""
        wanted = self._wanted.get(position)
        if wanted is None:  # taken or cancelled meanwhile
            return []
        assert wanted.state is _State.STARTED, position
        self._clock(now_s)
        self._rate_bytes += wanted.nbytes
        if self._streaming:
            wanted.state = _State.LANDED
            self._flight_bytes -= wanted.nbytes
            self._landed_bytes += wanted.nbytes
            self._idle(now_s)
        else:
            self._leave(position)
            self._idle(now_s)
            self._pass(wanted.nbytes)
        return self._advance(now_s)

    def failed(self, position: int, now_s: float) -> list[Action]:
        """``position`` cannot be had. A stream will end there: what lies behind it is not wanted any more."""
        if position not in self._wanted:
            return []
        self._clock(now_s)
        self._leave(position)
        self._idle(now_s)
        if not self._streaming:
            return self._advance(now_s)
        self._end = self._cursor = position + 1  # from there it goes on, should it be had after all
        self._head = None
        return self._forget_from(position + 1)

    def refused(self, position: int, now_s: float) -> list[Action]:
        """There is no room for ``position`` without evicting what is hotter: it is tried again after a ``room``."""
        self.refusals += 1
        self._paused = True
        wanted = self._wanted.get(position)
        if wanted is None:
            return []
        self._clock(now_s)
        behind = self._forget_from(position + 1)
        self._leave(position)
        self._idle(now_s)
        self._cursor = position
        self._head = None
        return behind

    def room(self, now_s: float) -> list[Action]:
        """Something was given back: a plan that paused goes on."""
        self._paused = False
        return self._advance(now_s)

    def lost(self, position: int, now_s: float) -> None:
        """``position`` had landed and was given up for somebody else's need before it was taken."""
        if position in self._wanted:
            self._leave(position)
            self._window = max(self._bounds.bytes_min, self._window // 2)
            self._new_epoch()

    # -- the consumer --------------------------------------------------------------------------

    def asked(self, position: int, now_s: float) -> list[Action]:
        """The consumer waits for ``position``, which has not landed."""
        self.stalls += 1
        self._epoch_stalls += 1
        self._full = False
        wanted = self._wanted.get(position)
        if wanted is not None:
            hurry = [Action(Act.HURRY, position)] if wanted.state is _State.STARTED else []
            return hurry + self._advance(now_s)
        self._skip_to(position + 1)
        return self._advance(now_s)

    def taken(self, position: int, nbytes: int, now_s: float) -> list[Action]:
        """The consumer has ``position`` now."""
        self._clock(now_s)
        if position in self._wanted:
            self._leave(position)
        self._idle(now_s)
        self._skip_to(position + 1)
        least = self._epoch_landed_min
        self._epoch_landed_min = self._landed_bytes if least is None else min(least, self._landed_bytes)
        self._pass(nbytes)
        return self._advance(now_s)

    # -- inside --------------------------------------------------------------------------------

    def _skip_to(self, position: int) -> None:
        """The consumer is that far: a plan that was behind, or had ended before, goes on from there."""
        if self._head is not None and self._head[0] < position:
            self._head = None
        if self._cursor < position:
            self._cursor = position
        if self._end <= position:
            self._end = self._count

    def _advance(self, now_s: float) -> list[Action]:
        if self._head is None or self._paused:
            return []
        position, nbytes = self._head
        if self._ahead_bytes:
            window = self.window_bytes
            if self._ahead_bytes + nbytes > window:
                self._full = True
                return []
            if self._full and self._ahead_bytes + min(REFILL_BYTES_MAX, window // REFILL_WINDOW_PART) > window:
                return []
        self._full = False
        self._head = None
        self._enter(position, nbytes, _State.STARTED, now_s)
        return [Action(Act.START, position)]

    def _enter(self, position: int, nbytes: int, state: _State, now_s: float) -> None:
        self._wanted[position] = _Wanted(nbytes, state)
        self._ahead_bytes += nbytes
        self._full = self._full or self._ahead_bytes >= self.window_bytes
        if state is _State.STARTED:
            if not self._flight_bytes:
                self._busy_since_s = now_s
            self._flight_bytes += nbytes
        else:
            self._landed_bytes += nbytes

    def _leave(self, position: int) -> None:
        wanted = self._wanted.pop(position)
        self._ahead_bytes -= wanted.nbytes
        if wanted.state is _State.STARTED:
            self._flight_bytes -= wanted.nbytes
        else:
            self._landed_bytes -= wanted.nbytes

    def _forget_from(self, position: int) -> list[Action]:
        """Nothing from ``position`` on is wanted for now."""
        behind = [(other, wanted.state) for other, wanted in self._wanted.items() if other >= position]
        for other, _ in behind:
            self._leave(other)
        return [Action(Act.CANCEL if state is _State.STARTED else Act.DROP, other) for other, state in behind]

    def _clock(self, now_s: float) -> None:
        """Count the time since the last event as busy if something was under way."""
        if self._busy_since_s is not None:
            self._busy_s += now_s - self._busy_since_s
            self._busy_since_s = now_s

    def _idle(self, now_s: float) -> None:
        if not self._flight_bytes:
            self._busy_since_s = None

    def _pass(self, nbytes: int) -> None:
        """``nbytes`` left the window at its near end: an epoch ends after one window's worth of them."""
        self._epoch_bytes += nbytes
        if self._epoch_bytes < self.window_bytes:
            return
        if self._busy_s > 0:
            self._bandwidth = self._rate_bytes / self._busy_s
        if self._epoch_stalls or not self._streaming:
            if not self._tried or self._bandwidth >= GAIN_MIN * self._rate_before:
                self._tried = True
                self._rate_before = self._bandwidth
                self._window = min(2 * self.window_bytes, self._bounds.bytes_max)
        elif (self._epoch_landed_min or 0) > self.window_bytes // 2:
            self._window = max(self._bounds.bytes_min, self.window_bytes * 3 // 4)
            self._tried = False
        self._new_epoch()

    def _new_epoch(self) -> None:
        self._epoch_bytes = 0
        self._epoch_stalls = 0
        self._epoch_landed_min = None
        self._rate_bytes = 0
        self._busy_s = 0.0
