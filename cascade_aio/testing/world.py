"""Whole stores in a world of memory: real ``Store`` objects on a ``MemoryDisk``, with time that jumps.

What it is: what the store's own tests are made of, shipped so that users can test against a store
without touching a disk. ``World`` is one node: a disk that crashes on request and the stores opened on
it. ``check_invariants`` walks everything that the parts of a store believe about each other;
``check_idle`` adds that nobody holds anything any more.

Run it on a loop with virtual time (``virtual_loop``): waits of minutes take no time, and waiting for
what can never come is an error instead of a hang.

Must not know: how any test uses it.
"""

from __future__ import annotations

import asyncio
import collections
import hashlib
import os
from collections.abc import Callable, Coroutine
from typing import Any

import async_solipsism

from cascade_aio.abc.storage import Platform
from cascade_aio.config import make_config
from cascade_aio.core.lifecycle import CopyState
from cascade_aio.store.opening import open_with
from cascade_aio.store.store import Store
from cascade_aio.testing.clock import ManualClock
from cascade_aio.testing.memory import MemoryDisk, MemoryEngine, MemoryStorage
from cascade_aio.tiers.arena import PrivateArena

ROOT = "/kv"

SMALL_SETTINGS: dict[str, Any] = {
    "shm_bytes": 1 << 20,
    "segment_bytes": 1 << 20,
    "put_wait_seconds_max": 5.0,
    "stripe": "off",
    "adopt_seconds": None,
}
"""The smallest store there is: eviction after some hundred KiB, a new segment every MiB."""


def virtual_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose clock jumps to the next timer as soon as nothing else is to be done."""
    loop: asyncio.AbstractEventLoop = async_solipsism.EventLoop()
    return loop


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Tell ``story`` in virtual time."""
    loop = virtual_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(story())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def pseudo_bytes(seed: str, nbytes: int) -> bytes:
    """Bytes that only depend on ``seed``."""
    return hashlib.shake_128(seed.encode()).digest(nbytes)


class World:
    """One node. ``disk`` is what survives; a store opened by ``open`` is a process on it."""

    def __init__(self, **settings: Any) -> None:
        self.disk = MemoryDisk()
        self.clock = ManualClock(tick_ns=1000)
        self.settings = {**SMALL_SETTINGS, **settings}
        self.storages: list[MemoryStorage] = []

    @property
    def storage(self) -> MemoryStorage:
        """The storage of the store opened last: for hooks and counts."""
        return self.storages[-1]

    async def open(self, **settings: Any) -> Store:
        """A store on this world's root, in a process and an arena of its own."""
        config = make_config(ROOT, **{**self.settings, **settings})
        storage = MemoryStorage(self.disk)
        self.storages.append(storage)
        platform = Platform(storage, MemoryEngine(), self.clock)
        return await open_with(config, platform=platform, arena=PrivateArena(config.shm_bytes))

    async def kill(self) -> None:
        """All processes end where they are; the kernel and its page cache live."""
        self.disk = self.disk.kill()
        for storage in self.storages:
            storage.freeze_at = 0
        await cancel_others()
        self.storages.clear()

    async def crash(self, seed: int | None = None) -> None:
        """Loss of power: every process ends where it is, ``disk`` is what the seed leaves of it.

        Stores opened before must not be used any more; leases on them are to be released before.
        """
        survivor = self.disk.crash(seed)
        for storage in self.storages:
            storage.freeze_at = 0
        await cancel_others()
        self.disk = survivor
        self.storages.clear()

    def check_closed(self) -> None:
        """After all stores were closed: no file, lock or task is left."""
        for storage in self.storages:
            assert not storage.open_files, [file.path for file in storage.open_files]
        assert not self.disk.locked, self.disk.locked
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, others


async def cancel_others() -> None:
    """Cancel every other task of this loop until all have ended."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.wait(others)


def check_invariants(store: Store) -> None:
    """Catalog, policies, allocator, lease desk and segments agree about the store, at any moment."""
    context = store._context
    catalog, index, shm = context.catalog, context.catalog.index, context.shm
    copies = catalog.copies
    assert {copy.block_id: copy for copy in copies.values()} == catalog.hot
    allocated = {extent.offset: extent.nbytes for extent in shm._allocator.iter_extents() if extent.allocated}
    for row, copy in copies.items():
        assert copy.row == row
        assert copy.state in (CopyState.SEALED, CopyState.COPYING), (row, copy.state)
        assert index.block_id(row) == copy.block_id
        assert index.lengths(row) == (copy.key_bytes, copy.value_bytes)
        assert allocated[copy.extent.offset] == copy.extent.nbytes, row
        assert row in catalog.shm_policy, row
        assert copy.holds >= (copy.leases > 0) + (copy.state is CopyState.COPYING), row
    assert len(catalog.shm_policy) == len(copies)
    assert catalog.copy_bytes == sum(copy.extent.nbytes for copy in copies.values())
    assert catalog.pinned_bytes == sum(copy.extent.nbytes for copy in copies.values() if copy.holds)
    assert sum(allocated.values()) == shm.allocated_bytes <= shm.ready_bytes <= shm.capacity_bytes
    assert context.desk.leases >= sum(copy.leases for copy in copies.values())
    _check_disk(store)


def _check_disk(store: Store) -> None:
    context = store._context
    catalog, index = context.catalog, context.catalog.index
    live: collections.Counter[int] = collections.Counter()
    placed = 0
    for row in index.rows():
        location = index.location(row)
        assert location is not None or row in catalog.copies, f"row {row} has no copy"
        if location is not None:
            entry = context.disk.table.get(location[0])
            assert entry is not None, f"row {row} is in a segment that is gone"
            live[location[0]] += catalog.record_bytes(row, location[2])
            placed += catalog.disk_policy is not None and row in catalog.disk_policy
            if catalog.disk_policy is not None and not entry.writing:  # it may be being adopted
                assert (row in catalog.disk_policy) is entry.own, row
    for entry in context.disk.table:
        assert entry.live_bytes == live[entry.number], (entry.name, entry.live_bytes, live[entry.number])
    if catalog.disk_policy is not None:
        assert len(catalog.disk_policy) == placed


async def settle(turns: int = 50) -> None:
    """Let everything happen that only takes turns of the loop, no time."""
    for _ in range(turns):
        await asyncio.sleep(0)


def check_idle(store: Store) -> None:
    """Nobody holds, reads, writes or waits for anything; all memory in use is resident copies.

    After a successful ``flush`` (or once everything has been written) and some turns of the loop.
    """
    check_invariants(store)
    context = store._context
    statistics = store.statistics()
    shm = statistics["shm"]
    idle = {name: shm[name] for name in ("leases", "leased_bytes", "pinned_bytes", "loading")}
    assert not any(idle.values()), idle
    assert statistics["disk"]["backlog_bytes"] == 0
    assert shm["allocated_bytes"] == shm["copy_bytes"], (shm["allocated_bytes"], shm["copy_bytes"])
    assert all(copy.state is CopyState.SEALED for copy in context.catalog.copies.values())
    assert not context.room._loads
    assert not context.room._stores
    assert not context.disk._backlog_waiters
    assert store._putter.in_progress == 0


def fail_with(code: int, *names: str, path_part: str = "", times: int = 1) -> Callable[[Any], OSError | None]:
    """A hook for ``MemoryStorage.hooks``: the next ``times`` operations of these names fail with errno ``code``."""
    left = times

    def hook(operation: Any) -> OSError | None:
        nonlocal left
        if left and not operation.after and operation.name in names and path_part in operation.path:
            left -= 1
            return OSError(code, os.strerror(code), operation.path)
        return None

    return hook
