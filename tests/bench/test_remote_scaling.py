"""The scaling study: a small one runs, is the same every time, and its page is that of its result file."""

from __future__ import annotations

import pathlib

import pytest
from typer.testing import CliRunner

from bench.app import app
from bench.mpi import scaling, study
from bench.mpi.cluster import Cluster, Costs, Script
from cascade_aio.core.remote_directory import Geometry, Listing, new_token
from cascade_aio.core.remote_operations import Found, Placed, Published, lookup, publish

COSTS = Costs(latency_s=2e-6, origin_s=1e-6, target_s=1e-6, bytes_per_s=10e9)
EVEN, SKEWED, UNSHARED, CHURN = scaling.WORKLOADS


def run(workload: scaling.Workload, nodes: int = 8) -> scaling.Point:
    return scaling.simulate(nodes, workload, COSTS, block_bytes=1 << 20, seed=3)


def test_a_simulation_depends_on_its_arguments_alone() -> None:
    assert run(SKEWED) == run(SKEWED)


def test_every_block_asked_for_is_accounted_for() -> None:
    point = run(EVEN)
    assert point.local + point.remote + point.missed == point.gets
    assert point.missed == point.stale == 0  # nothing is evicted, so everything that was put is found
    assert point.messages_per_get["payload"] == 1.0
    assert point.messages_per_get["generation"] == 2.0


def test_evicted_copies_are_stale_reads_or_misses_and_never_reads() -> None:
    point = run(CHURN, nodes=16)
    assert point.stale > 0
    assert point.missed > 0
    assert point.local + point.remote + point.missed == point.gets


def test_listed_replicas_take_load_from_the_node_of_a_hot_prompt() -> None:
    shared, unshared = run(SKEWED, nodes=16), run(UNSHARED, nodes=16)
    assert (
        shared.served_bytes.maximum / shared.served_bytes.mean
        < unshared.served_bytes.maximum / unshared.served_bytes.mean
    )


def test_a_command_takes_latency_service_and_payload() -> None:
    cluster = Cluster(2, Geometry(8, 64), COSTS)
    ends: list[float] = []

    def script(name: bytes) -> Script:
        listing = Listing(name, name, 0, 1, 1, 0, 1, 1)
        published: Published = yield publish(cluster.membership, [listing], [new_token(0, 1)])
        assert isinstance(published.entries[0], Placed)
        start_s = cluster.now_s
        found: Found = yield lookup(cluster.membership, [name])
        ends.append(cluster.now_s - start_s)
        assert found.listings == [[listing]]

    elsewhere = next(
        name for number in range(99) if cluster.membership.places_of([name := bytes([number] * 16)])[0].rank
    )
    cluster.start(0, script(elsewhere))
    cluster.run()
    assert ends[0] == pytest.approx(COSTS.origin_s + COSTS.latency_s + COSTS.target_s + 960 / COSTS.bytes_per_s)
    assert cluster.entries(1) == 1


def test_a_study_is_written_and_its_page_checked(tmp_path: pathlib.Path) -> None:
    result, page = tmp_path / "scaling.json", tmp_path / "page.md"
    costs = ["--latency-us", "2", "--origin-us", "1", "--target-us", "1", "--gb-per-s", "10"]
    invoke = CliRunner().invoke
    done = invoke(app, ["mpi", "scaling", "--nodes", "2,4", "--workers", "1", "--out", str(result), *costs])
    assert done.exit_code == 0, done.output
    options = ["mpi", "scaling-page", "--result", str(result), "--page", str(page)]
    assert invoke(app, options).exit_code == 0
    assert invoke(app, [*options, "--check"]).exit_code == 0
    text = page.read_text()
    assert "simulation" in text.splitlines()[0]
    assert "given, not measured" in text
    page.write_text(text.replace("simulation", "measurement", 1))
    assert invoke(app, [*options, "--check"]).exit_code == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--nodes", "four"], "numbers separated by commas"),
        (["--nodes", "1"], "between 2 and"),
        (["--nodes", "4", "--latency-us", "2"], "all of --latency-us"),
    ],
)
def test_bad_options_are_refused_with_the_cure(options: list[str], told: str, tmp_path: pathlib.Path) -> None:
    done = CliRunner().invoke(app, ["mpi", "scaling", "--out", str(tmp_path / "x.json"), *options])
    assert done.exit_code == 1
    assert told in " ".join(done.output.split())
    assert not (tmp_path / "x.json").exists()


def test_the_page_in_docs_is_that_of_the_result_file() -> None:
    if not study.RESULT.exists():
        pytest.skip("no result of `python -m bench mpi scaling` is in the repository yet")
    study.update(study.PAGE, study.load(study.RESULT), check=True)


def test_the_measured_page_in_docs_is_that_of_the_newest_result() -> None:
    if not list(study.RESULT.parent.glob("remote-20*.json")):
        pytest.skip("no result of `python -m bench mpi run` is in the repository yet")
    done = CliRunner().invoke(app, ["mpi", "page", "--check"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", ["launch", "stress"])
def test_an_mpi_that_is_not_here_is_named(command: str) -> None:
    done = CliRunner().invoke(app, ["mpi", command, "--mpi", "another"])
    assert done.exit_code == 1
    assert "another" in done.output
    assert "is not here" in " ".join(done.output.split())


def test_quick_numbers_need_a_file_of_their_own() -> None:
    done = CliRunner().invoke(app, ["mpi", "run", "--quick"])
    assert done.exit_code == 1
    assert "--quick needs --out" in " ".join(done.output.split())
