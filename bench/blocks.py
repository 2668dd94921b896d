"""Blocks of a pool through a store: bounded numbers in flight, every byte compared.

The verbs that figures share. Comparing is done with the clock stopped, by NumPy against the pool's
own bytes, never by a digest alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import cascade_aio as ca
from bench.data import Pool
from bench.results import BenchError

AnyStore = ca.Store | ca.ServiceStore

T = TypeVar("T")
R = TypeVar("R")


async def in_flight(limit: int, jobs: Iterable[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """Results of ``work`` on each job, in no particular order, ``limit`` at a time.

    The first failure cancels the others and is raised (in an ``ExceptionGroup``).
    """
    pending = iter(jobs)
    done: list[R] = []

    async def worker() -> None:
        for job in pending:
            done.append(await work(job))

    async with asyncio.TaskGroup() as group:
        for _ in range(limit):
            group.create_task(worker())
    return done


async def put_all(store: AnyStore, pool: Pool, limit: int) -> list[ca.BlockId]:
    """Put every block of ``pool`` as it is stamped now; their ids in the pool's order."""
    ids: list[ca.BlockId | None] = [None] * pool.count

    async def put(index: int) -> None:
        ids[index] = await store.put(*pool.parts(index))

    await in_flight(limit, range(pool.count), put)
    return [block_id for block_id in ids if block_id is not None]


async def lease_all(store: AnyStore, ids: Sequence[ca.BlockId], limit: int) -> list[tuple[int, ca.Block]]:
    """Leases on all of ``ids`` with their index, in order of arrival; the caller releases them."""

    async def get(index: int) -> tuple[int, ca.Block]:
        return index, await store.get(ids[index])

    return await in_flight(limit, range(len(ids)), get)


def compare_and_release(leases: Iterable[tuple[int, ca.Block]], pool: Pool) -> int:
    """Compare every leased byte with the pool's and release all. Bytes compared; ``BenchError`` on a difference."""
    compared = 0
    wrong: list[int] = []
    for index, block in leases:
        if not pool.equals(index, block.key, block.value):
            wrong.append(index)
        compared += len(block.key) + len(block.value)
        block.release()
    if wrong:
        raise BenchError(f"blocks {wrong[:8]} came back with other bytes than were put: the figure is void")
    return compared


async def verify_rounds(store: ca.Store, pool: Pool, rounds: dict[int, list[ca.BlockId]], limit: int) -> int:
    """Get every block of every round (stamp → ids) and compare all bytes. Bytes compared."""
    compared = 0
    for stamp, ids in rounds.items():
        pool.stamp(stamp)
        for start in range(0, len(ids), limit):
            part = await lease_all(store, ids[start : start + limit], limit)
            compared += compare_and_release(((start + index, block) for index, block in part), pool)
    return compared


async def time_hot_gets_ns(store: AnyStore, asked: Sequence[ca.BlockId]) -> list[float]:
    """How long each get and release took, one after the other."""
    taken = [0.0] * len(asked)
    clock = time.perf_counter_ns
    for index, block_id in enumerate(asked):
        started = clock()
        (await store.get(block_id)).release()
        taken[index] = clock() - started
    return taken


async def hot_gets_per_second(store: AnyStore, asked: Sequence[ca.BlockId]) -> float:
    """Gets and releases of one task, without a clock between them."""
    started = time.perf_counter()
    for block_id in asked:
        (await store.get(block_id)).release()
    return len(asked) / (time.perf_counter() - started)
