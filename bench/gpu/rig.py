"""What every GPU figure is handed: an open store, its device's driver, a stream, raw copies, comparisons.

The same driver object serves the store and the raw limit, so both pay the same price for a call. The clock of both
stops when the host sees an event behind the last copy.
"""

from __future__ import annotations

import asyncio
import importlib
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import cascade_aio as ca
from bench.data import Pool
from bench.results import CannotRunError
from bench.samples import quantile
from bench.ticker import Ticker
from cascade_aio._native import address_of
from cascade_aio.abc.device import DeviceDriver, MemoryCopy
from cascade_aio.config import make_config
from cascade_aio.store.devices import Device
from cascade_aio.store.opening import open_with

GB = 1e9
MIB = 1 << 20
NAMESPACE = "bench-gpu"


class Rig:
    """One device, one store, as ``open_rig`` makes them. ``sizes`` scales everything down for tests."""

    def __init__(self, driver: DeviceDriver, folder: pathlib.Path, *, quick: bool) -> None:
        self.driver = driver
        self.folder = folder
        self.quick = quick
        self.late_ms: list[float] = []
        self.registration = ""

    def bytes_of(self, nbytes: int) -> int:
        """``nbytes``, or a 64th of it (a multiple of 320 pages: 80 layers of two parts) in a quick run."""
        return nbytes if not self.quick else max(2 * 80 * 4096, nbytes // 64 // (2 * 80 * 4096) * (2 * 80 * 4096))

    def torch(self) -> Any:
        """PyTorch with a GPU. Raises ``CannotRunError``."""
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            raise CannotRunError(f"PyTorch is not installed: {error}") from error
        if not torch.cuda.is_available():
            raise CannotRunError("PyTorch sees no GPU")
        return torch

    async def open(self, block_bytes: int, blocks: int) -> Bench:
        """A store whose arena and device both hold all blocks, which are put, durable, and page-locked."""
        total = (block_bytes + 2 * 4096) * (blocks + 2)
        config = make_config(
            self.folder / f"kv-{time.monotonic_ns()}",
            arena=f"cascade-bench-gpu-{time.monotonic_ns()}",
            shm_bytes=2 * total // 4096 * 4096 + 8 * MIB,
            gpu_bytes=total // 4096 * 4096 + 4 * MIB,
            adopt_seconds=None,
        )
        store = await open_with(config, open_driver=lambda ordinal: _Shared(self.driver))
        bench = Bench(self, store, block_bytes, blocks)
        try:
            await bench.fill()
        except BaseException:
            await bench.close()
            raise
        return bench


class _Shared:
    """The rig's driver, which outlives the store."""

    def __init__(self, driver: DeviceDriver) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def close(self) -> None:
        """The rig closes it."""


class Bench:
    """One store with its blocks."""

    def __init__(self, rig: Rig, store: ca.Store, block_bytes: int, blocks: int) -> None:
        self.rig, self.store, self.block_bytes, self.blocks = rig, store, block_bytes, blocks
        self.driver = rig.driver
        self.pool = Pool(block_bytes, blocks, seed=7)
        self.ids: list[ca.BlockId] = []
        self.keys = ca.prefix_keys(range(blocks), block_tokens=1, namespace=NAMESPACE)
        self.stream = self.driver.create_stream()
        self.event = self.driver.create_event()
        self.raw_base = self.driver.allocate(block_bytes * blocks)
        self.readback = self.driver.allocate_pinned(block_bytes)
        self.verified_bytes = 0

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.blocks

    @property
    def device(self) -> Device:
        devices = self.store.parts.context.devices
        assert devices is not None
        return devices.devices[0]

    def part(self, block: int) -> tuple[memoryview, memoryview]:
        """Key and value of a block: halves of its bytes."""
        start, half = block * self.block_bytes, self.block_bytes // 2
        return self.pool.view[start : start + half], self.pool.view[start + half : start + self.block_bytes]

    async def fill(self) -> None:
        await self.store.wait_ready()
        for block in range(self.blocks):
            self.ids.append(await self.store.put(*self.part(block), prefix=self.keys[block]))
        await self.store.flush()
        for block_id in self.ids:  # page-lock what will be copied
            (await self.store.get(block_id, device=0)).release()
        self.rig.registration = str(self.store.statistics()["gpu"]["registration"])
        await self.forget_on_device()

    async def ended(self, stream: int | None = None) -> None:
        """The host has seen all that is in the stream end."""
        self.driver.record(self.event, self.stream if stream is None else stream)
        while not self.driver.is_done(self.event):  # noqa: ASYNC110 - the shortest way to know
            await asyncio.sleep(0)

    async def forget_on_device(self) -> None:
        """The device's arena is empty: the next get copies."""
        await self.ended()
        catalog = self.device.catalog
        while catalog.copies:
            catalog.ask_fences()
            if not catalog.evict_one():
                await asyncio.sleep(0.0005)

    async def forget_in_arena(self) -> None:
        """Only the disk has the blocks: the next get reads, past the page cache where the file system allows it."""
        catalog = self.store.parts.context.catalog
        while catalog.copies:
            if not catalog.evict_one():
                await asyncio.sleep(0.0005)

    def sources(self) -> list[tuple[int, int]]:
        """(address, bytes) of each block's payload in the arena, in order."""
        catalog = self.store.parts.context.catalog
        found = []
        for block_id in self.ids:
            copy = catalog.hot[block_id]
            payload = copy.extent.memory[copy.header_bytes :]
            found.append((address_of(payload), copy.value_offset + copy.value_bytes))
        return found

    async def raw_upload(self, *, batch: int) -> float:
        """Seconds of copying every block from the arena, ``batch`` to a call, nothing else."""
        copies = [MemoryCopy(self.raw_base + i * self.block_bytes, address, self.block_bytes)
                  for i, (address, _) in enumerate(self.sources())]  # fmt: skip
        start = time.perf_counter()
        for first in range(0, len(copies), batch):
            self.driver.copy(copies[first : first + batch], self.stream)
        await self.ended()
        return time.perf_counter() - start

    async def timed(self, work: Callable[[], Any]) -> float:
        """Seconds until ``await work()`` has returned and its stream has ended, with the loop's lateness beside it."""
        async with Ticker() as ticker:
            start = time.perf_counter()
            await work()
            await self.ended()
            seconds = time.perf_counter() - start
        self.rig.late_ms += ticker.late_ms
        return seconds

    async def compare(self, leases: Sequence[ca.DeviceBlock]) -> None:
        """Every byte of the leased blocks with its source, read back to the host; releases them."""
        for lease in leases:
            block = self.ids.index(lease.block_id)
            for array, expected in zip((lease.key, lease.value), self.part(block), strict=True):
                await self.compare_bytes(array.pointer, expected)
            lease.release()

    async def compare_bytes(self, pointer: int, expected: memoryview) -> None:
        target = self.readback[: len(expected)]
        self.driver.copy([MemoryCopy(address_of(target), pointer, len(expected))], self.stream)
        await self.ended()
        assert target == expected, "bytes on the device differ from their source"
        self.verified_bytes += len(expected)

    async def close(self) -> None:
        await self.ended()
        self.driver.free_pinned(self.readback)
        self.driver.free(self.raw_base)
        self.driver.destroy_event(self.event)
        self.driver.destroy_stream(self.stream)
        await self.store.aclose()


def late_p99(late_ms: Sequence[float]) -> float:
    return quantile(list(late_ms), 0.99)
