"""Conformance suite of the store interface: subclass it, give ``open``, run it with pytest.

An embedded ``Store`` and a client of a node service promise the same; this says what. Answers that may
be incomplete at once (``lookup``, ``in``, ``statistics``) are awaited here.

    class TestMine(StoreConformance):
        def open(self, root, **settings):
            return cascade_aio.open_store(root, **settings)
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.daemon import ServiceStore
from cascade_aio.errors import (
    BlockNotFoundError,
    BlockTooLargeError,
    ClosedError,
    ConfigError,
    DigestConflictError,
    LeaseError,
    TierFullError,
)

AnyStore = ca.Store | ServiceStore
Opener = Callable[..., AbstractAsyncContextManager[AnyStore]]

KEYS = ca.prefix_keys(range(64), block_tokens=8, namespace="conformance")
SETTLE_SECONDS_MAX = 60.0
"""How long what happens soon may take on a machine that is busy with other things."""


def block_bytes(seed: int, key_bytes: int = 70_000, value_bytes: int = 65_536) -> tuple[bytes, bytes]:
    """Random bytes of a block, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return rng.bytes(key_bytes), rng.bytes(value_bytes)


async def eventually(condition: Callable[[], Any]) -> None:
    """Wait until ``condition()`` (which may be a coroutine function) is true."""
    async with asyncio.timeout(SETTLE_SECONDS_MAX):
        while True:
            outcome = condition()
            if asyncio.iscoroutine(outcome):
                outcome = await outcome
            if outcome:
                return
            await asyncio.sleep(0.005)


class StoreConformance:
    """Override ``open``: a scope of a store on ``root`` with ``settings`` of ``StoreConfig``, reopened at will."""

    def open(self, root: Path, **settings: Any) -> AbstractAsyncContextManager[AnyStore]:
        raise NotImplementedError("return the scope of a store")

    @pytest.fixture
    def opened(self, tmp_path: Path) -> Opener:
        """``opened(**settings)`` on one root: 16 MiB of arena, small segments."""

        def opener(**settings: Any) -> AbstractAsyncContextManager[AnyStore]:
            defaults = {"shm_bytes": "16MiB", "segment_bytes": "8MiB", "put_wait_seconds_max": SETTLE_SECONDS_MAX}
            return self.open(tmp_path / "kv", **{**defaults, **settings})

        return opener

    @pytest.fixture
    async def store(self, opened: Opener) -> AsyncIterator[AnyStore]:
        async with opened() as store:
            yield store

    # -- what is put comes back --------------------------------------------------------------------

    async def test_a_block_comes_back_hot_and_cold(self, opened: Opener) -> None:
        key, value = block_bytes(1)
        meta = ca.BlockMeta(dtype="float16", shape=(2, 5), tokens=16)
        async with opened() as store:
            block_id = await store.put(key, value, meta=meta)
            assert block_id == ca.compute_block_id(key, value)
            async with store.get(block_id) as block:
                assert block.tier == "shm"
                assert block.block_id == block_id
                assert (bytes(block.key), bytes(block.value), block.meta) == (key, value, meta)
                assert block.value.ctypes.data % 64 == 0
            await store.flush()
        async with opened() as store:
            async with store.get(str(block_id)) as block:
                assert (bytes(block.key), bytes(block.value), block.meta) == (key, value, meta)
            async with store.get(block_id) as block:
                assert block.tier == "shm"

    @pytest.mark.parametrize(
        ("key_bytes", "value_bytes"), [(0, 0), (0, 5), (5, 0), (63, 64), (4096, 4095), (3_000_001, 2_999_999)]
    )
    async def test_any_lengths(self, store: AnyStore, key_bytes: int, value_bytes: int) -> None:
        key, value = block_bytes(2, key_bytes, value_bytes)
        block_id = await store.put(key, bytearray(value))
        async with store.get(block_id) as block:
            assert (bytes(block.key), bytes(block.value)) == (key, value)
            assert [part.tobytes() for part in block.views()] == [key, value]

    async def test_blake3_ids(self, opened: Opener) -> None:
        key, value = block_bytes(3)
        async with opened(digest="blake3") as store:
            assert await store.put(key, value) == ca.compute_block_id(key, value, "blake3")

    async def test_arrays_are_read_only_views(self, store: AnyStore) -> None:
        key = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
        value = np.arange(48, dtype=np.float32)
        block_id = await store.put(key, value)
        async with store.get(block_id) as block:
            assert np.array_equal(np.asarray(block.key).view(np.float16).reshape(2, 3, 4), key)
            assert np.array_equal(np.from_dlpack(block.value).view(np.float32), value)
            with pytest.raises(ValueError, match="read-only"):
                block.key[0] = 1
            with pytest.raises(ValueError, match="WRITEABLE"):
                block.key.flags.writeable = True

    async def test_read_into_copies(self, store: AnyStore) -> None:
        key, value = block_bytes(4)
        block_id = await store.put(key, value)
        key_buffer, value_buffer = bytearray(len(key)), np.zeros(len(value), np.uint8)
        await store.read_into(block_id, key_buffer, value_buffer)
        assert bytes(key_buffer) == key
        assert value_buffer.tobytes() == value
        with pytest.raises(ConfigError, match="read-only"):
            await store.read_into(block_id, key, bytearray(value))
        with pytest.raises(ConfigError, match="3 bytes"):
            await store.read_into(block_id, bytearray(3), bytearray(value))

    # -- content and names -----------------------------------------------------------------------

    async def test_equal_content_is_stored_once(self, store: AnyStore) -> None:
        key, value = block_bytes(5)
        first = await store.put(key, value, prefix=KEYS[0])
        assert await store.put(key, value, prefix=KEYS[1], parent=KEYS[0]) == first
        assert [info.block_id async for info in store.blocks()] == [first]
        for name in (KEYS[0], KEYS[1]):
            async with store.get(name) as block:
                assert bytes(block.value) == value

    async def test_the_first_writer_of_a_prefix_wins(self, store: AnyStore) -> None:
        first = await store.put(*block_bytes(6), prefix=KEYS[0])
        assert await store.put(b"other", b"bytes", prefix=KEYS[0]) == first
        ids = await asyncio.gather(*(store.put(*block_bytes(10 + i), prefix=KEYS[1]) for i in range(8)))
        assert len(set(ids)) == 1
        assert len([info async for info in store.blocks()]) == 2

    async def test_the_same_bytes_split_differently_are_a_conflict(self, store: AnyStore) -> None:
        await store.put(b"ab", b"c")
        with pytest.raises(DigestConflictError, match="split"):
            await store.put(b"a", b"bc")

    async def test_unknown_and_malformed_names(self, store: AnyStore) -> None:
        unknown = ca.compute_block_id(b"x", b"y")
        for name in (unknown, str(unknown), KEYS[0]):
            assert name not in store
            assert not await store.contains(name)
            with pytest.raises(BlockNotFoundError):
                await store.get(name)
            with pytest.raises(LookupError):
                async with store.get(name):
                    pass
            with pytest.raises(BlockNotFoundError):
                await store.delete(name)
        for malformed in ("xyz", "0" * 31, "g" * 32, 7, None, b"short"):
            with pytest.raises(ConfigError):
                await store.get(malformed)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="PrefixKey"):
            store.lookup(["text"])  # type: ignore[list-item]

    async def test_what_cannot_be_put(self, store: AnyStore) -> None:
        with pytest.raises(ConfigError, match="contiguous"):
            await store.put(np.zeros((64, 64), np.float16)[:, ::2], b"")
        with pytest.raises(ConfigError, match="buffer protocol"):
            await store.put("text", b"")  # type: ignore[arg-type]
        with pytest.raises(BlockTooLargeError, match="shm_bytes"):
            await store.put(bytes(20 << 20), b"")
        with pytest.raises(ConfigError, match="prefix"):
            await store.put(b"k", b"v", parent=KEYS[0])
        with pytest.raises(ConfigError, match="meta"):
            await store.put(b"k", b"v", meta=ca.BlockMeta(extra=bytes(5000)))
        assert [info async for info in store.blocks()] == []

    async def test_prefixes_are_looked_up_and_got(self, opened: Opener) -> None:
        async with opened() as store:
            parent = None
            for i, name in enumerate(KEYS[:5]):
                await store.put(*block_bytes(20 + i), prefix=name, parent=parent)
                parent = name
            assert (await store.lookup(KEYS)).tiers == ("shm",) * 5
            assert len(await store.lookup([*KEYS[:2], KEYS[6], *KEYS[2:]])) == 2
            assert len(store.lookup(KEYS)) <= 5
            await store.flush()
        async with opened() as store:
            assert len(await store.lookup(KEYS)) == 5
            assert await store.contains(KEYS[4])
            async with store.get_prefix(KEYS) as blocks:
                assert [bytes(block.value) for block in blocks] == [block_bytes(20 + i)[1] for i in range(5)]
            async with store.get_prefix(KEYS[6:]) as blocks:
                assert blocks == []
            assert await store.get_prefix([]) == []

    # -- reserve -------------------------------------------------------------------------------------

    async def test_reserve_seals_or_aborts(self, store: AnyStore) -> None:
        key, value = block_bytes(7)
        async with store.reserve(key_bytes=len(key), value_bytes=len(value), prefix=KEYS[0]) as slot:
            slot.key[:] = np.frombuffer(key, np.uint8)
            slot.value[:] = np.frombuffer(value, np.uint8)
            with pytest.raises(LeaseError):
                _ = slot.block_id
        assert slot.block_id == ca.compute_block_id(key, value)
        with pytest.raises(LeaseError):
            _ = slot.key
        with pytest.raises(RuntimeError, match="mine"):
            async with store.reserve(key_bytes=10, value_bytes=10, prefix=KEYS[1]):
                raise RuntimeError("mine")
        assert not await store.contains(KEYS[1])
        async with store.get(KEYS[0]) as block:
            assert bytes(block.key) == key

    async def test_reserve_of_a_bound_prefix_says_so(self, store: AnyStore) -> None:
        first = await store.put(*block_bytes(8), prefix=KEYS[0])
        async with store.reserve(key_bytes=3, value_bytes=3, prefix=KEYS[0]) as slot:
            assert slot.bound
        assert slot.block_id == first

    async def test_a_kept_writable_view_cannot_change_a_sealed_block(self, store: AnyStore) -> None:
        async with store.reserve(key_bytes=100, value_bytes=0) as slot:
            kept = slot.key
            kept[:] = 7
        kept[:] = 9
        async with store.get(slot.block_id) as block:
            assert set(bytes(block.key)) == {7}
        del kept

    # -- leases --------------------------------------------------------------------------------------

    async def test_leases_end_once(self, store: AnyStore) -> None:
        block_id = await store.put(b"key", b"value")
        block = await store.get(block_id)
        block.release()
        assert block.released
        with pytest.raises(LeaseError, match="released"):
            block.release()
        with pytest.raises(LeaseError):
            _ = block.key

    async def test_a_forgotten_lease_warns_and_is_given_back(self, store: AnyStore) -> None:
        block_id = await store.put(b"key", b"value")

        async def forget() -> None:
            await store.get(block_id)
            gc.collect()

        with pytest.warns(ResourceWarning, match="was never released"):
            await forget()
        await eventually(lambda: self._unleased(store))

    async def test_a_view_that_outlives_its_lease_keeps_its_bytes(self, store: AnyStore) -> None:
        key, value = block_bytes(9, 1 << 20, 1 << 20)
        block_id = await store.put(key, value)
        async with store.get(block_id) as block:
            kept = np.asarray(block.key)[10:]
        del block
        for i in range(20):  # far more than the arena holds
            await store.put(*block_bytes(100 + i, 1 << 20, 1 << 20))
        assert bytes(kept) == key[10:]
        del kept
        gc.collect()
        await eventually(lambda: self._unleased(store))

    async def _unleased(self, store: AnyStore) -> bool:
        return bool((await store.statistics())["shm"]["pinned_bytes"] == 0)

    async def test_an_array_of_a_forgotten_lease_keeps_its_bytes(self, store: AnyStore) -> None:
        """``value = (await store.get(name)).value`` is easily written: it warns, and is as good as any other array."""
        key, value = block_bytes(7, 1 << 20, 1 << 20)
        block_id = await store.put(key, value)
        await store.flush()
        with pytest.warns(ResourceWarning, match="never released"):
            kept = (await store.get(block_id)).value
        for i in range(20):  # far more than the arena holds
            await store.put(*block_bytes(100 + i, 1 << 20, 1 << 20))
        assert bytes(kept) == value
        del kept
        gc.collect()
        await eventually(lambda: self._unleased(store))

    async def test_an_arena_full_of_leases_is_an_error_until_they_go(self, opened: Opener) -> None:
        async with opened(put_wait_seconds_max=1.5) as store:
            leases: list[ca.Block] = []

            async def fill() -> None:
                for i in range(40):
                    leases.append(await store.get(await store.put(*block_bytes(300 + i, 1 << 20, 0))))

            with pytest.raises((TierFullError, LeaseError)):
                await fill()
            for block in leases:
                block.release()
            await store.put(*block_bytes(399, 1 << 20, 0))

    # -- eviction, deletion, durability -------------------------------------------------------------

    async def test_eviction_keeps_everything_readable(self, store: AnyStore) -> None:
        blocks = [block_bytes(200 + i, 1 << 20, 1 << 19) for i in range(20)]  # 30 MiB through 16 MiB
        ids = await asyncio.gather(*(store.put(*block) for block in blocks))
        for block_id, (key, value) in zip(ids, blocks, strict=True):
            async with store.get(block_id) as block:
                assert (bytes(block.key), bytes(block.value)) == (key, value)
        assert (await store.statistics())["shm"]["evicted_blocks"] > 0

    async def test_deleted_blocks_stay_deleted(self, opened: Opener) -> None:
        async with opened() as store:
            doomed = await store.put(*block_bytes(11), prefix=KEYS[0])
            kept = await store.put(*block_bytes(12), prefix=KEYS[1])
            async with store.get(doomed) as block:
                await store.delete(doomed)
                assert bytes(block.key) == block_bytes(11)[0]
            with pytest.raises(BlockNotFoundError):
                await store.get(KEYS[0])
            await store.flush()
        async with opened() as store:
            assert not await store.contains(doomed)
            assert await store.contains(kept)
            assert await store.put(*block_bytes(11), prefix=KEYS[0]) == doomed

    async def test_refresh_and_verify(self, store: AnyStore) -> None:
        for i in range(3):
            await store.put(*block_bytes(50 + i))
        await store.flush()
        assert await store.refresh() == 0
        steps: list[tuple[int, int]] = []
        report = await store.verify(lambda done, total: steps.append((done, total)))
        assert (report.blocks, report.damage) == (3, ())
        assert report.bytes == 3 * (70_000 + 65_536)
        assert steps
        assert steps[-1][0] == steps[-1][1]

    async def test_blocks_are_listed(self, store: AnyStore) -> None:
        ids = {await store.put(*block_bytes(60 + i), prefix=KEYS[i]) for i in range(4)}
        await store.flush()
        infos = [info async for info in store.blocks()]
        assert {info.block_id for info in infos} == ids
        assert all((info.key_bytes, info.value_bytes, info.prefixes) == (70_000, 65_536, 1) for info in infos)
        assert all(info.tiers == ("shm", "disk") for info in infos)

    # -- reading ahead -------------------------------------------------------------------------------

    async def test_prefetch_promotes(self, opened: Opener) -> None:
        async with opened() as store:
            ids = [await store.put(*block_bytes(70 + i)) for i in range(6)]
            await store.flush()
        async with opened() as store:
            handle = store.prefetch([*ids, KEYS[0]], priority="high")
            progress = await handle.wait()
            assert handle.done
            assert (progress.resident + progress.landed, progress.unknown, progress.pending) == (6, 1, 0)
            for block_id in ids:
                async with store.get(block_id) as block:
                    assert block.tier == "shm"
            with pytest.raises(ConfigError):
                store.prefetch("text")
            with pytest.raises(ConfigError):
                store.prefetch(ids, priority="soon")  # type: ignore[arg-type]

    async def test_a_stream_gives_blocks_in_order_and_says_why_it_ends(self, opened: Opener) -> None:
        async with opened() as store:
            ids = [await store.put(*block_bytes(80 + i, 1 << 20, 1 << 20)) for i in range(10)]
            await store.flush()
        async with opened() as store:
            async with store.stream(ids) as blocks:
                seen = [bytes(block.value) async for block in blocks]
                assert blocks.ended_because == "exhausted"
            assert seen == [block_bytes(80 + i, 1 << 20, 1 << 20)[1] for i in range(10)]
            async with store.stream([ids[0], KEYS[3], ids[1]], window_bytes="4MiB", keep=True) as blocks:
                kept = [block async for block in blocks]
                assert (len(kept), blocks.position, blocks.ended_because) == (1, 1, "missing")
                assert isinstance(blocks.error, BlockNotFoundError)
            kept[0].release()
            async with store.stream(ids) as blocks:
                await anext(blocks)
            assert blocks.ended_because == "closed"
            await eventually(lambda: self._unleased(store))

    async def test_first_bytes_come_before_the_rest(self, opened: Opener) -> None:
        key, value = block_bytes(90, 3 << 20, 3 << 20)
        async with opened() as store:
            block_id = await store.put(key, value)
            await store.flush()
        async with opened() as store:
            async with store.get(block_id, ready="first-bytes") as block:
                layers = [(bytes(k), bytes(v)) async for k, v in block.layers(3)]
                await block.ready()
                assert block.complete
                assert bytes(block.value) == value
            assert b"".join(k for k, _ in layers) == key
            assert b"".join(v for _, v in layers) == value
            with pytest.raises(ConfigError):
                store.get(block_id, ready="soon")  # type: ignore[arg-type, call-overload]

    # -- many at once, and the end ------------------------------------------------------------------

    async def test_cancelled_calls_leave_nothing_behind(self, store: AnyStore) -> None:
        blocks = [block_bytes(400 + i, 1 << 18, 1 << 18) for i in range(12)]
        for round_number in range(6):
            tasks = [asyncio.ensure_future(store.put(*block)) for block in blocks]
            await asyncio.sleep(0.002 * round_number)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(item, ca.BlockId | asyncio.CancelledError) for item in done)
        for block in blocks:
            await store.put(*block)
        gets = [asyncio.ensure_future(_get(store, ca.compute_block_id(*block))) for block in blocks * 4]
        await asyncio.sleep(0.001)
        for get in gets[::3]:
            get.cancel()
        for leased in await asyncio.gather(*gets, return_exceptions=True):
            if isinstance(leased, ca.Block):
                leased.release()
            else:
                assert isinstance(leased, asyncio.CancelledError)
        del leased, gets
        await eventually(lambda: self._all_accounted(store))

    async def _all_accounted(self, store: AnyStore) -> bool:
        await store.flush()
        shm = (await store.statistics())["shm"]
        return bool(shm["pinned_bytes"] == 0 and shm["allocated_bytes"] == shm["copy_bytes"])

    async def test_use_after_close(self, opened: Opener) -> None:
        async with opened() as store:
            block_id = await store.put(b"key", b"value")
        calls: list[Callable[[], Any]] = [
            lambda: store.put(b"a", b"b"),
            lambda: store.get(block_id),
            store.flush,
            lambda: store.delete(block_id),
            store.refresh,
            store.verify,
        ]
        for call in calls:
            with pytest.raises(ClosedError):
                await call()
        for sync in (lambda: store.lookup([]), store.blocks, lambda: block_id in store):
            with pytest.raises(ClosedError):
                sync()
        await store.aclose()


async def _get(store: AnyStore, name: ca.BlockId) -> ca.Block:
    return await store.get(name)
