"""The remote tier on real MPI: four ranks on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.conftest import RANKS, Launch

pytestmark = pytest.mark.mpi


def job(name: str) -> str:
    return f"tests.mpi.remote_jobs:{name}"


def test_every_rank_reads_from_every_other_in_a_store_opened_again(launch: Launch, tmp_path: Path) -> None:
    results = launch(job("everybody_reads_everybody"), root=str(tmp_path / "kv")).results(RANKS)
    for result in results:
        assert result["tiers"] == ["remote", "shm"]
        assert result["reads"] >= 12
        assert result["torn"] == 0


def test_extents_reused_while_others_read_them_never_give_a_wrong_byte(launch: Launch, tmp_path: Path) -> None:
    outcome = launch(job("arenas_change_under_readers"), root=str(tmp_path / "kv"), seconds=2.5)
    results = outcome.results(RANKS)
    assert sum(result["wrong"] for result in results) == 0
    assert sum(result["torn"] for result in results) == 0
    assert min(result["reads"] for result in results) >= 20


def test_a_rank_may_close_before_the_others(launch: Launch, tmp_path: Path) -> None:
    results = launch(job("one_closes_early"), root=str(tmp_path / "kv")).results(RANKS)
    assert set(results[0]["tiers"]) <= {"disk", "remote", "shm"}
    assert "closed_s" in results[3]


def test_the_others_go_on_without_a_killed_rank(launch: Launch, tmp_path: Path) -> None:
    outcome = launch(job("one_is_killed"), outlive=True, root=str(tmp_path / "kv"))
    assert not outcome.timed_out, outcome.describe()
    for rank in range(3):
        assert outcome.ranks[rank].error is None, outcome.describe()


def test_a_rank_that_cannot_open_is_everybodys_error(launch: Launch, tmp_path: Path) -> None:
    results = launch(job("one_cannot_open"), root=str(tmp_path / "kv")).results(RANKS)
    assert results[2].startswith("ConfigError: warm_restart")
    assert all(result.startswith("BrokenTierError: rank 2 could not open") for result in results[:2] + results[3:])


def test_windows_outlive_the_store_with_a_lease(launch: Launch, tmp_path: Path) -> None:
    assert launch(job("leases_outlive_the_store"), root=str(tmp_path / "kv")).results(RANKS) == [33_334] * RANKS


def test_mpi_that_allows_no_second_thread_is_refused(launch: Launch, tmp_path: Path) -> None:
    (message,) = launch(job("too_little_of_threads"), ranks=1, root=str(tmp_path / "kv")).results(1)
    assert "MPI_THREAD_SERIALIZED" in message
    assert "thread_level" in message
