"""``stat``, ``verify`` and ``version``: what a root holds, and whether every byte of it is right."""

from __future__ import annotations

import platform
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from cascade_aio._version import __version__
from cascade_aio.cli.blocks import GET_ARENA_BYTES, LOOK_ARENA_BYTES, PositionalRoot
from cascade_aio.cli.options import Json, Settings, open_private, store_command
from cascade_aio.cli.output import err, out, print_json, run
from cascade_aio.config import StoreConfig, format_size


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
    """Read and check every block of a root; exit code 1 if any is damaged."""
    report = run(_verify_root(settings.reading(directory, GET_ARENA_BYTES)))
    if json:
        print_json(report)
    else:
        for damage in report["damage"]:
            err.print(f"[bold red]damaged:[/] {escape(damage['message'])}")
        verdict = f"{len(report['damage'])} damaged" if report["damage"] else "all intact"
        out.print(f"{report['blocks']} blocks, {format_size(report['bytes'])} read: {verdict}")
    if report["damage"]:
        raise SystemExit(1)


async def _verify_root(config: StoreConfig) -> dict[str, Any]:
    columns = ("verify", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    async with open_private(config) as store:
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task("verify", total=None)

            def on_progress(done_bytes: int, total_bytes: int) -> None:
                progress.update(task, completed=done_bytes, total=total_bytes)

            report = await store.verify(on_progress)
    return {
        "blocks": report.blocks,
        "bytes": report.bytes,
        "damage": [
            {"path": damage.path, "segment": damage.segment, "offset": damage.offset, "message": str(damage)}
            for damage in report.damage
        ],
    }


def version(json: Json = False) -> None:
    """Print the version."""
    if json:
        print_json({"version": __version__, "python": platform.python_version()})
    else:
        out.print(f"cascade-aio {__version__} (Python {platform.python_version()})")
