"""Small roots of known content, damaged by hand, and the check that damage is never returned as data."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments import format as fmt
from cascade_aio.segments.footer import Trailer, decode_trailer

NAMES = ca.prefix_keys(range(64), block_tokens=2, namespace="faults")
STATES = ("checkpoint", "footer", "scan")
"""What a later opening finds: a checkpoint; sealed segments; an open segment, as after a kill."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A block that was put and flushed."""

    block_id: ca.BlockId
    key: bytes
    value: bytes
    names: tuple[ca.PrefixKey, ...]


@dataclasses.dataclass(frozen=True)
class World:
    """A root on disk. ``deleted`` was put, flushed, deleted and flushed."""

    root: Path
    blocks: tuple[Known, ...]
    deleted: Known

    def copy(self, target: Path) -> World:
        shutil.copytree(self.root, target)
        return dataclasses.replace(self, root=target)

    def only(self, pattern: str) -> Path:
        (found,) = self.root.glob(pattern)
        return found


@dataclasses.dataclass(frozen=True)
class Record:
    """A record found by walking the file, without any help of the store."""

    header: fmt.RecordHeader
    bytes: memoryview


def make_block(seed: int, key_bytes: int, value_bytes: int, *names: ca.PrefixKey) -> Known:
    rng = np.random.default_rng(seed)
    key, value = rng.bytes(key_bytes), rng.bytes(value_bytes)
    return Known(ca.compute_block_id(key, value), key, value, names)


def open_at(root: Path, **settings: Any) -> Any:
    """A small store with an arena of its own."""
    defaults = {
        "shm_bytes": "4MiB",
        "segment_bytes": "4MiB",
        "arena": f"cascade-faults-{uuid.uuid4().hex[:12]}",
        "io_backend": "threads",
        "tail_seconds_max": 60.0,
        "workers": 1,
        "put_wait_seconds_max": 60.0,
    }
    return ca.open_store(root, **{**defaults, **settings})


async def put(store: ca.Store, block: Known) -> None:
    """Put it under its first name, bind the others."""
    meta = ca.BlockMeta(dtype="float16")
    for name in block.names or (None,):
        assert await store.put(block.key, block.value, prefix=name, meta=meta) == block.block_id


async def make_world(place: Path, state: str) -> World:
    """Five blocks, a further name, a deletion; each put is flushed, so that records say what was synced."""
    blocks = (
        make_block(1, 5000, 3000, NAMES[0]),
        make_block(2, 1_300_000, 7, NAMES[1], NAMES[2]),
        make_block(3, 0, 60_000),
        make_block(4, 63, 4097, NAMES[3]),
        make_block(5, 4096, 0, NAMES[4]),
    )
    deleted = make_block(9, 100, 100, NAMES[9])
    root = place / "kv"
    async with open_at(root) as store:
        await put(store, deleted)
        await store.flush()
        await store.delete(deleted.block_id)
        for block in blocks:
            await put(store, block)
            await store.flush()
        if state == "scan":
            shutil.copytree(root, place / "killed")
    if state == "scan":
        return World(place / "killed", blocks, deleted)
    if state == "footer":
        for checkpoint in root.glob("writers/*/checkpoint"):
            checkpoint.unlink()
    return World(root, blocks, deleted)


def walk(segment: Path) -> list[Record]:
    """Its records, in order."""
    content = memoryview(segment.read_bytes())
    head = fmt.decode_segment_header(content, path=str(segment))
    assert head is not None
    records, position = [], PAGE_BYTES
    while position < len(content) and content[position : position + 8] == fmt.RECORD_MAGIC:
        header = fmt.decode_record(content[position:], head.identity, path=str(segment), offset=position)
        assert header is not None
        records.append(Record(header, content[position : header.end]))
        position = header.end
    return records


def trailer_of(segment: Path) -> Trailer | None:
    """Its trailer if it is sealed."""
    content = memoryview(segment.read_bytes())
    head = fmt.decode_segment_header(content, path=str(segment))
    assert head is not None
    return decode_trailer(content[-PAGE_BYTES:], head.identity, len(content))


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


@dataclasses.dataclass
class Seen:
    """What a store said of a world."""

    lost: list[Known]
    reports: list[str]
    errors: list[ca.CorruptionError]
    deleted_is_back: bool
    lost_names: int


async def look(store: ca.Store, world: World) -> Seen:
    """Read everything by id and by name. Wrong bytes are a failure at once; what is missing is told."""
    seen = Seen([], [], [], world.deleted.block_id in store, 0)
    for block in world.blocks:
        try:
            async with store.get(block.block_id) as found:
                assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)
                assert found.meta == ca.BlockMeta(dtype="float16")
        except ca.CorruptionError as error:
            seen.errors.append(error)
            seen.lost.append(block)
        except ca.BlockNotFoundError:
            seen.lost.append(block)
        else:
            for name in block.names:
                if store.lookup([name]):
                    async with store.get(name) as found:
                        assert found.block_id == block.block_id
                else:
                    seen.lost_names += 1
    report = await store.verify()
    seen.reports = [*map(str, report.damage), *store.statistics()["damage"]]
    return seen


async def mend(world: World) -> None:
    """Put everything again: then all of it is there, also in the next session, and nothing deleted is."""
    async with open_at(world.root) as store:
        await look(store, world)
        for block in world.blocks:
            await put(store, block)
        if world.deleted.block_id in store:
            await store.delete(world.deleted.block_id)
        await store.flush()
        await expect_whole(store, world)
    async with open_at(world.root) as store:
        await expect_whole(store, world)


async def expect_whole(store: ca.Store, world: World) -> None:
    """Every block and name is there; what was deleted is not."""
    seen = await look(store, world)
    assert not seen.lost
    assert not seen.errors
    assert not seen.lost_names
    assert not seen.deleted_is_back


@contextlib.contextmanager
def removed_afterwards(path: Path) -> Iterator[Path]:
    """Hundreds of roots are made: none stays."""
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
