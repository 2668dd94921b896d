"""How late the loop is: a ticker, a histogram of its lateness, and the watchdog that it feeds."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from types import TracebackType
from typing import Any, Self

from cascade_aio.daemon.notify import SystemdNotifier

TICK_SECONDS = 0.02

BOUNDS_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the classes of all histograms of times, in seconds; one more class is for what is above."""


class Histogram:
    """Counts of times by class. ``observe`` costs half a microsecond."""

    __slots__ = ("count", "counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.count = 0
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self.count += 1
        self.total_s += seconds

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready: counts per class of ``BOUNDS_S`` and above, and their sum."""
        return {
            "counts": list(self.counts),
            "total_seconds": self.total_s,
            "p50_seconds": self.quantile(0.5),
            "p99_seconds": self.quantile(0.99),
        }

    def quantile(self, share: float) -> float:
        """Upper bound of the class in which ``share`` of all observations are; 0 without any."""
        seen, wanted = 0, share * self.count
        for bound, count in zip(BOUNDS_S, self.counts, strict=False):
            seen += count
            if seen >= wanted and seen:
                return bound
        return BOUNDS_S[-1] if self.count else 0.0


class LagMeter:
    """A scope in which ``histogram`` is told every ``TICK_SECONDS`` how late the loop is."""

    def __init__(self, histogram: Histogram, notifier: SystemdNotifier) -> None:
        self._histogram = histogram
        self._notifier = notifier
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._tick(), name="cascade-service-lag")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None, "entered"
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        feed_s = self._notifier.watchdog_seconds
        fed_s = loop.time()
        while True:
            due_s = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now_s = loop.time()
            self._histogram.observe(max(0.0, now_s - due_s))
            if feed_s is not None and now_s - fed_s >= feed_s:
                self._notifier.tell("WATCHDOG=1")
                fed_s = now_s
