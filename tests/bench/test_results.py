from __future__ import annotations

import pathlib

import msgspec
import pytest

from bench import results
from bench.results import BenchError, Environment, NotRun, ResultFile, Row


def test_a_file_survives_the_round_trip(tmp_path: pathlib.Path, sample: ResultFile) -> None:
    path = tmp_path / "engine-2026-01-02.json"
    results.save(path, sample)
    assert results.load(path) == sample
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_same_environment_goes_on_with_the_file(
    tmp_path: pathlib.Path, sample: ResultFile, environment: Environment
) -> None:
    path = tmp_path / "engine-2026-01-02.json"
    results.save(path, sample)
    assert results.open_or_start(path, environment, ["run"]) == sample


@pytest.mark.parametrize(
    ("field", "value"), [("commit", "f" * 40), ("version", "0.2.0"), ("dirty", True), ("kernel", "6.9"), ("cores", 64)]
)
def test_rows_of_two_environments_are_never_mixed(
    tmp_path: pathlib.Path, sample: ResultFile, environment: Environment, field: str, value: object
) -> None:
    path = tmp_path / "engine-2026-01-02.json"
    results.save(path, sample)
    before = path.read_bytes()
    changed = msgspec.structs.replace(environment, **{field: value})
    with pytest.raises(BenchError, match=f"{field}: .* rows of two environments are not mixed"):
        results.open_or_start(path, changed, ["run"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 99}', b'{"format": 1, "rows": 3}'])
def test_what_is_no_result_file_is_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "engine-1.json"
    path.write_bytes(content)
    with pytest.raises(BenchError, match=r"engine-1\.json"):
        results.load(path)


def test_a_row_replaces_the_one_of_its_key_and_not_run(sample: ResultFile) -> None:
    first = sample.rows[0]
    again = msgspec.structs.replace(first, verified_bytes=1)
    results.put_row(sample, again)
    assert [row for row in sample.rows if results.row_key(row) == results.row_key(first)] == [again]
    missing = sample.not_run[0]
    measured = msgspec.structs.replace(
        first, figure=missing.figure, block_bytes=missing.block_bytes, variant=missing.variant
    )
    results.put_row(sample, measured)
    assert sample.not_run == []
    results.put_row(sample, missing)
    assert measured not in sample.rows


def test_verdicts_follow_the_target(sample: ResultFile) -> None:
    assert [row.verdict() for row in sample.rows] == ["met", "missed", "missed"]
    met, _, worst = sample.rows
    assert met.achieved() == pytest.approx(1.0)  # median of 0.95, 1.0, 1.0
    assert worst.achieved() == 16.0  # the worst repetition, not the median of 5 ms
    assert msgspec.structs.replace(met, target=None).verdict() == "shown"


def test_the_newest_file_is_the_one_started_last(tmp_path: pathlib.Path, sample: ResultFile) -> None:
    with pytest.raises(BenchError, match="python -m bench run"):
        results.newest(tmp_path)
    results.save(tmp_path / "engine-2.json", sample)
    later = msgspec.structs.replace(sample, started="2026-02-01T00:00:00+00:00")
    results.save(tmp_path / "engine-1.json", later)
    assert results.newest(tmp_path).name == "engine-1.json"


def test_series_of_different_units_make_no_ratio() -> None:
    with pytest.raises(ValueError, match="means nothing"):
        results.pair_summary(results.make_series("a", "GB/s", [1.0]), results.make_series("b", "s", [1.0]))


def test_keys_tell_variants_and_sizes_apart(sample: ResultFile) -> None:
    rows: list[Row | NotRun] = [*sample.rows, *sample.not_run]
    assert len({results.row_key(row) for row in rows}) == len(rows)
