"""A short run of the stress command's ranks: puts, gets, evictions, deletions, cancellations, one killed at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.mpi import stress
from cascade_aio.testing.mpi import MpiRuntime
from tests.mpi.conftest import RANKS, Launch

pytestmark = pytest.mark.mpi


def test_no_wrong_byte_and_no_hang_when_extents_are_reused_and_a_rank_is_killed(
    launch: Launch, runtime: MpiRuntime, tmp_path: Path
) -> None:
    outcome = launch(
        "bench.mpi.stress:rank",
        outlive=True,
        deadline_s=180.0,
        root=str(tmp_path / "kv"),
        seconds=3.0,
        seed=1,
        victim=3,
    )
    assert "no wrong byte" in stress.summary(outcome, RANKS - 1, runtime)
    assert sum(one.result["counts"]["put"] for one in outcome.ranks.values()) > 0
