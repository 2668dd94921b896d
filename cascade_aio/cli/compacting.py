"""``compact``: bring the space of dead bytes back."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from cascade_aio.cli.blocks import GET_ARENA_BYTES, PositionalRoot
from cascade_aio.cli.inspection import show_progress
from cascade_aio.cli.options import Json, Settings, store_command
from cascade_aio.cli.output import err, out, print_json, run
from cascade_aio.config import StoreConfig, format_size
from cascade_aio.store import open_store


@store_command
def compact(
    settings: Settings,
    directory: PositionalRoot = None,
    bandwidth: Annotated[
        str | None, typer.Option("--bandwidth", metavar="SIZE", help="Bytes per second at most, such as 100MiB.")
    ] = None,
    json: Json = False,
) -> None:
    """Copy what is live into new segments and remove the old ones.

    Segments of writers that died are adopted first; those of running processes are theirs to compact. May be
    interrupted and run again. Exit code 1 if segments had to be left because of damage.
    """
    config = settings.reading(directory, GET_ARENA_BYTES)
    report = run(_compact(dataclasses.replace(config, read_only=False), bandwidth))
    if json:
        print_json(report)
    else:
        out.print(
            f"{report['segments_before']} segments of {format_size(report['bytes_before'])} are now "
            f"{report['segments_after']} of {format_size(report['bytes_after'])}; {report['copied_blocks']} blocks, "
            f"{format_size(report['copied_bytes'])}, were copied, {report['dropped_tombstones']} deletions dropped"
        )
    if report["kept_aside"]:
        err.print(f"{report['kept_aside']} damaged segments were left: see cascade-aio verify and repair")
        raise SystemExit(1)


async def _compact(config: StoreConfig, bandwidth: str | None) -> dict[str, Any]:
    async with open_store(config) as store:
        await store.adopt()
        with show_progress("compact") as on_progress:
            report = await store.compact(on_progress, bandwidth=bandwidth)
    return {**dataclasses.asdict(report), "freed_bytes": report.freed_bytes}
