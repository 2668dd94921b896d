from __future__ import annotations

import pathlib

import msgspec
import pytest
from typer.testing import CliRunner

from bench import results, table
from bench.app import app
from bench.results import BenchError, ResultFile

README = f"# Title\n\nbefore\n\n{table.BEGIN}\nthe table before\n{table.END}\n\nafter\n"


def test_every_row_is_printed_whether_it_met_its_target_or_not(sample: ResultFile) -> None:
    lines = table.render(sample).splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == len(sample.rows) + len(sample.not_run)
    met, missed, worst, not_run = rows
    assert "**1.00** (0.95–1.00) | ≥ 0.90 | ✓ |" in met
    assert "16 MiB" in met
    assert "io_uring O_DIRECT" in met
    assert "**0.55** (0.50–0.60) | ≥ 0.90 | ✗ missed |" in missed
    assert "**16.0** ms (4.00–16.0) | ≤ 15.0 ms, worst | ✗ missed |" in worst
    assert "idle 0.20 ms" in worst
    assert "not run: io_uring is not available here" in not_run


def test_all_rows_have_as_many_cells_as_the_head(sample: ResultFile) -> None:
    rows = [line for line in table.render(sample).splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {8}


def test_one_line_says_how_it_was_measured(sample: ResultFile) -> None:
    last = table.render(sample).splitlines()[-1]
    for fact in ("2026-01-02", "kernel 6.1.0", "2 cores", "ext4 on virtio disk", "uring", "0.1.0", "0123456789ab"):
        assert fact in last
    assert "uncommitted" not in last
    dirty = msgspec.structs.replace(sample, environment=msgspec.structs.replace(sample.environment, dirty=True))
    assert "uncommitted changes" in table.render(dirty).splitlines()[-1]


def test_only_what_is_between_the_markers_changes(sample: ResultFile) -> None:
    text = table.replace(README, sample)
    assert text.startswith("# Title\n\nbefore\n\n" + table.BEGIN)
    assert text.endswith(table.END + "\n\nafter\n")
    assert "the table before" not in text
    assert table.replace(text, sample) == text


def test_a_readme_without_markers_is_refused(sample: ResultFile) -> None:
    with pytest.raises(BenchError, match="bench:begin"):
        table.replace("# Title\n", sample)
    with pytest.raises(BenchError, match="bench:begin"):
        table.replace(f"{table.END}\n{table.BEGIN}\n", sample)


def test_the_command_writes_and_checks(tmp_path: pathlib.Path, sample: ResultFile) -> None:
    readme, file = tmp_path / "README.md", tmp_path / "engine-1.json"
    readme.write_text(README, encoding="utf-8")
    results.save(file, sample)
    arguments = ["table", "--readme", str(readme), "--result", str(file)]
    runner = CliRunner()
    assert runner.invoke(app, [*arguments, "--check"]).exit_code == 1
    assert readme.read_text(encoding="utf-8") == README
    assert runner.invoke(app, arguments).exit_code == 0
    assert runner.invoke(app, [*arguments, "--check"]).exit_code == 0
    sample.rows.pop()
    results.save(file, sample)
    assert runner.invoke(app, [*arguments, "--check"]).exit_code == 1


def test_reading_ahead_has_a_table_of_its_own_and_leaves_the_other_alone(sample: ResultFile) -> None:
    series = {
        name: results.make_series(name, "s", [1.0, 1.0])
        for name in ("stalled", "without prefetch", "without prefetch, stalled")
    }
    decode = msgspec.structs.replace(
        sample.rows[1], figure="prefetch_decode", variant="0.25", extra=list(series.values())
    )
    layer = msgspec.structs.replace(sample.rows[1], figure="prefetch_first_layer")
    ahead = msgspec.structs.replace(sample, rows=[decode, layer], not_run=[])
    readme = f"{README}{table.marker('prefetch')}\nnone\n<!-- prefetch:end -->\n"
    text = table.replace(readme, ahead)
    assert text.startswith(README), "a file without other rows does not empty their table"
    lines = [line for line in text[len(README) :].splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {11}
    assert "| 0.25 × |" in lines[2]
    assert "✗ missed" in lines[2]
    assert f"{layer.title}, " in text
    assert table.in_step(text, ahead)
    both = table.replace(text, sample)
    assert table.marker("prefetch") in both
    assert lines[2] in both, "and the other way round"


def test_a_file_of_its_own_goes_before_rows_of_a_whole_run(
    tmp_path: pathlib.Path, sample: ResultFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = [
        results.make_series(name, "s", [1.0, 1.0])
        for name in ("stalled", "without prefetch", "without prefetch, stalled")
    ]
    decode = msgspec.structs.replace(sample.rows[1], figure="prefetch_decode", variant="0.25", extra=series)
    whole = msgspec.structs.replace(sample, rows=[*sample.rows, decode])
    results.save(tmp_path / "engine-1.json", whole)
    own = msgspec.structs.replace(sample, rows=[msgspec.structs.replace(decode, variant="4")], not_run=[])
    results.save(tmp_path / "prefetch-1.json", own)
    monkeypatch.setattr("bench.app.RESULTS", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"{README}{table.marker('prefetch')}\nnone\n<!-- prefetch:end -->\n", encoding="utf-8")
    runner = CliRunner()
    assert runner.invoke(app, ["table", "--readme", str(readme)]).exit_code == 0
    text = readme.read_text(encoding="utf-8")
    assert "| 4 × |" in text
    assert "0.25 ×" not in text
    assert runner.invoke(app, ["table", "--readme", str(readme), "--check"]).exit_code == 0
