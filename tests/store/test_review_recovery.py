"""Whole stores that are opened on a file system which fails, and again when it has recovered."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import cascade_aio.testing.world as world_module
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import MemoryStorage, Operation
from cascade_aio.testing.world import World, pseudo_bytes, run

Fault = Callable[[Operation], OSError | None]
NBYTES = 60_000


async def put(store: Store, numbers: range) -> list[Any]:
    ids = [await store.put(b"", pseudo_bytes(str(number), NBYTES)) for number in numbers]
    await store.flush()
    return ids


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Fault]:
    """Faults of every storage that a world makes, from its first operation on."""
    active: list[Fault] = []

    class Faulty(MemoryStorage):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.hooks += active

    monkeypatch.setattr(world_module, "MemoryStorage", Faulty)
    return active


def unreadable(operation: Operation) -> OSError | None:
    if operation.name == "read" and operation.path.endswith(".seg") and not operation.after:
        return OSError(errno.EIO, os.strerror(errno.EIO), operation.path)
    return None


def segments(world: World) -> dict[str, bytes]:
    return {path: world.disk.content(path) for path in world.disk.files if path.endswith(".seg")}


@pytest.mark.parametrize("count", [3, 80])
@pytest.mark.parametrize("clean", [False, True])
def test_a_store_that_could_not_read_its_segments_at_opening_has_them_when_it_can(
    faults: list[Fault], count: int, clean: bool
) -> None:
    async def scenario() -> None:
        world = World()
        ids = await put(await world.open(), range(count))
        await world.kill()
        before = segments(world)
        faults.append(unreadable)
        store = await world.open()
        assert segments(world) == before
        statistics = store.statistics()
        assert statistics["disk"]["recovery"]["unreadable"] == len(before)
        assert len(statistics["damage"]) >= 1
        if clean:
            await store.aclose()
        else:
            await world.kill()
        faults.clear()
        store = await world.open()
        assert not store.statistics()["damage"]
        for number, block_id in enumerate(ids):
            async with store.get(block_id) as block:
                assert bytes(block.value) == pseudo_bytes(str(number), NBYTES)
        await store.aclose()
        world.check_closed()

    run(scenario)


def test_a_session_on_unreadable_segments_adds_to_them_and_takes_none_for_its_budget(faults: list[Fault]) -> None:
    async def scenario() -> None:
        world = World(disk_bytes=32 << 20)
        ids = await put(await world.open(), range(40))
        await world.kill()
        before = segments(world)
        fault = lambda operation: None if operation.path not in before else unreadable(operation)  # noqa: E731
        faults.append(fault)
        store = await world.open(disk_bytes=8 << 20)
        more = await put(store, range(100, 300))
        await store.aclose()
        assert before.keys() <= segments(world).keys()
        assert store.statistics()["disk"]["reclaimed_segments"] > 0
        faults.clear()
        store = await world.open()
        found = [block_id for block_id in ids if block_id in store]
        assert len(found) == len(ids)
        assert more[-1] in store
        await store.aclose()

    run(scenario)


def test_a_reader_sees_what_a_killed_and_restarted_writer_adds_under_new_numbers() -> None:
    async def scenario() -> None:
        world = World()
        writer = await world.open()
        await put(writer, range(3))
        await world.kill()
        names = set(segments(world))
        for path in names:
            del world.disk.files[path]  # the whole segment was removed, as compaction does
        store = await world.open()
        await put(store, range(3, 6))
        assert not names & set(segments(world))
        await store.aclose()

    run(scenario)


def test_a_record_that_is_written_while_an_opening_reads_behind_it_is_no_damage(faults: list[Fault]) -> None:
    async def scenario() -> None:
        world = World(shm_bytes=4 << 20, segment_bytes=4 << 20)
        writer = await world.open()
        begun, may_end, read_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

        def hold(operation: Operation) -> Coroutine[Any, Any, Any] | None:
            if operation.name != "write" or operation.offset != PAGE_BYTES or operation.after:
                return None
            begun.set()
            return may_end.wait()

        world.storage.hooks.append(hold)
        first = await writer.put(b"first", pseudo_bytes("first", 300_000))
        await begun.wait()
        second = await writer.put(b"second", pseudo_bytes("second", 300_000))
        await asyncio.sleep(1.0)  # is written, and waits for the first

        async def go_on() -> None:
            read_on.set()
            may_end.set()
            await writer.flush()
            await writer.put(b"third", b"")  # its header says that both are on stable storage
            await writer.flush()

        def meet(operation: Operation) -> Any:
            behind = operation.name == "read" and PAGE_BYTES < operation.offset < 2 << 20 and not operation.after
            return go_on() if behind and not read_on.is_set() else None

        faults.append(meet)
        reader = await world.open()
        assert read_on.is_set()
        assert not reader.statistics()["damage"]
        for block_id in (first, second):
            async with reader.get(block_id) as block:
                assert block.block_id == block_id
        await reader.aclose()
        await writer.aclose()

    run(scenario)


def test_a_refresh_goes_on_behind_a_hole_where_an_opening_has_found_records() -> None:
    async def scenario() -> None:
        world = World()
        writer = await world.open()
        await put(writer, range(1))
        (path,) = segments(world)
        world.disk.poke(path, PAGE_BYTES, bytes(PAGE_BYTES))  # before anybody has seen it
        (block_id,) = await put(writer, range(1, 2))
        reader = await world.open()
        assert block_id in reader
        await writer.delete(block_id)
        (later,) = await put(writer, range(2, 3))
        await reader.refresh()
        assert block_id not in reader
        assert later in reader
        assert [(f"in {path} at offset {PAGE_BYTES}" in report) for report in reader.statistics()["damage"]] == [True]
        await reader.refresh()
        assert len(reader.statistics()["damage"]) == 1
        await reader.aclose()
        await writer.aclose()

    run(scenario)
