"""The real clock."""

from __future__ import annotations

import time


class SystemClock:
    """``abc.Clock`` of the system: wall time for records, monotonic time for intervals."""

    def wall_ns(self) -> int:
        return time.time_ns()

    def monotonic_s(self) -> float:
        return time.monotonic()
