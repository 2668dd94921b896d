"""What is measured under MPI. Each figure is a function called on every rank; it returns this rank's part.

In pairs rank 0 reads and rank 1 holds; the others are there. Every block that was got is compared byte for byte with
what its holder put, with the clock stopped, while it is still leased; so is what raw ``Rget`` brought.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import cascade_aio as ca
from bench.blocks import in_flight, lease_all, put_all
from bench.data import Pool
from bench.mpi.ranks import Ranks, RawWindow
from bench.results import BenchError
from bench.ticker import Ticker
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments.format import header_pages_for
from cascade_aio.tiers.remote.reading import remote_pieces

READER, HOLDER = 0, 1
PIECES_AT_ONCE = 4
"""As the tier has under way of one block."""
LOOKUP_NAMES = 64
SMALL_BLOCK_BYTES = 16 << 10
HOT_BLOCKS = 32
HOT_BLOCK_BYTES = 1 << 20
HOT_GETS = 4 * HOT_BLOCKS
LISTED_SECONDS_MAX = 30.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of one run: how much of everything."""

    round_bytes: int
    """Moved by each side of a pair in one repetition."""
    repeats: int
    lookups: int
    lag_seconds: float
    seed: int

    def blocks_of(self, block_bytes: int) -> int:
        return max(2, self.round_bytes // block_bytes)


FULL = Setting(round_bytes=160 << 20, repeats=7, lookups=400, lag_seconds=4.0, seed=20_240_229)
QUICK = Setting(round_bytes=2 << 20, repeats=2, lookups=20, lag_seconds=0.3, seed=20_240_229)


@dataclasses.dataclass
class PairTaken:
    """Seconds of each side, in the order of the repetitions; filled by the reader."""

    ours_s: list[float]
    raw_s: list[float]
    order: list[str]
    bytes_per_side: int
    verified_bytes: int


async def listed(store: ca.Store) -> None:
    """Until others can find everything that this rank holds."""
    deadline_s = time.monotonic() + LISTED_SECONDS_MAX
    while store.statistics()["remote"]["to_list"] or store.statistics()["remote"]["under_way"]:
        if time.monotonic() > deadline_s:
            raise BenchError(f"blocks are not listed after {LISTED_SECONDS_MAX:g} s: {store.statistics()['remote']}")
        await asyncio.sleep(0.001)


async def put_pinned(store: ca.Store, pool: Pool) -> tuple[list[ca.BlockId], list[ca.Block]]:
    """Put the pool, written, listed for others and leased: nothing is evicted, or still written, while others read."""
    ids = await put_all(store, pool, 4)
    await store.flush()
    leases = [block for _, block in await lease_all(store, ids, 4)]
    await listed(store)
    return ids, leases


def release(leases: Sequence[ca.Block]) -> None:
    for lease in leases:
        lease.release()


async def pair(ranks: Ranks, store: ca.Store, setting: Setting, block_bytes: int, at_once: int) -> PairTaken | None:
    """Verified gets of the holder's blocks, and plain ``Rget`` of the same bytes and pieces, in turns."""
    count = setting.blocks_of(block_bytes)
    header_bytes = header_pages_for(block_bytes, 0, 1) * PAGE_BYTES
    record_bytes = header_bytes + block_bytes
    window = RawWindow(ranks, count * record_bytes if ranks.rank == HOLDER else PAGE_BYTES)
    taken = PairTaken([], [], [], count * block_bytes, 0)
    if ranks.rank in (READER, HOLDER):
        with Pool(block_bytes, count, setting.seed) as pool:
            into = np.ones(count * record_bytes, np.uint8) if ranks.rank == READER else None
            for repeat in range(setting.repeats + 1):
                await _one_pair(ranks, store, window, pool, into, repeat, (header_bytes, at_once), taken)
    else:
        for _ in range(setting.repeats + 1):
            await ranks.gather([])
            await ranks.meet()
    await ranks.meet()  # an error ends the job: nothing collective is left to others then
    window.close()
    return taken if ranks.rank == READER else None


async def _one_pair(
    ranks: Ranks,
    store: ca.Store,
    window: RawWindow,
    pool: Pool,
    into: np.ndarray[Any, np.dtype[np.uint8]] | None,
    repeat: int,
    shape: tuple[int, int],
    taken: PairTaken,
) -> None:
    """Repetition 0 warms up and is not kept."""
    header_bytes, at_once = shape
    pool.stamp(1000 * at_once + repeat)  # bytes that this rank has never seen
    ids: list[ca.BlockId] = []
    pinned: list[ca.Block] = []
    if ranks.rank == HOLDER:
        ids, pinned = await put_pinned(store, pool)
        for index in range(pool.count):
            start = index * (header_bytes + pool.block_bytes) + header_bytes
            for part in pool.parts(index):
                window.memory[start : start + len(part)] = part
                start += len(part)
    ids = (await ranks.gather(ids))[HOLDER]
    if into is not None:
        sides = ["cascade", "raw"] if repeat % 2 else ["raw", "cascade"]
        for side in sides:
            if side == "raw":
                seconds = await _raw(window, memoryview(into), pool, header_bytes, at_once)
            else:
                seconds = await _ours(store, pool, ids, at_once)
            taken.verified_bytes += pool.total_bytes
            if repeat:
                (taken.raw_s if side == "raw" else taken.ours_s).append(seconds)
        if repeat:
            taken.order.append(",".join(sides))
    await ranks.meet()
    release(pinned)


async def _ours(store: ca.Store, pool: Pool, ids: Sequence[ca.BlockId], at_once: int) -> float:
    before = store.statistics()["remote"]["reads"]
    started_s = time.perf_counter()
    leases = await lease_all(store, ids, at_once)
    seconds = time.perf_counter() - started_s
    if store.statistics()["remote"]["reads"] - before != len(ids):
        raise BenchError(f"not all of {len(ids)} blocks came from the other rank: {store.statistics()['remote']}")
    for index, block in leases:
        try:
            if not pool.equals(index, block.key, block.value):
                raise BenchError(f"block {index} came with wrong bytes from the other rank")
        finally:
            block.release()
    return seconds


async def _raw(window: RawWindow, into: memoryview, pool: Pool, header_bytes: int, at_once: int) -> float:
    """As many blocks at once as the other side, ``PIECES_AT_ONCE`` pieces of each."""
    record_bytes = header_bytes + pool.block_bytes
    pieces = remote_pieces(header_bytes, record_bytes)

    async def transfer(index: int) -> None:
        start = index * record_bytes
        waiting: list[Any] = []
        for first, end in pieces:
            waiting.append(window.get(HOLDER, start + first, into[start + first : start + end]))
            while len(waiting) >= PIECES_AT_ONCE:
                waiting = await _rest(waiting)
        while waiting:
            waiting = await _rest(waiting)

    started_s = time.perf_counter()
    await in_flight(at_once, range(pool.count), transfer)
    seconds = time.perf_counter() - started_s
    for index in range(pool.count):
        start = index * record_bytes + header_bytes
        middle, end = start + pool.block_bytes // 2, start + pool.block_bytes
        if not pool.equals(index, into[start:middle], into[middle:end]):
            raise BenchError(f"raw Rget brought wrong bytes of block {index}")
    into[:] = bytes(len(into))
    return seconds


async def _rest(requests: list[Any]) -> list[Any]:
    """Those that are not complete; lets others run if none was."""
    left = [request for request in requests if not request.Test()]
    if len(left) == len(requests):
        await asyncio.sleep(0)
    return left


async def lookup(ranks: Ranks, store: ca.Store, setting: Setting) -> list[float] | None:
    """Seconds of each awaited lookup of ``LOOKUP_NAMES`` keys whose blocks are spread over all ranks."""
    keys = ca.prefix_keys(range(LOOKUP_NAMES), block_tokens=1, namespace="bench mpi lookup")
    chance = np.random.default_rng(setting.seed)
    for index, key in enumerate(keys):
        part = chance.bytes(SMALL_BLOCK_BYTES // 2)
        if index % ranks.size == ranks.rank:
            await store.put(part, part, prefix=key)
    await listed(store)
    await ranks.meet()
    taken = []
    if ranks.rank == READER:
        for _ in range(setting.lookups):
            started_s = time.perf_counter()
            answer = await store.lookup(keys)
            taken.append(time.perf_counter() - started_s)
            if len(answer) != len(keys):
                raise BenchError(f"a lookup of {len(keys)} keys found {len(answer)}")
    await ranks.meet()
    return taken if ranks.rank == READER else None


async def lag(ranks: Ranks, store: ca.Store, setting: Setting, block_bytes: int) -> dict[str, Any]:
    """Lateness of a 1 ms ticker on every rank's loop, and that loop's processor time: idle, then during transfers."""
    count = setting.blocks_of(block_bytes)
    found: dict[str, Any] = {"blocks": 0}
    await ranks.meet()
    async with Ticker() as ticker:
        cpu_s = time.thread_time()
        await asyncio.sleep(setting.lag_seconds)
        found["idle_cpu_share"] = (time.thread_time() - cpu_s) / setting.lag_seconds
    found["idle_ms"] = ticker.late_ms
    found["busy_ms"], found["busy_cpu_share"] = [], 0.0
    round_number = 0
    with Pool(block_bytes, count, setting.seed + 1) as pool:
        busy_s = 0.0
        while (await ranks.gather(busy_s))[READER] < setting.lag_seconds:
            round_number += 1
            pool.stamp(round_number)
            ids, pinned = await put_pinned(store, pool) if ranks.rank == HOLDER else ([], [])
            ids = (await ranks.gather(ids))[HOLDER]
            async with Ticker() as ticker:
                cpu_s, started_s = time.thread_time(), time.perf_counter()
                leases = await lease_all(store, ids, PIECES_AT_ONCE) if ranks.rank == READER else []
                await ranks.meet()
                seconds = time.perf_counter() - started_s
                found["busy_cpu_share"] += time.thread_time() - cpu_s
            busy_s += seconds
            found["busy_ms"] += ticker.late_ms
            found["blocks"] += len(leases)
            for index, block in leases:
                if not pool.equals(index, block.key, block.value):
                    raise BenchError(f"block {index} came with wrong bytes")
                block.release()
            release(pinned)
        found["busy_cpu_share"] /= busy_s
    return found


async def skewed(ranks: Ranks, store: ca.Store, setting: Setting) -> dict[str, Any]:
    """All ranks but the holder read the holder's hot blocks, Zipf-like; what each had to bring, and from whom."""
    before = store.statistics()["remote"]
    with Pool(HOT_BLOCK_BYTES, HOT_BLOCKS, setting.seed + 2) as pool:
        ids, pinned = await put_pinned(store, pool) if ranks.rank == HOLDER else ([], [])
        ids = (await ranks.gather(ids))[HOLDER]
        chance = random.Random(setting.seed + ranks.rank)
        weights = [1 / (number + 1) for number in range(HOT_BLOCKS)]
        chosen = chance.choices(range(HOT_BLOCKS), weights, k=HOT_GETS) if ranks.rank != HOLDER else []
        started_s = time.perf_counter()
        for index in chosen:
            async with store.get(ids[index]) as block:
                if not pool.equals(index, block.key, block.value):
                    raise BenchError(f"hot block {index} came with wrong bytes")
        seconds = time.perf_counter() - started_s
        await ranks.meet()
        release(pinned)
    after = store.statistics()["remote"]
    earlier = before["read_bytes_from"]
    from_rank = {rank: nbytes - earlier.get(rank, 0) for rank, nbytes in after["read_bytes_from"].items()}
    return {"gets": len(chosen), "seconds": seconds, "read_bytes_from": {r: n for r, n in from_rank.items() if n}}


@dataclasses.dataclass
class AllTaken:
    """One rank's part of one repetition in which all ranks work."""

    seconds: float
    nbytes: int
    operations: int
    cpu_s: float


async def everybody(
    ranks: Ranks, store: ca.Store, setting: Setting, block_bytes: int, repeat: int
) -> dict[str, AllTaken]:
    """All ranks put and flush, then each gets all blocks of the next rank, then those again (its own copies now)."""
    count = setting.blocks_of(block_bytes)
    taken: dict[str, AllTaken] = {}
    neighbour = (ranks.rank + 1) % ranks.size
    seed = setting.seed + 100 + repeat
    with (
        Pool(block_bytes, count, seed + 1000 * ranks.rank) as mine,
        Pool(block_bytes, count, seed + 1000 * neighbour) as theirs,
    ):
        await ranks.meet()
        started_s, cpu_s = time.perf_counter(), time.process_time()
        ids = await put_all(store, mine, 4)
        await store.flush()
        taken["write_durable"] = _since(started_s, cpu_s, mine.total_bytes, count)
        pinned = [block for _, block in await lease_all(store, ids, 4)]
        await listed(store)
        ids = (await ranks.gather(ids))[neighbour]
        for column in ("remote", "hot_lease"):
            await ranks.meet()
            before = store.statistics()["remote"]["read_bytes"]
            started_s, cpu_s = time.perf_counter(), time.process_time()
            leases = await lease_all(store, ids, 4)
            taken[column] = _since(started_s, cpu_s, theirs.total_bytes, count)
            brought = store.statistics()["remote"]["read_bytes"] > before
            for index, block in leases:
                if not theirs.equals(index, block.key, block.value):
                    raise BenchError(f"{column}: block {index} came with wrong bytes")
                block.release()
            if brought != (column == "remote"):
                raise BenchError(f"{column}: the blocks were not where they should be")
        await ranks.meet()
        release(pinned)
    return taken


def _since(started_s: float, cpu_s: float, nbytes: int, operations: int) -> AllTaken:
    return AllTaken(time.perf_counter() - started_s, nbytes, operations, time.process_time() - cpu_s)
