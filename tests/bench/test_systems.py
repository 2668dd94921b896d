"""The comparison through the real code with tiny blocks: every workload, going on, failing. Nothing about time."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench.app import app
from bench.machine import REPOSITORY
from bench.peers.catalog import entries
from bench.results import BenchError
from bench.results import CannotRunError as NotHereError
from bench.suite import environments, generating, results, running, workloads
from bench.suite.results import COLUMNS, GB, NotRun, Sample, SuiteFile
from bench.suite.turn import Load

KIB = 1 << 10
BLOCK_BYTES = 64 * KIB
START_SECONDS_MAX = 60.0


def make_plan(*systems: str, **changes: object) -> running.Plan:
    fields: dict[str, object] = {
        "systems": systems,
        "workloads": running.MAIN,
        "block_bytes": (BLOCK_BYTES,),
        "blocks": 8,
        "temperatures": frozenset({"hot", "cold"}),
        "repeats": 1,
        "in_flight": 4,
        "seed": 7,
        "data": None,
        "requests": ((0, 1, 2), (0, 1, 3), (4,), (0, 1, 2, 5)),
        "quick": True,
        **changes,
    }
    return running.Plan(**fields)  # type: ignore[arg-type]


def run(folder: pathlib.Path, plan: running.Plan) -> SuiteFile:
    return running.run(
        plan=plan,
        out=folder / "systems-test.json",
        scratch=folder / "scratch",
        command=["python", "-m", "bench", "run"],
        console=Console(stderr=True, quiet=True),
    )


def need(system: str) -> None:
    try:
        environments.interpreter(system)
    except NotHereError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("cold_reads")
@pytest.mark.parametrize("system", ["cascade", "files", "hdf5-contiguous", "redis-unix"])
def test_a_system_does_every_workload(tmp_path: pathlib.Path, system: str) -> None:
    need(system)
    plan = make_plan(system, workloads=running.WORKLOADS)
    result = run(tmp_path, plan)
    assert not [one for one in result.not_run if one.failed]
    expected = {key for job in running.works(plan, None) for key in job.keys(system)}
    told = [results.key_of(row) for row in result.rows] + [results.key_of(one) for one in result.not_run]
    assert set(told) == expected
    assert len(told) == len(expected)
    assert all(one.reason for one in result.not_run)
    if system == "cascade":
        assert not result.not_run
    assert list((tmp_path / "scratch").iterdir()) == []
    text = (tmp_path / "systems-test.json").read_text()
    assert str(tmp_path) not in text
    assert results.load(tmp_path / "systems-test.json") == result
    for row in result.rows:
        (sample,) = row.samples
        assert sample.cpu_s > 0
        assert row.peak_bytes >= 0
        assert row.summary.median == sample.value > 0
        if row.unit == "GB/s":
            assert sample.value == pytest.approx(sample.bytes / sample.seconds / GB)
        if row.column in workloads.READ_COLUMNS or row.column == "overflow_get":
            assert sample.verified_bytes == sample.bytes
        if row.column in ("cold", "cold_lease"):
            assert sample.read_bytes > 0
        if row.column == "trace_stall":
            assert sample.extra["hit_rate_blocks"] == 5 / 11  # 0 1 of the second request, 0 1 2 of the last
    assert result.verified_bytes > 0
    assert result.systems[system].version
    rates = result.results[system]
    assert (rates["hot_gbps"] or 0) > 0
    assert (rates["write_gbps"] is None) == (system == "redis-unix")


@pytest.mark.usefixtures("cold_reads")
def test_a_run_goes_on_where_it_stopped(tmp_path: pathlib.Path) -> None:
    plan = make_plan("files", "limit-memory", repeats=2)
    first = run(tmp_path, plan)
    assert {len(row.samples) for row in first.rows} == {2}
    again = run(tmp_path, plan)
    assert again.rows == first.rows
    kept = [row for row in first.rows if row.system == "limit-memory"]
    first.rows = kept
    results.save(tmp_path / "systems-test.json", first)
    third = run(tmp_path, plan)
    assert [row for row in third.rows if row.system == "limit-memory"] == kept
    assert {len(row.samples) for row in third.rows if row.system == "files"} == {2}
    with pytest.raises(BenchError, match="two set-ups are not mixed"):
        run(tmp_path, make_plan("files", blocks=4))


def test_systems_take_turns_in_an_order_that_changes(tmp_path: pathlib.Path) -> None:
    result = run(tmp_path, make_plan("files", "limit-memory", repeats=4, temperatures=frozenset({"hot"})))
    turns = {row.system: [sample.turn for sample in row.samples] for row in result.rows if row.column == "hot"}
    assert set(turns["files"]) == {0, 1}
    assert turns["limit-memory"] == [1 - turn for turn in turns["files"]]


def test_a_run_that_may_take_no_longer_stops_between_turns(tmp_path: pathlib.Path) -> None:
    assert not run(tmp_path, make_plan("files", seconds_max=0.0)).rows
    assert run(tmp_path, make_plan("files")).rows


def test_a_system_that_cannot_run_is_told_under_every_key(tmp_path: pathlib.Path) -> None:
    plan = make_plan("cascade-mpi", "limit-memory")
    result = run(tmp_path, plan)
    missing = {results.key_of(one): one for one in result.not_run}
    for job in running.works(plan, None):
        for key in job.keys("cascade-mpi"):
            assert "several ranks" in missing[key].reason
            assert not missing[key].failed
    assert {row.system for row in result.rows} == {"limit-memory"}


def test_a_system_that_goes_wrong_voids_its_rows_and_nobody_elses(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\necho its last words >&2\nexit 3\n")
    dies.chmod(0o700)
    real = environments.interpreter
    monkeypatch.setattr(running, "interpreter", lambda name: dies if name == "files" else real(name))
    result = run(tmp_path, make_plan("files", "limit-memory"))
    failed = [one for one in result.not_run if one.failed]
    assert {one.system for one in failed} == {"files"}
    assert all("ended with code 3" in one.reason and "its last words" in one.reason for one in failed)
    assert {row.system for row in result.rows} == {"limit-memory"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("warp-drive",)}, "no system warp-drive; there are cascade"),
        ({"systems": ()}, "no system"),
        ({"workloads": ("nap",)}, "no workload nap; there are write"),
        ({"temperatures": frozenset({"tepid"})}, "no temperature tepid"),
        ({"block_bytes": (12_345,)}, "no multiple of 8 KiB"),
        ({"block_bytes": (1 << 30,)}, "up to 512 MiB"),
        ({"blocks": 1 << 40}, "MiB of memory and .* are free: fewer --blocks"),
        ({"repeats": 0}, "at least one"),
        ({"seed": -1}, "seed -1 must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: pathlib.Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        run(tmp_path, make_plan(**{"systems": ("files",), **changes}))
    assert not (tmp_path / "systems-test.json").exists()


def test_ctrl_c_leaves_a_valid_file_and_nothing_else(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "systems.json"
    command = [sys.executable, "-m", "bench", "run", "--quick", "--systems", "files,limit-memory", "--repeats", "500"]
    process = subprocess.Popen(
        [*command, "--dir", str(tmp_path / "scratch"), "--out", str(out)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not out.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=START_SECONDS_MAX)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, stderr
    assert "goes on from there" in stderr
    assert results.load(out).rows
    assert list((tmp_path / "scratch").iterdir()) == []


def make_sample(repeat: int, value: float) -> Sample:
    return Sample(
        repeat=repeat,
        turn=0,
        value=value,
        seconds=1.0,
        bytes=2_000_000_000,
        operations=2,
        cpu_s=1.0,
        peak_bytes=10,
        read_bytes=0,
        written_bytes=0,
        verified_bytes=5,
    )


@pytest.fixture
def empty(environment: object) -> SuiteFile:
    config = results.TestConfig(
        block_size_mb=1.0,
        num_blocks=4,
        total_data_gb=0.1,
        hot_or_cold="hot",
        page_cache_dropped=False,
        block_sizes_mb=[1.0],
        workloads=["hot"],
        repeats=3,
        in_flight=8,
        seed=1,
        data="random",
    )
    return results.start(environment, config, ["python"])  # type: ignore[arg-type]


def test_samples_are_summed_up_by_repetition(empty: SuiteFile) -> None:
    key = ("hot", "hot", "cascade", 1 << 20, "")
    for repeat, value in ((2, 3.0), (0, 1.0), (1, 2.0), (1, 5.0)):
        results.add_sample(empty, key, make_sample(repeat, value), blocks=4, in_flight=8)
    (row,) = empty.rows
    assert [sample.value for sample in row.samples] == [1.0, 5.0, 3.0]
    assert (row.summary.median, row.summary.minimum, row.summary.maximum) == (3.0, 1.0, 5.0)
    assert row.cpu_s_per_gb is not None
    assert row.cpu_s_per_gb.median == 0.5
    assert results.has_sample(empty, key, 2)
    assert not results.has_sample(empty, key, 3)
    results.summarise(empty)
    assert empty.verified_bytes == 15
    assert empty.results["cascade"]["hot_gbps"] == 3.0
    assert empty.results["cascade"]["write_gbps"] is None


def test_a_failure_voids_a_row_and_a_reason_does_not(empty: SuiteFile) -> None:
    key = ("hot", "hot", "cascade", 1 << 20, "")
    results.add_sample(empty, key, make_sample(0, 1.0), blocks=4, in_flight=8)
    missing = NotRun(workload="hot", column="hot", system="cascade", block_bytes=1 << 20, reason="gone")
    results.put_not_run(empty, missing)
    assert empty.rows
    assert not empty.not_run
    results.put_not_run(empty, msgspec.structs.replace(missing, reason="wrong bytes", failed=True))
    assert not empty.rows
    assert empty.not_run[0].failed
    assert results.has_sample(empty, key, 0)
    results.add_sample(empty, key, make_sample(0, 1.0), blocks=4, in_flight=8)
    assert not empty.not_run


def test_what_is_no_result_file_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(BenchError, match="cannot be read"):
        results.load(path)
    path.write_text("{}")
    with pytest.raises(BenchError, match="is not a result file"):
        results.load(path)


def test_clients_are_added_up_over_the_slowest_clock() -> None:
    def one(began_s: float, ended_s: float) -> dict[str, object]:
        names = (
            "bytes",
            "operations",
            "cpu_s",
            "peak_bytes",
            "read_bytes",
            "written_bytes",
            "verified_bytes",
            "misses",
        )
        return {**dict.fromkeys(names, 10), "began_s": began_s, "ended_s": ended_s, "latency_ms": {"0.5": 1.0}}

    total = workloads.together([one(1.0, 3.0), one(2.0, 6.0)])
    assert total["seconds"] == 5.0
    assert total["bytes"] == 20
    assert total["latency_ms"] == {}


def test_a_slow_system_moves_less_but_two_blocks_at_least() -> None:
    load = Load(80 << 20, 8, 4, 1, None)
    assert load.limited(entries()["files"].system) == load
    assert load.limited(entries()["hdf5-gzip"].system).blocks == 2
    big = Load(80 << 20, 50, 4, 1, None)
    assert (big.count, big.passes) == (10, 5)
    assert big.memory_bytes == 2 * 50 * (80 << 20)
    assert (load.count, load.passes) == (8, 1)


def test_columns_name_one_medium_and_one_promise() -> None:
    assert COLUMNS["hot"].medium != COLUMNS["cold"].medium
    assert COLUMNS["write_volatile"].medium != COLUMNS["write_durable"].medium
    for plan in (make_plan("files", workloads=running.WORKLOADS), make_plan("files")):
        assert {key[1] for job in running.works(plan, None) for key in job.keys("files")} <= set(COLUMNS)


def test_generated_data_goes_on_and_ends_the_same(tmp_path: pathlib.Path) -> None:
    def make(name: str, blocks: int) -> pathlib.Path:
        return generating.generate(tmp_path / name, 256 * KIB, blocks, 5, lambda done, total: None)

    whole = make("whole", 5).read_bytes()
    part = make("part", 2)
    with part.open("ab") as file:
        file.write(b"interrupted")
    assert make("part", 5).read_bytes() == whole
    assert len(whole) == 5 * 256 * KIB
    assert make("part", 3).read_bytes() == whole  # nothing that is there is taken away
    values = np.frombuffer(whole, np.float16).reshape(5, 2, -1).astype(np.float64)
    assert np.isfinite(values).all()
    layers = np.array_split(values[0, 1], generating.LAYERS)
    assert max(layer.std() for layer in layers) > 2 * min(layer.std() for layer in layers)
    assert not np.array_equal(values[0], values[1])
    with pytest.raises(BenchError, match="data of another kind"):
        generating.generate(tmp_path / "part", 256 * KIB, 5, 6, lambda done, total: None)
    assert generating.find(tmp_path / "part", 1000).name == generating.CONTENT
    with pytest.raises(BenchError, match="generate more blocks"):
        generating.find(tmp_path / "part", 1 << 30)
    with pytest.raises(BenchError, match="run `python -m bench generate"):
        generating.find(tmp_path / "nowhere", 1)


def test_the_commands_say_what_is_wrong(tmp_path: pathlib.Path) -> None:
    runner = CliRunner()
    for words, message in (
        (["run", "--quick", "--systems", "files"], "needs --out"),
        (["run", "--systems", "warp", "--out", str(tmp_path / "x.json")], "no system warp"),
        (["run", "--systems", "files", "--repeats", "2"], "--repeats 2 is below 5"),
        (["run", "--systems", "files", "--block-size", "many"], "is not a size"),
        (["install", "warp"], "no peer warp to install"),
        (["conform", "files", "warp"], "no system warp"),
        (["generate", "--out", str(tmp_path / "d"), "--block-size", "1000"], "no multiple of 8 KiB"),
        (["generate", "--out", str(tmp_path / "d"), "--blocks", "900000000"], "do not fit"),
    ):
        done = runner.invoke(app, words)
        assert done.exit_code == 1
        assert message in done.stderr
    done = runner.invoke(app, ["generate", "--out", str(tmp_path / "d"), "--block-size", "64KiB", "--blocks", "2"])
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "d" / generating.MANIFEST).read_text())["block_bytes"] == 64 * KIB
