"""A small run of the benchmark under MPI: one file of all ranks, in the format that the issue asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.mpi import page, running
from bench.results import BenchError
from bench.suite import results
from tests.mpi.conftest import RANKS, Launch

pytestmark = pytest.mark.mpi


@pytest.mark.shm(600)
@pytest.mark.parametrize("runtime", ["openmpi"], indirect=True)
def test_a_quick_run_gathers_all_ranks_into_one_result_file(launch: Launch, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = launch("tests.mpi.bench_jobs:measure", deadline_s=240.0, scratch=str(tmp_path), out=str(out)).results(RANKS)
    assert done[0][-4:] == ["lookup", "loop lag, origin", "loop lag, target", "skewed"]
    assert done[1:] == [[]] * (RANKS - 1)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]  # the scratch folder is gone

    head = json.loads(out.read_bytes())
    assert head["environment"]["total_ranks"] == RANKS
    assert head["environment"]["nodes"] == 1
    assert head["results"][running.SYSTEM]["remote_gbps"] > 0
    assert head["results"][running.SYSTEM]["write_gbps"] > 0
    assert head["verified_bytes"] > 0

    file = running.load(out)
    assert {row.column for row in file.rows} == {"write_durable", "remote", "hot_lease"}
    assert all(row.clients == RANKS for row in file.rows)
    assert all(figure.samples for figure in file.figures)
    assert results.load(out).rows == file.rows  # the report of the comparison reads it as its own

    written = tmp_path / "page.md"
    page.update(written, file, out.name, check=False)
    page.update(written, file, out.name, check=True)
    assert "All ranks share this machine" in written.read_text()
    written.write_text(written.read_text().replace("met", "missed").replace("shown", "met"))
    with pytest.raises(BenchError, match="bench mpi page"):
        page.update(written, file, out.name, check=True)
