"""The processes that a crash campaign kills: a writer that reports what it did, and a reader.

Both print one JSON array per line. The writer announces an operation before it starts it and says
``durable`` only after a flush returned, so whoever reads the pipe never knows less than a caller of
the store would. Where its file system is made to fail (``may_fail``), an operation that raises what it may raise is
in ``doubt``: done or not, never promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any

import cascade_aio as ca
from cascade_aio.abc.storage import Platform
from cascade_aio.config import MIB, StoreConfig
from cascade_aio.io.engine import EngineLimits
from cascade_aio.io.platform import open_platform
from cascade_aio.store.opening import open_with
from cascade_aio.testing.crashes.dying import DyingStorage
from cascade_aio.testing.crashes.model import NAMES_PER_BLOCK, block_id_of, contents, name_of, parent_of

OPERATIONS_PER_BATCH_MAX = 8

LOOKS = 8
"""Blocks that are read between two batches."""

COMPACTION_SECONDS_MAX = 0.05
"""A compaction that is cancelled is so after at most so long."""

TURNS_BEFORE_CANCEL_MAX = 40
"""A put that is cancelled is so after at most so many turns of the loop."""

MAY_RAISE = (ca.TierFullError, ca.BrokenTierError, ca.ThrottledError, OSError)
"""What calls may raise while the file system fails."""


@dataclasses.dataclass(frozen=True, slots=True)
class ChildPlan:
    """What a writer does. ``die_at`` counts changing calls of its storage from 1; 0: it is killed from outside.

    Its blocks are the ``universe`` numbers from ``first_block`` on. ``may_fail``: the disk will be made to fail.
    """

    root: str
    shm_dir: str
    arena: str
    seed: int
    io_backend: str = "auto"
    operations: int = 300
    first_block: int = 0
    universe: int = 128
    segment_bytes: int = MIB
    request_bytes_max: int = MIB
    disk_bytes: int | None = None
    tail_seconds_max: float = 0.2
    adopt_seconds: float = 60.0
    die_at: int = 0
    phase: str = "before"
    may_fail: bool = False

    def config(self) -> StoreConfig:
        """The settings of the child's store. Where the disk fails, a put that finds no room gives up soon."""
        return StoreConfig(
            self.root,
            shm_dir=self.shm_dir,
            arena=self.arena,
            shm_bytes=16 * MIB,
            segment_bytes=self.segment_bytes,
            disk_bytes=self.disk_bytes,
            when_full="refuse" if self.disk_bytes is None else "evict",
            request_bytes_max=self.request_bytes_max,
            tail_seconds_max=self.tail_seconds_max,
            adopt_seconds=self.adopt_seconds,
            put_wait_seconds_max=0.1 if self.may_fail else 30.0,
        )


def tell(*event: object) -> None:
    """One report. Written with one call, so that a kill cuts between lines."""
    os.write(1, json.dumps(event).encode() + b"\n")


class Writer:
    """Random operations on one store, reported. Distinct blocks within a batch run concurrently."""

    def __init__(self, store: ca.Store, plan: ChildPlan) -> None:
        self._store = store
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._blocks = range(plan.first_block, plan.first_block + plan.universe)
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
            tell("alive")
        if self._flush is not None:
            await self._flush

    async def _batch(self, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        blocks = self._rng.sample(self._blocks, len(numbers))
        async with asyncio.TaskGroup() as tasks:
            for number, block in zip(numbers, blocks, strict=True):
                kind = self._rng.choices(("put", "reserve", "delete", "cancelled put"), (20, 4, 6, 1))[0]
                name = self._rng.choice((None, *range(NAMES_PER_BLOCK))) if kind != "delete" else None
                tell("op", number, kind, block, name)
                tasks.create_task(self._perform(number, kind, block, name))

    async def _perform(self, number: int, kind: str, block: int, name: int | None) -> None:
        with self._doubting(number):
            if kind == "delete":
                try:
                    await self._store.delete(block_id_of(block))
                except ca.BlockNotFoundError:
                    tell("miss", number)
            elif kind == "cancelled put":
                await self._cancel(number, block, name)
            else:
                await self._store_block(kind, block, name)

    async def _store_block(self, kind: str, block: int, name: int | None) -> None:
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

    async def _cancel(self, number: int, block: int, name: int | None) -> None:
        """A put whose caller gives up: it may have been done."""
        tell("doubt", number)
        task = asyncio.get_running_loop().create_task(self._store_block("put", block, name))
        for _ in range(self._rng.randrange(TURNS_BEFORE_CANCEL_MAX)):
            await asyncio.sleep(0)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome

    @contextlib.contextmanager
    def _doubting(self, number: int) -> Iterator[None]:
        try:
            yield
        except MAY_RAISE:
            if not self._plan.may_fail:
                raise
            tell("doubt", number)

    async def _between(self) -> None:
        choice = self._rng.random()
        if choice < 0.3:
            await self._flushed(self._done)
        elif choice < 0.5:
            if self._flush is not None:
                await self._flush
            self._flush = asyncio.get_running_loop().create_task(self._flushed(self._done))
        elif choice < 0.65:
            await self._look(self._rng.sample(self._blocks, LOOKS))
        elif choice < 0.72:
            self._store.prefetch([block_id_of(block) for block in self._rng.sample(self._blocks, LOOKS)])
        elif choice < 0.78:
            await self._trying(self._store.refresh())
        elif choice < 0.84:
            await self._compacted()

    async def _flushed(self, upto: int) -> None:
        try:
            await self._store.flush()
        except MAY_RAISE:
            if not self._plan.may_fail:
                raise
        else:
            tell("durable", upto)

    async def _compacted(self) -> None:
        """To its end, or until it is cancelled somewhere."""
        task = asyncio.get_running_loop().create_task(self._trying(self._store.compact()))
        if self._rng.random() < 0.5:
            await asyncio.sleep(self._rng.random() * COMPACTION_SECONDS_MAX)
            task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.result()

    async def _trying(self, call: Awaitable[object]) -> None:
        try:
            await call
        except MAY_RAISE:
            if not self._plan.may_fail:
                raise

    async def _look(self, blocks: Iterable[int]) -> None:
        """Read by id and by name: what comes is right, whatever the disk does."""
        for block in blocks:
            name = name_of(block, self._rng.randrange(NAMES_PER_BLOCK))
            for asked in (block_id_of(block), name):
                try:
                    async with self._store.get(asked) as found:
                        if (bytes(found.key), bytes(found.value)) != contents(block):
                            tell("wrong", f"block {block} asked for by {asked!r} has other bytes")
                except ca.BlockNotFoundError:
                    continue
                except MAY_RAISE as error:
                    if not self._plan.may_fail:
                        raise
                    tell("unread", repr(error))


async def write(plan: ChildPlan) -> None:
    """Open, work, close; reports ``open`` and ``closed`` around it, with what it has left open."""
    descriptors = len(os.listdir("/proc/self/fd"))
    platform = open_platform(
        io_backend=plan.io_backend, limits=EngineLimits(request_bytes_max=plan.request_bytes_max), worker_threads=2
    )
    storage = DyingStorage(platform.storage, die_at=plan.die_at, phase=plan.phase, seed=plan.seed)
    store = await open_with(plan.config(), platform=Platform(storage, platform.engine, platform.clock))
    tell("open")
    writer = Writer(store, plan)
    await writer.run()
    await writer._flushed(plan.operations + OPERATIONS_PER_BATCH_MAX)
    try:
        await store.aclose()
    except MAY_RAISE:
        if not plan.may_fail:
            raise
    others = asyncio.all_tasks() - {asyncio.current_task()}
    left = len(os.listdir("/proc/self/fd")) - descriptors
    if left or others:
        tell("leak", f"a closed store leaves {left} descriptors and {len(others)} tasks")
    tell("closed")


async def read(root: str, shm_dir: str, arena: str, seed: int, may_fail: bool) -> None:
    """Read blocks that others write, until killed. Whatever is read must be what its id says."""
    rng = random.Random(seed)
    async with ca.open_store(root, shm_dir=shm_dir, arena=arena, shm_bytes=8 * MIB) as store:
        tell("open")
        reads = misses = nbytes = 0
        while True:
            with contextlib.suppress(*(MAY_RAISE if may_fail else ())):
                await store.refresh()
            known = [info.block_id for info in store.blocks()]
            for block_id in rng.sample(known, min(len(known), 24)):
                try:
                    async with store.get(block_id) as block:
                        reads += 1
                        nbytes += len(block.key) + len(block.value)
                        if ca.compute_block_id(block.key, block.value) != block_id:
                            tell("wrong", f"the reader got other bytes for {block_id}")
                except ca.BlockNotFoundError:
                    misses += 1
                except MAY_RAISE:
                    if not may_fail:
                        raise
            if store.statistics()["damage"] and not may_fail:
                tell("damage", f"the reader saw damage: {store.statistics()['damage']}")
            tell("read", reads, misses, nbytes)
            await asyncio.sleep(0.01)


def run_child(arguments: dict[str, Any]) -> None:
    """Entry of the child process: ``arguments`` as the campaign passes them, JSON decoded."""
    role = arguments.pop("role")
    asyncio.run(write(ChildPlan(**arguments)) if role == "write" else read(**arguments))
