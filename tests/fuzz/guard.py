"""Runs a target and holds it to the promises that are not exceptions: it ends, and it does not allocate at will."""

from __future__ import annotations

import signal
import tracemalloc
from types import FrameType

from tests.fuzz.targets import Target

CPU_SECONDS_MAX = 20.0
"""Of one input; the slowest takes some tens of milliseconds."""

OBJECT_BYTES_PER_BYTE = 40
"""What a byte of a table may cost as Python objects: a name of 72 bytes becomes a tuple of objects."""

ALLOCATION_BYTES_FREE = 24 << 20
"""Allocated in any case: golden files in memory, event loop, windows, what is imported and compiled at first use."""


class EndlessLoopError(AssertionError):
    """The input was not done with in time."""


def run_guarded(target: Target, data: bytes) -> None:
    """``target(data)``. Raises ``AssertionError`` for an endless loop (main thread only) or for too much memory."""
    previous = signal.signal(signal.SIGVTALRM, _endless)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS_MAX)
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        target(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if not tracing:
            tracemalloc.stop()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
    limit = ALLOCATION_BYTES_FREE + OBJECT_BYTES_PER_BYTE * len(data)
    assert peak - before <= limit, f"{peak - before} bytes were allocated for {len(data)} bytes of input"


def _endless(number: int, frame: FrameType | None) -> None:
    raise EndlessLoopError(f"no end after {CPU_SECONDS_MAX:g} s of processor time")
