"""``put``, ``get`` and ``ls``: single blocks by hand, as a store's user would move them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import aiofiles
import typer
from rich.table import Table

from cascade_aio.cli.options import Json, Settings, arena_bytes_for, open_private, store_command
from cascade_aio.cli.output import UsageError, fail, out, print_json, run
from cascade_aio.config import GIB, MIB, StoreConfig, format_size, parse_size
from cascade_aio.errors import ConfigError
from cascade_aio.model import BLOCK_ID_BYTES, BlockId, PrefixKey, Tier
from cascade_aio.store import Block

GET_ARENA_BYTES = GIB
"""Arena of a single ``get``: holds any block of usual size."""
LOOK_ARENA_BYTES = MIB
"""Arena of a command that reads no payload."""

PositionalRoot = Annotated[
    Path | None, typer.Argument(metavar="[ROOT]", help="Directory of the segment files.", show_default=False)
]


@store_command
def put(
    settings: Settings,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files to store, one block each.")],
    key_bytes: Annotated[
        str, typer.Option("--key-bytes", metavar="SIZE", help="How much of each file is the key part.")
    ] = "0",
    json: Json = False,
) -> None:
    """Store each FILE as a block and print its id; durable when the command returns.

    Exit code 1 if the root was too small for all of them, so that some had to go again.
    """
    try:
        split = parse_size(key_bytes)
    except ConfigError as error:
        raise UsageError(f"--key-bytes: {error}") from None
    for path in files:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file; put takes files only")
    largest = max(os.stat(path).st_size for path in files)
    rows = run(_put_files(settings.private(None, arena_bytes_for(largest)), files, split))
    if json:
        print_json(rows)
    else:
        for row in rows:
            out.print(f"{row['block_id']}  {row['file']}", markup=False)
    gone = [str(row["file"]) for row in rows if not row["stored"]]
    if gone:
        fail(
            f"{len(gone)} of {len(rows)} blocks had to make room for others and are gone again ({gone[0]} is one): the "
            "root is too small for all of them; raise disk_bytes or free disk space"
        )


async def _put_files(config: StoreConfig, files: list[Path], split: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    async with open_private(config) as store:
        for path in files:
            async with aiofiles.open(path, "rb") as file:
                content = memoryview(await file.read())
            if split > len(content):
                raise UsageError(f"--key-bytes {split} is more than {path} has ({len(content)} bytes)")
            block_id = await store.put(content[:split], content[split:])
            rows.append({"block_id": block_id, "file": path, "key_bytes": split, "value_bytes": len(content) - split})
        await store.flush()
        kept = {info.block_id async for info in store.blocks() if Tier.DISK in info.tiers}
        for row in rows:
            row["stored"] = row["block_id"] in kept
    return rows


def parse_name(text: str) -> BlockId | PrefixKey:
    """A block id (32 hex digits) or a prefix key (64). Raises ``UsageError``."""
    kind = BlockId if len(text) <= 2 * BLOCK_ID_BYTES else PrefixKey
    try:
        return kind.from_hex(text)
    except ConfigError as error:
        raise UsageError(f"{error} (a block id; a prefix key takes 64)") from None


@store_command
def get(
    settings: Settings,
    block: Annotated[str, typer.Argument(metavar="ID", help="Block id (32 hex digits) or prefix key (64).")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write; default stdout.")
    ] = None,
    part: Annotated[Literal["all", "key", "value"], typer.Option(help="Which part; all: key, then value.")] = "all",
    json: Json = False,
) -> None:
    """Read a block, verified, and write its bytes to a file or to stdout."""
    name = parse_name(block)
    if output is None and json:
        raise UsageError("--json needs -o FILE: stdout carries the bytes otherwise")
    if output is None and sys.stdout.isatty():
        raise UsageError("a block is binary; give -o FILE or redirect stdout")
    row = run(_get_block(settings.reading(None, GET_ARENA_BYTES), name, output, part))
    if json:
        print_json(row)


async def _get_block(config: StoreConfig, name: BlockId | PrefixKey, output: Path | None, part: str) -> dict[str, Any]:
    async with open_private(config) as store, store.get(name) as block:
        await asyncio.to_thread(_write_out, output, block, part)
        return {
            "block_id": block.block_id,
            "key_bytes": block.key.nbytes,
            "value_bytes": block.value.nbytes,
            "tier": block.tier,
            "file": output,
        }


def _write_out(output: Path | None, block: Block, part: str) -> None:
    """Runs in a thread, which is also what keeps the arrays no longer than the lease."""
    with contextlib.ExitStack() as files:
        file = sys.stdout.buffer if output is None else files.enter_context(open(output, "wb"))
        if part != "value":
            file.write(block.key)
        if part != "key":
            file.write(block.value)
        file.flush()


@store_command
def ls(settings: Settings, directory: PositionalRoot = None, json: Json = False) -> None:
    """List the blocks of a root."""
    rows = run(_list_blocks(settings.reading(directory, LOOK_ARENA_BYTES)))
    if json:
        print_json(rows)
        return
    table = Table("block id", "key", "value", "tiers", "names", box=None)
    for row in rows:
        sizes = (format_size(row["key_bytes"]), format_size(row["value_bytes"]))
        table.add_row(row["block_id"], *sizes, " ".join(row["tiers"]), str(row["prefixes"]))
    out.print(table)
    total = sum(row["key_bytes"] + row["value_bytes"] for row in rows)
    out.print(f"{len(rows)} blocks, {format_size(total)}")


async def _list_blocks(config: StoreConfig) -> list[dict[str, Any]]:
    async with open_private(config) as store:
        return [
            {
                "block_id": str(info.block_id),
                "key_bytes": info.key_bytes,
                "value_bytes": info.value_bytes,
                "tiers": [str(tier) for tier in info.tiers],
                "prefixes": info.prefixes,
            }
            for info in store.blocks()
        ]
