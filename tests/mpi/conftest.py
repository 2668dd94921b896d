"""Every test here runs under each MPI that is installed; where there is none it is skipped with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_aio.testing.mpi import JobOutcome, MpiRuntime, find_runtimes, run_ranks

ROOT = Path(__file__).resolve().parents[2]

RANKS = 4

DEADLINE_SECONDS = 60.0
"""A job that takes longer hangs; jobs take one to five seconds when the machine is quiet."""


@functools.cache
def _runtimes() -> tuple[dict[str, MpiRuntime], str]:
    return find_runtimes()


@pytest.fixture(params=["openmpi", "mpich"])
def runtime(request: pytest.FixtureRequest) -> MpiRuntime:
    runtimes, reason = _runtimes()
    if request.param not in runtimes:
        pytest.skip(reason)
    return runtimes[request.param]


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
