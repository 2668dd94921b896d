"""Reports of the comparison: every line printed, columns never mixed, claims held, the README in step."""

from __future__ import annotations

import pathlib
import xml.etree.ElementTree as xml
from collections.abc import Sequence

import msgspec
import pytest
from typer.testing import CliRunner

from bench.app import app
from bench.machine import REPOSITORY
from bench.report import claims, figures, latex, markdown, readme
from bench.report.parts import Part, load_parts, tables
from bench.results import BenchError, Environment
from bench.suite import results as suite
from bench.suite.results import (
    NotRun,
    Sample,
    SuiteFile,
    SystemInfo,
    add_sample,
    put_not_run,
    save,
    start,
)

MIB = 1 << 20


def _sample(repeat: int, value: float, cpu_s: float, latencies: bool) -> Sample:
    quantiles = ("0", "0.25", "0.5", "0.75", "0.99", "1")
    return Sample(
        repeat=repeat,
        turn=0,
        value=value,
        seconds=1.0,
        bytes=1_000_000_000,
        operations=10,
        cpu_s=cpu_s,
        peak_bytes=64 * MIB,
        read_bytes=0,
        written_bytes=0,
        verified_bytes=1_000_000_000,
        latency_ms={share: 1.0 + number for number, share in enumerate(quantiles)} if latencies else {},
    )


def _add(
    result: SuiteFile, key: tuple[str, str, str, int, str], values: Sequence[float], cpu_s: float = 1.0, **how: int
) -> None:
    for repeat, value in enumerate(values):
        one = _sample(repeat, value, cpu_s, latencies=key[2] != "nixl-direct")
        add_sample(result, key, one, blocks=how.get("blocks", 10), in_flight=8)


@pytest.fixture
def measured(environment: Environment) -> SuiteFile:
    """Two sizes, a win and a loss, a system that did not run and one that failed, a limit, a workload with variants."""
    config = suite.TestConfig(
        block_size_mb=1.0,
        num_blocks=10,
        total_data_gb=0.01,
        hot_or_cold="hot,cold",
        page_cache_dropped=True,
        block_sizes_mb=[1.0, 16.0],
        workloads=["write", "cold", "concurrency"],
        repeats=3,
        in_flight=8,
        seed=1,
        data="random",
    )
    result = start(environment, config, ["python", "-m", "bench", "run", "--systems", "all"])
    for size in (MIB, 16 * MIB):
        _add(result, ("write", "write_durable", "limit-disk", size, ""), [2.2, 2.3, 2.1])
        _add(result, ("write", "write_durable", "cascade", size, ""), [2.0, 2.1, 1.9], cpu_s=0.5)
        _add(result, ("write", "write_durable", "lmcache-disk", size, ""), [0.5, 0.5, 0.5], cpu_s=2.0, blocks=4)
        _add(result, ("write", "write_volatile", "cascade", size, ""), [4.0, 4.0, 4.0])
        _add(result, ("cold", "cold", "cascade", size, ""), [1.0, 1.1, 0.9])
        _add(result, ("cold", "cold", "nixl-direct", size, ""), [1.5, 1.6, 1.4])
        put_not_run(result, _missing("cold", "pdc", size, "PDC_DIR is not set"))
        put_not_run(result, _missing("cold", "limit-memory", size, "no disk"))
    put_not_run(
        result,
        NotRun(
            workload="write", column="write_durable", system="redis-aof", block_bytes=MIB, reason="a | b", failed=True
        ),
    )
    for count, rate in (("16 in flight", 2.0), ("4 in flight", 1.0)):
        _add(result, ("concurrency", "hot", "cascade", MIB, count), [rate, rate, rate])
    result.systems = {
        name: SystemInfo(title=title, version="1", module="m.py", tuning="t", medium=medium)
        for name, title, medium in (
            ("limit-disk", "Limit: raw disk", "disk"),
            ("cascade", "Cascade (embedded)", "shared memory"),
            ("lmcache-disk", "LMCache LocalDiskBackend (default)", "page cache"),
            ("nixl-direct", "NIXL_POSIX & O_DIRECT", "page cache"),
            ("pdc", "PDC", "server memory"),
        )
    }
    return result


def _missing(workload: str, system: str, size: int, reason: str) -> NotRun:
    return NotRun(workload=workload, column="cold", system=system, block_bytes=size, reason=reason)


def _part(result: SuiteFile) -> Part:
    return Part(("systems-2026-01-02.json",), result)


def test_a_table_is_one_column_and_prints_every_system_but_limits_of_another_medium(measured: SuiteFile) -> None:
    found = {(table.workload, table.name): table for table in tables(measured)}
    assert list(found)[:3] == [("write", "write_volatile"), ("write", "write_durable"), ("cold", "cold")]
    durable = found["write", "write_durable"]
    assert [line.system for line in durable.lines] == ["limit-disk", "cascade", "lmcache-disk", "redis-aof"]
    assert durable.heads == ("1 MiB", "16 MiB")
    assert [line.system for line in found["cold", "cold"].lines] == ["nixl-direct", "cascade", "pdc"]
    assert found["concurrency", "hot"].heads == ("4 in flight", "16 in flight")
    for table in tables(measured):
        rows = [cell for line in table.lines for cell in line.cells if cell is not None]
        assert {row.column for row in rows} == {table.name}


def test_markdown_prints_winners_losers_and_what_did_not_run(measured: SuiteFile) -> None:
    text = markdown.render([_part(measured)], [[("A title", "figures/a.svg")]])
    assert "| Limit: raw disk | 2.20 (2.10–2.30)" in text
    assert "| Cascade (embedded) | **2.00** (1.90–2.10); 0.50; 64 |" in text
    assert "| LMCache LocalDiskBackend (default) | 0.50 (0.50–0.50); 2.00; 64, 4 blocks |" in text
    assert "| NIXL_POSIX & O_DIRECT | **1.50** (1.40–1.60)" in text
    assert "| PDC | not run: PDC_DIR is not set |  |" in text
    assert "| Redis (Unix socket, AOF) | not run: a \\| b |" in text
    assert "limit-memory" not in text
    assert "![A title](figures/a.svg)" in text
    assert "✗ lost" in text
    assert "not run: not among the systems of this run" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|"), line


def test_what_a_workload_tells_beside_its_value_is_printed(measured: SuiteFile) -> None:
    one = msgspec.structs.replace(_sample(0, 3.0, 1.0, latencies=False), extra={"hit_rate_blocks": 0.25})
    add_sample(measured, ("trace", "trace_stall", "cascade", MIB, ""), one, blocks=10, in_flight=8)
    (table,) = tables(measured, ["trace"])
    assert table.title.startswith("trace: time")
    assert "| Cascade (embedded) | **3.00** (3.00–3.00); 1.00; 64; hit rate blocks 0.25 |" in markdown.table_lines(
        table
    )


def test_every_line_of_a_table_has_as_many_cells_as_its_head(measured: SuiteFile) -> None:
    for brief in (False, True):
        for table in tables(measured):
            lines = [line for line in markdown.table_lines(table, brief=brief) if line.startswith("|")]
            counts = {line.replace("\\|", "").count("|") for line in lines}
            assert len(counts) == 1, lines


def test_claims_are_taken_within_repetitions_and_say_why_they_cannot_be_held(measured: SuiteFile) -> None:
    found = {
        (one.claim.column, one.claim.than, one.claim.of, one.block_bytes): one for one in claims.verdicts(measured)
    }
    lmcache = found["write_durable", "LMCache's default disk", "value", MIB]
    assert lmcache.ratio is not None
    assert lmcache.ratio.median == pytest.approx(4.0)
    assert lmcache.met is True
    cold = found["cold", "the fastest disk peer", "value", MIB]
    assert (cold.other, cold.met) == ("nixl-direct", False)
    thrift = found["write_durable", "the thriftiest peer", "cpu", MIB]
    assert thrift.ratio is not None
    assert (thrift.ours, thrift.theirs) == (2.0, 0.5)  # GB per CPU second
    assert thrift.ratio.median == pytest.approx(4.0)
    assert found["cold", "PDC", "value", MIB].reason == "not run: PDC_DIR is not set"
    assert found["write_durable", "Redis", "value", MIB].reason == "not run: a | b"
    assert found["write_durable", "contiguous HDF5", "value", MIB].met is None


def test_neither_a_limit_nor_another_of_ours_is_anybodys_peer(measured: SuiteFile) -> None:
    _add(measured, ("write", "write_durable", "cascade-blake3", MIB, ""), [9.0, 9.0, 9.0])
    found = [one for one in claims.verdicts(measured) if one.claim.column == "write_durable" and one.other]
    assert {one.other for one in found} == {"lmcache-disk"}


def test_latex_escapes_and_prints_every_line(measured: SuiteFile) -> None:
    text = latex.render([_part(measured)])
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == len(tables(measured))
    assert r"NIXL\_POSIX \& O\_DIRECT & \textbf{1.50}" in text
    assert r"\multicolumn{2}{l}{\footnotesize not run: PDC\_DIR is not set}" in text
    assert "–" not in text
    assert text.count(r"\midrule") == len(tables(measured)) + 1  # and one below the limit


def test_files_of_one_set_up_lie_together_and_others_apart(
    measured: SuiteFile, environment: Environment, tmp_path: pathlib.Path
) -> None:
    save(tmp_path / "systems-1.json", measured)
    more = start(environment, measured.test_config, ["again"])
    _add(more, ("restart", "restart", "cascade", MIB, ""), [0.1, 0.2, 0.3])
    save(tmp_path / "systems-2.json", more)
    save(tmp_path / "systems-3.json", msgspec.structs.replace(more, kernel="7.0"))
    save(tmp_path / "systems-4.json", msgspec.structs.replace(more, environment=suite.Cluster(nodes=4, total_ranks=16)))
    together, apart, ranks = load_parts([tmp_path / f"systems-{number}.json" for number in (1, 2, 3, 4)])
    assert together.names == ("systems-1.json", "systems-2.json")
    assert {row.workload for row in together.result.rows} >= {"write", "restart"}
    assert (apart.names, ranks.names) == (("systems-3.json",), ("systems-4.json",))
    assert "4 nodes, 16 ranks" in markdown.how(ranks.result)
    with pytest.raises(BenchError, match="both have restart"):
        load_parts([tmp_path / "systems-2.json", tmp_path / "systems-2.json"])


def test_a_quick_run_is_called_one(measured: SuiteFile) -> None:
    real = msgspec.structs.replace(
        measured, test_config=msgspec.structs.replace(measured.test_config, data="kv-float16")
    )
    assert "numbers mean nothing" in markdown.how(measured)
    assert "numbers mean nothing" not in markdown.how(real)


def test_the_command_writes_what_check_then_accepts(measured: SuiteFile, tmp_path: pathlib.Path) -> None:
    result, page = tmp_path / "systems-1.json", tmp_path / "README.md"
    save(result, measured)
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    arguments = ["report", str(result), "--out", str(tmp_path), "--readme", str(page), "--no-figures"]
    assert CliRunner().invoke(app, [*arguments, "--check"]).exit_code == 1
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--check"]).exit_code == 0
    text = page.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n| cascade's | against")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "(figures/systems-1-throughput-1-mib.svg)" in text
    page.write_text(text.replace("2.00", "3.00"))
    assert CliRunner().invoke(app, [*arguments, "--check"]).exit_code == 1


@pytest.mark.parametrize("wrong", ["{}", "no JSON", None])
def test_a_file_that_is_no_result_is_one_line(wrong: str | None, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "systems-1.json"
    if wrong is not None:
        path.write_text(wrong)
    done = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path), "--no-figures"])
    assert done.exit_code == 1
    assert not list(tmp_path.glob("comparison.*"))


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(BenchError, match="put the two lines"):
        readme.replace("no markers", "text")


def test_our_readme_is_in_step_with_the_result_files() -> None:
    done = CliRunner().invoke(app, ["report", "--readme", str(REPOSITORY / "README.md"), "--check", "--no-figures"])
    assert done.exit_code == 0, done.output


def test_figures_are_drawn_and_the_same_again(measured: SuiteFile, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the bench extra, which is not installed")
    part = _part(measured)
    drawn = figures.draw(part, tmp_path / "a", "s")
    assert [path.name for _, path in drawn] == [f"s-{name}.svg" for name, _ in figures.names(measured)]
    assert {name for name, _ in figures.names(measured)} == {
        "throughput-1-mib",
        "throughput-16-mib",
        "scaling-concurrency",
        "latency",
    }
    for _, path in drawn:
        assert xml.parse(path).getroot().tag.endswith("svg")
        assert path.with_suffix(".png").stat().st_size > 1000
        again = tmp_path / "b" / path.name
        if not again.exists():
            figures.draw(part, tmp_path / "b", "s")
        assert again.read_bytes() == path.read_bytes()
