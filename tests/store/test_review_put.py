"""What a put promises when the block is known already, but not for sure."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments.writer import JOINED_RECORD_BYTES_MAX
from cascade_aio.testing.memory import Operation
from cascade_aio.testing.world import World, check_idle, pseudo_bytes, settle, virtual_loop

KEYS = ca.prefix_keys(range(16), block_tokens=8, namespace="review")
KEY, VALUE = pseudo_bytes("k", 4000), pseudo_bytes("v", 4000)
Put = Callable[[ca.Store], Coroutine[Any, Any, ca.BlockId]]


def run(story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(story(World()))


def hold_syncs(world: World) -> Callable[[], None]:
    """Syncs of segments do not return on the store opened last until the result is called."""
    gate = asyncio.Event()

    def hook(operation: Operation) -> Coroutine[Any, Any, object] | None:
        if operation.name == "sync" and operation.path.endswith(".seg") and not operation.after:
            return gate.wait()
        return None

    world.storage.hooks.append(hook)
    return gate.set


async def by_put(store: ca.Store) -> ca.BlockId:
    return await store.put(KEY, VALUE, prefix=KEYS[0])


async def by_reserve(store: ca.Store) -> ca.BlockId:
    async with store.reserve(key_bytes=len(KEY), value_bytes=len(VALUE), prefix=KEYS[0]) as slot:
        if not slot.bound:
            slot.key[:] = memoryview(KEY)
            slot.value[:] = memoryview(VALUE)
    return slot.block_id


async def by_put_after_get(store: ca.Store) -> ca.BlockId:
    async with store.get(KEYS[0]) as got:
        assert bytes(got.key) == KEY
    return await store.put(b"not", b"looked at", prefix=KEYS[0])


@pytest.mark.parametrize("put", [by_put, by_reserve, by_put_after_get])
def test_flush_covers_a_bound_prefix_that_only_another_writers_unsynced_record_holds(put: Put) -> None:
    async def story(world: World) -> None:
        other = await world.open()
        warm = await other.put(b"warm", b"up")  # the segment's own creation is over before its syncs are held
        await other.flush()
        hold_syncs(world)
        block_id = await other.put(KEY, VALUE, prefix=KEYS[0])
        flushing = asyncio.ensure_future(other.flush())
        await settle()
        assert not flushing.done()
        mine = await world.open()
        assert KEYS[0] in mine
        assert warm in mine
        assert await put(mine) == block_id
        await mine.flush()
        await settle()
        check_idle(mine)
        world.disk = world.disk.crash(None)
        flushing.cancel()
        reopened = await world.open()
        async with reopened.get(KEYS[0]) as got:
            assert (bytes(got.key), bytes(got.value)) == (KEY, VALUE)
        await reopened.aclose()

    run(story)


def test_a_durable_record_is_not_given_up_for_one_that_may_vanish() -> None:
    async def story(world: World) -> None:
        other = await world.open()
        await other.put(b"warm", b"up")
        await other.flush()
        hold_syncs(world)
        block_id = await by_put(other)
        flushing = asyncio.ensure_future(other.flush())
        await settle()
        mine = await world.open()
        await by_put(mine)
        await mine.flush()
        await mine.refresh()  # tells of the other's record again
        check_idle(mine)
        context = mine._context
        location = context.catalog.index.location(context.catalog.index.find(block_id))
        assert location is not None
        entry = context.disk.table.get(location[0])
        assert entry is not None
        assert entry.own, "else the durable record is dead, and goes with the next reclaim"
        flushing.cancel()
        await mine.aclose()

    run(story)


def test_a_slot_that_was_bound_never_seals_what_nobody_filled() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        block_id = await by_put(store)
        async with store.reserve(key_bytes=len(KEY), value_bytes=len(VALUE), prefix=KEYS[0]) as slot:
            assert slot.bound
            await store.delete(block_id)
        assert slot.block_id == block_id
        assert KEYS[0] not in store
        await store.aclose()
        world.check_closed()

    run(story)


def refuse_large_writes(world: World) -> None:
    """A disk with room for what a note takes, and not for a record."""

    def hook(operation: Operation) -> BaseException | None:
        if operation.name == "write" and operation.path.endswith(".seg") and operation.nbytes > 2 * PAGE_BYTES:
            return None if operation.after else OSError(errno.ENOSPC, "no room", operation.path)
        return None

    world.storage.hooks.append(hook)


def test_a_name_whose_record_was_lost_in_a_crash_does_not_lie_in_wait_for_the_block() -> None:
    """As on a disk that fills up: the second name of a block reached the disk, its record did not."""
    settings = {"shm_bytes": 1 << 22, "when_full": "refuse"}
    large = pseudo_bytes("large", JOINED_RECORD_BYTES_MAX)

    async def story(world: World) -> None:
        store = await world.open(**settings)
        await store.put(b"is", b"durable")
        await store.flush()
        refuse_large_writes(world)
        await store.put(KEY, large)
        block_id = await store.put(KEY, large, prefix=KEYS[0])
        with pytest.raises(ca.TierFullError):
            await store.flush()
        await settle()
        world.disk = world.disk.kill()
        store = await world.open(**settings)
        assert KEYS[0] not in store
        assert block_id not in store
        await store.put(KEY, large, prefix=KEYS[1])
        await store.flush()
        world.disk = world.disk.crash(None)
        store = await world.open(**settings)
        assert KEYS[1] in store
        assert KEYS[0] not in store
        await store.aclose()

    run(story)


def test_a_disk_that_takes_headers_and_no_records_is_full() -> None:
    """As on file systems that do not reserve: a new file is no sign of room, nor is its removal."""

    async def story(world: World) -> None:
        store = await world.open(when_full="evict")
        await store.put(b"is", b"durable")
        await store.flush()
        refuse_large_writes(world)
        block_id = await store.put(KEY, VALUE)
        with pytest.raises(ca.TierFullError, match="no room"):
            await store.flush()
        world.storage.hooks.clear()
        await store.flush()
        assert block_id in store
        await store.aclose()
        assert sum(path.endswith(".seg") for path in world.disk.files) <= 2

    run(story)


def test_flush_covers_a_name_that_waits_for_its_record() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        block_id = await store.put(KEY, VALUE)
        for key in KEYS[:8]:
            assert await store.put(KEY, VALUE, prefix=key) == block_id
        await store.flush()
        world.disk = world.disk.crash(None)
        store = await world.open()
        assert all(key in store for key in KEYS[:8])
        await store.aclose()

    run(story)
