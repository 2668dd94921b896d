"""Stamps that order the records of all writers: a hybrid logical clock.

A stamp is a wall-clock time in nanoseconds, raised where needed so that stamps of one clock strictly
increase and a stamp made after seeing another's is larger than it. The newer of two records of a
block is the one with the larger stamp, whichever node wrote it. Pure: the time comes in as an
argument. (Kulkarni et al., "Logical Physical Clocks", 2014, with the logical part folded into the
nanoseconds.)

Invariant: ``last`` is at most ``skew_ns_max`` ahead of the latest wall time given, plus the number of
stamps made since; so a root with one absurd stamp cannot push everybody's clocks into the future.
"""

from __future__ import annotations

SKEW_NS_MAX_DEFAULT = 60 * 1_000_000_000
"""A minute: more than NTP-less nodes drift in practice, less than would hide a wrong date."""


class HybridClock:
    """One writer's clock. Not thread-safe; nothing blocks."""

    def __init__(self, *, skew_ns_max: int = SKEW_NS_MAX_DEFAULT) -> None:
        assert skew_ns_max >= 0, "skew_ns_max is a duration"
        self._skew_ns_max = skew_ns_max
        self._last = 0
        self._refused = 0

    def next(self, wall_ns: int) -> int:
        """A new stamp: larger than all made or observed before, and at least ``wall_ns``."""
        last = self._last + 1
        self._last = wall_ns if wall_ns > last else last
        return self._last

    def observe(self, stamp: int, wall_ns: int) -> bool:
        """Take note of a stamp found in a record. ``False``: it is more than ``skew_ns_max`` ahead of
        ``wall_ns``; it is not followed, only counted (such records compare by their stamp as ever)."""
        if stamp > wall_ns + self._skew_ns_max:
            self._refused += 1
            return False
        if stamp > self._last:
            self._last = stamp
        return True

    @property
    def last(self) -> int:
        """The largest stamp made or accepted; 0 before the first."""
        return self._last

    @property
    def refused(self) -> int:
        """How many stamps were too far ahead: another node's date is wrong when this grows."""
        return self._refused
