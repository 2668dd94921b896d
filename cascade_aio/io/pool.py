"""A few threads that run jobs and tell the loop in batches.

Why not ``run_in_executor``: it costs 30-60 us a hop (two futures, a lock, one wake-up of the loop
each); thousands of 1 MiB blocks a second pass here. A finished job is appended to a deque and the
loop is woken once for all that finished since it last looked.

Invariants: ``run`` of a job is called exactly once, in a worker; ``deliver`` is called on the loop's
thread with jobs in the order they finished. The queue is bounded by the callers (each waits for its
job). Knows nothing of what the jobs do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from cascade_aio.io.waiting import call_in_thread


class Job(Protocol):
    def run(self) -> None:
        """Do the work. Must not raise: outcomes, also errors, are kept in the job."""
        ...


J = TypeVar("J", bound=Job)


class WorkerPool(Generic[J]):
    """``threads`` workers of niceness ``nice`` (Linux: per thread) that serve one event loop.

    The threads are daemons, so that a loop torn down without ``aclose`` does not hang the interpreter.
    """

    def __init__(self, threads: int, name: str, nice: int, deliver: Callable[[list[J]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver_jobs = deliver
        self._nice = nice
        self._jobs: SimpleQueue[J | None] = SimpleQueue()
        self._finished: deque[J] = deque()
        self._woken = False
        self._threads = [
            threading.Thread(target=self._work, name=f"cascade-{name}-{index}", daemon=True) for index in range(threads)
        ]
        started = 0
        try:
            for thread in self._threads:
                thread.start()
                started += 1
        except BaseException:  # a limit on threads: those that run must not wait for jobs for ever
            del self._threads[started:]
            self.abandon()
            raise

    def abandon(self) -> None:
        """End the threads after the jobs already queued, without waiting for them: nobody awaits this pool."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)

    @property
    def threads(self) -> int:
        return len(self._threads)

    def submit(self, job: J) -> None:
        self._jobs.put(job)

    async def aclose(self) -> None:
        """End the threads after the jobs already queued, and wait for them. May be repeated."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            await call_in_thread(None, thread.join)

    def _work(self) -> None:
        if self._nice and hasattr(os, "setpriority"):
            # A container may forbid it; the pool works all the same, only the loop is less preferred.
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
        while (job := self._jobs.get()) is not None:
            job.run()
            self._finished.append(job)
            del job  # an idle worker must not keep the buffers of its last job
            # Appended before looking at the flag; the loop clears the flag before it looks at the deque:
            # so no job is missed, and a wake-up too many does no harm.
            if not self._woken:
                self._woken = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    return

    def _deliver(self) -> None:
        self._woken = False
        finished = self._finished
        jobs: list[J] = []
        while finished:
            jobs.append(finished.popleft())
        if jobs:
            self._deliver_jobs(jobs)
