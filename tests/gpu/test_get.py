"""Leases in device memory: bytes, order with streams, release, arrays that outlive their lease."""

from __future__ import annotations

import asyncio
import gc
import uuid
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.errors import BlockNotFoundError, ConfigError, LeaseError
from cascade_aio.testing.gpu import FakeGpu
from cascade_aio.testing.store import eventually
from tests.gpu.conftest import Opener, block_bytes


async def seen(gpu: FakeGpu, stream: int, block: ca.DeviceBlock) -> tuple[bytes, bytes]:
    """What a kernel in ``stream`` reads of the block, enqueued now."""
    parts = block.key, block.value
    kernel = gpu.launch(stream, reads=[(part.pointer, part.nbytes) for part in parts])
    await gpu.idle()
    key, value = kernel.seen
    return key, value


async def test_a_kernel_enqueued_after_get_finds_the_bytes(store: ca.Store, gpu: FakeGpu) -> None:
    key, value = block_bytes(1)
    meta = ca.BlockMeta(dtype="float16", tokens=16)
    block_id = await store.put(key, value, meta=meta)
    user = gpu.create_stream()
    await store.wait_ready()
    for expected in ("shm", "gpu", "gpu"):
        async with store.get(block_id, device=0, stream=user) as block:
            kernel = gpu.launch(user, reads=[(block.key.pointer, len(block.key)), (block.value.pointer, len(value))])
            assert (block.tier, block.device, block.block_id, block.meta) == (expected, 0, block_id, meta)
        await gpu.idle()
        assert kernel.seen == [key, value]
    statistics = store.statistics()["gpu"]
    assert statistics["devices"][0]["promoted_blocks"] == 1
    assert statistics["devices"][0]["staged_bytes"] == 0
    gpu.destroy_stream(user)


async def test_without_a_stream_the_bytes_are_there(store: ca.Store, gpu: FakeGpu) -> None:
    key, value = block_bytes(2)
    block_id = await store.put(key, value)
    async with store.get(block_id, device=0) as block:
        # The fake's memory is the host's, so NumPy stands for a consumer.
        assert np.from_dlpack(block.key).tobytes() == key
        assert np.from_dlpack(block.value).tobytes() == value
        assert block.value.pointer % 64 == 0


async def test_from_disk_to_the_device(opened: Opener, gpu: FakeGpu) -> None:
    blocks = [block_bytes(seed, 1_500_000, 1_400_000) for seed in range(3)]
    async with opened(FakeGpu()) as store:
        ids = [await store.put(*block) for block in blocks]
    async with opened(gpu_bytes="16MiB") as store:
        user = gpu.create_stream()
        leases = await asyncio.gather(*(store.get(block_id, device=0, stream=user) for block_id in ids))
        for block, expected in zip(leases, blocks, strict=True):
            assert block.tier == "disk"
            assert await seen(gpu, user, block) == expected
            block.release()
        gpu.destroy_stream(user)


@pytest.mark.parametrize(("key_bytes", "value_bytes"), [(0, 0), (0, 5), (5, 0), (63, 64), (4096, 4095)])
async def test_any_lengths(store: ca.Store, key_bytes: int, value_bytes: int) -> None:
    key, value = block_bytes(3, key_bytes, value_bytes)
    block_id = await store.put(key, value)
    async with store.get(block_id, device=0) as block:
        assert np.from_dlpack(block.key).tobytes() == key
        assert np.from_dlpack(block.value).tobytes() == value
        assert block.key.shape == (key_bytes,)


async def test_many_who_ask_at_once_cause_one_copy(opened: Opener, gpu: FakeGpu) -> None:
    async with opened() as store:
        block_id = await store.put(*block_bytes(4))
        blocks = await asyncio.gather(*(store.get(block_id, device=0) for _ in range(5)))
        assert store.statistics()["gpu"]["devices"][0]["promoted_blocks"] == 1
        for block in blocks:
            block.release()
        assert store.statistics()["gpu"]["devices"][0]["leases"] == 0


async def test_layers_come_as_they_are_enqueued(opened: Opener, gpu: FakeGpu) -> None:
    key, value = block_bytes(5, 3 << 20, 3 << 20)
    async with opened(FakeGpu()) as store:
        block_id = await store.put(key, value)
    async with opened(gpu_bytes="16MiB") as store:
        user = gpu.create_stream()
        kernels = []
        async with store.get(block_id, device=0, stream=user, ready="first-bytes") as block:
            async for layer_key, layer_value in block.layers(12):
                reads = [(part.pointer, part.nbytes) for part in (layer_key, layer_value)]
                kernels.append(gpu.launch(user, reads=reads))
            del layer_key, layer_value  # they would keep the block pinned
            await block.ready()
            assert block.complete
        await gpu.idle()
        assert b"".join(kernel.seen[0] for kernel in kernels) == key
        assert b"".join(kernel.seen[1] for kernel in kernels) == value
        gpu.destroy_stream(user)


async def test_a_prefix_is_one_call_of_the_driver(opened: Opener, gpu: FakeGpu) -> None:
    keys = ca.prefix_keys(range(64), block_tokens=8)
    blocks = [block_bytes(seed, 40_000, 40_000) for seed in range(8)]
    async with opened() as store:
        for prefix, block in zip(keys, blocks, strict=True):
            await store.put(*block, prefix=prefix)
        user = gpu.create_stream()
        async with store.get(keys[0], device=0, stream=user):  # the arena is page-locked by now
            pass
        before = gpu.calls["copy"]
        async with store.get_prefix(keys, device=0, stream=user) as leases:
            assert gpu.calls["copy"] == before + 1
            assert [block.tier for block in leases] == ["gpu", *["shm"] * 7]
            kernels = [gpu.launch(user, reads=[(block.key.pointer, 40_000)]) for block in leases]
        await gpu.idle()
        assert [kernel.seen[0] for kernel in kernels] == [key for key, _ in blocks]
        assert [str(tier) for tier in store.lookup(keys).tiers] == ["gpu"] * 8
        assert {info.tiers[0] for info in store.blocks()} == {"gpu"}
        async with store.get_prefix(keys, device=0) as leases:
            assert np.from_dlpack(leases[7].value).tobytes() == blocks[7][1]
        assert await store.get_prefix([], device=0) == []
        gpu.destroy_stream(user)


async def test_a_prefix_makes_no_room_at_its_own_cost(opened: Opener, gpu: FakeGpu) -> None:
    """Room for four of six blocks; the first two are there already, and stay."""
    keys = ca.prefix_keys(range(6), block_tokens=1)
    async with opened(gpu_bytes="1MiB") as store:
        for number, prefix in enumerate(keys):
            await store.put(*block_bytes(number, 120_000, 120_000), prefix=prefix)
        async with store.get_prefix(keys[4:], device=0), store.get_prefix(keys[:2], device=0):
            pass
        promoted = store.statistics()["gpu"]["devices"][0]["promoted_blocks"]
        async with store.get_prefix(keys, device=0) as leases:
            assert [block.tier for block in leases] == ["gpu", "gpu", *["shm"] * (len(leases) - 2)]
            assert len(leases) in (3, 4)
            for number, block in enumerate(leases):
                assert np.from_dlpack(block.key).tobytes() == block_bytes(number, 120_000, 120_000)[0]
            counted = store.statistics()["gpu"]["devices"][0]["promoted_blocks"]
            assert counted == promoted + len(leases) - 2


async def test_released_memory_is_not_reused_while_a_kernel_may_read_it(opened: Opener, gpu: FakeGpu) -> None:
    """Room for two blocks: the third takes the first one's place, whose reader has not run yet."""
    blocks = [block_bytes(seed, 500_000, 500_000) for seed in range(6)]
    async with opened(gpu_bytes="2MiB") as store:
        ids = [await store.put(*block) for block in blocks]
        user = gpu.create_stream()
        kernels = []
        for block_id in ids * 2:
            async with store.get(block_id, device=0, stream=user) as block:
                kernels.append(gpu.launch(user, reads=[(block.key.pointer, 500_000)]))
        await gpu.idle()
        assert [kernel.seen[0] for kernel in kernels] == [key for key, _ in blocks] * 2
        assert store.statistics()["gpu"]["devices"][0]["evicted_blocks"] > 0
        gpu.destroy_stream(user)


async def test_arrays_outlive_their_lease(store: ca.Store, gpu: FakeGpu) -> None:
    key, value = block_bytes(6)
    block_id = await store.put(key, value)
    block = await store.get(block_id, device=0)
    array, shown = block.key, np.from_dlpack(block.value)
    block.release()
    device = store.statistics()["gpu"]["devices"][0]
    assert (device["leases"], device["shown"]) == (1, 1)
    assert array.pointer
    assert shown.tobytes() == value
    del array
    gc.collect()
    await asyncio.sleep(0.01)
    assert store.statistics()["gpu"]["devices"][0]["leases"] == 1
    del shown
    gc.collect()
    await eventually(lambda: not store.statistics()["gpu"]["devices"][0]["leases"])
    device = store.statistics()["gpu"]["devices"][0]
    assert (device["leases"], device["shown"]) == (0, 0)


async def test_what_the_protocols_say(store: ca.Store, gpu: FakeGpu) -> None:
    block_id = await store.put(*block_bytes(7))
    user = gpu.create_stream()
    async with store.get(block_id, device=0, stream=user) as block:
        interface = block.key.__cuda_array_interface__
        assert interface == {
            "shape": (300_000,), "typestr": "|u1", "data": (block.key.pointer, False), "strides": None, "version": 3,
            "stream": user,
        }  # fmt: skip
        assert block.key.__dlpack_device__() == (1, 0)
        with pytest.raises(BufferError, match="not on"):
            block.key.__dlpack__(dl_device=(2, 3))
        with pytest.raises(BufferError, match="copied"):
            block.key.__dlpack__(copy=True)
        assert block.key.__dlpack__(stream=-1) is not None
        other = gpu.create_stream()
        capsule = block.key.__dlpack__(stream=other)
        kernel = gpu.launch(other, reads=[(block.key.pointer, 16)])
        del capsule
    await gpu.idle()
    assert kernel.seen[0] == block_bytes(7)[0][:16]
    async with store.get(block_id, device=0, stream=0) as block:
        assert block.key.__cuda_array_interface__["stream"] == 1
    await gpu.idle()
    gpu.destroy_stream(user)
    gpu.destroy_stream(other)


class Stream:
    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@pytest.mark.parametrize("kind", ["int", "torch", "cupy", "protocol"])
async def test_streams_of_others(store: ca.Store, gpu: FakeGpu, kind: str) -> None:
    block_id = await store.put(*block_bytes(8))
    user = gpu.create_stream()
    given: Any = {
        "int": user,
        "torch": SimpleNamespace(cuda_stream=user),
        "cupy": SimpleNamespace(ptr=user),
        "protocol": Stream(user),
    }[kind]
    async with store.get(block_id, device=SimpleNamespace(index=0), stream=given) as block:  # type: ignore[call-overload]
        assert block.stream == user
        assert await seen(gpu, user, block) == block_bytes(8)
    gpu.destroy_stream(user)


@pytest.mark.parametrize("stream", [True, "5", 1.5, -3, object()])
async def test_what_is_no_stream(store: ca.Store, stream: Any) -> None:
    with pytest.raises(ConfigError, match="is no stream"):
        store.get("00" * 16, device=0, stream=stream)


async def test_bad_calls_are_named(store: ca.Store, opened: Opener) -> None:
    for device in (1, True, "0", None.__class__):
        with pytest.raises(ConfigError, match="none of this store's devices"):
            store.get("00" * 16, device=device)  # type: ignore[arg-type]
    with pytest.raises(BlockNotFoundError):
        await store.get("00" * 16, device=0)
    with pytest.raises(ConfigError, match="names no block"):
        await store.get(b"x", device=0)  # type: ignore[call-overload]
    block_id = await store.put(*block_bytes(9))
    block = await store.get(block_id, device=0)
    with pytest.raises(ConfigError, match="outside the key"):
        await block.ready("key", 0, 1 << 30)
    with pytest.raises(ConfigError, match="equal layers"):
        await anext(block.layers(7))
    block.release()
    for use in (block.release, lambda: block.key, lambda: block.block_id):
        with pytest.raises(LeaseError, match="released already"):
            use()
    assert repr(block) == "DeviceBlock(released)"


async def test_a_forgotten_lease_warns_and_is_taken_back(store: ca.Store) -> None:
    block_id = await store.put(*block_bytes(10))
    leases = [await store.get(block_id, device=0)]
    with pytest.warns(ResourceWarning, match=r"test_get\.py:\d+ was never released"):
        leases.clear()
    await eventually(lambda: store.statistics()["gpu"]["devices"][0]["leases"] == 0)


async def test_a_store_without_a_gpu_tier_says_how_to_get_one(tmp_path: Any) -> None:
    async with ca.open_store(tmp_path / "kv", shm_bytes="4MiB", arena=f"cascade-test-{uuid.uuid4().hex[:12]}") as store:
        with pytest.raises(ConfigError, match="gpu_bytes='8GiB'"):
            store.get("00" * 16, device=0)
        assert store.statistics()["gpu"] is None
