"""``repair``: set aside what is damaged, make anew what is derived, say what was lost."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.markup import escape

from cascade_aio.cli.blocks import GET_ARENA_BYTES, PositionalRoot
from cascade_aio.cli.inspection import plain_report, print_findings, show_progress, told_once
from cascade_aio.cli.options import Json, Settings, store_command
from cascade_aio.cli.output import UsageError, err, out, print_json, run
from cascade_aio.config import StoreConfig, format_size
from cascade_aio.store.repairing import RepairReport, repair_root

LINES_MAX = 50
"""Lost blocks that are listed one by one; --json lists all."""


@store_command
def repair(
    settings: Settings,
    directory: PositionalRoot = None,
    dead: Annotated[
        list[str] | None,
        typer.Option(
            "--dead",
            metavar="WRITER",
            help="A writer directory (32 hex digits) whose process you know to be dead, where that cannot be proven.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Repair a root: damaged records go to ROOT/quarantine, footers and checkpoints are written anew.

    Reads everything. May be interrupted and run again. Exit code 1 if something had to be left.
    """
    vouched_for = [_writer(text) for text in dead or ()]
    config = settings.reading(directory, GET_ARENA_BYTES)
    with told_once():
        report = run(_repair(dataclasses.replace(config, read_only=False), vouched_for))
    if json:
        print_json(_plain(report))
    else:
        _print(report)
    if not report.clean:
        raise SystemExit(1)


def _writer(text: str) -> bytes:
    try:
        writer = bytes.fromhex(text)
    except ValueError:
        writer = b""
    if len(writer) != 16:
        raise UsageError(f"--dead {text} is no writer: give the 32 hex digits of a directory in ROOT/writers")
    return writer


async def _repair(config: StoreConfig, vouched_for: list[bytes]) -> RepairReport:
    with show_progress("verify") as on_progress:
        return await repair_root(config, vouched_for=vouched_for, on_progress=on_progress)


def _plain(report: RepairReport) -> dict[str, Any]:
    return {
        "clean": report.clean,
        "before": plain_report(report.before),
        "quarantined": [dataclasses.asdict(one) for one in report.quarantined],
        "lost_blocks": [dataclasses.asdict(one) for one in report.lost_blocks],
        "lost_segments": [dataclasses.asdict(one) for one in report.lost_segments],
        "resealed": report.resealed,
        "left": report.left,
        "remaining": plain_report(report.remaining),
    }


def _print(report: RepairReport) -> None:
    if report.before.clean:
        size = format_size(report.before.bytes)
        out.print(f"{report.before.blocks} blocks, {size} read: all intact, nothing to repair")
        return
    for one in report.quarantined:
        out.print(f"set aside {format_size(one.nbytes)} in {one.copy} ({one.reason})", markup=False)
    for segment in report.lost_segments:
        out.print(f"lost: {segment.path}: {segment.reason}; {segment.blocks} blocks were in it", markup=False)
    for block in report.lost_blocks[:LINES_MAX]:
        names = f" (prefix keys {', '.join(block.names)})" if block.names else ""
        out.print(f"lost: block {block.block_id}{names}", markup=False)
    if len(report.lost_blocks) > LINES_MAX:
        out.print(f"… and {len(report.lost_blocks) - LINES_MAX} more blocks (--json lists all)")
    for reason in report.left:
        err.print(f"[bold red]left:[/] {escape(reason)}")
    print_findings(plain_report(report.remaining))
    verdict = "verify finds nothing more" if report.clean else "some of it had to be left"
    lost, copies = len(report.lost_blocks), len(report.quarantined)
    out.print(f"{lost} blocks lost, {copies} ranges set aside, {len(report.resealed)} segments put right: {verdict}")
