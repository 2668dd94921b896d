"""The in-memory disk forgets exactly what POSIX lets it forget."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable

import pytest

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.testing.memory import MemoryDisk, MemoryStorage, Operation


def page(fill: int, count: int = 1) -> memoryview:
    return memoryview(bytearray([fill]) * (PAGE_BYTES * count))


async def test_only_the_synced_survives_a_crash() -> None:
    storage = MemoryStorage()
    await storage.make_directory("/d")
    await storage.sync_directory("/")
    file = await storage.create("/d/f", preallocate_bytes=4 * PAGE_BYTES)
    await storage.write(file, [page(1)], 0)
    await storage.sync(file)
    await storage.write(file, [page(2)], PAGE_BYTES)
    assert "/d/f" not in storage.crash().disk.files, "the name was never synced"
    await storage.sync_directory("/d")
    survivor = storage.crash()
    assert survivor.disk.content("/d/f") == bytes(page(1)) + bytes(3 * PAGE_BYTES)
    assert storage.disk.content("/d/f")[PAGE_BYTES] == 2


async def test_a_seed_keeps_some_unsynced_pages_and_tears_some() -> None:
    storage = MemoryStorage()
    file = await storage.create("/f", preallocate_bytes=64 * PAGE_BYTES)
    await storage.sync(file)
    await storage.sync_directory("/")
    await storage.write(file, [page(7, 64)], 0)
    outcomes = set()
    for seed in range(40):
        content = storage.crash(seed).disk.content("/f")
        assert content == storage.crash(seed).disk.content("/f"), "the seed decides"
        pages = [content[start : start + PAGE_BYTES] for start in range(0, len(content), PAGE_BYTES)]
        outcomes |= {"kept" if p == bytes(page(7)) else "dropped" if not any(p) else "torn" for p in pages}
    assert outcomes == {"kept", "dropped", "torn"}


async def test_a_failed_sync_is_not_mended_by_a_later_one() -> None:
    storage = MemoryStorage()
    file = await storage.create("/f", preallocate_bytes=2 * PAGE_BYTES)
    await storage.sync(file)
    await storage.sync_directory("/")
    await storage.write(file, [page(1)], 0)
    storage.hooks.append(lambda op: OSError(errno.EIO, "injected") if op.name == "sync" else None)
    with pytest.raises(OSError, match="injected"):
        await storage.sync(file)
    storage.hooks.clear()
    await storage.write(file, [page(2)], PAGE_BYTES)
    await storage.sync(file)
    assert storage.crash().disk.content("/f") == bytes(PAGE_BYTES) + bytes(page(2))


async def test_a_sync_covers_only_writes_completed_before_it() -> None:
    storage = MemoryStorage()
    file = await storage.create("/f", preallocate_bytes=PAGE_BYTES)
    await storage.sync(file)
    await storage.sync_directory("/")
    gate = asyncio.Event()

    def hold_sync(operation: Operation) -> Awaitable[object] | None:
        return gate.wait() if operation.name == "sync" and not operation.after else None

    storage.hooks.append(hold_sync)
    sync = asyncio.create_task(storage.sync(file))
    await asyncio.sleep(0)
    await storage.write(file, [page(1)], 0)
    gate.set()
    await sync
    assert storage.crash().disk.content("/f") == bytes(PAGE_BYTES)


async def test_no_space_freeze_locks_and_alignment() -> None:
    storage = MemoryStorage(MemoryDisk(capacity_bytes=2 * PAGE_BYTES))
    with pytest.raises(OSError, match="No space") as full:
        await storage.create("/f", preallocate_bytes=3 * PAGE_BYTES)
    assert full.value.errno == errno.ENOSPC
    file = await storage.create("/f")
    with pytest.raises(OSError, match="Invalid") as unaligned:
        await storage.write(file, [memoryview(bytearray(5))], 0)
    assert unaligned.value.errno == errno.EINVAL
    lock = await storage.try_lock("/lock")
    assert lock is not None
    assert await MemoryStorage(storage.disk).try_lock("/lock") is None
    lock.release()
    assert await storage.try_lock("/lock") is not None
    storage.freeze_at = storage.events
    write = asyncio.create_task(storage.write(file, [page(1)], 0))
    await storage.frozen.wait()
    write.cancel()
    assert (await asyncio.gather(write, return_exceptions=True))[0].__class__ is asyncio.CancelledError
