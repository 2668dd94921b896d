"""Every figure through the real code with tiny sizes, so that no benchmark can rot. Nothing about time."""

from __future__ import annotations

import os
import pathlib

import pytest
from rich.console import Console

from bench import runner, table
from bench.figures import families
from bench.results import BenchError, ResultFile, load, row_key, save
from bench.scale import QUICK


def run_quick(folder: pathlib.Path, *names: str, seed: int = 7) -> ResultFile:
    return runner.run(
        out=folder / "engine-test.json",
        scratch=folder / "scratch",
        scale=QUICK,
        names=names,
        repeats=QUICK.repeats,
        seed=seed,
        io_backend="auto",
        command=["python", "-m", "bench", "run", "--quick"],
        console=Console(stderr=True, quiet=True),
    )


COUNTED_FAMILIES = {"cold_get_cpu", "compaction"}
"""They void a figure whose bytes the kernel has not counted as read from the medium."""


@pytest.mark.parametrize("name", families())
def test_a_family_measures_all_its_lines(tmp_path: pathlib.Path, name: str, request: pytest.FixtureRequest) -> None:
    if name in COUNTED_FAMILIES:
        request.getfixturevalue("cold_reads")
    result = run_quick(tmp_path, name)
    lines = [line for case in families()[name](QUICK) for line in case.lines]
    keys = {(line.figure, line.block_bytes, line.variant) for line in lines}
    assert {row_key(row) for row in result.rows} | {row_key(row) for row in result.not_run} == keys
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not list(pathlib.Path("/dev/shm").glob(f"cascade-bench-{os.getpid()}-*"))
    text = (tmp_path / "engine-test.json").read_text()
    assert str(tmp_path) not in text
    assert load(tmp_path / "engine-test.json") == result
    assert table.render(result)
    for row in result.rows:
        assert len(row.ours.samples) == QUICK.repeats
        assert row.other is None or len(row.ratios) == QUICK.repeats == len(row.order)
        assert row.io_backend
        assert row.io_backend_reason
        if row.figure not in ("index_memory", "reopen"):
            assert row.verified_bytes >= QUICK.repeats * row.block_bytes
    if result.not_run:
        pytest.skip(result.not_run[0].reason)


def test_a_second_run_measures_only_what_is_missing(tmp_path: pathlib.Path) -> None:
    first = run_quick(tmp_path, "bound_put")
    kept = first.rows.pop()
    save(tmp_path / "engine-test.json", first)
    again = run_quick(tmp_path, "bound_put")
    assert again.rows[0] == first.rows[0]
    assert len(again.rows) == 2
    assert again.rows[1].ours != kept.ours


def test_an_unknown_figure_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BenchError, match="no figure warp_speed; there are cold_get"):
        run_quick(tmp_path, "warp_speed")
    assert not (tmp_path / "engine-test.json").exists()


def test_bytes_that_come_back_wrong_void_the_figure(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.data import Pool

    monkeypatch.setattr(Pool, "equals", lambda self, index, key, value: index != 1)
    with pytest.raises(BenchError, match="the figure is void"):
        run_quick(tmp_path, "bound_put")
