"""Layers to and from places of the caller's own: bytes, order with the caller's stream, few calls, bad layers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.errors import ConfigError
from cascade_aio.store.paging import address_on_device, merged
from cascade_aio.testing.device import until_done
from cascade_aio.testing.gpu import FakeGpu
from cascade_aio.tiers.gpu.tier import Part
from tests.gpu.conftest import Opener, block_bytes

LAYERS = 8
LAYER = 40_960


class Pages:
    """A paged KV memory: 2 × LAYERS places in an order of its own."""

    def __init__(self, gpu: FakeGpu, seed: int = 1) -> None:
        self.gpu = gpu
        self.base = gpu.allocate(4 * LAYERS * LAYER)
        places = [self.base + int(i) * LAYER for i in np.random.default_rng(seed).permutation(4 * LAYERS)]
        self.keys, self.values = places[:LAYERS], places[LAYERS : 2 * LAYERS]

    async def seen(self, stream: int) -> tuple[bytes, bytes]:
        """What a kernel enqueued now in ``stream`` finds."""
        kernel = self.gpu.launch(stream, reads=[(place, LAYER) for place in (*self.keys, *self.values)])
        await self.gpu.idle()
        return b"".join(kernel.seen[:LAYERS]), b"".join(kernel.seen[LAYERS:])


@pytest.mark.parametrize("where", ["arena", "device", "on its way", "disk"])
@pytest.mark.parametrize("with_stream", [True, False])
async def test_scatter(opened: Opener, gpu: FakeGpu, where: str, with_stream: bool) -> None:
    block = block_bytes(1, LAYERS * LAYER, LAYERS * LAYER)
    if where == "disk":
        async with opened(FakeGpu()) as store:
            await store.put(*block)
    async with opened() as store:
        block_id = await store.put(*block) if where != "disk" else ca.compute_block_id(*block)
        pages, user = Pages(gpu), gpu.create_stream()
        leases = [await store.get(block_id, device=0, stream=user)] if where in ("device", "on its way") else []
        if where == "device":
            await gpu.idle()
        # Earlier work of the stream uses the places: the copies must wait for it.
        before = gpu.launch(user, reads=[(pages.keys[0], LAYER)])
        calls = gpu.calls["copy"]
        if with_stream:
            await store.scatter(block_id, pages.keys, pages.values, device=0, stream=user)
        else:
            await until_ended(gpu, user)
            await store.scatter(block_id, pages.keys, pages.values, device=0)
        assert gpu.calls["copy"] == calls + 1
        assert await pages.seen(user) == block
        assert before.seen[0] == b"\xa5" * LAYER
        for lease in leases:
            lease.release()
        await gpu.idle()
        statistics = store.statistics()
        assert statistics["gpu"]["devices"][0]["blocks"] == (where in ("device", "on its way"))
        gpu.destroy_stream(user)
        gpu.free(pages.base)


async def until_ended(gpu: FakeGpu, stream: int) -> None:
    """The host sees that what is in the stream has ended, as a caller without a stream has to."""
    event = gpu.create_event()
    gpu.record(event, stream)
    await until_done(gpu, event)
    gpu.destroy_event(event)


async def test_scatter_without_page_locking(opened: Opener, gpu: FakeGpu) -> None:
    gpu.fail_next("pin", memory=True)
    block = block_bytes(2, LAYERS * LAYER, LAYERS * LAYER)
    async with opened() as store:
        block_id = await store.put(*block)
        pages, user = Pages(gpu), gpu.create_stream()
        await store.scatter(block_id, pages.keys, pages.values, device=0, stream=user)
        assert await pages.seen(user) == block
        assert store.statistics()["gpu"]["devices"][0]["staged_bytes"] == 2 * LAYERS * LAYER
        assert "pinned buffers" in store.statistics()["gpu"]["registration"]
        gpu.destroy_stream(user)
        gpu.free(pages.base)


@pytest.mark.parametrize("pinned", [True, False])
async def test_gather_is_the_way_back(opened: Opener, gpu: FakeGpu, pinned: bool) -> None:
    if not pinned:
        gpu.fail_next("pin", memory=True)
    key, value = block_bytes(3, LAYERS * LAYER, LAYERS * LAYER)
    async with opened() as store:
        pages, user = Pages(gpu), gpu.create_stream()
        writes = [
            (place, part[i * LAYER : (i + 1) * LAYER])
            for places, part in ((pages.keys, key), (pages.values, value))
            for i, place in enumerate(places)
        ]
        gpu.launch(user, writes=writes)
        async with store.reserve(key_bytes=len(key), value_bytes=len(value)) as slot:
            await store.gather(slot, pages.keys, pages.values, device=0, stream=user)
        assert slot.block_id == ca.compute_block_id(key, value)
        if pinned:  # a worker that copied from a pinned buffer may refer to its last target a moment longer
            assert store.statistics()["store"]["reserve_copies"] == 0
        gpu.destroy_stream(user)
        gpu.free(pages.base)


async def test_layers_that_do_not_fit(store: ca.Store, gpu: FakeGpu) -> None:
    block_id = await store.put(*block_bytes(4, 4096, 0))
    place = gpu.allocate(8192)
    with pytest.raises(ConfigError, match="3 equal layers"):
        await store.scatter(block_id, [place] * 3, [], device=0)
    with pytest.raises(ConfigError, match="keys are 0 pointers for 4096 bytes"):
        await store.scatter(block_id, [], [], device=0)
    with pytest.raises(ConfigError, match="neither an address"):
        await store.scatter(block_id, ["here"], [], device=0)
    await store.scatter(block_id, [place], [], device=0)
    assert store.statistics()["shm"]["leases"] == 0
    gpu.free(place)


def test_arrays_of_others_give_their_address() -> None:
    torch_like = SimpleNamespace(data_ptr=lambda: 4096, nbytes=64, is_contiguous=lambda: True)
    cupy_like = SimpleNamespace(
        __cuda_array_interface__={"shape": (4, 8), "typestr": "<f2", "data": (8192, False), "strides": None}
    )
    assert address_on_device(torch_like, 64) == 4096
    assert address_on_device(cupy_like, 64) == 8192
    for array in (torch_like, cupy_like):
        with pytest.raises(ConfigError, match="array of 64 bytes was given for a layer of 63"):
            address_on_device(array, 63)
    torch_like.is_contiguous = lambda: False
    with pytest.raises(ConfigError, match="not a contiguous"):
        address_on_device(torch_like, 64)
    for other in (True, 0, -5, None):
        with pytest.raises(ConfigError, match="neither an address"):
            address_on_device(other, 64)


def test_neighbours_on_both_sides_are_one_copy() -> None:
    parts = [Part(100, 0, 10), Part(110, 10, 10), Part(120, 30, 10), Part(140, 40, 10), Part(150, 50, 5)]
    assert merged(parts) == [Part(100, 0, 20), Part(120, 30, 10), Part(140, 40, 15)]
    assert merged([]) == []
