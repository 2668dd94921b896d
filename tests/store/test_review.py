"""Defects that a hostile reviewer found in opening, closing and the arena, each as its shortest story."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from pathlib import Path
from unittest import mock

import pytest

from cascade_aio.errors import ConfigError, TierFullError
from cascade_aio.model import BlockMeta
from cascade_aio.testing.store import eventually
from cascade_aio.tiers.arena import open_arena
from tests.store.conftest import OpenStore, block_bytes


async def test_a_root_with_more_blocks_than_the_index_holds_can_be_opened(open_small: OpenStore) -> None:
    async with open_small() as store:
        for i in range(1100):
            await store.put(b"%d" % i, b"")
    async with open_small(index_blocks_max=1024) as store:
        assert len(store) == 1024
        assert store.statistics()["disk"]["facts_refused"] > 0
        with pytest.raises(TierFullError, match="index_blocks_max"):
            await store.put(b"new", b"")
        await store.refresh()
    async with open_small() as store:
        assert len(store) == 1100


async def test_an_opening_without_threads_leaves_nothing_open(open_small: OpenStore) -> None:
    start = threading.Thread.start

    def refuse_second(thread: threading.Thread) -> None:
        if thread.name.endswith("bytes-1"):
            raise RuntimeError("can't start new thread")
        start(thread)

    async def fail() -> None:
        with mock.patch.object(threading.Thread, "start", refuse_second), pytest.raises(RuntimeError, match="thread"):
            await open_small(workers=2)

    def threads() -> list[str]:
        return [
            thread.name for thread in set(threading.enumerate()) - others if thread.name.startswith("cascade-bytes")
        ]

    others = set(threading.enumerate())
    await fail()
    await eventually(lambda: not threads())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await fail()
    await eventually(lambda: not threads())
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_a_stale_arena_is_replaced_not_reused(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    path.write_bytes(b"old" * 5000)
    path.chmod(0o666)
    with path.open("rb") as old:
        arena = await open_arena(str(path), 1 << 20)
        arena.memory[:3] = b"new"
        assert old.read(3) == b"old"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        arena.close()
    assert not path.exists()


async def test_closing_leaves_another_stores_arena_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    first = await open_arena(str(path), 1 << 20)
    path.unlink()  # somebody tidied up
    second = await open_arena(str(path), 1 << 20)
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["link", "fifo", "hard link", "directory"])
async def test_what_is_no_arena_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "arena", tmp_path / "other"
    other.write_bytes(b"mine")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        path.hardlink_to(other)
    else:
        path.mkdir()
    with pytest.raises(ConfigError, match="arena"):
        await open_arena(str(path), 1 << 20)
    assert os.path.lexists(path)
    assert other.read_bytes() == b"mine"


async def test_segments_are_private(open_small: OpenStore, tmp_path: Path) -> None:
    async with open_small() as store:
        await store.put(*block_bytes(1))
        await store.flush()
        segments = list((tmp_path / "kv").rglob("*.seg"))
        assert segments
        assert {stat.S_IMODE(path.stat().st_mode) for path in segments} == {0o600}


async def test_a_forked_child_leaves_its_parents_store_alone(open_small: OpenStore, arena: str) -> None:
    async with open_small() as store:
        block_id = await store.put(*block_bytes(2))
        await store.flush()
        child = os.fork()
        if not child:
            try:
                store._context.platform.storage.engine.__del__()  # what its garbage collector does at exit
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.path.exists(f"/dev/shm/{arena}")
        await store.put(*block_bytes(3))
        await store.flush()
    async with open_small() as store, store.get(block_id) as block:
        assert bytes(block.key) == block_bytes(2)[0]


async def test_concurrent_puts_of_stored_content_do_not_wait_for_each_other(open_small: OpenStore) -> None:
    async with open_small(shm_bytes="8MiB", put_wait_seconds_max=60) as store:
        data = [bytes([i]) * (1 << 19) for i in range(32)]
        for part in data:
            await store.put(part, part)
        await store.flush()
        async with asyncio.timeout(50):
            await asyncio.gather(*(store.put(part, part) for part in data))


async def test_a_root_without_its_description_is_not_made_anew(open_small: OpenStore, tmp_path: Path) -> None:
    async with open_small() as store:
        block_id = await store.put(*block_bytes(4))
    description = (tmp_path / "kv" / "cascade.json").read_bytes()
    (tmp_path / "kv" / "cascade.json").unlink()
    with pytest.raises(ConfigError, match="restore"):
        await open_small()
    (tmp_path / "kv" / "cascade.json").write_bytes(description)
    async with open_small() as store:
        assert block_id in store


@pytest.mark.parametrize("field", [{"dtype": 5}, {"shape": "4x4"}, {"tokens": "no"}, {"tokens": 1 << 70}])
async def test_meta_that_could_not_be_read_back_is_refused(open_small: OpenStore, field: dict[str, object]) -> None:
    async with open_small() as store:
        with pytest.raises(ConfigError, match="meta"):
            await store.put(b"k", b"v", meta=BlockMeta(**field))  # type: ignore[arg-type]
        assert len(store) == 0
