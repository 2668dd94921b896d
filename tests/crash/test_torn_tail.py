"""What a kill leaves behind the last flush: records that are half there, seen by adopters and by bystanders."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments import format as fmt
from tests.faults.harness import Known, Record, make_block, open_at, put, walk

BLOCKS = tuple(make_block(seed, 100_000, 50_000 * seed) for seed in range(1, 5))
"""The first is flushed; of the others, the second is torn."""


def blocks_of(segment: Path) -> list[Record]:
    """Its records but for marks."""
    return [record for record in walk(segment) if record.header.kind == fmt.BLOCK]


async def killed_root(place: Path, torn: str) -> Path:
    """A root as a kill leaves it: A flushed; B, C, D written by one flush that had not ended; B with pages missing."""
    async with open_at(place / "kv") as store:
        await put(store, BLOCKS[0])
        await store.flush()
        for block in BLOCKS[1:]:
            await put(store, block)
        await store.flush()
        shutil.copytree(place / "kv", place / "killed")
    (segment,) = (place / "killed").glob("writers/*/*.seg")
    _, second, _, last = blocks_of(segment)
    with segment.open("r+b") as file:
        file.seek(last.header.end)
        file.write(bytes(PAGE_BYTES))  # the mark by which the flush said that it had ended
        start = second.header.offset + (0 if torn == "header and payload" else 3 * PAGE_BYTES)
        file.seek(start)
        file.write(bytes(8 * PAGE_BYTES))
    return place / "killed"


async def expect(store: ca.Store, there: tuple[Known, ...], gone: Known) -> None:
    """Bytes, a plain miss for the torn one, and no talk of damage."""
    for block in there:
        async with store.get(block.block_id) as found:
            assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)
    with pytest.raises(ca.BlockNotFoundError):
        await store.get(gone.block_id)
    report = await store.verify()
    assert report.damage == ()
    assert store.statistics()["damage"] == []


@pytest.mark.parametrize("torn", ["payload", "header and payload"])
async def test_the_adopter_keeps_what_is_sound_and_leaves_no_hole(tmp_path: Path, torn: str) -> None:
    root = await killed_root(tmp_path, torn)
    there = (BLOCKS[0], *BLOCKS[2:])
    async with open_at(root) as store:
        await expect(store, there, BLOCKS[1])
        assert store.statistics()["disk"]["recovery"]["sealed"] == 1
    for _ in range(2):
        async with open_at(root) as store:
            assert store.statistics()["disk"]["recovery"]["scanned"] == 0
            await expect(store, there, BLOCKS[1])
        for checkpoint in root.glob("writers/*/checkpoint"):
            checkpoint.unlink()
    async with open_at(root) as store:
        await put(store, BLOCKS[1])
    async with open_at(root) as store, store.get(BLOCKS[1].block_id) as found:
        assert bytes(found.key) == BLOCKS[1].key


@pytest.mark.parametrize("torn", ["payload", "header and payload"])
async def test_a_bystander_misses_what_the_writer_never_finished(tmp_path: Path, torn: str) -> None:
    """Before and after somebody adopts the dead writer's directory, and across the bystander's own restart."""
    root = await killed_root(tmp_path, torn)
    (lock,) = root.glob("writers/*/lock")
    there = (BLOCKS[0], *BLOCKS[2:])
    fd = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # the writer seems to live
        async with open_at(root) as bystander:
            await expect(bystander, there, BLOCKS[1])
            await bystander.refresh()
            if torn == "payload":
                assert BLOCKS[1].block_id in bystander  # told again: the write may have been in flight
            await expect(bystander, there, BLOCKS[1])
            await bystander.refresh()
            os.close(fd)
            fd = -1
            async with open_at(root) as adopter:
                await expect(adopter, there, BLOCKS[1])
            await expect(bystander, there, BLOCKS[1])
            await bystander.refresh()
            await expect(bystander, there, BLOCKS[1])
    finally:
        if fd >= 0:
            os.close(fd)
    async with open_at(root) as store:
        await expect(store, there, BLOCKS[1])


async def test_an_end_that_was_cut_off_by_the_adopter(tmp_path: Path) -> None:
    """The last record is torn: the adopter's footer takes its place, and the file may end before it did."""
    root = await killed_root(tmp_path, "payload")
    (segment,) = root.glob("writers/*/*.seg")
    last = blocks_of(segment)[-1]
    with segment.open("r+b") as file:
        file.seek(last.header.end - 2 * PAGE_BYTES)
        file.write(bytes(PAGE_BYTES))
    (lock,) = root.glob("writers/*/lock")
    fd = os.open(lock, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    async with open_at(root) as bystander:
        os.close(fd)
        async with open_at(root) as adopter:
            assert BLOCKS[3].block_id not in adopter
        await expect(bystander, (BLOCKS[0], BLOCKS[2]), BLOCKS[3])
        await bystander.refresh()
        await expect(bystander, (BLOCKS[0], BLOCKS[2]), BLOCKS[3])
