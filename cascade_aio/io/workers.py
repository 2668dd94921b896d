"""``ByteWorkers``: ``abc.ByteEngine`` on a few threads of its own.

Digests, checksums and copies take about a millisecond per MiB and would stall the loop; they run in
as many threads as there are CPUs, in C calls without the GIL. Small ones are done at once, where a
hop to a thread would cost more than the work. The threads are a little less preferred than the loop
(``WORKER_NICE``), so that the loop gets a CPU when it wakes.

Invariants: a call returns or raises only after no thread touches its buffers; the number of jobs
queued is bounded by the callers, each of which waits for its own. Must not know extents or blocks.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

from cascade_aio import _native
from cascade_aio.abc.storage import Ingested
from cascade_aio.errors import ClosedError, ConfigError
from cascade_aio.io.ingest import chunk_checksums, digest_in_place, ingest
from cascade_aio.io.pool import WorkerPool
from cascade_aio.io.populate import map_in, populate
from cascade_aio.io.waiting import Completion

INLINE_BYTES_MAX = 64 << 10
"""Work on no more than this is done on the loop: ingest of 64 KiB takes 45-50 us, a hop to a thread 25-50."""

COPY_INLINE_BYTES_MAX = 256 << 10
"""Copies and checksums are far faster than digests: 256 KiB out of the cache takes less than 50 us."""

SPLIT_BYTES = 4 << 20
"""Copies and checksums are shared out to the workers in parts of at least this size, one for each worker: a part
more is two handoffs of the GIL more, and half a millisecond of work is worth them."""

PREFAULT_BYTES = 32 << 20
"""Memory made present between two looks at cancellation: 10 to 150 ms."""

WORKER_NICE = 5
"""Niceness of the threads. Lateness of a 1 ms ticker on the loop, 2 workers busy with SHA-256 on 2 cores, p99 in
ms: nice 0: 2.2-2.8, nice 5: 1.1, nice 10: 1.1 (with outliers of 30 when other processes want the CPUs)."""

WORKER_THREADS_MAX = 256


class _Call(Completion):
    """One function call in a worker; ``outcome`` after ``wait``."""

    __slots__ = ("_arguments", "_error", "_function", "_result", "abandoned")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        super().__init__(loop)
        self._function = function
        self._arguments = arguments
        self._result: Any = None
        self._error: BaseException | None = None
        self.abandoned = False  # set by the loop, read once by the worker: skip it if it has not begun

    def run(self) -> None:
        try:
            if not self.abandoned:
                self._result = self._function(*self._arguments)
        except BaseException as error:  # kept for the caller, who raises it
            self._error = error
        self._arguments = ()

    def outcome(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


def _abandon(call: _Call) -> None:
    call.abandoned = True


class ByteWorkers:
    """Made in the running loop; ``await aclose()`` joins the threads."""

    def __init__(self, threads: int | None = None, *, nice: int | None = None) -> None:
        """``threads``: by default the CPUs this process may use. ``nice``: 0 to 19, by default ``WORKER_NICE``."""
        threads = len(os.sched_getaffinity(0)) if threads is None else threads
        nice = WORKER_NICE if nice is None else nice
        if not 1 <= threads <= WORKER_THREADS_MAX:
            raise ConfigError(f"worker threads={threads} must be between 1 and {WORKER_THREADS_MAX}")
        if not 0 <= nice <= 19:
            raise ConfigError(f"worker nice={nice} must be between 0 and 19")
        self._loop = asyncio.get_running_loop()
        self._pool: WorkerPool[_Call] = WorkerPool(threads, "bytes", nice, self._deliver)
        self._calls: set[_Call] = set()
        self._idle = asyncio.Event()
        self._closed = False

    def abandon(self) -> None:
        """``aclose`` for a caller that cannot wait, of workers that were never used."""
        self._closed = True
        self._pool.abandon()

    @property
    def threads(self) -> int:
        return self._pool.threads

    async def ingest(
        self,
        key: memoryview,
        value: memoryview,
        payload: memoryview,
        value_offset: int,
        chunk_bytes: int,
        digest: str,
    ) -> Ingested:
        """See ``abc.ByteEngine``; also zeroes the padding. Buffers are flat byte views, of any alignment."""
        arguments = (key, value, payload, value_offset, chunk_bytes, digest)
        if payload.nbytes <= INLINE_BYTES_MAX:
            self._check_open()
            return ingest(*arguments)
        result: Ingested = await self._call(ingest, *arguments)
        return result

    async def digest(
        self, payload: memoryview, key_bytes: int, value_offset: int, value_bytes: int, chunk_bytes: int, digest: str
    ) -> Ingested:
        """See ``abc.ByteEngine``."""
        arguments = (payload, key_bytes, value_offset, value_bytes, chunk_bytes, digest)
        if payload.nbytes <= INLINE_BYTES_MAX:
            self._check_open()
            return digest_in_place(*arguments)
        result: Ingested = await self._call(digest_in_place, *arguments)
        return result

    async def checksum(self, payload: memoryview, chunk_bytes: int) -> tuple[int, ...]:
        """See ``abc.ByteEngine``; split over the workers at chunk boundaries."""
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes={chunk_bytes} must be at least 1")
        if payload.nbytes <= COPY_INLINE_BYTES_MAX:
            self._check_open()
            return chunk_checksums(payload, chunk_bytes)
        step = -(-self._share_bytes(payload.nbytes) // chunk_bytes) * chunk_bytes
        parts = [(payload[start : start + step], chunk_bytes) for start in range(0, payload.nbytes, step)]
        found = await self._call_all(chunk_checksums, parts)
        return tuple(crc for crcs in found for crc in crcs)

    async def checksums(self, payloads: Sequence[memoryview], chunk_bytes: int) -> list[tuple[int, ...]]:
        """See ``abc.ByteEngine``; neighbours in the list share a call, one share for each worker."""
        if len(payloads) == 1:
            return [await self.checksum(payloads[0], chunk_bytes)]
        total = sum(payload.nbytes for payload in payloads)
        if total <= COPY_INLINE_BYTES_MAX:
            self._check_open()
            return _native.crc32c_ranges(payloads, chunk_bytes)
        share_bytes = self._share_bytes(total)
        shares: list[list[memoryview]] = []
        room = 0
        for payload in payloads:
            if room <= 0:
                shares.append([])
                room = share_bytes
            shares[-1].append(payload)
            room -= payload.nbytes
        found = await self._call_all(_native.crc32c_ranges, [(share, chunk_bytes) for share in shares])
        return [crcs for share in found for crcs in share]

    async def copy(self, pairs: Sequence[tuple[memoryview, memoryview]]) -> None:
        """See ``abc.ByteEngine``. Raises ``ValueError`` before a byte moves if two lengths differ."""
        self._check_open()
        for destination, source in pairs:
            if destination.nbytes != source.nbytes:
                raise ValueError(f"destination has {destination.nbytes} bytes, source has {source.nbytes}")
        if sum(source.nbytes for _, source in pairs) <= COPY_INLINE_BYTES_MAX:
            for pair in pairs:
                _native.copy(*pair)
            return
        total = sum(source.nbytes for _, source in pairs)
        await self._call_all(_copy_all, [(part,) for part in _shares(pairs, self._share_bytes(total))])

    async def prefault(self, memory: memoryview, *, huge: bool = True) -> int:
        """See ``abc.ByteEngine``; may be cancelled every ``PREFAULT_BYTES``. Raises ``OSError`` (ENOMEM, EFAULT)."""
        huge_bytes = 0
        for start in range(0, memory.nbytes, PREFAULT_BYTES):
            piece = memory[start : start + PREFAULT_BYTES]
            huge_bytes += await self._call(populate if huge else map_in, piece)
        return huge_bytes

    async def trim_heap(self) -> None:
        """See ``abc.ByteEngine``."""
        await self._call(_native.trim_heap)

    async def aclose(self) -> None:
        """Wait for the calls in progress and end the threads. May be repeated."""
        self._closed = True
        cancelled: asyncio.CancelledError | None = None
        while self._calls:
            self._idle.clear()
            try:
                await self._idle.wait()
            except asyncio.CancelledError as error:
                cancelled = error
        await self._pool.aclose()
        if cancelled is not None:
            raise cancelled

    def _share_bytes(self, nbytes: int) -> int:
        """How much of ``nbytes`` one worker takes."""
        return max(SPLIT_BYTES, -(-nbytes // max(1, self.threads)))

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the byte workers are closed; open the store again")

    def _start(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Call:
        call = _Call(self._loop, function, arguments)
        self._calls.add(call)
        self._pool.submit(call)
        return call

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._check_open()
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("these byte workers belong to another event loop; open them in the loop that uses them")
        call = self._start(function, arguments)
        await call.wait(_abandon)
        return call.outcome()

    async def _call_all(self, function: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``function`` once per part, in parallel; when cancelled, parts not begun are left out."""
        self._check_open()
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("these byte workers belong to another event loop; open them in the loop that uses them")
        calls = [self._start(function, part) for part in parts]

        def abandon_all(_: _Call) -> None:
            for call in calls:
                call.abandoned = True

        cancelled: asyncio.CancelledError | None = None
        for call in calls:
            try:
                await call.wait(abandon_all)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        return [call.outcome() for call in calls]

    def _deliver(self, calls: list[_Call]) -> None:
        for call in calls:
            self._calls.discard(call)
            call.finish()
        if not self._calls:
            self._idle.set()


def _shares(
    pairs: Sequence[tuple[memoryview, memoryview]], share_bytes: int
) -> list[list[tuple[memoryview, memoryview]]]:
    """``pairs`` cut into lists of at most ``share_bytes`` each, in order."""
    shares: list[list[tuple[memoryview, memoryview]]] = [[]]
    room = share_bytes
    for destination, source in pairs:
        start = 0
        while start < source.nbytes:
            if not room:
                shares.append([])
                room = share_bytes
            step = min(room, source.nbytes - start)
            shares[-1].append((destination[start : start + step], source[start : start + step]))
            start += step
            room -= step
    return shares


def _copy_all(pairs: Sequence[tuple[memoryview, memoryview]]) -> None:
    for destination, source in pairs:
        _native.copy(destination, source)
