"""Host memory that copies may use: the arena, page-locked piece by piece, or two small buffers in its place.

What it is: ``HostPins`` registers the pieces of one mapping with the driver when they are first needed, and in the
background, so that opening a store does not wait for 64 GiB of page-locking. Where the driver refuses (memlock limit, a
mapping that cannot be pinned), what is not registered is copied through ``Staging``, two pinned buffers in turns, and
``statistics`` tell.

Invariant: a copy never crosses from one registered piece into the next, which CUDA refuses; ``split`` sees to that.
Belongs to one event loop; registering runs in worker threads.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

from cascade_aio._native import address_of
from cascade_aio.abc.device import DeviceDriver, DeviceError, MemoryCopy
from cascade_aio.abc.storage import ByteEngine
from cascade_aio.io.waiting import call_in_thread, call_with_undo
from cascade_aio.tiers.gpu.lanes import Lanes, Ticket

PIECE_BYTES = 64 << 20
"""Registered by one call. The driver holds locks meanwhile: larger pieces would hold up copies, more pieces would cut
more copies in two."""

STAGING_BYTES = 8 << 20
"""Of each of the pinned buffers."""

BUFFERS = 2


class HostPins:
    """Which pieces of ``memory`` are registered. Loop thread only."""

    def __init__(
        self,
        driver: DeviceDriver,
        memory: memoryview,
        *,
        ready_bytes: Callable[[], int] | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """``ready_bytes()`` tells how much of ``memory`` has been populated, from its start: only that is registered,
        because page-locking would populate it in small pages, which stay small."""
        self._driver = driver
        self._ready_bytes = functools.partial(len, memory) if ready_bytes is None else ready_bytes
        self._memory = memory  # stays mapped while pieces are registered
        self._start = address_of(memory) if len(memory) else 0
        self._end = self._start + len(memory)
        self._piece_bytes = piece_bytes
        self._registered: set[int] = set()
        self._queue = asyncio.Lock()
        self._closed = False
        self.registered_bytes = 0
        self.refused: str | None = None
        """Why no more is registered."""

    def covers(self, address: int, nbytes: int) -> bool:
        """Whether copies may use these bytes directly, in the pieces that ``split`` makes."""
        if not self._start <= address <= address + nbytes <= self._end:
            return False
        return all(piece in self._registered for piece in self._pieces(address, nbytes))

    def split(self, copies: Sequence[MemoryCopy], *, to_device: bool) -> list[MemoryCopy]:
        """The same copies, none across the end of a piece of the host's memory."""
        found: list[MemoryCopy] = []
        for copy in copies:
            start = (copy.source if to_device else copy.target) - self._start
            if start // self._piece_bytes == (start + copy.nbytes - 1) // self._piece_bytes:
                found.append(copy)
                continue
            done = 0
            while done < copy.nbytes:
                step = min(copy.nbytes - done, self._piece_bytes - (start + done) % self._piece_bytes)
                found.append(MemoryCopy(copy.target + done, copy.source + done, step))
                done += step
        return found

    async def ensure(self, address: int, nbytes: int) -> bool:
        """Register what is missing of these bytes; ``False``: use ``Staging``. A cancelled caller leaves the call in
        progress to others."""
        if not self._start <= address <= address + nbytes <= self._end:
            return False
        for piece in self._pieces(address, nbytes):
            if piece not in self._registered and not await self._register(piece):
                return False
        return True

    async def register_all(self) -> None:
        """Every piece, in order, until the driver refuses. Cancellation stops between pieces."""
        for piece in range(-(-(self._end - self._start) // self._piece_bytes)):
            if not await self._register(piece):
                return

    async def close(self) -> None:
        """Unregister everything. Copies of it have ended."""
        self._closed = True
        async with self._queue:
            pieces, self._registered = self._registered, set()
            for piece in pieces:
                with contextlib.suppress(DeviceError):  # a device that is lost has forgotten them
                    await call_in_thread(None, self._driver.unpin, self._start + piece * self._piece_bytes)
            self.registered_bytes = 0
            self._memory = memoryview(b"")

    def statistics(self) -> dict[str, object]:
        return {
            "registered_bytes": self.registered_bytes,
            "registration": self.refused or "as needed",
        }

    def _pieces(self, address: int, nbytes: int) -> range:
        first = (address - self._start) // self._piece_bytes
        return range(first, (address - self._start + max(nbytes, 1) - 1) // self._piece_bytes + 1)

    async def _register(self, piece: int) -> bool:
        async with self._queue:  # the driver does them one after the other anyway
            if piece in self._registered:
                return True
            if self.refused is not None or self._closed:
                return False
            start = self._start + piece * self._piece_bytes
            nbytes = min(self._piece_bytes, self._end - start)
            if start + nbytes - self._start > self._ready_bytes():
                return False
            try:
                await call_in_thread(None, functools.partial(self._pin, piece, start, nbytes))
            except DeviceError as error:
                self.refused = f"{error}; copies go through two pinned buffers of {STAGING_BYTES} bytes"
                return False
            self.registered_bytes += nbytes
        return True

    def _pin(self, piece: int, start: int, nbytes: int) -> None:
        """In a worker thread; a cancelled caller has waited for its end, so what was registered is known."""
        self._driver.pin(start, nbytes)
        self._registered.add(piece)


class Staging:
    """Two pinned buffers, used in turns: while one is copied by the device, the other is filled or emptied.

    One transfer at a time: this is the slow path.
    """

    def __init__(self, driver: DeviceDriver, lanes: Lanes, engine: ByteEngine, *, nbytes: int = STAGING_BYTES) -> None:
        self._driver = driver
        self._lanes = lanes
        self._engine = engine
        self._nbytes = nbytes
        self._buffers: list[memoryview] = []
        self._lock = asyncio.Lock()
        self.staged_bytes = 0

    async def upload(self, lane: str, copies: Sequence[tuple[int, memoryview]], *, after: int | None = None) -> None:
        """Copy host memory to the device: (device address, source). Returns when all has arrived.

        A cancelled caller waits for what is on its way. Raises ``DeviceError``.
        """
        async with self._lock:
            buffers = await self._open()
            tickets: list[Ticket] = []
            try:
                for turn, (target, source) in enumerate(self._cut(copies)):
                    if turn >= len(buffers):
                        await tickets[turn - len(buffers)].wait()
                    buffer = buffers[turn % len(buffers)][: len(source)]
                    await self._engine.copy([(buffer, source)])
                    copy = MemoryCopy(target, address_of(buffer), len(source))
                    tickets.append(self._lanes.submit(lane, [copy], after=after))
                    after = None
                    self.staged_bytes += len(source)
            finally:
                await wait_all(tickets[-len(buffers) :])

    async def download(self, lane: str, copies: Sequence[tuple[int, memoryview]], *, after: int | None = None) -> None:
        """Copy device memory to the host: (device address, writable target). Otherwise as ``upload``."""
        async with self._lock:
            buffers = await self._open()
            flying: collections.deque[tuple[Ticket, memoryview, memoryview]] = collections.deque()
            try:
                for turn, (source, target) in enumerate(self._cut(copies)):
                    if len(flying) == len(buffers):
                        await self._land(flying)
                    buffer = buffers[turn % len(buffers)][: len(target)]
                    copy = MemoryCopy(address_of(buffer), source, len(target))
                    flying.append((self._lanes.submit(lane, [copy], after=after), buffer, target))
                    after = None
                    self.staged_bytes += len(target)
                while flying:
                    await self._land(flying)
            finally:
                await wait_all([ticket for ticket, _, _ in flying])

    async def close(self) -> None:
        """Nothing is on its way any more."""
        async with self._lock:
            while self._buffers:
                with contextlib.suppress(DeviceError):  # a device that is lost has forgotten them
                    await call_in_thread(None, self._driver.free_pinned, self._buffers.pop())

    async def _land(self, flying: collections.deque[tuple[Ticket, memoryview, memoryview]]) -> None:
        ticket, buffer, target = flying[0]
        await ticket.wait()
        flying.popleft()
        await self._engine.copy([(target, buffer)])

    async def _open(self) -> list[memoryview]:
        while len(self._buffers) < BUFFERS:
            memory = await call_with_undo(
                None, functools.partial(self._driver.allocate_pinned, self._nbytes), self._driver.free_pinned
            )
            self._buffers.append(memory)
        return self._buffers

    def _cut(self, copies: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
        for device, host in copies:
            for start in range(0, len(host), self._nbytes):
                yield device + start, host[start : start + self._nbytes]


async def wait_all(tickets: Sequence[Ticket]) -> None:
    """Return when all have ended, whatever comes meanwhile; raises the first error."""
    first: BaseException | None = None
    for ticket in tickets:
        try:
            await ticket.wait()
        except (DeviceError, asyncio.CancelledError) as error:
            first = first or error
    if first is not None:
        raise first
