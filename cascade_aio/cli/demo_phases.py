"""The phases of the demo: store, hot, deduplicate, reopen, cold. Every byte is compared.

What is timed and what is not: block bytes are generated into private memory *before* the clock
starts, and compared *after* it has stopped, while the lease is still held. Flushing belongs to
storing and is timed with it. Generation and comparison run in worker threads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cascade_aio.cli.demo_plan import DEMO_NAMESPACE, DemoPlan
from cascade_aio.cli.page_cache import cached_bytes, drop_cache
from cascade_aio.errors import CorruptionError
from cascade_aio.model import BlockId, Namespace, PrefixKey, Tier, prefix_keys
from cascade_aio.store import Block, Store
from cascade_aio.workload import Request, content_id, fill_block, verify_block

Bytes = npt.NDArray[np.uint8]

GETS_IN_FLIGHT = 8
LAG_PERIOD_S = 0.002
"""How often the loop's lag is sampled."""
HOT_GETS_MIN = 2000
"""Hot gets timed one by one, for the percentiles."""


@dataclasses.dataclass(slots=True)
class Timed:
    """One phase: bytes moved in ``seconds``, and what was compared. ``detail`` is for people."""

    phase: str
    nbytes: int = 0
    seconds: float = 0.0
    compared: str = ""
    detail: str = ""

    @property
    def gb_per_s(self) -> float | None:
        return self.nbytes / self.seconds / 1e9 if self.nbytes and self.seconds else None


class LoopLag:
    """How late the event loop wakes a sleeper while the phases run; seconds."""

    def __init__(self) -> None:
        self._late_s: list[float] = []

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Sample while the scope is open."""
        task = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            self._late_s.append(max(0.0, time.perf_counter() - due))

    def quantile_ms(self, part: float) -> float:
        ordered = sorted(self._late_s)
        return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)))] * 1e3 if ordered else 0.0


class DemoBlocks:
    """The demo's blocks by name, and a fixed piece of private memory to make them in."""

    def __init__(self, plan: DemoPlan) -> None:
        self.plan = plan
        self.names: dict[PrefixKey, BlockId] = {}
        self.memory: Bytes = np.zeros((plan.batch_blocks, plan.block_bytes), np.uint8)

    def parts(self, slot: int) -> tuple[Bytes, Bytes]:
        """Key and value halves of one slot of the batch memory."""
        half = self.plan.block_bytes // 2
        return self.memory[slot, :half], self.memory[slot, half:]

    async def generate(self, keys: Sequence[PrefixKey]) -> None:
        """Fill slot i with the bytes of ``keys[i]``."""
        await asyncio.gather(
            *(asyncio.to_thread(fill_block, content_id(key), *self.parts(slot)) for slot, key in enumerate(keys))
        )

    def batches(self, keys: Iterable[PrefixKey]) -> Iterable[list[PrefixKey]]:
        ordered = list(keys)
        size = self.plan.batch_blocks
        return (ordered[start : start + size] for start in range(0, len(ordered), size))


async def compare(key: PrefixKey, key_part: Bytes, value_part: Bytes, where: str) -> None:
    """Raise ``CorruptionError`` at the first byte that is not what was generated. Works in a thread.

    The arrays are handed over in a list that the thread empties: neither its work item nor a
    traceback keeps them, and with them the lease, alive.
    """
    parts = [value_part, key_part]
    del key_part, value_part
    offset = await asyncio.to_thread(_verify_parts, content_id(key), parts)
    if offset >= 0:
        raise CorruptionError(f"{where}: block {key} came back with a wrong byte {offset}", offset=offset)


def _verify_parts(block: int, parts: list[Bytes]) -> int:
    return verify_block(block, parts.pop(), parts.pop())


@dataclasses.dataclass(slots=True)
class Hits:
    """What the requests asked for and found, in blocks."""

    requests: int = 0
    asked: int = 0
    cached: int = 0
    cached_requests: int = 0

    @property
    def block_hit_rate(self) -> float:
        return self.cached / self.asked if self.asked else 0.0


async def store_phase(store: Store, blocks: DemoBlocks, requests: Sequence[Request]) -> tuple[Timed, Hits]:
    """Play the requests: look up each, store what is missing in batches, flush each batch."""
    timed, hits = Timed("store: put + flush"), Hits()
    waiting: dict[PrefixKey, PrefixKey | None] = {}
    for request in requests:
        cached = len(store.lookup(request.keys))
        while cached < len(request.keys) and request.keys[cached] in waiting:
            cached += 1
        hits.requests += 1
        hits.asked += len(request.keys)
        hits.cached += cached
        hits.cached_requests += cached > 0
        for position in range(cached, len(request.keys)):
            waiting[request.keys[position]] = request.parent(position)
            if len(waiting) == blocks.plan.batch_blocks:
                await _store_batch(store, blocks, waiting, timed)
    await _store_batch(store, blocks, waiting, timed)
    timed.detail = f"{len(blocks.names)} blocks, flushed every {blocks.plan.batch_blocks}"
    return timed, hits


async def _store_batch(
    store: Store, blocks: DemoBlocks, waiting: dict[PrefixKey, PrefixKey | None], timed: Timed
) -> None:
    keys = list(waiting)
    await blocks.generate(keys)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(store.put(*blocks.parts(slot), prefix=key, parent=waiting[key], meta=blocks.plan.meta))
            for slot, key in enumerate(keys)
        ]
    await store.flush()
    timed.seconds += time.perf_counter() - started
    timed.nbytes += len(keys) * blocks.plan.block_bytes
    blocks.names.update((key, task.result()) for key, task in zip(keys, tasks, strict=True))
    waiting.clear()


async def hot_get_phase(store: Store, blocks: DemoBlocks) -> Timed:
    """Leases on cached blocks, timed one by one; then every byte compared in the arena."""
    names = list(blocks.names.values())
    laps_s: list[float] = []
    for count in range(max(HOT_GETS_MIN, len(names))):
        started = time.perf_counter()
        block = await store.get(names[count % len(names)])
        block.release()
        laps_s.append(time.perf_counter() - started)
    laps_s.sort()
    tiers: list[Tier] = []
    for key in blocks.names:
        async with store.get(key) as block:
            tiers.append(block.tier)
            await compare(key, block.key, block.value, "hot get")
    where = "all in shm" if set(tiers) == {Tier.SHM} else f"{tiers.count(Tier.SHM)} of {len(tiers)} in shm"
    p50, p99 = (laps_s[int(part * len(laps_s))] * 1e6 for part in (0.5, 0.99))
    detail = f"p50 {p50:.1f} µs, p99 {p99:.1f} µs, no copy; {where}"
    return Timed("hot: get + release", 0, sum(laps_s), "all bytes", detail)


async def hot_read_phase(store: Store, blocks: DemoBlocks) -> Timed:
    """``read_into`` of every cached block, a batch at a time; compared after each batch."""
    timed = Timed("hot: read_into", compared="all bytes")
    for keys in blocks.batches(blocks.names):
        blocks.memory[: len(keys), ::4096] = 0  # so that a copy that did nothing is noticed
        started = time.perf_counter()
        for slot, key in enumerate(keys):
            await store.read_into(key, *blocks.parts(slot))
        timed.seconds += time.perf_counter() - started
        timed.nbytes += len(keys) * blocks.plan.block_bytes
        for slot, key in enumerate(keys):
            await compare(key, *blocks.parts(slot), "hot read_into")
    return timed


async def dedup_phase(store: Store, blocks: DemoBlocks) -> Timed:
    """The same content under other names: hashed and found, not stored. Raises if a byte was stored."""
    timed = Timed("deduplicate: put again", compared="ids equal")
    other = Namespace(DEMO_NAMESPACE.model, dtype=DEMO_NAMESPACE.dtype, rank="tp0", salt="another tenant")
    again = dict(zip(blocks.names, prefix_keys(range(len(blocks.names)), 1, other), strict=True))
    before = len(store)
    for keys in blocks.batches(blocks.names):
        await blocks.generate(keys)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(store.put(*blocks.parts(slot), prefix=again[key])) for slot, key in enumerate(keys)
            ]
        timed.seconds += time.perf_counter() - started
        timed.nbytes += len(keys) * blocks.plan.block_bytes
        for key, task in zip(keys, tasks, strict=True):
            if task.result() != blocks.names[key]:
                raise CorruptionError("the same bytes got another id", expected=blocks.names[key], found=task.result())
    if len(store) != before:
        raise CorruptionError("blocks stored twice were not deduplicated", expected=before, found=len(store))
    timed.detail = f"{len(again)} more names, no block added"
    return timed


def drop_segments(root: str) -> str:
    """Drop the root's files from the page cache, look whether they are gone, and say what was seen. Blocks."""
    paths = [str(path) for path in Path(root).rglob("*") if path.is_file()]
    before = cached_bytes(paths)
    drop_cache(paths)
    after = cached_bytes(paths)
    if after == 0:
        return f"page cache checked with mincore: {before / 1e6:.1f} MB of the files before dropping, 0 after"
    return f"page cache not empty: mincore still sees {after / 1e6:.1f} MB of the files (reads may bypass it)"


async def cold_phase(store: Store, blocks: DemoBlocks) -> Timed:
    """Get every block from disk, several in flight; compared under the lease after each wave."""
    timed = Timed("cold: get", compared="all bytes")
    ordered = list(blocks.names)
    tiers: list[Tier] = []
    for start in range(0, len(ordered), GETS_IN_FLIGHT):
        wave = ordered[start : start + GETS_IN_FLIGHT]
        started = time.perf_counter()
        leases: list[Block] = await asyncio.gather(*(_lease(store, key) for key in wave))
        timed.seconds += time.perf_counter() - started
        try:
            for key, block in zip(wave, leases, strict=True):
                tiers.append(block.tier)
                timed.nbytes += block.key.nbytes + block.value.nbytes
                await compare(key, block.key, block.value, "cold get")
        finally:
            for block in leases:
                block.release()
    timed.detail = f"{GETS_IN_FLIGHT} in flight, {tiers.count(Tier.DISK)} of {len(tiers)} from disk"
    return timed


async def _lease(store: Store, key: PrefixKey) -> Block:
    return await store.get(key)
