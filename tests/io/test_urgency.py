"""Reads whose class rises while they wait: what is queued moves at once, what is in flight stays accounted for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cascade_aio.abc.storage import PAGE_BYTES, Priority, Urgency
from cascade_aio.io.engine import EngineLimits
from cascade_aio.io.storage import PosixStorage, open_storage
from cascade_aio.testing.storage import page_buffer, random_pages, written

ONE_AT_A_TIME = EngineLimits(request_bytes_max=PAGE_BYTES, requests_in_flight_max=1, bytes_in_flight_max=PAGE_BYTES)


@pytest.fixture
async def storage() -> AsyncIterator[PosixStorage]:
    storage = open_storage("threads", limits=ONE_AT_A_TIME)
    yield storage
    await storage.aclose()


def test_an_urgency_only_rises() -> None:
    heard: list[Priority] = []
    urgency = Urgency(Priority.WRITE)
    with urgency.watched(heard.append):
        urgency.rise(Priority.BACKGROUND)
        urgency.rise(Priority.WRITE)
        urgency.rise(Priority.DEMAND)
        urgency.rise(Priority.DEMAND)
    assert (urgency.priority, heard) == (Priority.DEMAND, [Priority.DEMAND])


async def ends_before_the_background(storage: PosixStorage, path: Path, *, rises: bool) -> bool:
    """Whether a background read that waits behind eight others of its class ends before the last of them."""
    file = await written(storage, str(path / "f"), random_pages(16 * PAGE_BYTES, 1))
    order: list[str] = []

    async def read(name: str, priority: Priority | Urgency) -> None:
        await storage.read(file, [page_buffer(2 * PAGE_BYTES)], 0, priority=priority)
        order.append(name)

    urgency = Urgency(Priority.BACKGROUND)
    async with asyncio.TaskGroup() as tasks:
        for number in range(8):
            tasks.create_task(read(f"background {number}", Priority.BACKGROUND))
        tasks.create_task(read("ours", urgency))
        await asyncio.sleep(0)
        if rises:
            urgency.rise(Priority.DEMAND)
    return order.index("ours") < 8


async def test_what_waits_goes_before_its_former_class(storage: PosixStorage, tmp_path: Path) -> None:
    assert await ends_before_the_background(storage, tmp_path, rises=True)
    idle = storage.statistics()
    assert (idle["requests_in_flight"], idle["bytes_in_flight"], idle["queued"]) == (0, 0, 0)
    assert storage.engine._class_requests == [0 for _ in Priority]
    assert storage.engine._class_bytes == [0 for _ in Priority]


async def test_without_a_rise_it_waits_its_turn(storage: PosixStorage, tmp_path: Path) -> None:
    assert not await ends_before_the_background(storage, tmp_path, rises=False)


async def test_a_rise_after_the_end_or_after_a_cancellation_does_nothing(storage: PosixStorage, tmp_path: Path) -> None:
    file = await written(storage, str(tmp_path / "f"), random_pages(4 * PAGE_BYTES, 1))
    urgency = Urgency(Priority.BACKGROUND)
    task = asyncio.ensure_future(storage.read(file, [page_buffer(4 * PAGE_BYTES)], 0, priority=urgency))
    await asyncio.sleep(0)
    task.cancel()
    urgency.rise(Priority.DEMAND)
    with pytest.raises(asyncio.CancelledError):
        await task
    found = page_buffer(4 * PAGE_BYTES)
    assert await storage.read(file, [found], 0, priority=urgency) == 4 * PAGE_BYTES
    urgency.rise(Priority.DEMAND)
    assert storage.engine._class_requests == [0 for _ in Priority]
