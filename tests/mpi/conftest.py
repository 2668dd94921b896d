"""Every test here runs under each MPI that is installed; where there is none it is skipped with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_aio.testing.mpi import JobOutcome, MpiRuntime, find_runtimes, run_ranks

ROOT = Path(__file__).resolve().parents[2]

RANKS = 4

DEADLINE_SECONDS = 120.0
"""A job that takes longer hangs; jobs take one to five seconds when the machine is quiet."""


@functools.cache
def _runtime(name: str) -> tuple[MpiRuntime | None, str]:
    """The runtime, or why there is none: not installed, or it cannot work on this machine."""
    runtimes, reason = find_runtimes()
    if name not in runtimes:
        return None, reason
    tried = run_ranks(
        runtimes[name], 2, "tests.mpi.jobs:read_each_other", deadline_s=DEADLINE_SECONDS, path=[str(ROOT)]
    )
    if tried.timed_out or {rank: one.result for rank, one in tried.ranks.items()} != {0: 1, 1: 0}:
        return None, f"{runtimes[name].version} does not work on this machine: {tried.describe()[-2000:]}"
    return runtimes[name], ""


@pytest.fixture(params=["openmpi", "mpich"])
def runtime(request: pytest.FixtureRequest) -> MpiRuntime:
    found, reason = _runtime(request.param)
    if found is None:
        pytest.skip(reason)
    return found


Launch = Callable[..., JobOutcome]


@pytest.fixture
def launch(runtime: MpiRuntime) -> Launch:
    """``launch("job", ranks=4, outlive=False, **arguments)`` calls ``tests.mpi.jobs.job`` on every rank."""

    def launch(
        job: str,
        *,
        ranks: int = RANKS,
        outlive: bool = False,
        deadline_s: float = DEADLINE_SECONDS,
        **arguments: object,
    ) -> JobOutcome:
        target = job if ":" in job else f"tests.mpi.jobs:{job}"
        return run_ranks(runtime, ranks, target, arguments, deadline_s=deadline_s, outlive=outlive, path=[str(ROOT)])

    return launch
