"""The scrubber: goes round, keeps its pace and its place, and finds damage before anybody asks."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import Operation
from cascade_aio.testing.world import World, pseudo_bytes, run
from tests.store.test_adopting import NBYTES, disk, put

BANDWIDTH = 1 << 20
RECORD_BYTES = (NBYTES // PAGE_BYTES + 2) * PAGE_BYTES


def scrub(store: Store) -> dict[str, Any]:
    found: dict[str, Any] = disk(store)["scrub"]
    return found


async def filled(world: World, blocks: int = 60) -> list[str]:
    """A closed root; its segments in order."""
    store = await world.open(scrub_bandwidth=None)
    await put(store, range(blocks))
    await store.aclose()
    return sorted(path for path in world.disk.files if path.endswith(".seg"))


def test_it_reads_everything_at_its_pace_and_again() -> None:
    async def story() -> None:
        world = World(scrub_bandwidth=BANDWIDTH)
        await filled(world)
        store = await world.open()
        await asyncio.sleep(2)
        assert 0 < scrub(store)["bytes"] <= 4 * BANDWIDTH
        await asyncio.sleep(300)
        found = scrub(store)
        assert found["rounds"] >= 3
        assert found["records"] >= 3 * 60
        assert found["bytes"] <= 303 * BANDWIDTH
        assert found["damaged"] == found["unreadable"] == 0
        await store.aclose()

    run(story)


def test_damage_is_told_once_and_a_block_in_the_arena_is_written_again() -> None:
    async def story() -> None:
        world = World(scrub_bandwidth=BANDWIDTH, shm_bytes=8 << 20)
        store = await world.open()
        ids = await put(store, range(60))
        segments = sorted(path for path in world.disk.files if path.endswith(".seg"))
        world.disk.poke(segments[0], PAGE_BYTES + RECORD_BYTES + 3 * PAGE_BYTES, b"\xff" * 16)
        await asyncio.sleep(400)
        found = scrub(store)
        assert found["rounds"] >= 3
        assert (found["damaged"], found["rewritten"]) == (1, 1)
        assert len(store.statistics()["damage"]) == 1
        await store.aclose()
        store = await world.open()
        for number, block_id in enumerate(ids):
            async with store.get(block_id) as block:
                assert bytes(block.value) == pseudo_bytes(str(number), NBYTES)
        await store.aclose()

    run(story)


def test_a_damaged_block_that_nobody_has_is_forgotten_before_anybody_asks() -> None:
    async def story() -> None:
        world = World(scrub_bandwidth=BANDWIDTH)
        segments = await filled(world)
        world.disk.poke(segments[1], PAGE_BYTES + RECORD_BYTES + 3 * PAGE_BYTES, b"\xff" * 16)
        store = await world.open()
        assert len(store) == 60
        await asyncio.sleep(60)
        assert len(store) == 59
        assert segments[1] in store.statistics()["damage"][0]
        await store.aclose()

    run(story)


def test_what_cannot_be_read_now_is_kept_and_tried_again() -> None:
    async def story() -> None:
        world = World(scrub_bandwidth=BANDWIDTH)
        segments = await filled(world)
        store = await world.open()

        def fail(operation: Operation) -> OSError | None:
            bad = operation.name == "read" and operation.path == segments[1]
            return OSError(errno.EIO, os.strerror(errno.EIO)) if bad else None

        world.storage.hooks.append(fail)
        await asyncio.sleep(60)
        assert scrub(store)["unreadable"] > 0
        assert (len(store), store.statistics()["damage"]) == (60, [])
        await store.aclose()

    run(story)


def test_a_restart_goes_on_where_it_was() -> None:
    async def story() -> None:
        world = World(scrub_bandwidth=BANDWIDTH // 32)
        segments = await filled(world)
        store = await world.open()
        await asyncio.sleep(80)  # two segments and a half
        seen = scrub(store)["segment"]
        assert seen is not None
        await store.aclose()
        read: list[str] = []
        store = await world.open()
        world.storage.hooks.append(lambda operation: read.append(operation.path) if operation.name == "read" else None)
        await asyncio.sleep(20)
        done = [path for path in segments if path.removesuffix(".seg").endswith(seen.rpartition("/")[2])]
        assert done
        assert read[0] > done[0]
        await store.aclose()

    run(story)
