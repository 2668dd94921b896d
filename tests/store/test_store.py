"""The public interface of an embedded store: what is put comes back, hot, cold, after a restart."""

from __future__ import annotations

import asyncio
import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.errors import (
    BlockNotFoundError,
    BlockTooLargeError,
    CascadeError,
    ClosedError,
    ConfigError,
    DigestConflictError,
    LeaseError,
    TierFullError,
)
from tests.store.conftest import OpenStore, block_bytes

KEYS = ca.prefix_keys(range(64), block_tokens=8, namespace="test")


def allocated_copies(store: ca.Store) -> float:
    """Extents in use, in copies: 1.0 means that nothing but the one resident block holds memory."""
    shm = store.statistics()["shm"]
    return float(shm["allocated_bytes"] / shm["copy_bytes"] * shm["blocks"])


async def forget(store: ca.Store, block_id: ca.BlockId) -> None:
    await store.get(block_id)
    gc.collect()


async def test_put_get_hot_and_cold(open_small: OpenStore) -> None:
    key, value = block_bytes(1)
    meta = ca.BlockMeta(dtype="float16", shape=(2, 5), tokens=16)
    async with open_small() as store:
        block_id = await store.put(key, value, meta=meta)
        assert block_id == ca.compute_block_id(key, value)
        assert len(str(block_id)) == 32
        async with store.get(block_id) as block:
            assert block.tier == "shm"
            assert (bytes(block.key), bytes(block.value), block.meta) == (key, value, meta)
            assert not block.key.flags.writeable
            assert block.value.ctypes.data % 64 == 0
    async with open_small() as store:
        assert len(store) == 1
        async with store.get(str(block_id)) as block:
            assert block.tier == "disk"
            assert (bytes(block.key), bytes(block.value), block.meta) == (key, value, meta)
        async with store.get(block_id) as block:
            assert block.tier == "shm"


@pytest.mark.parametrize(
    ("key_bytes", "value_bytes"),
    [(0, 0), (0, 5), (5, 0), (1, 1), (63, 64), (64, 4096), (4096, 4095), (3_000_001, 2_999_999)],
)
async def test_any_lengths(open_small: OpenStore, key_bytes: int, value_bytes: int) -> None:
    key, value = block_bytes(2, key_bytes, value_bytes)
    async with open_small() as store:
        block_id = await store.put(key, bytearray(value))
        async with store.get(block_id) as block:
            assert (bytes(block.key), bytes(block.value)) == (key, value)
    async with open_small() as store, store.get(block_id) as block:
        assert (bytes(block.key), bytes(block.value)) == (key, value)


async def test_blake3_ids(open_small: OpenStore) -> None:
    key, value = block_bytes(3)
    async with open_small(digest="blake3") as store:
        assert await store.put(key, value) == ca.compute_block_id(key, value, "blake3")
    with pytest.raises(ConfigError, match="digest"):
        async with open_small(digest="sha256"):
            pass


async def test_equal_content_is_stored_once(open_small: OpenStore) -> None:
    key, value = block_bytes(4)
    async with open_small() as store:
        first = await store.put(key, value, prefix=KEYS[0])
        await store.flush()
        written = store.statistics()["disk"]["live_bytes"]
        second = await store.put(key, value, prefix=KEYS[1], parent=KEYS[0])
        await store.flush()
        assert first == second
        assert len(store) == 1
        assert store.statistics()["store"]["puts_deduplicated"] == 1
        assert store.statistics()["disk"]["live_bytes"] == written
    async with open_small() as store:
        for name in (KEYS[0], KEYS[1]):
            async with store.get(name) as block:
                assert bytes(block.value) == value


async def test_first_writer_of_a_prefix_wins(open_small: OpenStore) -> None:
    async with open_small() as store:
        first = await store.put(*block_bytes(5), prefix=KEYS[0])
        assert await store.put(b"other", b"bytes", prefix=KEYS[0]) == first
        ids = await asyncio.gather(*(store.put(*block_bytes(10 + i), prefix=KEYS[1]) for i in range(8)))
        assert len(set(ids)) == 1
        assert len(store) == 2


async def test_the_same_bytes_split_differently_are_a_conflict(open_small: OpenStore) -> None:
    async with open_small() as store:
        await store.put(b"ab", b"c")
        with pytest.raises(DigestConflictError, match="split"):
            await store.put(b"a", b"bc")
        assert allocated_copies(store) == 1


async def test_names(open_small: OpenStore) -> None:
    async with open_small() as store:
        unknown = ca.compute_block_id(b"x", b"y")
        for name in (unknown, str(unknown), KEYS[0]):
            assert name not in store
            with pytest.raises(BlockNotFoundError):
                await store.get(name)
            with pytest.raises(LookupError):
                async with store.get(name):
                    pass
        for malformed in ("xyz", "0" * 31, "g" * 32, 7, None, b"short"):
            with pytest.raises(ConfigError):
                await store.get(malformed)
        with pytest.raises(ConfigError, match="PrefixKey"):
            store.lookup(["text"])


async def test_bad_buffers(open_small: OpenStore) -> None:
    async with open_small() as store:
        strided = np.zeros((64, 64), np.float16)[:, ::2]
        with pytest.raises(ConfigError, match="contiguous"):
            await store.put(strided, b"")
        with pytest.raises(ConfigError, match="buffer protocol"):
            await store.put("text", b"")
        with pytest.raises(BlockTooLargeError, match="shm_bytes"):
            await store.put(bytes(20 << 20), b"")
        with pytest.raises(ConfigError, match="prefix"):
            await store.put(b"k", b"v", parent=KEYS[0])
        with pytest.raises(ConfigError, match="meta"):
            await store.put(b"k", b"v", meta=ca.BlockMeta(extra=bytes(5000)))
        block_id = await store.put(b"key", b"value")
        with pytest.raises(ConfigError, match="read-only"):
            await store.read_into(block_id, bytes(3), bytearray(5))
        with pytest.raises(ConfigError, match="4 bytes"):
            await store.read_into(block_id, bytearray(4), bytearray(5))
        assert store.statistics()["shm"]["leases"] == 0
        assert len(store) == 1


async def test_numpy_blocks_and_views(open_small: OpenStore) -> None:
    key = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    value = np.arange(48, dtype=np.float32)
    async with open_small() as store:
        block_id = await store.put(key, value)
        async with store.get(block_id) as block:
            assert np.array_equal(np.asarray(block.key).view(np.float16).reshape(2, 3, 4), key)
            assert np.array_equal(np.from_dlpack(block.value).view(np.float32), value)
            with pytest.raises(ValueError, match="read-only"):
                block.key[0] = 1
        out_key, out_value = np.empty_like(key), np.empty_like(value)
        await store.read_into(block_id, out_key, out_value)
        assert np.array_equal(out_key, key)
        assert np.array_equal(out_value, value)


async def test_reserve_seals_or_aborts(open_small: OpenStore) -> None:
    key, value = block_bytes(6)
    async with open_small() as store:
        async with store.reserve(key_bytes=len(key), value_bytes=len(value), prefix=KEYS[0]) as slot:
            slot.key[:] = np.frombuffer(key, np.uint8)
            slot.value[:] = np.frombuffer(value, np.uint8)
            with pytest.raises(LeaseError):
                _ = slot.block_id
        assert slot.block_id == ca.compute_block_id(key, value)
        with pytest.raises(LeaseError):
            _ = slot.key
        assert store.statistics()["store"]["reserve_copies"] == 0
        with pytest.raises(RuntimeError, match="mine"):
            async with store.reserve(key_bytes=10, value_bytes=10, prefix=KEYS[1]):
                raise RuntimeError("mine")
        assert KEYS[1] not in store
        assert len(store) == 1
        assert allocated_copies(store) == 1
        async with store.get(KEYS[0]) as block:
            assert bytes(block.key) == key


async def test_a_kept_writable_view_cannot_change_a_sealed_block(open_small: OpenStore) -> None:
    async with open_small() as store:
        async with store.reserve(key_bytes=100, value_bytes=0) as slot:
            kept = slot.key
            kept[:] = 7
        kept[:] = 9
        async with store.get(slot.block_id) as block:
            assert set(bytes(block.key)) == {7}
        assert store.statistics()["store"]["reserve_copies"] == 1
        del kept
        await asyncio.sleep(0.01)
        assert allocated_copies(store) == 1


async def test_a_view_that_outlives_its_lease_keeps_its_bytes(open_small: OpenStore) -> None:
    key, value = block_bytes(7, 1 << 20, 1 << 20)
    async with open_small() as store:
        block_id = await store.put(key, value)
        await store.flush()
        async with store.get(block_id) as block:
            kept = np.asarray(block.key)[10:]
        del block
        for i in range(20):  # far more than the arena holds
            await store.put(*block_bytes(100 + i, 1 << 20, 1 << 20))
        assert bytes(kept) == key[10:]
        del kept
        gc.collect()
        await asyncio.sleep(0.01)
        assert store.statistics()["shm"]["leases"] == 0


async def test_lease_errors(open_small: OpenStore) -> None:
    async with open_small() as store:
        block_id = await store.put(b"key", b"value")
        block = await store.get(block_id)
        block.release()
        with pytest.raises(LeaseError, match="released"):
            block.release()
        with pytest.raises(LeaseError):
            _ = block.key
        with pytest.warns(ResourceWarning, match="test_store.py"):
            await forget(store, block_id)
        await asyncio.sleep(0.01)
        assert store.statistics()["shm"]["leases"] == 0


async def test_prefix_lookup_and_get(open_small: OpenStore) -> None:
    async with open_small() as store:
        parent = None
        for i, name in enumerate(KEYS[:5]):
            await store.put(*block_bytes(20 + i), prefix=name, parent=parent)
            parent = name
        assert len(store.lookup(KEYS)) == 5
        assert store.lookup(KEYS).tiers == ("shm",) * 5
        assert len(store.lookup([*KEYS[:2], KEYS[6], *KEYS[2:]])) == 2
    async with open_small() as store:
        assert store.lookup(KEYS).tiers == ("disk",) * 5
        async with store.get_prefix(KEYS) as blocks:
            assert [bytes(block.value) for block in blocks] == [block_bytes(20 + i)[1] for i in range(5)]
        async with store.get_prefix(KEYS[6:]) as blocks:
            assert blocks == []
        assert store.statistics()["shm"]["leases"] == 0


async def test_single_flight(open_small: OpenStore) -> None:
    key, value = block_bytes(8, 1 << 20, 1 << 20)
    async with open_small() as store:
        block_id = await store.put(key, value)
    async with open_small() as store:
        blocks = await asyncio.gather(*(store.get(block_id) for _ in range(50)))
        assert store.statistics()["disk"]["records_read"] == 1
        for block in blocks:
            assert block.value.tobytes() == value
            block.release()


@pytest.mark.parametrize("eviction", ["prefix-lru", "hit-density"])
async def test_eviction_keeps_everything_readable(open_small: OpenStore, eviction: str) -> None:
    blocks = [block_bytes(200 + i, 1 << 20, 1 << 19) for i in range(30)]  # 45 MiB through 16 MiB
    async with open_small(eviction=eviction, disk_bytes="128MiB") as store:
        ids = [await store.put(*block) for block in blocks]
        assert store.statistics()["shm"]["evicted_blocks"] > 0
        for block_id, (key, value) in zip(ids, blocks, strict=True):
            async with store.get(block_id) as block:
                assert (bytes(block.key), bytes(block.value)) == (key, value)
        assert store.statistics()["shm"]["allocated_bytes"] <= 16 << 20


async def test_arena_full_of_leases(open_small: OpenStore) -> None:
    async with open_small(put_wait_seconds_max=1.5) as store:
        leases: list[ca.Block] = []

        async def fill() -> None:
            for i in range(40):
                leases.append(await store.get(await store.put(*block_bytes(300 + i, 1 << 20, 0))))

        with pytest.raises(TierFullError, match="leases pin"):
            await fill()
        await store.flush()  # from now on leases alone hold the arena, however slow the disk is
        waiting = asyncio.ensure_future(store.put(*block_bytes(399, 1 << 20, 0)))
        await asyncio.sleep(0.05)
        for block in leases:
            block.release()
        await waiting


async def test_delete_and_reopen(open_small: OpenStore) -> None:
    async with open_small() as store:
        doomed = await store.put(*block_bytes(9), prefix=KEYS[0])
        kept = await store.put(*block_bytes(10), prefix=KEYS[1])
        await store.flush()
        async with store.get(doomed) as block:
            await store.delete(doomed)
            assert bytes(block.key) == block_bytes(9)[0]
        with pytest.raises(BlockNotFoundError):
            await store.get(KEYS[0])
        with pytest.raises(BlockNotFoundError):
            await store.delete(doomed)
        await store.flush()
    async with open_small() as store:
        assert doomed not in store
        assert kept in store
        assert await store.put(*block_bytes(9), prefix=KEYS[0]) == doomed
    async with open_small() as store:
        assert KEYS[0] in store
        assert doomed in store


async def test_two_stores_share_a_root(open_small: OpenStore, arena: str) -> None:
    async with open_small() as one, open_small(arena=arena + "-b") as two:
        block_id = await one.put(*block_bytes(11), prefix=KEYS[0])
        await one.flush()
        assert block_id not in two
        assert await two.refresh() == 1
        async with two.get(KEYS[0]) as block:
            assert bytes(block.key) == block_bytes(11)[0]
        await two.delete(block_id)
        await two.flush()
        await one.refresh()
        assert block_id not in one


async def test_second_opener_of_one_arena(open_small: OpenStore) -> None:
    async with open_small() as store:
        with pytest.raises(ConfigError, match="in use"):
            async with open_small():
                pass
        await store.put(b"still", b"works")


async def test_use_after_close(open_small: OpenStore) -> None:
    async with open_small() as store:
        block_id = await store.put(b"key", b"value")
    for call in (
        lambda: store.put(b"a", b"b"),
        lambda: store.get(block_id),
        store.flush,
        lambda: store.delete(block_id),
        store.refresh,
        store.verify,
    ):
        with pytest.raises(ClosedError):
            await call()
    for sync in (lambda: store.lookup([]), lambda: list(store.blocks()), lambda: len(store)):
        with pytest.raises(ClosedError):
            sync()
    await store.aclose()


async def test_closing_with_a_lease_outstanding(open_small: OpenStore, arena: str) -> None:
    store = await open_small()
    block_id = await store.put(b"key" * 1000, b"value")
    block = await store.get(block_id)
    with pytest.warns(ResourceWarning, match="1 leases"):
        await store.aclose()
    assert bytes(block.key) == b"key" * 1000
    assert not os.path.exists(f"/dev/shm/{arena}")
    block.release()


def test_another_event_loop_is_refused(tmp_path: Path, arena: str) -> None:
    first = asyncio.new_event_loop()

    async def open_it() -> ca.Store:
        return await ca.open_store(tmp_path / "kv", shm_bytes="4MiB", arena=arena)

    store = first.run_until_complete(open_it())

    async def use_it() -> None:
        with pytest.raises(CascadeError, match="loop"):
            await store.put(b"a", b"b")

    asyncio.run(use_it())
    first.run_until_complete(store.aclose())
    first.close()


@pytest.mark.parametrize(
    "prepare",
    [
        lambda root: root.write_text("a file"),
        lambda root: (root.mkdir(), (root / "notes.txt").write_text("mine")),
        lambda root: (root.mkdir(), (root / "cascade.json").write_text("{}")),
        lambda root: (root.mkdir(), (root / "cascade.json").write_text("not json")),
    ],
    ids=["file", "foreign-directory", "foreign-json", "no-json"],
)
async def test_a_root_that_is_no_store(
    open_small: OpenStore, tmp_path: Path, prepare: Callable[[Path], object], arena: str
) -> None:
    prepare(tmp_path / "kv")
    with pytest.raises(ConfigError, match="kv"):
        async with open_small():
            pass
    assert not os.path.exists(f"/dev/shm/{arena}")


async def test_shared_memory_too_small(open_small: OpenStore, arena: str) -> None:
    with pytest.raises(TierFullError, match="shm_bytes"):
        async with open_small(shm_bytes="512TiB"):
            pass
    assert not os.path.exists(f"/dev/shm/{arena}")


async def test_nothing_is_left_behind(open_small: OpenStore, arena: str) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with open_small() as store:
            for i in range(10):
                await store.put(*block_bytes(500 + i))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert not os.path.exists(f"/dev/shm/{arena}")


async def test_verify_and_listing(open_small: OpenStore) -> None:
    async with open_small() as store:
        ids = {await store.put(*block_bytes(600 + i)) for i in range(5)}
        await store.flush()
        assert {info.block_id for info in store.blocks()} == ids
        assert all(info.tiers == ("shm", "disk") for info in store.blocks())
        report = await store.verify()
        assert report.blocks == 5
        assert report.damage == ()
