"""RELIABILITY.md says what the result files say, and says so where there are none."""

from __future__ import annotations

import json
from pathlib import Path

from bench.reliability import CAMPAIGNS, NOT_RUN, PAGE, RESULTS, render
from cascade_aio.testing.crashes import Figures


def test_the_page_is_that_of_the_result_files() -> None:
    assert PAGE.read_text() == render(), "run python -m bench.reliability"


def test_what_has_no_result_file_was_not_run(tmp_path: Path) -> None:
    page = render(tmp_path)
    assert page.count(NOT_RUN) > len(CAMPAIGNS)
    assert not any(character.isdigit() for line in page.splitlines() if line.startswith("| **") for character in line)


def test_numbers_come_from_the_file(tmp_path: Path) -> None:
    figures = Figures(kills=4321, operations=98765, bytes_checked=10**9, bytes_verified=2 * 10**9)
    figures.broken["lost"] = 17
    result = {
        "commit": "0123456789abcdef",
        "dirty": True,
        "date": "2026-01-02T03:04:05",
        "version": "9.9",
        "kernel": "7.0",
        "command": "crash it",
        "here": "btrfs",
        "file_systems": {"here": figures.as_json()},
        "not_run": {"xfs": "no mkfs.xfs"},
        "total": figures.as_json(),
    }
    (tmp_path / "crash.json").write_text(json.dumps(result))
    page = render(tmp_path)
    for told in (
        "4,321",
        "98,765",
        "3.0 GB",
        "| 17 |",
        "no mkfs.xfs",
        "btrfs",
        "`0123456789ab` and changes",
        "crash it",
    ):
        assert told in page, told


def test_results_in_the_repository_kept_every_promise() -> None:
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        broken = result["total"]["failures"] if "total" in result else result["failures"]
        assert not broken, f"{path.name}: {broken}"
