"""Batches of jobs through a peer, bounded numbers at a time, with the clock around them.

Threads for blocking peers, tasks for async ones, the whole batch at once for peers that take batches; threads
are started before the clock is. Results and the latency of each operation come back in the order of the jobs;
nothing is compared here. The first failure stops the batch and is raised as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from bench.peers.protocol import AsyncLeasing, AsyncPeer, Batching, Job, Leasing, Peer

clock = time.monotonic
"""One clock for all processes of the machine."""


@dataclasses.dataclass(slots=True)
class Ran:
    """One batch: when it began and ended (the machine's monotonic clock, for several clients), what it gave."""

    began_s: float
    ended_s: float
    results: list[Any]
    latency_s: list[float]
    """Of each operation, in the order of the jobs; empty for batching peers, where operations have none."""


async def put_all(peer: Peer, jobs: Sequence[Job], in_flight: int) -> Ran:
    """Put every job's data."""
    if isinstance(peer, AsyncPeer):
        async_put = peer.put
        return await _tasks(lambda job: async_put(job.name, job.data), jobs, in_flight)
    if isinstance(peer, Batching):
        return _whole(peer.put_many, jobs, in_flight)
    put = peer.put
    return _threads(lambda job: put(job.name, job.data), jobs, in_flight)


async def get_all(peer: Peer, jobs: Sequence[Job], in_flight: int) -> Ran:
    """Get every job's block into its room (or as an object of its own); results are single buffers."""
    if isinstance(peer, AsyncPeer):
        async_get = peer.get
        return await _tasks(lambda job: async_get(job.name, job.data), jobs, in_flight)
    if isinstance(peer, Batching):
        return _whole(peer.get_many, jobs, in_flight)
    get = peer.get
    return _threads(lambda job: get(job.name, job.data), jobs, in_flight)


async def lease_all(peer: Peer, jobs: Sequence[Job], in_flight: int, held: contextlib.AsyncExitStack) -> Ran:
    """Lease every job's block until ``held`` is left; results are sequences of pieces."""
    if isinstance(peer, AsyncPeer):
        assert isinstance(peer, AsyncLeasing), f"{peer.system} says that it leases and has no lease()"
        async_lease = peer.lease
        return await _tasks(lambda job: held.enter_async_context(async_lease(job.name)), jobs, in_flight)
    assert isinstance(peer, Leasing), f"{peer.system} says that it leases and has no lease()"
    lease = peer.lease
    return _threads(lambda job: held.enter_context(lease(job.name)), jobs, in_flight)


async def call(peer: Peer, verb: str, *arguments: Any) -> Any:
    """One verb of either kind of peer."""
    outcome = getattr(peer, verb)(*arguments)
    return await outcome if isinstance(peer, AsyncPeer) else outcome


async def mix(peer: Peer, jobs: Sequence[tuple[bool, Job]], in_flight: int) -> Ran:
    """Puts (``True``) and gets as they come. Batching peers are driven one by one: their batches are of one kind."""
    if isinstance(peer, AsyncPeer):
        async_put, async_get = peer.put, peer.get

        async def either(job: tuple[bool, Job]) -> Any:
            write, one = job
            return await (async_put if write else async_get)(one.name, one.data)

        return await _tasks(either, jobs, in_flight)
    put, get = peer.put, peer.get
    return _threads(lambda job: (put if job[0] else get)(job[1].name, job[1].data), jobs, in_flight)


def _whole(work: Callable[[Sequence[Job], int], Any], jobs: Sequence[Job], in_flight: int) -> Ran:
    began_s = clock()
    results = work(jobs, in_flight)
    return Ran(began_s, clock(), list(results or []), [])


async def _tasks(work: Callable[[Any], Awaitable[Any]], jobs: Sequence[Any], in_flight: int) -> Ran:
    results: list[Any] = [None] * len(jobs)
    latency_s = [0.0] * len(jobs)
    feed = iter(range(len(jobs)))

    async def worker() -> None:
        for index in feed:
            began = clock()
            results[index] = await work(jobs[index])
            latency_s[index] = clock() - began

    began_s = clock()
    if in_flight == 1:
        await worker()
    else:
        tasks = [asyncio.create_task(worker()) for _ in range(min(in_flight, len(jobs)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return Ran(began_s, clock(), results, latency_s)


def _threads(work: Callable[[Any], Any], jobs: Sequence[Any], in_flight: int) -> Ran:
    results: list[Any] = [None] * len(jobs)
    latency_s = [0.0] * len(jobs)
    failures: list[BaseException] = []
    feed = iter(range(len(jobs)))

    def worker() -> None:
        for index in feed:
            if failures:
                return
            began = clock()
            results[index] = work(jobs[index])
            latency_s[index] = clock() - began

    if in_flight == 1:
        began_s = clock()
        worker()
        return Ran(began_s, clock(), results, latency_s)

    ready = threading.Barrier(in_flight + 1)

    def guarded() -> None:
        ready.wait()
        try:
            worker()
        except BaseException as error:  # handed to the caller below
            failures.append(error)

    threads = [threading.Thread(target=guarded, daemon=True) for _ in range(in_flight)]
    for thread in threads:
        thread.start()
    ready.wait()
    began_s = clock()
    for thread in threads:
        thread.join()
    ended_s = clock()
    if failures:
        raise failures[0]
    return Ran(began_s, ended_s, results, latency_s)
