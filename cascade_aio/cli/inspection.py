"""``stat``, ``verify`` and ``version``: what a root holds, and whether every byte of it is right."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from cascade_aio._version import __version__
from cascade_aio.cli.blocks import GET_ARENA_BYTES, LOOK_ARENA_BYTES, PositionalRoot
from cascade_aio.cli.options import Json, Settings, open_private, store_command
from cascade_aio.cli.output import err, out, print_json, run
from cascade_aio.config import StoreConfig, format_size
from cascade_aio.errors import CorruptionError
from cascade_aio.store.verifying import VerifyReport

_FINDINGS = {
    "damage": "damaged",
    "lost": "segments lost",
    "unreadable": "unreadable",
    "inconsistent": "inconsistent",
}
"""Parts of a report, and what they are called."""


@store_command
def stat(settings: Settings, directory: PositionalRoot = None, json: Json = False) -> None:
    """Print the statistics of a root as a freshly opened store sees them."""
    statistics = run(_read_statistics(settings.reading(directory, LOOK_ARENA_BYTES)))
    if json:
        print_json(statistics)
        return
    table = Table("what", "value", box=None)
    for name, entry in _flatten(statistics):
        table.add_row(escape(name), escape(_show(name, entry)))
    out.print(table)


async def _read_statistics(config: StoreConfig) -> dict[str, Any]:
    async with open_private(config) as store:
        return dict(store.statistics())


def _flatten(record: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, entry in record.items():
        if isinstance(entry, dict):
            rows += _flatten(entry, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", entry))
    return rows


def _show(name: str, entry: Any) -> str:
    if "bytes" in name.rpartition(".")[2] and isinstance(entry, int) and not isinstance(entry, bool):
        return f"{entry} ({format_size(entry)})" if entry >= 1024 else str(entry)
    return str(entry)


@store_command
def verify(settings: Settings, directory: PositionalRoot = None, json: Json = False) -> None:
    """Read and check every block of a root, and what is said of them; exit code 1 if anything is wrong."""
    config = settings.reading(directory, GET_ARENA_BYTES)
    with told_once():
        report = run(_verify_root(config))
    if json:
        print_json(report)
    else:
        print_findings(report)
        verdict = ", ".join(f"{len(report[kind])} {word}" for kind, word in _FINDINGS.items() if report[kind])
        out.print(f"{report['blocks']} blocks, {format_size(report['bytes'])} read: {verdict or 'all intact'}")
        if verdict:
            root = escape(shlex.quote(config.root))
            cure = f"to set damage aside and be told what is lost: cascade-aio repair {root}"
            if all(kind == "unreadable" for kind in _FINDINGS if report[kind]):  # says nothing about the bytes
                cure = "what could not be read need not be damaged: mend what the lines above name, then verify again"
            err.print(cure, soft_wrap=True)
    if any(report[kind] for kind in _FINDINGS):
        raise SystemExit(1)


def print_findings(report: dict[str, Any]) -> None:
    """One line on stderr for everything that ``verify`` found."""
    for kind, word in _FINDINGS.items():
        for finding in report[kind]:
            err.print(f"[bold red]{word}:[/] {escape(finding['message'])}")


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """A scope whose damaged records are not in the log as well: a report names each."""
    logger = logging.getLogger("cascade_aio.store.damage")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


async def _verify_root(config: StoreConfig) -> dict[str, Any]:
    async with open_private(config) as store:
        with show_progress("verify") as on_progress:
            report = await store.verify(on_progress)
    return plain_report(report)


@contextlib.contextmanager
def show_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, told of (bytes done, bytes in all)."""
    columns = (name, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(name, total=None)

        def on_progress(done_bytes: int, total_bytes: int) -> None:
            progress.update(task, completed=done_bytes, total=total_bytes)

        yield on_progress


def plain_report(report: VerifyReport) -> dict[str, Any]:
    """A report as JSON says it."""

    def errors(some: Iterable[CorruptionError]) -> list[dict[str, Any]]:
        return [
            {"path": error.path, "segment": error.segment, "offset": error.offset, "message": str(error)}
            for error in some
        ]

    lost = [
        {**dataclasses.asdict(one), "message": f"{one.path}: {one.reason}; {one.blocks} blocks are lost"}
        for one in report.lost
    ]
    inconsistent = [{"path": one.path, "message": f"{one.path}: {one.what}"} for one in report.inconsistent]
    return {
        "blocks": report.blocks,
        "bytes": report.bytes,
        "damage": errors(report.damage),
        "unreadable": errors(report.unreadable),
        "lost": lost,
        "inconsistent": inconsistent,
    }


def version(json: Json = False) -> None:
    """Print the version."""
    if json:
        print_json({"version": __version__, "python": platform.python_version()})
    else:
        out.print(f"cascade-aio {__version__} (Python {platform.python_version()})")
