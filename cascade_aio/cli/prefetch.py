"""``prefetch``: tell a running node service which blocks will be wanted."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import aiofiles
import typer

from cascade_aio.cli.blocks import parse_name
from cascade_aio.cli.options import Json
from cascade_aio.cli.output import UsageError, fail, out, print_json, run
from cascade_aio.config import format_size
from cascade_aio.daemon import connect, socket_path_of
from cascade_aio.model import BlockId, PrefixKey
from cascade_aio.store.prefetching import KEYS_MAX, PrefetchProgress

KEYS_FILE_BYTES_MAX = 1 << 30


def socket_path(socket: Path | None, root: Path | None) -> str:
    """The socket that was named, or the default one of the root that was. Raises ``UsageError``."""
    if (socket is None) == (root is None):
        raise UsageError("name the service: --socket PATH, or --root DIR for the one that serves it on this node")
    return str(socket) if socket is not None else socket_path_of(root or "")


SocketOption = Annotated[
    Path | None, typer.Option("--socket", metavar="PATH", help="Socket of the service.", show_default=False)
]
RootOption = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="Or the root that it serves here.", show_default=False)
]


def prefetch(
    keys: Annotated[str, typer.Option("--keys", metavar="FILE", help="Names, one a line; -: stdin.")],
    socket: SocketOption = None,
    root: RootOption = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", metavar="SECONDS", help="Give up what is not there by then.")
    ] = None,
    urgent: Annotated[bool, typer.Option("--urgent", help="Before the writing of new blocks.")] = False,
    json: Json = False,
) -> None:
    """Let a service promote blocks to shared memory: ids (32 hex digits) or prefix keys (64), in this order."""
    if keys != "-" and not Path(keys).is_file():
        raise UsageError(f"--keys {keys} is no file; give one with a name a line, or - for stdin")
    progress = run(_prefetch(socket_path(socket, root), keys, deadline, urgent))
    if json:
        print_json(progress)
    else:
        given_up = progress["refused"] + progress["failed"] + progress["cancelled"]
        out.print(
            f"{progress['landed']} promoted ({format_size(progress['landed_bytes'])}), {progress['resident']} were "
            f"there, {progress['unknown']} unknown, {given_up} given up"
        )
    if progress["failed"] or progress["refused"]:
        fail(f"{progress['failed']} blocks could not be read and {progress['refused']} found no room")


async def _prefetch(path: str, keys: str, deadline_s: float | None, urgent: bool) -> dict[str, Any]:
    names = await _read_names(keys)
    totals: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(PrefetchProgress)), 0)
    async with connect(path, client="cascade-aio prefetch", wait_seconds=0) as store:
        for start in range(0, len(names), KEYS_MAX):
            part = names[start : start + KEYS_MAX]
            handle = store.prefetch(part, priority="high" if urgent else "low", deadline_s=deadline_s)
            for name, count in dataclasses.asdict(await handle.wait()).items():
                totals[name] += count
    return totals


async def _read_names(keys: str) -> list[BlockId | PrefixKey]:
    try:
        if keys == "-":
            text = await asyncio.to_thread(sys.stdin.read, KEYS_FILE_BYTES_MAX)
        else:
            async with aiofiles.open(keys) as file:
                text = await file.read(KEYS_FILE_BYTES_MAX)
    except UnicodeDecodeError:
        raise UsageError(f"--keys {keys} is no text; give a file with a name a line") from None
    return [parse_name(line.strip()) for line in text.splitlines() if line.strip()]
