"""A file system that fills up, or may not be written: flush says so, reads go on, room brings everything back."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

import pytest

import cascade_aio as ca
from tests.faults.conftest import fill
from tests.faults.harness import Known, make_block, open_at, put

SETTINGS = {"segment_bytes": "4MiB", "shm_bytes": "8MiB", "put_wait_seconds_max": 1.0, "when_full": "refuse"}
FLUSH_TRIES = 200
"""A full writer looks for room every two seconds by itself."""


def blocks(first: int, count: int, nbytes: int = 600_000) -> list[Known]:
    return [make_block(seed, nbytes // 2, nbytes // 2) for seed in range(first, first + count)]


async def put_all(store: ca.Store, some: list[Known]) -> None:
    for block in some:
        await put(store, block)


async def expect(store: ca.Store, some: list[Known]) -> None:
    for block in some:
        async with store.get(block.block_id) as found:
            assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)


async def flush_when_possible(store: ca.Store) -> None:
    """Room was made: the writer notices by itself."""
    for _ in range(FLUSH_TRIES):
        try:
            return await store.flush()
        except ca.TierFullError:
            await asyncio.sleep(0.1)
    raise AssertionError("the writer never noticed that there is room again")


async def test_no_room_for_a_new_segment(small_disk: Path) -> None:
    before, after = blocks(0, 8), blocks(100, 3)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await put_all(store, before)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        filler = fill(small_disk)
        await put_all(store, after)
        with pytest.raises(ca.TierFullError, match=str(small_disk)):
            await store.flush()
        assert store.statistics()["disk"]["full"]
        await expect(store, before + after)
        with pytest.raises(ca.TierFullError):  # still, and it does not hang
            await store.flush()
        filler.unlink()
        await flush_when_possible(store)
        assert not store.statistics()["disk"]["full"]
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await expect(store, before + after)
        assert (await store.verify()).damage == ()


async def test_full_in_the_middle_of_a_stream_of_puts(small_disk: Path) -> None:
    acknowledged: list[Known] = []
    store = await open_at(small_disk / "kv", **SETTINGS)

    async def put_until_full() -> None:
        for seed in itertools.count():
            (block,) = blocks(seed, 1, 900_000)
            await put(store, block)
            await store.flush()
            acknowledged.append(block)

    with pytest.raises(ca.TierFullError):
        await put_until_full()
    assert len(acknowledged) > 30
    await expect(store, acknowledged)
    with pytest.raises(ca.TierFullError):
        await store.aclose()
    async with open_at(small_disk / "kv", **SETTINGS) as store:  # full as it is
        await expect(store, acknowledged)
        assert (await store.verify()).damage == ()
        assert store.statistics()["damage"] == []
    async with open_at(small_disk / "kv", **SETTINGS, disk_bytes="32MiB") as store:  # the budget makes room
        more = blocks(1000, 4)
        await put_all(store, more)
        await flush_when_possible(store)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await expect(store, more)
        assert (await store.verify()).damage == ()


async def test_a_full_disk_evicts_the_coldest(small_disk: Path) -> None:
    """As a cache does unless told otherwise: nobody has to make room, and nobody is told."""
    settings = {**SETTINGS, "when_full": "evict", "put_wait_seconds_max": 30.0}
    some = blocks(0, 100, 900_000)
    async with open_at(small_disk / "kv", **settings) as store:
        for block in some:
            await put(store, block)
            await store.flush()
        disk = store.statistics()["disk"]
        assert disk["evicted_blocks"] > 0
        assert disk["reclaimed_segments"] > 0
        assert not disk["full"]
        await expect(store, some[-20:])
        there = [block for block in some if block.block_id in store]
        assert 20 <= len(there) < len(some)
    async with open_at(small_disk / "kv", **settings) as store:
        await expect(store, some[-20:])
        assert (await store.verify()).damage == ()


async def test_no_room_for_footer_and_checkpoint(small_disk: Path) -> None:
    """What was flushed needs neither: the end is clean, and the next opening finds everything."""
    some = blocks(0, 6)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await put_all(store, some)
        await store.delete(some.pop().block_id)
        await store.flush()
        filler = fill(small_disk)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await expect(store, some)
        assert len(store) == len(some)
        filler.unlink()
        more = blocks(50, 1)
        await put_all(store, more)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await expect(store, some + more)
        assert (await store.verify()).damage == ()


async def test_a_deletion_on_a_full_disk_is_not_acknowledged_and_not_forgotten(small_disk: Path) -> None:
    some = blocks(0, 4)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await put_all(store, some)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        filler = fill(small_disk)
        await store.delete(some[0].block_id)
        with pytest.raises(ca.TierFullError):
            await store.flush()
        filler.unlink()
        await flush_when_possible(store)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        assert some[0].block_id not in store
        await expect(store, some[1:])


async def test_no_room_for_a_root(small_disk: Path) -> None:
    filler = fill(small_disk)
    with pytest.raises(ca.ConfigError, match="No space left"):
        await open_at(small_disk / "kv", **SETTINGS)
    filler.unlink()
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await put_all(store, blocks(0, 1))


def make_read_only(place: Path) -> None:
    """As the kernel does it after an error, whatever is open for writing."""
    device = os.stat(place).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    trigger = Path(f"/sys/fs/ext4/{name}/trigger_fs_error")
    if not trigger.exists():
        pytest.skip("this kernel has no trigger_fs_error for ext4")
    trigger.write_text("1\n")


async def test_remounted_read_only(small_disk: Path) -> None:
    some = blocks(0, 4)
    async with open_at(small_disk / "kv", **SETTINGS) as store:
        await put_all(store, some)
    store = await open_at(small_disk / "kv", **SETTINGS)
    broken = False
    try:
        make_read_only(small_disk)
        (block,) = blocks(99, 1)
        await put(store, block)
        with pytest.raises(ca.BrokenTierError, match=r"Read-only|Input/output"):
            await store.flush()
        await expect(store, [*some, block])
        broken = store.statistics()["disk"]["broken"]
    finally:
        with pytest.raises(ca.BrokenTierError):
            await store.aclose()
    assert broken
    with pytest.raises(ca.ConfigError, match=str(small_disk)):
        await open_at(small_disk / "kv", **SETTINGS)
