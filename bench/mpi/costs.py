"""What one-sided commands cost between two ranks of this machine: the parameters of the scaling study.

On one machine "the network" is shared memory: latency is that of a call, the rate that of a copy. A cluster's own
figures go in by the options of the study. ``two_ranks`` runs under MPI; mpi4py is imported there and only there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.mpi.cluster import Costs
from bench.results import CannotRunError
from cascade_aio.core.remote_directory import BUCKET_BYTES
from cascade_aio.testing.mpi import find_runtimes, run_ranks

SMALL_COMMANDS = 3000
LARGE_BYTES = 16 << 20
LARGE_COMMANDS = 20
IN_FLIGHT = 64
DEADLINE_SECONDS = 90.0


def measure() -> tuple[Costs, str]:
    """(costs, where they come from). Raises ``CannotRunError`` without an MPI."""
    runtimes, reason = find_runtimes()
    if not runtimes:
        raise CannotRunError(f"no MPI to measure costs with ({reason}); or name all four costs")
    runtime = next(iter(runtimes.values()))
    done = run_ranks(runtime, 2, "bench.mpi.costs:two_ranks", deadline_s=DEADLINE_SECONDS)
    costs = Costs(**done.results(2)[0])
    return costs, f"measured: two ranks of one machine through shared memory, {runtime.version}"


def two_ranks() -> dict[str, float]:
    """Rank 0 reads from rank 1 in the way of the MPI thread: ``Rget`` and ``Test``. Medians and rates."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    window = MPI.Win.Allocate(LARGE_BYTES, 1, comm=world)
    np.frombuffer(window.tomemory(), np.uint8)[:] = 1
    window.Lock_all(MPI.MODE_NOCHECK)
    world.Barrier()
    found: dict[str, float] = {}
    if world.rank == 0:

        def get(into: bytearray | np.ndarray[Any, Any]) -> Any:
            return window.Rget([into, len(into), MPI.BYTE], 1, (0, len(into), MPI.BYTE))

        word, large = bytearray(8), np.zeros(LARGE_BYTES, np.uint8)
        buckets = [bytearray(BUCKET_BYTES) for _ in range(IN_FLIGHT)]
        found["latency_s"] = _median_s(lambda: _finish([get(word)]), SMALL_COMMANDS)
        cpu_s = time.thread_time()
        many_s = _median_s(lambda: _finish([get(bucket) for bucket in buckets]), SMALL_COMMANDS // IN_FLIGHT)
        found["origin_s"] = (time.thread_time() - cpu_s) / (SMALL_COMMANDS // IN_FLIGHT * IN_FLIGHT)
        found["target_s"] = many_s / IN_FLIGHT
        found["bytes_per_s"] = LARGE_BYTES / _median_s(lambda: _finish([get(large)]), LARGE_COMMANDS)
    world.Barrier()
    window.Unlock_all()
    window.Free()
    return found


def _finish(requests: list[Any]) -> None:
    while requests:
        requests = [request for request in requests if not request.Test()]


def _median_s(act: Callable[[], None], times: int) -> float:
    samples = []
    for _ in range(times):
        started_s = time.perf_counter()
        act()
        samples.append(time.perf_counter() - started_s)
    return sorted(samples)[len(samples) // 2]
