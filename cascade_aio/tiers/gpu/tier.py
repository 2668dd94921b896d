"""One device's arena: extents in device memory, and copies of payloads to and from them.

What it is: the ``ExtentAllocator`` of the arena joined to one allocation of device memory, three lanes (in, out,
scatter) and the host memory that copies may use. Who may stay in the tier is not decided here (``store.devices``).

Invariant: an extent is freed only when no copy to or from it is in flight, the caller sees to that. A device that
fails is *broken* for good: ``broken`` says why, every call raises it, and the rest of the store goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from cascade_aio._native import address_of
from cascade_aio.abc.device import DeviceDriver, DeviceError, DeviceMemoryError, MemoryCopy
from cascade_aio.abc.storage import PAGE_BYTES, ByteEngine
from cascade_aio.config import format_size
from cascade_aio.core.extents import ExtentAllocator
from cascade_aio.errors import BrokenTierError, ConfigError, TierFullError
from cascade_aio.io.waiting import call_in_thread, call_with_undo
from cascade_aio.tiers.gpu.dlpack import Exports
from cascade_aio.tiers.gpu.lanes import Lanes, OnEnd, Ticket
from cascade_aio.tiers.gpu.pinning import HostPins, Staging

IN, OUT, SCATTER = "in", "out", "scatter"
"""The lanes: to the device, from it, and to a caller's own memory, which waits for the caller's stream."""

DRAIN_S_MAX = 30.0
"""How long closing waits for copies in flight before the device counts as lost."""


class Part(NamedTuple):
    """``nbytes`` at the device address ``pointer`` that belong to ``offset`` of some host memory."""

    pointer: int
    offset: int
    nbytes: int


@dataclasses.dataclass(slots=True, eq=False)
class DeviceExtent:
    """One allocation: ``pointer`` is its address on the device, 4 KiB-aligned within the arena."""

    offset: int
    pointer: int
    nbytes: int


class GpuTier:
    """Extents and copies of one device. Belongs to one event loop. Made by ``GpuTier.open``."""

    def __init__(self, driver: DeviceDriver, base: int, nbytes: int, pins: HostPins, engine: ByteEngine) -> None:
        self.driver = driver
        self.capacity_bytes = nbytes
        self.broken: BrokenTierError | None = None
        self.on_broken: Callable[[], None] = lambda: None
        self.uploaded_bytes = 0
        self.downloaded_bytes = 0
        self._base = base
        self._pins = pins
        self._allocator = ExtentAllocator(granule_bytes=PAGE_BYTES)
        self._allocator.add_region(0, nbytes)
        self._lanes = Lanes(driver, (IN, OUT, SCATTER), self._fail)
        self._staging = Staging(driver, self._lanes, engine)
        self.exports = Exports(driver.dlpack_device)

    @classmethod
    async def open(cls, driver: DeviceDriver, nbytes: int, pins: HostPins, engine: ByteEngine) -> GpuTier:
        """Take ``nbytes`` of device memory. Raises ``TierFullError`` if it is not there, ``DeviceError``."""
        try:
            base = await call_with_undo(None, functools.partial(driver.allocate, nbytes), driver.free)
        except DeviceMemoryError as error:
            raise TierFullError(
                f"device {driver.ordinal} ({driver.description}) has {format_size(driver.free_bytes())} free of "
                f"{format_size(driver.memory_bytes)}, gpu_bytes={nbytes} ({format_size(nbytes)}) was asked for: use "
                "less, or leave room beside what the inference engine takes"
            ) from error
        try:
            return cls(driver, base, nbytes, pins, engine)
        except BaseException:
            with contextlib.suppress(DeviceError):
                await call_in_thread(None, driver.free, base)
            raise

    # -- memory -----------------------------------------------------------------------------------

    @property
    def allocated_bytes(self) -> int:
        return self._allocator.allocated_bytes

    def allocate(self, nbytes: int) -> DeviceExtent | None:
        """An extent of exactly ``nbytes`` (a multiple of PAGE_BYTES), or ``None`` without room for it."""
        assert nbytes % PAGE_BYTES == 0, nbytes
        offset = self._allocator.allocate(nbytes)
        return None if offset is None else DeviceExtent(offset, self._base + offset, nbytes)

    def free(self, extent: DeviceExtent) -> None:
        """Take the extent back: nothing that is enqueued anywhere refers to it any more."""
        self._allocator.free(extent.offset)
        extent.pointer = 0

    # -- copies -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ``BrokenTierError`` if the device was lost."""
        if self.broken is not None:
            raise BrokenTierError(str(self.broken)) from self.broken

    def can_copy_now(self, memory: memoryview) -> bool:
        """Whether ``start_upload`` takes this host memory: it is page-locked."""
        return self._pins.covers(address_of(memory), len(memory))

    async def prepare(self, memory: memoryview) -> bool:
        """Page-lock this host memory if it can be; ``False``: it takes ``upload``."""
        return await self._pins.ensure(address_of(memory), len(memory))

    def start_upload(self, copies: Sequence[tuple[int, memoryview]], on_end: OnEnd, *, lane: str = IN,
                     after: int | None = None) -> Ticket:  # fmt: skip
        """Enqueue copies of page-locked host memory: (device address, source). ``on_end`` is called at the end.

        The memory belongs to the copy until then. Raises ``BrokenTierError``; ``on_end`` is not called then.
        """
        self.check()
        wanted = [MemoryCopy(target, address_of(source), len(source)) for target, source in copies if len(source)]
        ticket = self._lanes.submit(lane, self._pins.split(wanted, to_device=True), on_end, after=after)
        self.uploaded_bytes += sum(copy.nbytes for copy in wanted)
        return ticket

    async def upload(
        self, copies: Sequence[tuple[int, memoryview]], *, lane: str = IN, after: int | None = None
    ) -> None:
        """Copy host memory, page-locked or not, to the device; returns when it is there.

        A cancelled caller waits until nobody uses the memory any more. Raises ``BrokenTierError``.
        """
        self.check()
        if await self._prepare_all(copies):
            await self.start_upload(copies, _nothing, lane=lane, after=after).wait()
        else:
            await self._staging.upload(lane, copies, after=after)
            self.uploaded_bytes += sum(len(source) for _, source in copies)

    async def download(self, copies: Sequence[tuple[int, memoryview]], *, after: int | None = None) -> None:
        """Copy device memory to the host: (device address, writable target). Otherwise as ``upload``."""
        self.check()
        if await self._prepare_all(copies):
            wanted = [MemoryCopy(address_of(target), source, len(target)) for source, target in copies if len(target)]
            split = self._pins.split(wanted, to_device=False)
            await self._lanes.submit(OUT, split, after=after).wait()
        else:
            await self._staging.download(OUT, copies, after=after)
        self.downloaded_bytes += sum(len(target) for _, target in copies)

    def start_scatter(self, memory: memoryview, parts: Sequence[Part], on_end: OnEnd, *, after: int | None) -> Ticket:
        """Enqueue copies of parts of page-locked ``memory`` to the device, behind what the stream ``after`` has now.

        As ``start_upload`` otherwise.
        """
        self.check()
        base = address_of(memory)
        wanted = [MemoryCopy(part.pointer, base + part.offset, part.nbytes) for part in parts]
        ticket = self._lanes.submit(SCATTER, self._pins.split(wanted, to_device=True), on_end, after=after)
        self.uploaded_bytes += sum(part.nbytes for part in parts)
        return ticket

    async def upload_parts(self, memory: memoryview, parts: Sequence[Part], *, after: int | None) -> None:
        """As ``upload``, of parts of host memory that need not be page-locked."""
        copies = [(part.pointer, memory[part.offset : part.offset + part.nbytes]) for part in parts]
        await self.upload(copies, lane=SCATTER, after=after)

    async def download_parts(self, memory: memoryview, parts: Sequence[Part], *, after: int | None) -> None:
        """Copy from the device to parts of ``memory``, which is writable. As ``download`` otherwise."""
        self.check()
        if not await self.prepare(memory):
            await self.download(
                [(part.pointer, memory[part.offset : part.offset + part.nbytes]) for part in parts], after=after
            )
            return
        base = address_of(memory)
        wanted = [MemoryCopy(base + part.offset, part.pointer, part.nbytes) for part in parts]
        await self._lanes.submit(OUT, self._pins.split(wanted, to_device=False), after=after).wait()
        self.downloaded_bytes += sum(part.nbytes for part in parts)

    def start_local(
        self, copies: Sequence[MemoryCopy], on_end: OnEnd, *, after: int | None, behind: Ticket | None = None
    ) -> Ticket:
        """Enqueue copies within the device, behind ``behind`` and what the stream ``after`` has now."""
        self.check()
        return self._lanes.submit(SCATTER, copies, on_end, after=after, behind=behind)

    def order(self, stream: int, ticket: Ticket) -> None:
        """What is enqueued in ``stream`` from now on runs after ``ticket``. Raises ``BrokenTierError``, ``ConfigError``
        for what is no stream of this device."""
        self.check()
        try:
            self._lanes.order(stream, ticket)
        except DeviceError as error:
            self._judge(error, stream)

    def fence(self, stream: int) -> int:
        """An event behind all that ``stream`` has now, for ``passed``."""
        self.check()
        try:
            return self._lanes.fence(stream)
        except DeviceError as error:
            self._judge(error, stream)

    def passed(self, event: int) -> bool:
        """Whether the event of ``fence`` is done, or never will be; then it is given back."""
        if self.broken is not None:
            return True
        try:
            done = self._lanes.is_done(event)
        except DeviceError as error:
            self._lanes.fail(error)
            return True
        if done:
            self._lanes.retire(event)
        return done

    async def _prepare_all(self, copies: Sequence[tuple[int, memoryview]]) -> bool:
        return all([await self.prepare(host) for _, host in copies if len(host)])

    def _judge(self, error: DeviceError, stream: int) -> NoReturn:
        """A call about a caller's stream was refused: a lost device, or a stream that is none."""
        if error.lost:
            self._lanes.fail(error)
            self.check()
        raise ConfigError(
            f"the stream {stream:#x} was refused by device {self.driver.ordinal} ({error}); pass a stream of "
            "this device that exists"
        ) from error

    # -- the end ----------------------------------------------------------------------------------

    def _fail(self, error: DeviceError) -> None:
        self.broken = BrokenTierError(
            f"device {self.driver.ordinal} ({self.driver.description}) failed: {error}; the store goes on without it, "
            "open it again when the device is well"
        )
        self.broken.__cause__ = error
        self.on_broken()

    async def drain(self) -> None:
        """Return when no copy is in flight; a device that does not answer counts as lost."""
        try:
            async with asyncio.timeout(DRAIN_S_MAX):
                await self._lanes.drain()
        except TimeoutError:
            self._lanes.fail(DeviceError(f"copies in flight did not end within {DRAIN_S_MAX:g} s", lost=True))

    async def close(self, *, keep_memory: bool) -> None:
        """Give everything back, after ``drain``; with ``keep_memory`` all but the arena, for leases that are out."""
        self.exports.close()
        await self._staging.close()
        self._lanes.close()
        if not keep_memory:
            await call_in_thread(None, self.give_memory_back)

    def give_memory_back(self) -> None:
        """The end of the arena and the device. May block."""
        with contextlib.suppress(DeviceError):  # a device that is lost has no memory to give back
            self.driver.free(self._base)
        self.driver.close()

    def statistics(self) -> dict[str, object]:
        allocator = self._allocator
        return {
            "device": self.driver.ordinal,
            "description": self.driver.description,
            "broken": None if self.broken is None else str(self.broken),
            "capacity_bytes": self.capacity_bytes,
            "allocated_bytes": allocator.allocated_bytes,
            "free_bytes": allocator.free_bytes,
            "largest_free_bytes": allocator.largest_free_bytes,
            "fragmentation": allocator.fragmentation,
            "uploaded_bytes": self.uploaded_bytes,
            "downloaded_bytes": self.downloaded_bytes,
            "staged_bytes": self._staging.staged_bytes,
            "copies_in_flight": self._lanes.in_flight,
            "submissions": self._lanes.submissions,
            "shown": len(self.exports),
            "batched_copies": self.driver.batches_copies,
        }


def _nothing(error: DeviceError | None) -> None:
    """The caller waits for the ticket instead."""
