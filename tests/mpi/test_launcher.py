"""The launcher itself: outcomes of every rank, an end of every job, nothing left behind."""

from __future__ import annotations

import mmap
import os
import time
import uuid
from pathlib import Path

import pytest

from cascade_aio.testing.mpi import JobOutcome, MpiRuntime, remove_leftovers
from tests.mpi.conftest import RANKS, Launch

pytestmark = pytest.mark.mpi


def test_ranks_answer_in_order_and_know_each_other(launch: Launch, runtime: MpiRuntime) -> None:
    assert runtime.version
    assert launch("sum_of_ranks").results(RANKS) == [[6, 4, True]] * RANKS


def test_a_rank_that_raises_ends_the_job_and_is_quoted(launch: Launch) -> None:
    outcome = launch("one_raises", rank=2)
    assert not outcome.timed_out
    assert set(outcome.ranks) == {2}
    with pytest.raises(AssertionError, match="rank 2 does not want to"):
        outcome.results(RANKS)


def test_a_job_that_hangs_is_killed_when_its_time_is_up(launch: Launch) -> None:
    outcome = launch("hang", deadline_s=3.0)
    assert outcome.timed_out
    assert outcome.ranks == {}
    with pytest.raises(AssertionError, match="ran out of time"):
        outcome.results(RANKS)


def test_the_others_outlive_a_killed_rank_if_asked_to(launch: Launch, tmp_path: Path) -> None:
    outcome: JobOutcome = launch("read_from_sleepers_beside_a_corpse", outlive=True, done=str(tmp_path / "done"))
    assert not outcome.timed_out, outcome.describe()
    assert set(outcome.ranks) == {0, 1, 2}, outcome.describe()
    assert outcome.ranks[0].error is None, outcome.describe()
    assert outcome.ranks[0].result == [2, 2, 3, 3]


def test_leftovers_go_unless_somebody_maps_them_or_they_are_older_or_not_of_mpi() -> None:
    started = time.monotonic()
    token = uuid.uuid4().hex
    left, mapped, other = (f"/dev/shm/{name}{token}" for name in ("mpich_shm_", "mpich_shar_", "cascade-test-"))
    try:
        for path in (left, mapped, other):
            with open(path, "w+b") as file:
                file.truncate(4096)
                if path == mapped:
                    memory = mmap.mmap(file.fileno(), 4096)
        remove_leftovers(time.monotonic() + 3600)  # nothing was made after that
        assert os.path.exists(left)
        remove_leftovers(started)
        assert [os.path.exists(path) for path in (left, mapped, other)] == [False, True, True]
        memory.close()
        remove_leftovers(started)
        assert not os.path.exists(mapped)
    finally:
        for path in (left, mapped, other):
            if os.path.exists(path):
                os.unlink(path)
