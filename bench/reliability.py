"""RELIABILITY.md from the result files: ``python -m bench.reliability`` writes it, ``--check`` only compares.

Every number in it comes from a file below ``bench/results/reliability``; what has no file is "not run". It
must not know how anything is tested.
"""

from __future__ import annotations

import argparse
import difflib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench.machine import REPOSITORY

RESULTS = REPOSITORY / "bench" / "results" / "reliability"
PAGE = REPOSITORY / "RELIABILITY.md"
NOT_RUN = "not run"

CAMPAIGNS = {
    "simulation": "`make simulate SEEDS=5000`",
    "crash": "`make crash KILLS=500`",
    "fuzz": "`make fuzz SECONDS=600`",
}
"""Result files by name, and what writes them."""

PROMISES = (
    ("blocks acknowledged and lost", "blocks_lost", "lost"),
    ("wrong bytes handed out", "wrong_bytes", "wrong"),
    ("deleted and back", "came_back", "resurrected"),
    ("damage reported without a cause", None, "damage"),
    ("leaks (leases, memory, descriptors, files, tasks)", "leaks", "leak"),
    ("hangs", "hangs", "hang"),
    ("other failures", "unexpected", "error"),
)
"""What must not happen: its name, its field in the simulation's result, its kind in the kill campaign's."""

DISKS = {
    "here": "{here}, the machine's own",
    "ext4": "ext4 on a loop device with a volatile write cache",
    "xfs": "XFS on a loop device with a volatile write cache",
}

REAL_FAULTS = {
    "full": "file system full (ENOSPC)",
    "read-only": "file system turns read-only",
    "shut down": "file system fails every call (shut down without its journal)",
    "power cut": "loss of power: what the device had not flushed is gone",
}

INTRODUCTION = """\
# Reliability

What was done to the store, and what became of it. This page is made from the result files in
[`bench/results/reliability`](bench/results/reliability) by `python -m bench.reliability`; nothing in it is written by
hand, and what has no result file says "{not_run}".

The promises: bytes handed out are the bytes that were put; what `flush` acknowledged survives any crash unless the
medium itself is damaged, and then the damage is reported with its place; what was deleted and flushed stays away;
nothing leaks; nothing hangs. "Lost" excludes what was never flushed and what a disk budget evicted: nobody promised it.
"""


def load(name: str, folder: pathlib.Path = RESULTS) -> dict[str, Any] | None:
    """A result, or ``None`` if that campaign was not run."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def render(folder: pathlib.Path = RESULTS) -> str:
    """The page."""
    simulation, crash, fuzz = (load(name, folder) for name in CAMPAIGNS)
    sections = [
        INTRODUCTION.format(not_run=NOT_RUN).rstrip(),
        "## Summary\n\n" + _summary(simulation, crash),
        "## Processes killed, by file system\n\n" + _crashes(crash),
        "## Faults, and how each was met\n\n" + _faults(simulation, crash),
        "## Fuzzing\n\n" + _fuzz(fuzz),
        "## Where the numbers come from\n\n" + _origins({"simulation": simulation, "crash": crash, "fuzz": fuzz}),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(simulation: Mapping[str, Any] | None, crash: Mapping[str, Any] | None) -> str:
    total = crash and crash["total"]
    rows = [
        ("runs", _at(simulation, "seeds_run"), _at(total, "seeds")),
        ("operations", _at(simulation, "operations"), _at(total, "operations")),
        ("crashes", _at(simulation, "crashes"), _at(total, "kills")),
        ("openings afterwards, each checked", _at(simulation, "reopens"), _at(total, "checks")),
        ("bytes verified", _bytes(simulation, "bytes_verified"), _bytes(total, "bytes_checked", "bytes_verified")),
    ]
    for words, simulated, kind in PROMISES:
        there = _at(simulation, simulated) if simulated or simulation is None else "in other failures"
        rows.append((f"**{words}**", there, _at(total and total["broken"], kind)))
    return _table(("", "simulated world", "real processes and file systems"), rows)


def _crashes(crash: Mapping[str, Any] | None) -> str:
    if crash is None:
        return f"{NOT_RUN}: {CAMPAIGNS['crash']}"
    rows = []
    for kind, words in DISKS.items():
        name = words.format(here=crash["here"])
        figures = crash["file_systems"].get(kind)
        if figures is None:
            rows.append((name, f"{NOT_RUN}: {crash['not_run'].get(kind, 'not asked for')}", *[""] * 7))
            continue
        rows.append(
            (
                name,
                _number(figures["kills"]),
                _number(figures["kills_beside_reader"]),
                _number(figures["kills_beside_writers"]),
                _number(figures["operations"]),
                _bytes(figures, "bytes_checked", "bytes_verified"),
                _bytes(figures, "reader_bytes"),
                _number(figures["torn_records"]),
                _number(sum(figures["broken"].values())),
            )
        )
    head = (
        "file system", "kills", "beside a reader", "with other writers", "operations", "bytes verified",
        "read meanwhile", "torn records met", "promises broken",
    )  # fmt: skip
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(crash["total"]["kills_by_phase"].items()))
    return (
        _table(head, rows)
        + f"\n\nKilled by moment: {phases}. *before*, *during*, *after* and *torn* are exact calls of the storage, "
        "*beside* are further writers of the same root, *opening* is while a root was being opened."
    )


def _faults(simulation: Mapping[str, Any] | None, crash: Mapping[str, Any] | None) -> str:
    rows: list[Sequence[str]] = []
    if simulation is None:
        rows.append(("simulated faults", NOT_RUN, CAMPAIGNS["simulation"]))
    else:
        for fault in simulation["faults"].values():
            met = ", ".join(f"{how} {_number(count)}" for how, count in fault["met"].items() if count)
            rows.append((fault["what"], _number(fault["injected"]), met))
    for kind, words in REAL_FAULTS.items():
        if crash is None:
            rows.append((f"real: {words}", NOT_RUN, CAMPAIGNS["crash"]))
            continue
        count = crash["total"]["faults"].get(kind, 0)
        rows.append((f"real: {words}", _number(count), _met(kind, crash["total"])))
    note = (
        "\n\n*Absorbed*: no call ended with an error for it (retried, written elsewhere, served from memory, of no "
        "consequence). Damage of the medium is met by the records that it hits: reported with their place, or never "
        "met again (dead, overwritten, removed). Simulated faults are those of single calls and pages; real ones are "
        "those of whole file systems."
    )
    return _table(("fault", "times", "met by"), rows) + note


def _met(fault: str, total: Mapping[str, Any]) -> str:
    """How a writer and the next opening met a failing file system: as promised, or not."""
    if any(total["broken"].values()):
        return "see the failures in the result file"
    if fault == "power cut":
        return "all that had been flushed is there after the restart"
    return "the writer answers until it is killed; all that had been flushed is there afterwards"


def _fuzz(fuzz: Mapping[str, Any] | None) -> str:
    if fuzz is None:
        return f"{NOT_RUN}: {CAMPAIGNS['fuzz']}"
    rows = [(f"`{name}`", _number(count)) for name, count in fuzz["inputs"].items()]
    return (
        _table(("structure", "inputs"), rows)
        + f"\n\nInputs come from {fuzz['engine']}. Any bytes must give data, a clean error or the end of the log; "
        f"{fuzz['failures']} did not."
    )


def _origins(results: Mapping[str, Mapping[str, Any] | None]) -> str:
    rows: list[Sequence[str]] = []
    for name, result in results.items():
        if result is None:
            rows.append((name, NOT_RUN, "", "", "", CAMPAIGNS[name]))
            continue
        commit = "unknown" if result["commit"] is None else f"`{result['commit'][:12]}`"
        dirty = " and changes" if result["dirty"] else ""
        rows.append(
            (name, result["date"][:10], result["version"], commit + dirty, result["kernel"], f"`{result['command']}`")
        )
    return _table(("campaign", "date", "version", "commit", "kernel", "command"), rows)


def _at(figures: Mapping[str, Any] | None, key: str | None) -> str:
    return NOT_RUN if figures is None or key is None else _number(figures[key])


def _bytes(figures: Mapping[str, Any] | None, *keys: str) -> str:
    return NOT_RUN if figures is None else f"{sum(figures[key] for key in keys) / 1e9:,.1f} GB"


def _number(value: float) -> str:
    return f"{value:,}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers are aligned right."""
    rules = ["---:" if all(_is_number(row[column]) for row in rows) else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rules, *rows))


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell.partition(":")[0] in ("", NOT_RUN)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or say how it differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description="Make RELIABILITY.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it is not up to date")
    options = parser.parse_args(arguments)
    page = render()
    old = PAGE.read_text() if PAGE.exists() else ""
    if not options.check:
        PAGE.write_text(page)
        return 0
    if old == page:
        return 0
    sys.stderr.writelines(
        difflib.unified_diff(old.splitlines(True), page.splitlines(True), "RELIABILITY.md", "results")
    )
    sys.stderr.write("RELIABILITY.md is not what the result files say: run python -m bench.reliability\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
