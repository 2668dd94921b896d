"""A store that only looks: nothing of the root changes, whoever else has it open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.testing.memory import Operation
from cascade_aio.testing.world import World, cancel_others, run
from tests.store.conftest import OpenStore, block_bytes
from tests.store.test_adopting import expect, kill, put

CHANGES = {
    "create",
    "write",
    "sync",
    "truncate",
    "make_directory",
    "sync_directory",
    "unlink",
    "write_small",
    "try_lock",
}


def picture(root: Path) -> dict[str, tuple[int, int, int]]:
    """Whatever a change would change."""
    found = {}
    for path in [root, *root.rglob("*")]:
        status = path.stat()
        found[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


async def test_looking_changes_nothing_and_reads_everything(open_small: OpenStore, tmp_path: Path) -> None:
    async with open_small(digest="blake3") as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(100)]
    before = picture(tmp_path / "kv")
    async with ca.open_store(tmp_path / "kv", read_only=True, shm_bytes="4MiB") as reader:
        assert len(reader) == 100
        for seed, block_id in enumerate(ids):
            async with reader.get(block_id) as block:
                assert (bytes(block.key), bytes(block.value)) == block_bytes(seed)
        report = await reader.verify()
        assert (report.blocks, report.damage) == (100, ())
        await reader.flush()
        await reader.refresh()
        assert reader.statistics()["digest"] == "blake3"
        assert reader.statistics()["shm"]["arena"] == "private memory"
    assert picture(tmp_path / "kv") == before


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.put(b"", b"x"),
        lambda store: store.delete(store._some),
        lambda store: store.adopt(),
        lambda store: store.reserve(key_bytes=1, value_bytes=1).__aenter__(),
    ],
    ids=["put", "delete", "adopt", "reserve"],
)
async def test_changes_are_refused(open_small: OpenStore, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    async with open_small() as store:
        block_id = await store.put(b"", b"x")
    async with ca.open_store(tmp_path / "kv", read_only=True, shm_bytes="1MiB") as reader:
        reader._some = block_id  # type: ignore[attr-defined]
        with pytest.raises(ca.ConfigError, match="read_only=True"):
            await change(reader)
        assert block_id in reader


async def test_a_reader_follows_a_writer(open_small: OpenStore, tmp_path: Path) -> None:
    async with open_small() as store, ca.open_store(tmp_path / "kv", read_only=True, shm_bytes="4MiB") as reader:
        block_id = await store.put(*block_bytes(1))
        await store.flush()
        assert await reader.refresh() == 1
        async with reader.get(block_id) as block:
            assert bytes(block.key) == block_bytes(1)[0]
        await store.delete(block_id)
        await store.flush()
        await reader.refresh()
        assert block_id not in reader


@pytest.mark.parametrize("kind", ["nothing", "empty", "file", "strangers"])
async def test_what_is_no_root_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "kv"
    if kind == "file":
        root.write_text("x")
    elif kind != "nothing":
        root.mkdir()
    if kind == "strangers":
        (root / "notes.txt").write_text("x")
    before = picture(tmp_path)
    with pytest.raises(ca.ConfigError, match=r"holds no store|is a file"):
        await ca.open_store(root, read_only=True)
    assert picture(tmp_path) == before


def test_no_operation_that_changes_anything_is_even_tried() -> None:
    """After a kill too: an open segment is read as far as it goes, and left to its adopter."""

    async def story() -> None:
        world = World()
        victim = await world.open()
        ids = await put(victim, range(20))
        kill(world, victim)
        tried: list[Operation] = []
        reader = await world.open(read_only=True)
        world.storage.hooks.append(lambda operation: tried.append(operation) if operation.name in CHANGES else None)
        assert not CHANGES & world.storage.counts.keys()
        await expect(reader, ids)
        assert (await reader.verify()).damage == ()
        await reader.refresh()
        await reader.aclose()
        assert tried == []
        await cancel_others()

    run(story)


async def test_a_root_without_write_permission_can_be_read(open_small: OpenStore, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere: tests/faults looks at it as another user")
    async with open_small() as store:
        block_id = await store.put(*block_bytes(1))
    paths = [tmp_path / "kv", *(path for path in (tmp_path / "kv").rglob("*") if path.is_dir())]
    for path in paths:
        path.chmod(0o500)
    try:
        reading = ca.open_store(tmp_path / "kv", read_only=True, shm_bytes="4MiB")
        async with reading as reader, reader.get(block_id) as block:
            assert bytes(block.key) == block_bytes(1)[0]
    finally:
        for path in paths:
            path.chmod(0o700)
