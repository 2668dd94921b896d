"""The processes that a crash campaign kills: a writer that reports what it did, and a reader.

Both print one JSON array per line. The writer announces an operation before it starts it and says
``durable`` only after a flush returned, so whoever reads the pipe never knows less than a caller of
the store would. ``DyingStorage`` ends the process at an exact call, before, during, after or in the
middle of it; the production code knows nothing of that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES, File, FileEntry, Lock, Platform, Priority, Storage, Urgency
from cascade_aio.config import MIB, StoreConfig
from cascade_aio.io.engine import EngineLimits
from cascade_aio.io.platform import open_platform
from cascade_aio.store.opening import open_with
from cascade_aio.testing.crash_model import NAMES_PER_BLOCK, block_id_of, contents, name_of, parent_of

PHASES = ("before", "during", "after", "torn")
"""When a dying call ends the process; ``torn`` writes some pages of a write and not the others."""

OPERATIONS_PER_BATCH_MAX = 8
PAGES_TORN_MAX = 4096
"""A torn write is done page by page, at most so many."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class ChildPlan:
    """What a child does. ``die_at`` counts changing calls of its storage from 1; 0: it is killed from outside.

    ``present`` are the blocks on stable storage at the start, ``universe`` how many numbers there are.
    """

    root: str
    shm_dir: str
    arena: str
    seed: int
    io_backend: str = "auto"
    operations: int = 300
    universe: int = 128
    segment_bytes: int = MIB
    request_bytes_max: int = MIB
    disk_bytes: int | None = None
    tail_seconds_max: float = 0.2
    die_at: int = 0
    phase: str = "before"

    def config(self) -> StoreConfig:
        """The settings of the child's store."""
        return StoreConfig(
            self.root,
            shm_dir=self.shm_dir,
            arena=self.arena,
            shm_bytes=16 * MIB,
            segment_bytes=self.segment_bytes,
            disk_bytes=self.disk_bytes,
            request_bytes_max=self.request_bytes_max,
            tail_seconds_max=self.tail_seconds_max,
        )


def tell(*event: object) -> None:
    """One report. Written with one call, so that a kill cuts between lines."""
    os.write(1, json.dumps(event).encode() + b"\n")


class DyingStorage:
    """A ``Storage`` that kills its process at the ``die_at``-th call that changes something."""

    def __init__(self, inner: Storage, *, die_at: int = 0, phase: str = "before", seed: int = 0) -> None:
        assert phase in PHASES, phase
        self._inner = inner
        self._die_at = die_at
        self._phase = phase
        self._rng = random.Random(seed)
        self._calls = 0

    async def _change(self, call: Callable[[], Awaitable[T]], torn: Callable[[], Awaitable[None]] | None = None) -> T:
        self._calls += 1
        if self._calls != self._die_at:
            return await call()
        if self._phase == "torn" and torn is not None:
            await torn()
        elif self._phase == "during":
            running = asyncio.ensure_future(call())
            for _ in range(3):  # to the engine, and from there to the kernel
                await asyncio.sleep(0)
            _die()
            return await running
        elif self._phase == "after":
            await call()
        _die()
        raise AssertionError("this process has killed itself")

    async def _tear(self, file: File, buffers: Sequence[memoryview], offset: int) -> None:
        """Half of the pages reach the file, in any order."""
        pages: list[tuple[int, memoryview]] = []
        for buffer in buffers:
            for start in range(0, len(buffer), PAGE_BYTES):
                pages.append((offset, buffer[start : start + PAGE_BYTES]))
                offset += PAGE_BYTES
        chosen = self._rng.sample(pages, len(pages) // 2)[:PAGES_TORN_MAX]
        await asyncio.gather(*(self._inner.write(file, [page], at) for at, page in chosen))

    async def create(self, path: str, *, preallocate_bytes: int = 0) -> File:
        return await self._change(lambda: self._inner.create(path, preallocate_bytes=preallocate_bytes))

    async def write(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority = Priority.WRITE,
        deadline_s: float | None = None,
    ) -> None:
        await self._change(
            lambda: self._inner.write(file, buffers, offset, priority=priority, deadline_s=deadline_s),
            lambda: self._tear(file, buffers, offset),
        )

    async def sync(self, file: File) -> None:
        await self._change(lambda: self._inner.sync(file))

    async def truncate(self, file: File, size_bytes: int) -> None:
        await self._change(lambda: self._inner.truncate(file, size_bytes))

    async def make_directory(self, path: str) -> None:
        await self._change(lambda: self._inner.make_directory(path))

    async def sync_directory(self, path: str) -> None:
        await self._change(lambda: self._inner.sync_directory(path))

    async def unlink(self, path: str) -> None:
        await self._change(lambda: self._inner.unlink(path))

    async def write_small(self, path: str, data: Sequence[bytes | memoryview]) -> None:
        await self._change(lambda: self._inner.write_small(path, data))

    async def try_lock(self, path: str) -> Lock | None:
        return await self._change(lambda: self._inner.try_lock(path))

    # -- what changes nothing

    async def open(self, path: str, *, writable: bool = False) -> File:
        return await self._inner.open(path, writable=writable)

    async def read(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority | Urgency = Priority.DEMAND,
        deadline_s: float | None = None,
    ) -> int:
        return await self._inner.read(file, buffers, offset, priority=priority, deadline_s=deadline_s)

    async def size(self, file: File) -> int:
        return await self._inner.size(file)

    async def list_directory(self, path: str) -> list[FileEntry]:
        return await self._inner.list_directory(path)

    async def read_small(self, path: str) -> bytes:
        return await self._inner.read_small(path)

    async def free_bytes(self, path: str) -> int:
        return await self._inner.free_bytes(path)

    async def register_memory(self, memory: memoryview) -> None:
        await self._inner.register_memory(memory)

    def statistics(self) -> dict[str, object]:
        return self._inner.statistics()

    async def aclose(self) -> None:
        await self._inner.aclose()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Writer:
    """Random operations on one store, reported. Distinct blocks within a batch run concurrently."""

    def __init__(self, store: ca.Store, plan: ChildPlan) -> None:
        self._store = store
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._done = -1
        self._flush: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """``plan.operations`` operations with flushes, reads and refreshes between them."""
        number = 0
        while number < self._plan.operations:
            count = self._rng.randint(1, OPERATIONS_PER_BATCH_MAX)
            batch = range(number, number + count)
            number += count
            await self._batch(batch)
            self._done = number - 1
            await self._between()
        if self._flush is not None:
            await self._flush

    async def _batch(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        blocks = self._rng.sample(range(self._plan.universe), len(numbers))
        async with asyncio.TaskGroup() as tasks:
            for number, block in zip(numbers, blocks, strict=True):
                kind = self._rng.choices(("put", "reserve", "delete"), (10, 2, 3))[0]
                name = self._rng.choice((None, *range(NAMES_PER_BLOCK))) if kind != "delete" else None
                tell("op", number, kind, block, name)
                tasks.create_task(self._perform(number, kind, block, name))

    async def _perform(self, number: int, kind: str, block: int, name: int | None) -> None:
        if kind == "delete":
            try:
                await self._store.delete(block_id_of(block))
            except ca.BlockNotFoundError:
                tell("miss", number)
            return
        prefix = None if name is None else name_of(block, name)
        parent = None if name is None else parent_of(block)
        key, value = contents(block)
        if kind == "put":
            stored = await self._store.put(key, value, prefix=prefix, parent=parent)
        else:
            async with self._store.reserve(
                key_bytes=len(key), value_bytes=len(value), prefix=prefix, parent=parent
            ) as slot:
                slot.key[:] = memoryview(key)
                slot.value[:] = memoryview(value)
            stored = slot.block_id
        if stored != block_id_of(block):
            tell("wrong", f"{kind} of block {block} under name {name} returned {stored}")

    async def _between(self) -> None:
        choice = self._rng.random()
        if choice < 0.3:
            await self._flushed(self._done)
        elif choice < 0.5:
            if self._flush is not None:
                await self._flush
            self._flush = asyncio.get_running_loop().create_task(self._flushed(self._done))
        elif choice < 0.7:
            await self._look(self._rng.sample(range(self._plan.universe), 8))
        elif choice < 0.75:
            await self._store.refresh()

    async def _flushed(self, upto: int) -> None:
        await self._store.flush()
        tell("durable", upto)

    async def _look(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            try:
                async with self._store.get(block_id_of(block)) as found:
                    if (bytes(found.key), bytes(found.value)) != contents(block):
                        tell("wrong", f"block {block} has other bytes")
            except ca.BlockNotFoundError:
                continue


async def write(plan: ChildPlan) -> None:
    """Open, work, close; reports ``open`` and ``closed`` around it."""
    platform = open_platform(
        io_backend=plan.io_backend, limits=EngineLimits(request_bytes_max=plan.request_bytes_max), worker_threads=2
    )
    storage = DyingStorage(platform.storage, die_at=plan.die_at, phase=plan.phase, seed=plan.seed)
    store = await open_with(plan.config(), platform=Platform(storage, platform.engine, platform.clock))
    tell("open")
    writer = Writer(store, plan)
    await writer.run()
    await store.flush()
    tell("durable", plan.operations + OPERATIONS_PER_BATCH_MAX)
    await store.aclose()
    tell("closed")


async def read(root: str, shm_dir: str, arena: str, seed: int) -> None:
    """Read blocks that others write, until killed. Whatever is read must be what its id says."""
    rng = random.Random(seed)
    async with ca.open_store(root, shm_dir=shm_dir, arena=arena, shm_bytes=8 * MIB) as store:
        tell("open")
        reads = misses = 0
        while True:
            await store.refresh()
            known = [info.block_id for info in store.blocks()]
            for block_id in rng.sample(known, min(len(known), 24)):
                try:
                    async with store.get(block_id) as block:
                        reads += 1
                        if ca.compute_block_id(block.key, block.value) != block_id:
                            tell("wrong", f"the reader got other bytes for {block_id}")
                except ca.BlockNotFoundError:
                    misses += 1
            if store.statistics()["damage"]:
                tell("wrong", f"the reader saw damage: {store.statistics()['damage']}")
            tell("read", reads, misses)
            await asyncio.sleep(0.01)


def run_child(arguments: dict[str, Any]) -> None:
    """Entry of the child process: ``arguments`` as the campaign passes them, JSON decoded."""
    role = arguments.pop("role")
    asyncio.run(write(ChildPlan(**arguments)) if role == "write" else read(**arguments))
