"""The GPU tier on a real device beside PyTorch: bytes, pointers, streams, order. Everything here needs a GPU."""

from __future__ import annotations

import asyncio
import importlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.errors import ConfigError, TierFullError
from tests.gpu.conftest import SETTINGS, block_bytes

pytestmark = pytest.mark.gpu

LAYERS = 16


@pytest.fixture
def torch() -> Any:
    try:
        found = importlib.import_module("torch")
    except ImportError as error:
        pytest.skip(f"PyTorch is not installed: {error}")
    if not found.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    return found


@pytest.fixture
async def real(tmp_path: Path) -> AsyncIterator[ca.Store]:
    settings = {**SETTINGS, "shm_bytes": "256MiB", "gpu_bytes": "128MiB", "segment_bytes": "64MiB"}
    arena = f"cascade-test-{uuid.uuid4().hex[:12]}"
    try:
        store = await ca.open_store(tmp_path / "kv", arena=arena, **settings)
    except (ConfigError, TierFullError) as error:  # no GPU, or a /dev/shm that is too small for the arena
        pytest.skip(str(error))
    try:
        yield store
    finally:
        await store.aclose()


def on_device(torch: Any, data: bytes) -> Any:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).cuda()


async def test_bytes_and_pointers(real: ca.Store, torch: Any) -> None:
    key, value = block_bytes(1, 5 << 20, 5 << 20)
    block_id = await real.put(key, value)
    stream = torch.cuda.Stream()
    for _ in range(3):
        async with real.get(block_id, device=0, stream=stream) as block:
            with torch.cuda.stream(stream):
                shown = torch.from_dlpack(block.key)
                viewed = torch.as_tensor(block.value, device="cuda")
                equal = torch.equal(shown, on_device(torch, key)), torch.equal(viewed, on_device(torch, value))
            assert equal == (True, True)
            assert (shown.data_ptr(), viewed.data_ptr()) == (block.key.pointer, block.value.pointer)
            del shown, viewed
    statistics = real.statistics()["gpu"]
    assert statistics["devices"][0]["promoted_blocks"] == 1, statistics


async def test_from_disk_layer_by_layer_beside_kernels(real: ca.Store, torch: Any) -> None:
    blocks = [block_bytes(seed, 8 << 20, 8 << 20) for seed in range(6)]
    ids = [await real.put(*block) for block in blocks]
    await real.flush()
    catalog = real.parts.context.catalog
    while catalog.copies:
        if not catalog.evict_one():
            await asyncio.sleep(0.002)
    stream = torch.cuda.Stream()
    sums = []
    for block_id in ids:
        async with real.get(block_id, device=0, stream=stream, ready="first-bytes") as block:
            async for key, value in block.layers(LAYERS):
                with torch.cuda.stream(stream):
                    sums.append((torch.from_dlpack(key).sum(), torch.from_dlpack(value).sum()))
            del key, value
    stream.synchronize()
    step = (8 << 20) // LAYERS
    for number, (of_key, of_value) in enumerate(sums):
        source = blocks[number // LAYERS]
        part = slice(number % LAYERS * step, (number % LAYERS + 1) * step)
        assert int(of_key) == int(np.frombuffer(source[0][part], np.uint8).sum(dtype=np.int64))
        assert int(of_value) == int(np.frombuffer(source[1][part], np.uint8).sum(dtype=np.int64))


async def test_eviction_under_slow_kernels(real: ca.Store, torch: Any) -> None:
    """More blocks than fit, each read by a kernel that comes late: what is read is never overwritten."""
    blocks = [block_bytes(seed, 8 << 20, 8 << 20) for seed in range(10)]
    ids = [await real.put(*block) for block in blocks]
    stream = torch.cuda.Stream()
    outs = []
    for turn in range(30):
        async with real.get(ids[turn % 10], device=0, stream=stream) as block:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
                shown = torch.from_dlpack(block.key)
                outs.append((turn % 10, shown.clone()))
            del shown
    stream.synchronize()
    for number, out in outs:
        assert torch.equal(out, on_device(torch, blocks[number][0])), number
    assert real.statistics()["gpu"]["devices"][0]["evicted_blocks"] > 0


async def test_scatter_and_gather_with_paged_tensors(real: ca.Store, torch: Any) -> None:
    key, value = block_bytes(2, LAYERS * 65536, LAYERS * 65536)
    block_id = await real.put(key, value)
    pages = torch.zeros(4 * LAYERS, 65536, dtype=torch.uint8, device="cuda")
    order = torch.randperm(4 * LAYERS).tolist()
    keys, values = [pages[i] for i in order[:LAYERS]], [pages[i] for i in order[LAYERS : 2 * LAYERS]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(2):  # from the arena, then from the device
        with torch.cuda.stream(stream):
            pages.zero_()
        await real.scatter(block_id, keys, values, device=0, stream=stream)
        with torch.cuda.stream(stream):
            found = torch.cat(keys), torch.cat(values)
            equal = torch.equal(found[0], on_device(torch, key)), torch.equal(found[1], on_device(torch, value))
        assert equal == (True, True)
        (await real.get(block_id, device=0, stream=stream)).release()
    async with real.reserve(key_bytes=len(value), value_bytes=len(key)) as slot:
        await real.gather(slot, values, keys, device=0, stream=stream)
    assert slot.block_id == ca.compute_block_id(value, key)


async def test_the_legacy_default_stream(real: ca.Store, torch: Any) -> None:
    key, value = block_bytes(3, 1 << 20, 1 << 20)
    block_id = await real.put(key, value)
    async with real.get(block_id, device=0, stream=torch.cuda.default_stream()) as block:
        assert torch.equal(torch.from_dlpack(block.value), on_device(torch, value))


async def test_the_hosts_view_without_a_stream(real: ca.Store, torch: Any) -> None:
    key, value = block_bytes(4, 1 << 20, 1 << 20)
    block_id = await real.put(key, value)
    async with real.get(block_id, device=0) as block:
        assert torch.from_dlpack(block.key).cpu().numpy().tobytes() == key
        torch.cuda.synchronize()
