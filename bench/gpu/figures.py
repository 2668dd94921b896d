"""The figures: what is copied, in which order, against which limit. One function each, which gives its rows."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import numpy as np

import cascade_aio as ca
from bench.gpu.rig import GB, MIB, Bench, Rig, late_p99
from bench.gpu.rows import Row, make_row, median_ratio
from bench.limits import DiskLimit
from bench.results import CannotRunError
from bench.samples import median, quantile
from bench.scale import FULL, QUICK
from bench.turns import Side, take_turns
from cascade_aio.abc.device import MemoryCopy
from cascade_aio.testing.gpu import FakeGpu

LAYERS = 80
BATCH = 64
TOTAL_BYTES = 640 * MIB
REPEATS = 7
HOT_GETS = 5000

Figure = Callable[[Rig], Awaitable[list[Row]]]


def _blocks(rig: Rig, nbytes: int) -> tuple[int, int]:
    """(bytes of a block, how many)."""
    size = rig.bytes_of(nbytes)
    return size, max(2, min(512, (TOTAL_BYTES if not rig.quick else 4 * size) // size))


def _repeats(rig: Rig) -> int:
    return 2 if rig.quick else REPEATS


async def upload(rig: Rig) -> list[Row]:
    """shm → GPU against cuMemcpyAsync of the same sizes from the same memory."""
    rows = []
    for nbytes, target, batched in ((80 * MIB, 0.95, False), (16 * MIB, 0.95, False), (MIB, 0.85, True)):
        size, count = _blocks(rig, nbytes)
        bench = await rig.open(size, count)
        try:
            rows.append(await _upload(rig, bench, target, batched=batched))
        finally:
            await bench.close()
    return rows


async def _upload(rig: Rig, bench: Bench, target: float, *, batched: bool) -> Row:
    async def ours(repetition: int) -> float:
        leases: list[ca.DeviceBlock] = []

        async def work() -> None:
            if not batched:
                leases.extend([await bench.store.get(name, device=0, stream=bench.stream) for name in bench.ids])
                return
            for first in range(0, len(bench.keys), BATCH):
                some = bench.keys[first : first + BATCH]
                leases.extend(await bench.store.get_prefix(some, device=0, stream=bench.stream))

        seconds = await bench.timed(work)
        assert len(leases) == bench.blocks
        await bench.compare(leases)
        await bench.forget_on_device()
        return bench.total_bytes / seconds / GB

    async def raw(batch: int) -> float:
        return bench.total_bytes / await bench.raw_upload(batch=batch) / GB

    sides = [Side("cascade", ours), Side("raw", lambda _: raw(1))]
    if batched:
        sides.append(Side("raw batched", lambda _: raw(BATCH)))
    turns = await take_turns(sides, _repeats(rig))
    limits = [max(taken) for taken in zip(*(turns.samples[side.name] for side in sides[1:]), strict=True)]
    return make_row(
        "shm_to_gpu", bench.block_bytes, "GB/s", turns.samples, turns.order,
        median_ratio(turns.samples["cascade"], limits), target, at_least=True, verified_bytes=bench.verified_bytes,
        notes=f"{bench.blocks} blocks; " + ("get_prefix of 64, the better raw side counts" if batched else "get"),
    )  # fmt: skip


class _AbortedError(Exception):
    """Leaves a reservation without a block: only the copy is timed, not the digest."""


async def download(rig: Rig) -> list[Row]:
    """GPU → shm: gather into reservations, against the same copies alone."""
    rows = []
    for nbytes in (80 * MIB, 16 * MIB):
        size, count = _blocks(rig, nbytes)
        bench = await rig.open(size, count)
        try:
            rows.append(await _download(rig, bench))
        finally:
            await bench.close()
    return rows


async def _download(rig: Rig, bench: Bench) -> Row:
    half = bench.block_bytes // 2
    await bench.raw_upload(batch=1)  # what is gathered: block i at raw_base + i * block_bytes
    places = [bench.raw_base + i * bench.block_bytes for i in range(bench.blocks)]
    catalog = bench.store.parts.context.catalog

    async def with_slots(use: Callable[[list[ca.Slot]], Awaitable[float]]) -> float:
        seconds = 0.0
        with contextlib.suppress(_AbortedError):
            async with contextlib.AsyncExitStack() as stack:
                slots = [
                    await stack.enter_async_context(bench.store.reserve(key_bytes=half, value_bytes=half))
                    for _ in range(min(bench.blocks, 8))
                ]
                seconds = await use(slots)
                for i, slot in enumerate(slots):
                    assert (slot.key.data, slot.value.data) == bench.part(i), "gathered bytes differ from their source"
                    bench.verified_bytes += bench.block_bytes
                    slot.key[:64] = 0  # the next repetition has to write them
                raise _AbortedError
        return bench.block_bytes * len(slots) / seconds / GB

    async def gathered(slots: list[ca.Slot]) -> float:
        async def work() -> None:
            await asyncio.gather(
                *(
                    bench.store.gather(slot, [place], [place + half], device=0)
                    for slot, place in zip(slots, places, strict=False)
                )
            )

        return await bench.timed(work)

    async def raw(slots: list[ca.Slot]) -> float:
        start = time.perf_counter()
        for slot, place in zip(slots, places, strict=False):
            for array, source in ((slot.key, place), (slot.value, place + half)):
                memory = memoryview(array)
                if not bench.device.tier.can_copy_now(memory):
                    raise CannotRunError("the arena is not page-locked here")
                bench.driver.copy([MemoryCopy(array.ctypes.data, source, len(memory))], bench.stream)
        await bench.ended()
        return time.perf_counter() - start

    assert not catalog.dormant
    turns = await take_turns(
        [Side("cascade", lambda _: with_slots(gathered)), Side("raw", lambda _: with_slots(raw))], _repeats(rig)
    )
    return make_row(
        "gpu_to_shm", bench.block_bytes, "GB/s", turns.samples, turns.order,
        median_ratio(turns.samples["cascade"], turns.samples["raw"]), 0.95, at_least=True,
        verified_bytes=bench.verified_bytes, notes="8 reservations at a time",
    )  # fmt: skip


async def from_disk(rig: Rig) -> list[Row]:
    """disk → GPU cold against the slower of the raw read and the raw copy."""
    size, count = _blocks(rig, 80 * MIB)
    bench = await rig.open(size, count)
    limit = DiskLimit(rig.folder, (QUICK if rig.quick else FULL).grid, 7, [], lambda cells: None)
    copies = [bench.total_bytes / await bench.raw_upload(batch=1) / GB for _ in range(3)]
    try:

        async def ours(repetition: int) -> float:
            await bench.forget_on_device()
            await bench.forget_in_arena()
            leases: list[ca.DeviceBlock] = []

            async def work() -> None:
                requests = (bench.store.get(name, device=0, stream=bench.stream).__aenter__() for name in bench.ids)
                leases.extend(await asyncio.gather(*requests))

            seconds = await bench.timed(work)
            await bench.compare(leases)
            return bench.total_bytes / seconds / GB

        async def read(repetition: int) -> float:
            return limit.read_gb_per_s(bench.total_bytes)

        turns = await take_turns([Side("cascade", ours), Side("raw read", read)], _repeats(rig))
        turns.samples["raw copy"] = copies
        limits = [min(taken, median(copies)) for taken in turns.samples["raw read"]]
        return [
            make_row(
                "disk_to_gpu", size, "GB/s", turns.samples, turns.order,
                median_ratio(turns.samples["cascade"], limits), 0.90, at_least=True,
                verified_bytes=bench.verified_bytes, notes=f"raw read: {limit.setting(write=False).text}",
            )
        ]  # fmt: skip
    finally:
        limit.close()
        await bench.close()


async def overlap(rig: Rig) -> list[Row]:
    """Layer after layer: promotion beside a kernel per layer, against the longer of the two alone."""
    size, count = rig.bytes_of(80 * MIB), 4 if not rig.quick else 2
    bench = await rig.open(size, count)
    try:
        copy_s = bench.block_bytes / bench.total_bytes * await bench.raw_upload(batch=1)
        kernel = _kernel(rig, bench, copy_s / LAYERS)

        async def total(repetition: int) -> float:
            name = bench.ids[repetition % count]
            leases: list[ca.DeviceBlock] = []

            async def work() -> None:
                lease = await bench.store.get(name, device=0, stream=bench.stream, ready="first-bytes")
                async for key, _value in lease.layers(LAYERS):
                    kernel(key.pointer)
                leases.append(lease)

            seconds = await bench.timed(work)
            await bench.compare(leases)
            await bench.forget_on_device()
            return seconds * 1e3

        async def copy(repetition: int) -> float:
            leases: list[ca.DeviceBlock] = []

            async def work() -> None:
                leases.append(await bench.store.get(bench.ids[repetition % count], device=0, stream=bench.stream))

            seconds = await bench.timed(work)
            await bench.compare(leases)
            await bench.forget_on_device()
            return seconds * 1e3

        async def compute(repetition: int) -> float:
            async def work() -> None:
                for _ in range(LAYERS):
                    kernel(bench.raw_base)

            return await bench.timed(work) * 1e3

        sides = [Side("overlapped", total), Side("copy", copy), Side("compute", compute)]
        await take_turns(sides, 1)  # kernels are loaded when they first run
        turns = await take_turns(sides, _repeats(rig))
        longer = [max(taken) for taken in zip(turns.samples["copy"], turns.samples["compute"], strict=True)]
        return [
            make_row(
                "layers_overlapped", size, "ms", turns.samples, turns.order,
                median_ratio(turns.samples["overlapped"], longer), 1.05, at_least=False,
                verified_bytes=bench.verified_bytes, notes=f"{LAYERS} layers, a matrix product after each",
            )
        ]  # fmt: skip
    finally:
        await bench.close()


def _kernel(rig: Rig, bench: Bench, seconds: float) -> Callable[[int], None]:
    """Something that takes about ``seconds`` in the bench's stream: matrix products by PyTorch."""
    driver = bench.driver
    if isinstance(driver, FakeGpu):
        fake = driver

        def launch(pointer: int) -> None:
            fake.launch(bench.stream, reads=[(pointer, 64)])

        return launch
    torch = rig.torch()
    stream = torch.cuda.ExternalStream(bench.stream)
    with torch.cuda.stream(stream):
        side = 1024
        a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(a)
        for _ in range(20):
            torch.matmul(a, a, out=out)
        began, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(50):
            torch.matmul(a, a, out=out)
        done.record()
    done.synchronize()
    times = max(1, round(seconds / (began.elapsed_time(done) / 50 * 1e-3)))
    graph = torch.cuda.CUDAGraph()  # one launch a layer, so that the host is not what is measured
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(times):
            torch.matmul(a, a, out=out)

    def replay(pointer: int) -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    return replay


async def hot_get(rig: Rig) -> list[Row]:
    """What a get on the device and its release cost, without a copy."""
    size, count = rig.bytes_of(MIB), 64 if not rig.quick else 4
    bench = await rig.open(size, count)
    try:
        await bench.compare([await bench.store.get(name, device=0, stream=bench.stream) for name in bench.ids])
        get_us: list[float] = []
        both_us: list[float] = []
        for _ in range(_repeats(rig)):
            gets, both = [], []
            for number in range(HOT_GETS if not rig.quick else 50):
                name = bench.ids[number % count]
                start = time.perf_counter_ns()
                block = await bench.store.get(name, device=0, stream=bench.stream)
                middle = time.perf_counter_ns()
                block.release()
                end = time.perf_counter_ns()
                gets.append((middle - start) / 1e3)
                both.append((end - start) / 1e3)
            get_us.append(quantile(gets, 0.5))
            both_us.append(quantile(both, 0.5))
        return [
            make_row(
                "hot_get", size, "µs", {"get + release": both_us, "get": get_us}, ["cascade"] * len(get_us),
                median(both_us), 20.0, at_least=False, verified_bytes=bench.verified_bytes,
                notes="p50 of each repetition; get and release together are held against the target",
            )
        ]  # fmt: skip
    finally:
        await bench.close()


async def scatter(rig: Rig) -> list[Row]:
    """80 layers × 2 into pages in random order, from the arena, against one copy of the same bytes."""
    size, count = rig.bytes_of(80 * MIB), 4 if not rig.quick else 2
    bench = await rig.open(size, count)
    layer = size // 2 // LAYERS
    pages = bench.driver.allocate(2 * LAYERS * count * layer)
    try:
        order = np.random.default_rng(3).permutation(2 * LAYERS * count)
        places = [pages + int(i) * layer for i in order]

        def targets(block: int) -> tuple[list[int], list[int]]:
            first = block * 2 * LAYERS
            return places[first : first + LAYERS], places[first + LAYERS : first + 2 * LAYERS]

        async def ours(repetition: int) -> float:
            async def work() -> None:
                for block, name in enumerate(bench.ids):
                    await bench.store.scatter(name, *targets(block), device=0, stream=bench.stream)

            seconds = await bench.timed(work)
            for block in range(count):
                for part, pointers in zip(bench.part(block), targets(block), strict=True):
                    for i, pointer in enumerate(pointers):
                        await bench.compare_bytes(pointer, part[i * layer : (i + 1) * layer])
            return bench.total_bytes / seconds / GB

        async def raw(repetition: int) -> float:
            return bench.total_bytes / await bench.raw_upload(batch=1) / GB

        turns = await take_turns([Side("cascade", ours), Side("raw", raw)], _repeats(rig))
        return [
            make_row(
                "scatter", size, "GB/s", turns.samples, turns.order,
                median_ratio(turns.samples["cascade"], turns.samples["raw"]), 0.85, at_least=True,
                verified_bytes=bench.verified_bytes,
                notes=f"{2 * LAYERS} pages of {layer} bytes; batched by the driver: {bench.driver.batches_copies}",
            )
        ]  # fmt: skip
    finally:
        bench.driver.free(pages)
        await bench.close()


async def loop_lag(rig: Rig) -> list[Row]:
    """How late the loop was beside everything that was timed before."""
    if not rig.late_ms:
        raise CannotRunError("nothing was measured before it")
    return [
        make_row(
            "loop_lag", 0, "ms", {"late": rig.late_ms}, [], late_p99(rig.late_ms), 3.0, at_least=False,
            verified_bytes=0, notes="p99 of a 1 ms ticker beside all timed copies of this run",
        )
    ]  # fmt: skip


FIGURES: dict[str, Figure] = {
    "upload": upload,
    "download": download,
    "from_disk": from_disk,
    "overlap": overlap,
    "hot_get": hot_get,
    "scatter": scatter,
    "loop_lag": loop_lag,
}
