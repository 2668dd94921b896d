"""The tier's copies on the fake device: word of their end, page-locked and staged host memory, devices that fail."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from cascade_aio._native import address_of
from cascade_aio.abc.device import DeviceError, MemoryCopy
from cascade_aio.errors import BrokenTierError, TierFullError
from cascade_aio.io.workers import ByteWorkers
from cascade_aio.testing.gpu import FakeGpu
from cascade_aio.tiers.gpu.pinning import HostPins
from cascade_aio.tiers.gpu.tier import GpuTier

MIB = 1 << 20


class Rig:
    """A tier of 8 MiB on a fake device, beside a host mapping of 4 MiB registered in pieces of one."""

    def __init__(self, gpu: FakeGpu, tier: GpuTier, host: memoryview, pins: HostPins) -> None:
        self.gpu, self.tier, self.host, self.pins = gpu, tier, host, pins

    async def round_trip(self, start: int, nbytes: int) -> None:
        """Up and down again; the second half of the host's memory gets what the first had."""
        extent = self.tier.allocate(nbytes)
        assert extent is not None
        source, target = self.host[start : start + nbytes], self.host[2 * MIB : 2 * MIB + nbytes]
        await self.tier.upload([(extent.pointer, source)])
        await self.tier.download([(extent.pointer, target)])
        assert source == target
        self.tier.free(extent)


@contextlib.asynccontextmanager
async def rig(**settings: Any) -> AsyncIterator[Rig]:
    gpu = FakeGpu(**settings)
    host = memoryview(mmap.mmap(-1, 4 * MIB))
    host[: 2 * MIB] = np.random.default_rng(5).bytes(2 * MIB)
    engine = ByteWorkers(1)
    pins = HostPins(gpu, host, piece_bytes=MIB)
    tier = await GpuTier.open(gpu, 8 * MIB, pins, engine)
    try:
        yield Rig(gpu, tier, host, pins)
    finally:
        await tier.drain()
        await pins.close()
        await tier.close(keep_memory=False)
        await engine.aclose()


@pytest.mark.parametrize("batches_copies", [True, False])
async def test_copies_across_pieces_of_the_registration(batches_copies: bool) -> None:
    async with rig(batches_copies=batches_copies) as it:
        await it.round_trip(12345 * 4, MIB + 4096)
        assert it.pins.registered_bytes == 4 * MIB
        assert it.tier.statistics()["staged_bytes"] == 0


async def test_registration_is_lazy_and_can_be_completed() -> None:
    async with rig() as it:
        assert it.gpu.pinned_bytes == 0
        assert not it.tier.can_copy_now(it.host[:4096])
        assert await it.tier.prepare(it.host[:4096])
        assert it.gpu.pinned_bytes == MIB
        await it.pins.register_all()
        assert it.tier.can_copy_now(it.host)


async def test_only_what_is_populated_is_registered() -> None:
    async with rig() as it:
        ready = [MIB - 4096]
        pins = HostPins(it.gpu, it.host, ready_bytes=lambda: ready[0], piece_bytes=MIB)
        assert not await pins.ensure(address_of(it.host), 4096)
        ready[0] = 2 * MIB
        assert await pins.ensure(address_of(it.host) + MIB, 4096)
        assert not await pins.ensure(address_of(it.host) + 2 * MIB - 1, 2)
        assert pins.statistics() == {"registered_bytes": MIB, "registration": "as needed"}
        await pins.close()


@pytest.mark.parametrize("nbytes", [4096, 2 * MIB])
async def test_without_page_locking_copies_are_staged_and_it_is_said(nbytes: int) -> None:
    async with rig(pinned_bytes_max=16 * MIB) as it:
        it.gpu.fail_next("pin", code="CUDA_ERROR_OUT_OF_MEMORY", memory=True)
        await it.round_trip(0, nbytes)
        await it.round_trip(0, nbytes)
        assert it.tier.statistics()["staged_bytes"] == 4 * nbytes
        assert "CUDA_ERROR_OUT_OF_MEMORY" in str(it.pins.statistics()["registration"])


async def test_what_the_driver_registered_stays_in_use_when_it_takes_no_more() -> None:
    async with rig(pinned_bytes_max=2 * MIB) as it:
        await it.pins.register_all()
        assert it.pins.registered_bytes == 2 * MIB
        assert it.tier.can_copy_now(it.host[: 2 * MIB])
        assert not it.tier.can_copy_now(it.host[: 2 * MIB + 1])


async def test_a_cancelled_caller_waits_for_the_copy() -> None:
    async with rig() as it:
        extent = it.tier.allocate(MIB)
        assert extent is not None
        await it.tier.prepare(it.host[:MIB])
        it.gpu.pause()
        task = asyncio.ensure_future(it.tier.upload([(extent.pointer, it.host[:MIB])]))
        await asyncio.sleep(0)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.002)
        assert not task.done()
        it.gpu.resume()
        with pytest.raises(asyncio.CancelledError):
            await task
        it.host[0] ^= 1  # the memory is ours again: the fake would tell
        assert it.tier.statistics()["copies_in_flight"] == 0


async def test_a_lost_device_ends_what_is_in_flight_without_a_wake() -> None:
    async with rig() as it:
        await it.tier.prepare(it.host)
        it.gpu.pause()
        ended: list[DeviceError | None] = []
        told: list[str] = []
        it.tier.on_broken = lambda: told.append("broken")
        ticket = it.tier.start_upload([(it.tier._base, it.host[:MIB])], ended.append)
        it.gpu.lose()
        async with asyncio.timeout(60):
            with pytest.raises(DeviceError, match="lost"):
                await ticket.wait()
        assert ended[0] is not None
        assert told == ["broken"]
        for call in (it.tier.upload, it.tier.download):
            with pytest.raises(BrokenTierError, match="goes on without it"):
                await call([(it.tier._base, it.host[:MIB])])
        with pytest.raises(BrokenTierError):
            it.tier.fence(0)


async def test_a_refused_copy_is_the_callers_affair() -> None:
    async with rig() as it:
        await it.tier.prepare(it.host)
        it.gpu.fail_next("copy")
        with pytest.raises(DeviceError, match="refused"):
            it.tier.start_upload([(it.tier._base, it.host[:MIB])], lambda error: None)
        assert it.tier.broken is None
        await it.round_trip(0, MIB)


async def test_a_host_function_that_is_refused_only_makes_it_later() -> None:
    async with rig() as it:
        await it.tier.prepare(it.host)
        it.gpu.fail_next("notify")
        await it.round_trip(0, 4096)
        assert it.tier.broken is None


async def test_callers_streams_are_waited_for_and_made_to_wait() -> None:
    async with rig(seed=3) as it:
        gpu, tier = it.gpu, it.tier
        await tier.prepare(it.host)
        user = gpu.create_stream()
        for turn in range(20):
            gpu.launch(user, writes=[(tier._base, bytes([turn]) * 64)])
            ticket = tier.start_local([MemoryCopy(tier._base + 4096, tier._base, 64)], lambda error: None, after=user)
            tier.order(user, ticket)
            kernel = gpu.launch(user, reads=[(tier._base + 4096, 64)])
            fence = tier.fence(user)
            async with asyncio.timeout(60):
                while not tier.passed(fence):  # noqa: ASYNC110 - fences are asked, they do not tell
                    await asyncio.sleep(0.001)
            assert kernel.seen == [bytes([turn]) * 64]
        gpu.destroy_stream(user)


async def test_an_arena_that_does_not_fit() -> None:
    gpu = FakeGpu(memory_bytes=MIB)
    engine = ByteWorkers(1)
    with pytest.raises(TierFullError, match="gpu_bytes=2097152"):
        await GpuTier.open(gpu, 2 * MIB, HostPins(gpu, memoryview(b"")), engine)
    await engine.aclose()
    gpu.close()
