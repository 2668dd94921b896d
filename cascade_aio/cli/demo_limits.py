"""The raw limits beside which the demo's figures stand, measured in the same run on the same file system.

Direct reads and writes of the same amount through the same ring with no store around it, the best
streaming copy, and the digest alone on all cores. Each is the best of a few settings, and bounded in
time. Figures are GB/s (10**9 bytes).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import mmap
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cascade_aio.abc.storage import File, Priority, Storage
from cascade_aio.config import MIB
from cascade_aio.io.engine import EngineLimits
from cascade_aio.io.platform import open_platform
from cascade_aio.io.storage import open_storage
from cascade_aio.model import compute_digest

Bytes = npt.NDArray[np.uint8]

SETTINGS = ((4 * MIB, 16), (1 * MIB, 32), (16 * MIB, 8))
"""(bytes of a request, requests in flight), the best of which counts."""
LIMIT_SECONDS_MAX = 6.0
"""No further setting is tried once a limit has taken so long."""
COPY_BYTES = 256 * MIB
COPY_ROUNDS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class RawLimits:
    """GB/s each; the settings are those that were best."""

    write: float
    write_setting: str
    read: float
    read_setting: str
    copy: float
    digest: float


async def measure_limits(directory: str, total_bytes: int, io_backend: str, digest: str, scratch: Bytes) -> RawLimits:
    """All limits for ``total_bytes`` in ``directory``; ``scratch`` holds bytes to write and is not changed.

    Writes one file of ``total_bytes`` and removes it, also when cancelled.
    """
    path = os.path.join(directory, "raw-limit")
    largest = max(request for request, _ in SETTINGS)
    total_bytes = max(largest, total_bytes - total_bytes % largest)
    try:
        write, write_setting = await _best(path, total_bytes, io_backend, scratch, write=True)
        read, read_setting = await _best(path, total_bytes, io_backend, scratch, write=False)
    finally:
        _remove(path)
    copy = await _copy_limit(min(COPY_BYTES, max(len(scratch), MIB)))
    hashed = await asyncio.to_thread(_digest_limit, scratch, digest)
    return RawLimits(write, write_setting, read, read_setting, copy, hashed)


async def _best(path: str, total_bytes: int, io_backend: str, scratch: Bytes, *, write: bool) -> tuple[float, str]:
    best = (0.0, "")
    started = time.perf_counter()
    for request_bytes, depth in SETTINGS:
        limits = EngineLimits(
            request_bytes_max=request_bytes, requests_in_flight_max=depth, bytes_in_flight_max=request_bytes * depth
        )
        storage = open_storage(io_backend, limits=limits)
        try:
            run = _write_file if write else _read_file
            seconds = await run(storage, path, total_bytes, request_bytes, depth, scratch)
        finally:
            await storage.aclose()
        best = max(best, (total_bytes / seconds / 1e9, f"{request_bytes // MIB} MiB x {depth}"))
        if time.perf_counter() - started > LIMIT_SECONDS_MAX:
            break
    return best


async def _write_file(
    storage: Storage, path: str, total_bytes: int, request_bytes: int, depth: int, scratch: Bytes
) -> float:
    """Seconds to write a preallocated file and sync it once."""
    _remove(path)
    file = await storage.create(path, preallocate_bytes=total_bytes)
    try:
        buffers = _aligned_buffers(request_bytes, depth)
        for position, buffer in enumerate(buffers):
            start = position * request_bytes % max(1, len(scratch) - request_bytes + 1)
            piece = scratch[start : start + request_bytes]
            np.frombuffer(buffer, np.uint8)[: len(piece)] = piece

        async def move(buffer: memoryview, offset: int) -> None:
            await storage.write(file, [buffer], offset, priority=Priority.DEMAND)

        started = time.perf_counter()
        await _sweep(move, buffers, total_bytes, request_bytes)
        await storage.sync(file)
        return time.perf_counter() - started
    finally:
        await file.close()


async def _read_file(
    storage: Storage, path: str, total_bytes: int, request_bytes: int, depth: int, scratch: Bytes
) -> float:
    file: File = await storage.open(path)
    try:
        buffers = _aligned_buffers(request_bytes, depth)

        async def move(buffer: memoryview, offset: int) -> None:
            await storage.read(file, [buffer], offset)

        started = time.perf_counter()
        await _sweep(move, buffers, total_bytes, request_bytes)
        return time.perf_counter() - started
    finally:
        await file.close()


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _aligned_buffers(request_bytes: int, depth: int) -> list[memoryview]:
    """Page-aligned private memory, touched, one piece per request in flight."""
    memory = memoryview(mmap.mmap(-1, request_bytes * depth))
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
    return [memory[start : start + request_bytes] for start in range(0, len(memory), request_bytes)]


async def _sweep(
    move: Callable[[memoryview, int], Awaitable[None]],
    buffers: Sequence[memoryview],
    total_bytes: int,
    request_bytes: int,
) -> None:
    """Move the whole range, each buffer carrying one request at a time."""
    offsets = iter(range(0, total_bytes, request_bytes))

    async def lane(buffer: memoryview) -> None:
        for offset in offsets:
            await move(buffer, offset)

    async with asyncio.TaskGroup() as lanes:
        for buffer in buffers:
            lanes.create_task(lane(buffer))


async def _copy_limit(nbytes: int) -> float:
    """The faster of the package's streaming copy on all workers and NumPy's plain one."""
    platform = open_platform(io_backend="threads")
    try:
        source, target = (memoryview(mmap.mmap(-1, nbytes)) for _ in range(2))
        np.frombuffer(source, np.uint8)[:: mmap.PAGESIZE] = 1
        np.frombuffer(target, np.uint8)[:: mmap.PAGESIZE] = 1
        best = float("inf")
        for _ in range(COPY_ROUNDS):
            started = time.perf_counter()
            await platform.engine.copy([(target, source)])
            middle = time.perf_counter()
            await asyncio.to_thread(np.copyto, np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
            best = min(best, middle - started, time.perf_counter() - middle)
        return nbytes / best / 1e9
    finally:
        await platform.engine.aclose()
        await platform.storage.aclose()


def _digest_limit(scratch: Bytes, digest: str) -> float:
    """Every usable core hashes its share of ``scratch``, twice; the better round counts."""
    cores = len(os.sched_getaffinity(0))
    share = len(scratch) // cores
    pieces = [scratch[index * share : (index + 1) * share] for index in range(cores)]
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(2):
            started = time.perf_counter()
            list(pool.map(lambda piece: compute_digest(piece, b"", digest), pieces))
            best = min(best, time.perf_counter() - started)
    return share * cores / best / 1e9
