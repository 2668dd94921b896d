"""How late the event loop is: a 1 ms ticker, and the lateness of each of its ticks."""

from __future__ import annotations

import asyncio
import time
from typing import Self

TICK_S = 0.001


class Ticker:
    """While the scope is open, asks the loop for a wake-up every millisecond.

    ``late_ms`` has one number per tick: how long after the moment it asked for it ran. A late tick
    is followed by the next one a millisecond after it *ran*, so a stall of 10 ms counts once.
    """

    def __init__(self) -> None:
        self.late_ms: list[float] = []
        self._handle: asyncio.TimerHandle | None = None
        self._due_s = 0.0

    async def __aenter__(self) -> Self:
        self._arm()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _arm(self) -> None:
        self._due_s = time.perf_counter() + TICK_S
        self._handle = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self.late_ms.append((time.perf_counter() - self._due_s) * 1e3)
        self._arm()
