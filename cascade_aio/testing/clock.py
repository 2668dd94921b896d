"""A clock that moves only when told to."""

from __future__ import annotations


class ManualClock:
    """``Clock`` for tests: starts at ``wall_ns``, advanced by ``advance``; each look at it may tick."""

    def __init__(self, wall_ns: int = 1_700_000_000_000_000_000, *, tick_ns: int = 0) -> None:
        self._start_ns = wall_ns
        self._now_ns = wall_ns
        self._tick_ns = tick_ns

    def wall_ns(self) -> int:
        self._now_ns += self._tick_ns
        return self._now_ns

    def monotonic_s(self) -> float:
        return (self.wall_ns() - self._start_ns) / 1e9

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass (negative: the wall clock was set back)."""
        self._now_ns += round(seconds * 1e9)
