"""The thread backend: the engine's interface where io_uring is missing.

``preadv``/``pwritev``/``fdatasync`` in a bounded pool of threads; each thread is one request in
flight. Slower per request (tens of microseconds) and no way to interrupt a request that runs: a
cancelled transfer waits for the requests in the threads and drops the others. All else (order of
service, bounds, resuming, errors) is ``TransferEngine``'s.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence

from cascade_aio.errors import ConfigError
from cascade_aio.io.engine import EngineLimits, TransferEngine
from cascade_aio.io.pool import WorkerPool
from cascade_aio.io.transfer import Kind, Request

THREADS_DEFAULT = 16
"""Requests that run at once: with 4 MiB requests enough for a fast local disk."""

THREADS_MAX = 256


class _FileCall:
    """One system call on a file; ``result`` is bytes or -errno, as the ring answers."""

    __slots__ = ("_fd", "_kind", "_offset", "_views", "result", "token")

    def __init__(self, request: Request) -> None:
        self.token = request.token
        self.result = 0
        self._kind = request.transfer.kind
        self._fd = request.transfer.file.fd
        self._views: Sequence[memoryview] = request.views()
        self._offset = request.offset

    def run(self) -> None:
        try:
            if self._kind is Kind.READ:
                self.result = os.preadv(self._fd, self._views, self._offset)
            elif self._kind is Kind.WRITE:
                self.result = os.pwritev(self._fd, self._views, self._offset)
            else:
                os.fdatasync(self._fd)
        except OSError as error:
            self.result = -(error.errno or errno.EIO)
        self._views = ()


class ThreadEngine(TransferEngine):
    """Make it in the running loop; ``await aclose()`` joins the threads."""

    backend = "threads"

    def __init__(self, threads: int, limits: EngineLimits) -> None:
        super().__init__(dataclasses.replace(limits, requests_in_flight_max=threads))
        self._batch: list[_FileCall] = []
        self._pool: WorkerPool[_FileCall] = WorkerPool(threads, "io", 0, self._answered)

    @classmethod
    def open(cls, *, threads: int = THREADS_DEFAULT, limits: EngineLimits | None = None) -> ThreadEngine:
        """Start ``threads`` threads (1 to ``THREADS_MAX``), which is also the bound on requests in flight."""
        if not 1 <= threads <= THREADS_MAX:
            raise ConfigError(f"I/O threads={threads} must be between 1 and {THREADS_MAX}")
        return cls(threads, limits or EngineLimits())

    def _launch(self, request: Request) -> None:
        self._batch.append(_FileCall(request))

    def _push(self) -> None:
        if self._batch:
            self._counts["batches"] += 1
        for call in self._batch:
            self._pool.submit(call)
        self._batch.clear()

    def _interrupt(self, request: Request) -> None:
        """A system call in a thread cannot be given up; its answer is awaited."""

    def _answered(self, calls: list[_FileCall]) -> None:
        self._complete([(call.token, call.result) for call in calls])

    async def _release(self) -> None:
        await self._pool.aclose()
