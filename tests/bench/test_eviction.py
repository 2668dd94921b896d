"""bench.eviction: a small run gives a file from which the README table is made, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.eviction import report
from bench.eviction.rows import EvictionResult
from bench.results import BenchError
from cascade_aio.core.contest import OURS, POLICIES


def test_a_small_run_makes_the_table(tmp_path: Path) -> None:
    result = report.measure([], 40, lambda line: None)
    assert all(one.store_hits == one.replay_hits for one in result.confirmed)
    path = tmp_path / "eviction.json"
    report.save(path, result)
    assert report.load(path) == result
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\noutdated\n{report.END}\nafter\n")
    with pytest.raises(BenchError, match="not in step"):
        report.update(readme, result, check=True)
    report.update(readme, result, check=False)
    report.update(readme, result, check=True)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "outdated" not in text
    assert all(name in text for name in (*result.workloads, OURS))
    report.update(readme, result, full=True, check=False)
    assert all(name in readme.read_text() for name in (*POLICIES, *result.workloads, f"**{OURS}**"))


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="run `python -m"):
        report.load(tmp_path / "none.json")
    path = tmp_path / "other.json"
    path.write_text('{"format": 9}')
    with pytest.raises(BenchError, match="not a result file"):
        report.load(path)


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    result = EvictionResult("0", "c", False, "2000-01-01", {}, [], [])
    with pytest.raises(BenchError, match="put the two lines"):
        report.update(readme, result, check=True)
