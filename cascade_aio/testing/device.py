"""Conformance suite of ``DeviceDriver``: subclass it, give ``open_driver``, run it with pytest.

The fake and the real driver promise the same; this says what. Bytes are compared on the host, so it runs on both:

    class TestMine(DeviceDriverConformance):
        def open_driver(self):
            return FakeGpu()
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from cascade_aio._native import address_of
from cascade_aio.abc.device import DeviceDriver, DeviceError, DeviceMemoryError, MemoryCopy

NBYTES = 1 << 20
SECONDS_MAX = 60.0
"""How long what happens soon may take on a machine that is busy with other things."""


async def until_done(driver: DeviceDriver, event: int) -> None:
    """Return once ``event`` is done."""
    async with asyncio.timeout(SECONDS_MAX):
        while not driver.is_done(event):  # noqa: ASYNC110 - the driver has no other way to tell
            await asyncio.sleep(0.0002)


class DeviceDriverConformance:
    """Override ``open_driver``: a driver of its own for each test."""

    def open_driver(self) -> DeviceDriver:
        raise NotImplementedError("return a driver")

    @pytest.fixture
    def driver(self) -> Iterator[DeviceDriver]:
        driver = self.open_driver()
        yield driver
        driver.close()

    @pytest.fixture
    def host(self, driver: DeviceDriver) -> Iterator[memoryview]:
        """Two MiB of the host, pinned; the first one random."""
        memory = memoryview(mmap.mmap(-1, 2 * NBYTES))
        memory[:NBYTES] = np.random.default_rng(1).bytes(NBYTES)
        driver.pin(address_of(memory), len(memory))
        yield memory
        driver.unpin(address_of(memory))

    def test_says_what_it_is(self, driver: DeviceDriver) -> None:
        assert driver.ordinal >= 0
        assert driver.description
        assert 0 < driver.free_bytes() <= driver.memory_bytes
        assert len(driver.dlpack_device) == 2

    async def test_bytes_go_there_and_back_in_order(self, driver: DeviceDriver, host: memoryview) -> None:
        pointer, stream, event = driver.allocate(NBYTES), driver.create_stream(), driver.create_event()
        assert pointer % 256 == 0
        start = address_of(host)
        driver.copy([MemoryCopy(pointer, start, NBYTES)], stream)
        driver.copy([MemoryCopy(start + NBYTES, pointer, NBYTES)], stream)
        driver.record(event, stream)
        await until_done(driver, event)
        assert host[:NBYTES] == host[NBYTES:]
        driver.destroy_event(event)
        driver.destroy_stream(stream)
        driver.free(pointer)

    async def test_many_copies_at_once(self, driver: DeviceDriver, host: memoryview) -> None:
        pointer, stream, event = driver.allocate(NBYTES), driver.create_stream(), driver.create_event()
        start, step = address_of(host), NBYTES // 256
        order = [int(i) for i in np.random.default_rng(2).permutation(256)]
        driver.copy([MemoryCopy(pointer + i * step, start + j * step, step) for i, j in enumerate(order)], stream)
        driver.copy(
            [MemoryCopy(start + NBYTES + j * step, pointer + i * step, step) for i, j in enumerate(order)], stream
        )
        driver.record(event, stream)
        await until_done(driver, event)
        assert host[:NBYTES] == host[NBYTES:]
        driver.destroy_event(event)
        driver.destroy_stream(stream)
        driver.free(pointer)

    async def test_events_order_streams(self, driver: DeviceDriver, host: memoryview) -> None:
        """Many times, because without the event it would go well sometimes."""
        pointer = driver.allocate(NBYTES)
        streams = [driver.create_stream() for _ in range(3)]
        events = [driver.create_event() for _ in range(3)]
        start = address_of(host)
        for turn in range(8):
            host[0] = turn
            driver.copy([MemoryCopy(pointer, start, NBYTES)], streams[0])
            driver.record(events[0], streams[0])
            driver.wait(streams[1], events[0])
            driver.copy([MemoryCopy(start + NBYTES, pointer, NBYTES)], streams[1])
            driver.record(events[1], streams[1])
            await until_done(driver, events[1])
            assert host[NBYTES] == turn
            assert host[:NBYTES] == host[NBYTES:]
        for event in events:
            driver.destroy_event(event)
        for stream in streams:
            driver.destroy_stream(stream)
        driver.free(pointer)

    async def test_an_event_that_was_never_recorded_is_done_and_holds_nobody_up(self, driver: DeviceDriver) -> None:
        stream, never, event = driver.create_stream(), driver.create_event(), driver.create_event()
        assert driver.is_done(never)
        driver.wait(stream, never)
        driver.record(event, stream)
        await until_done(driver, event)
        driver.destroy_event(never)
        driver.destroy_event(event)
        driver.destroy_stream(stream)

    async def test_notify_comes_after_what_was_enqueued(self, driver: DeviceDriver, host: memoryview) -> None:
        pointer, stream, event = driver.allocate(NBYTES), driver.create_stream(), driver.create_event()
        event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        told = asyncio.Event()
        asyncio.get_running_loop().add_reader(event_fd, told.set)
        try:
            driver.copy([MemoryCopy(pointer, address_of(host), NBYTES)], stream)
            driver.record(event, stream)
            driver.notify(stream, event_fd)
            async with asyncio.timeout(SECONDS_MAX):
                await told.wait()
            assert os.eventfd_read(event_fd) == 1
            assert driver.is_done(event)
        finally:
            asyncio.get_running_loop().remove_reader(event_fd)
            os.close(event_fd)
        driver.destroy_event(event)
        driver.destroy_stream(stream)
        driver.free(pointer)

    async def test_the_legacy_default_stream_can_be_waited_for(self, driver: DeviceDriver) -> None:
        stream, event = driver.create_stream(), driver.create_event()
        driver.record(event, 0)
        driver.wait(stream, event)
        driver.record(event, stream)
        driver.wait(0, event)
        await until_done(driver, event)
        driver.destroy_event(event)
        driver.destroy_stream(stream)

    async def test_pinned_memory_of_the_driver(self, driver: DeviceDriver) -> None:
        memory = driver.allocate_pinned(2 * NBYTES)
        assert len(memory) == 2 * NBYTES
        memory[:NBYTES] = np.random.default_rng(3).bytes(NBYTES)
        pointer, stream, event = driver.allocate(NBYTES), driver.create_stream(), driver.create_event()
        driver.copy([MemoryCopy(pointer, address_of(memory), NBYTES)], stream)
        driver.copy([MemoryCopy(address_of(memory) + NBYTES, pointer, NBYTES)], stream)
        driver.record(event, stream)
        await until_done(driver, event)
        assert memory[:NBYTES] == memory[NBYTES:]
        driver.destroy_event(event)
        driver.destroy_stream(stream)
        driver.free(pointer)
        driver.free_pinned(memory)

    def test_more_memory_than_there_is(self, driver: DeviceDriver) -> None:
        with pytest.raises(DeviceMemoryError):
            driver.allocate(driver.memory_bytes * 2)
        driver.free(driver.allocate(NBYTES))

    def test_memory_is_pinned_once(self, driver: DeviceDriver, host: memoryview) -> None:
        with pytest.raises(DeviceError) as error:
            driver.pin(address_of(host), len(host))
        assert not error.value.lost
