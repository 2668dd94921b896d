"""What goes wrong: no room, no device, a lost one, refused calls, cancelled callers, closing in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import uuid
from pathlib import Path

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.abc.device import DeviceDriver, DeviceError
from cascade_aio.config import make_config
from cascade_aio.daemon.service import serve
from cascade_aio.errors import (
    BlockNotFoundError,
    BlockTooLargeError,
    BrokenTierError,
    ClosedError,
    ConfigError,
    TierFullError,
)
from cascade_aio.store.opening import open_with
from cascade_aio.testing.gpu import FakeGpu
from cascade_aio.testing.store import eventually
from cascade_aio.tiers.gpu.cuda import open_device
from tests.gpu.conftest import SETTINGS, Opener, block_bytes

MIB = 1 << 20


def device(store: ca.Store, number: int = 0) -> dict[str, object]:
    found: dict[str, object] = store.statistics()["gpu"]["devices"][number]
    return found


async def same(store: ca.Store, block_id: ca.BlockId, seed: int, *, on: int = 0) -> None:
    """The block is on the device, byte for byte."""
    async with store.get(block_id, device=on) as block:
        assert np.from_dlpack(block.key).tobytes() == block_bytes(seed)[0]
        assert np.from_dlpack(block.value).tobytes() == block_bytes(seed)[1]


async def forget_in_arena(store: ca.Store, block_id: ca.BlockId) -> None:
    """Evict the block from the node's arena as soon as nobody holds it there."""
    context = store.parts.context
    copy = context.catalog.copies[context.catalog.index.find(block_id)]
    async with asyncio.timeout(60):
        while copy.holds:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.002)
    assert context.catalog.evict(copy)


async def count_of(store: ca.Store, counter: str) -> None:
    """Return once the device has counted one."""
    async with asyncio.timeout(60):
        while not device(store)[counter]:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.002)
    assert device(store)[counter] == 1


async def test_a_full_device_evicts_and_demotes_what_only_the_disk_has(opened: Opener) -> None:
    """The arena has room for a few of the blocks as well; all of them stay to be had."""
    async with opened(gpu_bytes="2MiB", shm_bytes="4MiB") as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(12)]
        await store.flush()
        for turn in range(3):
            for seed in np.random.default_rng(turn).permutation(12):
                await same(store, ids[seed], int(seed))
        assert device(store)["evicted_blocks"] != 0
        assert device(store)["damaged_blocks"] == 0
        assert not store.statistics()["damage"]


async def test_a_demoted_block_is_read_from_the_arena(opened: Opener) -> None:
    async with opened(gpu_bytes="1MiB", shm_bytes="4MiB") as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(2)]
        await store.flush()
        await same(store, ids[0], 0)
        await forget_in_arena(store, ids[0])  # now the device and the disk have it
        reads = store.statistics()["store"]["disk_hits"]
        await same(store, ids[1], 1)  # takes its place on the device
        await count_of(store, "demoted_blocks")
        async with store.get(ids[0]) as block:
            assert bytes(block.key) == block_bytes(0)[0]
            assert block.tier == "shm"
        assert store.statistics()["store"]["disk_hits"] == reads


async def test_bytes_that_a_consumer_has_overwritten_are_not_demoted(opened: Opener, gpu: FakeGpu) -> None:
    async with opened(gpu_bytes="1MiB", shm_bytes="4MiB") as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(2)]
        await store.flush()
        user = gpu.create_stream()
        async with store.get(ids[0], device=0, stream=user) as block:
            gpu.launch(user, writes=[(block.key.pointer + 1000, b"oops")])
        await forget_in_arena(store, ids[0])
        await same(store, ids[1], 1)
        await count_of(store, "damaged_blocks")
        await same(store, ids[0], 0)
        gpu.destroy_stream(user)


async def test_no_room_beside_leases(opened: Opener) -> None:
    async with opened(gpu_bytes="1MiB", put_wait_seconds_max=0.2) as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(2)]
        block = await store.get(ids[0], device=0)
        with pytest.raises(TierFullError, match=r"no room for 580 KiB in the arena of device 0.*1 leases pin"):
            await store.get(ids[1], device=0)
        block.release()

        async def fits() -> bool:
            with contextlib.suppress(TierFullError):  # the little that it waits may be too little on a busy machine
                await same(store, ids[1], 1)
                return True
            return False

        await eventually(fits)
        large = await store.put(*block_bytes(9, MIB, MIB))
        with pytest.raises(BlockTooLargeError, match="larger gpu_bytes"):
            await store.get(large, device=0)


async def test_room_is_waited_for_until_kernels_have_read(opened: Opener, gpu: FakeGpu) -> None:
    async with opened(gpu_bytes="1MiB") as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(2)]
        user = gpu.create_stream()
        async with store.get(ids[0], device=0, stream=user) as block:
            kernel = gpu.launch(user, reads=[(block.key.pointer, 100)])
        gpu.pause()
        asking = asyncio.ensure_future(store.get(ids[1], device=0, stream=user).__aenter__())
        await asyncio.sleep(0.02)
        assert not asking.done()
        gpu.resume()
        (await asking).release()
        assert kernel.seen == [block_bytes(0)[0][:100]]
        gpu.destroy_stream(user)


async def test_a_lost_device_leaves_the_store_going(opened: Opener, gpu: FakeGpu) -> None:
    async with opened() as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(3)]
        held = await store.get(ids[0], device=0)
        await store.wait_ready()
        gpu.pause()
        asking = asyncio.ensure_future(store.get(ids[1], device=0).__aenter__())
        await asyncio.sleep(0.01)
        gpu.lose()
        with pytest.raises(BrokenTierError):
            await asking
        for call in (
            lambda: store.get(ids[0], device=0).__aenter__(),
            lambda: store.get(ids[2], device=0).__aenter__(),
            lambda: store.get_prefix(ca.prefix_keys(range(4), 4), device=0).__aenter__(),
            lambda: store.scatter(ids[0], [1], [1], device=0),
        ):
            with pytest.raises(BrokenTierError, match="goes on without it"):
                await call()
        held.release()
        assert device(store)["blocks"] == 0
        assert "lost" in str(device(store)["broken"])
        for seed, block_id in enumerate(ids):
            async with store.get(block_id) as block:
                assert bytes(block.key) == block_bytes(seed)[0]
        await store.put(*block_bytes(7))


async def test_a_device_out_of_memory_leaves_the_store_going_and_copies_ending(opened: Opener, gpu: FakeGpu) -> None:
    async with opened() as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(2)]
        gpu.pause()
        first = asyncio.ensure_future(store.get(ids[0], device=0).__aenter__())
        async with asyncio.timeout(60):
            while not gpu.pending:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.002)
        gpu.fail_next("copy", code="CUDA_ERROR_OUT_OF_MEMORY", memory=True)
        with pytest.raises(BrokenTierError, match="OUT_OF_MEMORY"):
            await store.get(ids[1], device=0)
        assert "OUT_OF_MEMORY" in str(device(store)["broken"])
        gpu.resume()
        with pytest.raises(BrokenTierError):
            await first
        async with store.get(ids[0]) as block:
            assert bytes(block.key) == block_bytes(0)[0]


@pytest.mark.parametrize("call", ["copy", "notify", "wait"])
async def test_a_refused_call_costs_one_get(opened: Opener, gpu: FakeGpu, call: str) -> None:
    async with opened() as store:
        block_id = await store.put(*block_bytes(1))
        await store.wait_ready()
        async with store.get(await store.put(*block_bytes(2)), device=0):
            pass
        gpu.fail_next(call)
        with contextlib.suppress(DeviceError):
            async with store.get(block_id, device=0):
                pass
        await same(store, block_id, 1)
        assert device(store)["broken"] is None
        assert store.statistics()["shm"]["pinned_bytes"] >= 0


async def test_cancelled_callers_leave_nothing_behind(opened: Opener, gpu: FakeGpu) -> None:
    async with opened(FakeGpu()) as store:
        ids = [await store.put(*block_bytes(seed)) for seed in range(6)]
    async with opened() as store:
        rng = np.random.default_rng(1)
        for _ in range(40):
            tasks = [asyncio.ensure_future(store.get(ids[i], device=0).__aenter__()) for i in rng.integers(0, 6, 3)]
            await asyncio.sleep(float(rng.uniform(0, 0.004)))
            tasks[0].cancel()
            tasks[2].cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    (await task).release()
        await gpu.idle()
        for seed, block_id in enumerate(ids):
            await same(store, block_id, seed)
        await eventually(lambda: (device(store)["leases"], device(store)["promoting"]) == (0, 0))
        assert store.statistics()["shm"]["leases"] == 0


async def test_deleted_while_on_its_way_and_while_leased(opened: Opener, gpu: FakeGpu) -> None:
    async with opened() as store:
        block_id = await store.put(*block_bytes(1))
        block = await store.get(block_id, device=0)
        await store.delete(block_id)
        assert device(store)["blocks"] == 0
        assert np.from_dlpack(block.key).tobytes() == block_bytes(1)[0]
        with pytest.raises(BlockNotFoundError):
            await store.get(block_id, device=0)
        block.release()
        del block
        gc.collect()
        assert await store.put(*block_bytes(1)) == block_id
        await same(store, block_id, 1)


async def test_closed_while_a_copy_is_on_its_way(opened: Opener, gpu: FakeGpu) -> None:
    async with opened() as store:
        block_id = await store.put(*block_bytes(1))
        gpu.pause()
        task = asyncio.ensure_future(store.get(block_id, device=0).__aenter__())
        async with asyncio.timeout(60):
            while not gpu.pending:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.002)
        closing = asyncio.ensure_future(store.aclose())
        await asyncio.sleep(0.02)
        assert not closing.done()
        gpu.resume()
        await closing
        with pytest.raises(ClosedError):
            await task


@pytest.mark.parametrize("turns", range(4))
async def test_closed_in_the_turn_of_a_get(opened: Opener, turns: int) -> None:
    async with opened(FakeGpu()) as store:
        block_id = await store.put(*block_bytes(1))
    async with opened() as store:
        task = asyncio.ensure_future(store.get(block_id, device=0).__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        await store.aclose()
        with pytest.raises(ClosedError):
            await task


async def test_an_early_lease_is_told_that_no_more_comes(opened: Opener, gpu: FakeGpu) -> None:
    key, value = block_bytes(1, 3 * MIB, 3 * MIB)
    async with opened(FakeGpu()) as store:
        block_id = await store.put(key, value)
    async with opened() as store:
        user = gpu.create_stream()
        gpu.fail_next("copy", after=1)
        block = await store.get(block_id, device=0, stream=user, ready="first-bytes")
        with pytest.raises(DeviceError, match="refused"):
            await block.ready()
        block.release()
        async with store.get(block_id, device=0, stream=user) as whole:
            kernel = gpu.launch(user, reads=[(whole.key.pointer, len(key)), (whole.value.pointer, len(value))])
        await gpu.idle()
        assert kernel.seen == [key, value]
        gpu.destroy_stream(user)


async def test_a_lease_outlives_its_store(opened: Opener, gpu: FakeGpu) -> None:
    async with opened() as store:
        block_id = await store.put(*block_bytes(1))
        block = await store.get(block_id, device=0)
        with pytest.warns(ResourceWarning, match="its arena stays allocated"):
            await store.aclose()
    assert not gpu.closed
    block.release()
    assert gpu.closed


async def test_an_arena_larger_than_the_device(opened: Opener) -> None:
    with pytest.raises(TierFullError, match=r"64 MiB free of 64 MiB, gpu_bytes=1073741824 \(1 GiB\) was asked for"):
        async with opened(gpu_bytes="1GiB"):
            pass


async def test_opening_without_cuda_says_what_is_missing(tmp_path: Path) -> None:
    """Nothing is left behind."""
    config = make_config(tmp_path / "kv", arena=f"cascade-test-{uuid.uuid4().hex[:12]}", **SETTINGS)
    try:
        open_device(0).close()
    except ConfigError:
        with pytest.raises(ConfigError, match=r"gpu_bytes.*without a GPU"):
            await open_with(config)
        assert not (Path("/dev/shm") / str(config.arena)).exists()
    else:
        pytest.skip("there is a GPU here")


async def test_a_service_takes_no_device_memory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lends no device memory"):
        async with serve(make_config(tmp_path / "kv", **SETTINGS)):
            pass


async def test_several_devices_and_one_of_them_lost(tmp_path: Path) -> None:
    first = FakeGpu(0, seed=1)
    gpus = [first, FakeGpu(1, seed=2, beside=first)]
    arena = f"cascade-test-{uuid.uuid4().hex[:12]}"
    config = make_config(tmp_path / "kv", arena=arena, **{**SETTINGS, "gpu_devices": "0,1"})

    def open_driver(ordinal: int) -> DeviceDriver:
        return gpus[ordinal]

    store = await open_with(config, open_driver=open_driver)
    try:
        block_id = await store.put(*block_bytes(1))
        for on in (0, 1, 0):
            await same(store, block_id, 1, on=on)
        assert [device(store, on)["blocks"] for on in (0, 1)] == [1, 1]
        gpus[0].lose()
        with pytest.raises(BrokenTierError):
            await same(store, await store.put(*block_bytes(2)), 2, on=0)
        await same(store, block_id, 1, on=1)
        with pytest.raises(ConfigError, match=r"none of this store's devices \(0, 1\)"):
            store.get(block_id, device=2)
    finally:
        await store.aclose()
