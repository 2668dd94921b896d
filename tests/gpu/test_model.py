"""A store with a small GPU tier against a dictionary: random calls, any order of events, every byte looked at.

Whatever is leased is read by a kernel enqueued in the lease's stream at once and checked much later; the fake device
notices every access that no event orders. A failing run prints what it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.config import make_config
from cascade_aio.errors import BlockNotFoundError, TierFullError
from cascade_aio.store.opening import open_with
from cascade_aio.testing.device import until_done
from cascade_aio.testing.gpu import FakeGpu, Kernel
from cascade_aio.testing.store import eventually
from tests.gpu.conftest import SETTINGS

STEPS = 250
LAYERS = 4


@dataclasses.dataclass
class Expected:
    kernel: Kernel
    key: bytes
    value: bytes
    what: str


class World:
    """The store, the device, and what should come back."""

    def __init__(self, store: ca.Store, gpu: FakeGpu, rng: np.random.Generator) -> None:
        self.store, self.gpu, self.rng = store, gpu, rng
        self.blocks: dict[ca.BlockId, tuple[bytes, bytes]] = {}
        self.streams = [gpu.create_stream() for _ in range(3)]
        self.expected: list[Expected] = []
        self.leases: list[ca.DeviceBlock] = []
        self.pages = gpu.allocate(2 * 512 * 1024)
        self.history: list[str] = []

    def any_block(self) -> ca.BlockId:
        return list(self.blocks)[int(self.rng.integers(len(self.blocks)))]

    def expect(self, block: ca.DeviceBlock, stream: int, what: str) -> None:
        key, value = self.blocks[block.block_id]
        reads = [(part.pointer, part.nbytes) for part in (block.key, block.value)]
        self.expected.append(Expected(self.gpu.launch(stream, reads=reads), key, value, what))

    async def step(self) -> None:
        names = ["put", "get", "get", "get", "prefix", "scatter", "gather", "delete", "cancel", "release", "layers"]
        name = "put" if not self.blocks else names[int(self.rng.integers(len(names)))]
        stream = self.streams[int(self.rng.integers(3))]
        self.history.append(name)
        with contextlib.suppress(TierFullError):
            await getattr(self, f"do_{name}")(stream)

    async def do_put(self, stream: int) -> None:
        size = int(self.rng.integers(1, 60)) * 4 * LAYERS * 256
        key, value = self.rng.bytes(size), self.rng.bytes(size)
        self.blocks[await self.store.put(key, value)] = (key, value)

    async def do_get(self, stream: int) -> None:
        block = await self.store.get(self.any_block(), device=0, stream=stream)
        self.expect(block, stream, "get")
        self.leases.append(block)
        if self.rng.random() < 0.7:
            self.leases.pop().release()

    async def do_prefix(self, stream: int) -> None:
        names = {self.any_block() for _ in range(3)}
        leases = await asyncio.gather(*(self.store.get(name, device=0, stream=stream) for name in names),
                                      return_exceptions=True)  # fmt: skip
        for block in leases:
            if isinstance(block, BaseException):
                assert isinstance(block, TierFullError), block
                continue
            self.expect(block, stream, "several")
            block.release()

    async def do_layers(self, stream: int) -> None:
        name = self.any_block()
        key, value = self.blocks[name]
        async with self.store.get(name, device=0, stream=stream, ready="first-bytes") as block:
            step = len(key) // LAYERS
            layer = 0
            async for layer_key, layer_value in block.layers(LAYERS):
                reads = [(part.pointer, part.nbytes) for part in (layer_key, layer_value)]
                part = slice(layer * step, (layer + 1) * step)
                kernel = self.gpu.launch(stream, reads=reads)
                self.expected.append(Expected(kernel, key[part], value[part], f"layer {layer}"))
                layer += 1
            del layer_key, layer_value
            await block.ready()

    async def do_scatter(self, stream: int) -> None:
        name = self.any_block()
        key, value = self.blocks[name]
        places = [self.pages + i * (len(key) // LAYERS) for i in range(2 * LAYERS)]
        stream = self.streams[0]  # whose pages they are
        await self.store.scatter(name, places[:LAYERS], places[LAYERS:], device=0, stream=stream)
        reads = [(self.pages, len(key)), (self.pages + len(key), len(value))]
        self.expected.append(Expected(self.gpu.launch(stream, reads=reads), key, value, "scatter"))

    async def do_gather(self, stream: int) -> None:
        stream, size = self.streams[0], 4096 * LAYERS
        key, value = self.rng.bytes(size), self.rng.bytes(size)
        self.gpu.launch(stream, writes=[(self.pages, key), (self.pages + size, value)])
        places = [self.pages + i * 4096 for i in range(2 * LAYERS)]
        async with self.store.reserve(key_bytes=size, value_bytes=size) as slot:
            await self.store.gather(slot, places[:LAYERS], places[LAYERS:], device=0, stream=stream)
        assert slot.block_id == ca.compute_block_id(key, value), self.history
        self.blocks[slot.block_id] = (key, value)

    async def do_delete(self, stream: int) -> None:
        name = self.any_block()
        del self.blocks[name]
        for block in [block for block in self.leases if block.block_id == name]:
            self.leases.remove(block)
            block.release()
        await self.store.delete(name)
        with pytest.raises(BlockNotFoundError):
            await self.store.get(name, device=0)

    async def do_cancel(self, stream: int) -> None:
        task = asyncio.ensure_future(self.store.get(self.any_block(), device=0).__aenter__())
        for _ in range(int(self.rng.integers(5))):
            await asyncio.sleep(0.0003)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).release()

    async def do_release(self, stream: int) -> None:
        for block in self.leases:
            block.release()
        self.leases.clear()

    async def check(self) -> None:
        """Every kernel has run and has seen what it should."""
        await self.gpu.idle()
        for expected in self.expected:
            assert expected.kernel.done, self.history
            assert expected.kernel.seen == [expected.key, expected.value], (expected.what, self.history)
        self.expected.clear()
        event = self.gpu.create_event()
        for stream in self.streams:  # the host sees that they have ended
            self.gpu.record(event, stream)
            await until_done(self.gpu, event)
        self.gpu.destroy_event(event)
        assert not self.gpu.violations, (self.gpu.violations[:3], self.history)


@pytest.mark.parametrize("seed", range(6))
async def test_any_calls_in_any_order(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gpu = FakeGpu(
        seed=seed, batches_copies=seed % 2 == 0, pinned_bytes_max=(1 << 40) if seed % 3 else 24 << 20,
        delay_s_max=0.0004,
    )  # fmt: skip
    config = make_config(
        tmp_path / "kv",
        arena=f"cascade-test-{uuid.uuid4().hex[:12]}",
        **{**SETTINGS, "gpu_bytes": "2MiB", "shm_bytes": "6MiB", "put_wait_seconds_max": 0.5},
    )
    store = await open_with(config, open_driver=lambda ordinal: gpu)
    try:
        await store.wait_ready()
        world = World(store, gpu, rng)
        for number in range(STEPS):
            await world.step()
            if number % 50 == 49:
                await world.check()
        await world.do_release(0)
        await world.check()

        def statistics() -> dict[str, Any]:
            found: dict[str, Any] = store.statistics()["gpu"]["devices"][0]
            return found

        await eventually(lambda: (statistics()["leases"], statistics()["promoting"]) == (0, 0))
        assert statistics()["damaged_blocks"] == 0
        assert statistics()["evicted_blocks"] > 0
        gpu.free(world.pages)
        for stream in world.streams:
            gpu.destroy_stream(stream)
    finally:
        await store.aclose()
