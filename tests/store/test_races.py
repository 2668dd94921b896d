"""Orders of events that once went wrong: each test is the shortest story of one."""

from __future__ import annotations

import asyncio
import errno
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.errors import BlockNotFoundError, BrokenTierError, ClosedError, ConfigError, CorruptionError
from cascade_aio.testing.world import World, check_idle, fail_with, pseudo_bytes, settle, virtual_loop

KEYS = ca.prefix_keys(range(64), block_tokens=8, namespace="races")
Story = Callable[[World], Coroutine[Any, Any, None]]


def run(story: Story, **settings: Any) -> None:
    """Tell ``story`` in a fresh world with virtual time."""
    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(story(World(**settings)))


def block(name: str, nbytes: int = 8000) -> tuple[bytes, bytes]:
    return pseudo_bytes("k" + name, nbytes // 2), pseudo_bytes("v" + name, nbytes // 2)


async def crash_and_open(world: World, **settings: Any) -> ca.Store:
    await world.crash()
    return await world.open(**settings)


async def cold(world: World, *blocks: tuple[bytes, bytes]) -> ca.Store:
    """A store that has ``blocks`` on disk only."""
    store = await world.open()
    for key, value in blocks:
        await store.put(key, value)
    await store.aclose()
    return await world.open()


def test_a_cancelled_cold_get_and_a_new_one_in_the_same_turn() -> None:
    async def story(world: World) -> None:
        store = await cold(world, block("a"))
        block_id = ca.compute_block_id(*block("a"))
        for turns in range(8):
            first = asyncio.ensure_future(_bytes_of(store, block_id))
            for _ in range(turns):
                await asyncio.sleep(0)
            first.cancel()
            second = asyncio.ensure_future(_bytes_of(store, block_id))
            third = asyncio.ensure_future(_bytes_of(store, block_id))
            assert await second == await third == block("a")
            await asyncio.gather(first, return_exceptions=True)
            await settle()
            check_idle(store)
            await store.aclose()
            store = await world.open()
        await store.aclose()
        world.check_closed()

    run(story)


async def _bytes_of(store: ca.Store, name: Any) -> tuple[bytes, bytes]:
    async with store.get(name) as got:
        return bytes(got.key), bytes(got.value)


def test_a_name_given_to_another_block_after_a_deletion_survives_a_crash() -> None:
    async def story(world: World) -> None:
        # Whichever writer's directory is read first, one of the two stories has its facts out of order.
        one, two = await world.open(), await world.open()
        for writer, remover, name in ((one, two, KEYS[0]), (two, one, KEYS[1])):
            first = await writer.put(*block(f"first {name}"), prefix=name)
            await writer.flush()
            await remover.refresh()
            await remover.delete(first)
            await remover.flush()
            await writer.refresh()
            await writer.put(*block(f"second {name}"), prefix=name)
            await writer.flush()
        store = await crash_and_open(world)
        for name in KEYS[:2]:
            assert await _bytes_of(store, name) == block(f"second {name}")
        await store.aclose()

    run(story)


def test_a_failed_load_lets_the_next_in_line_have_its_room() -> None:
    async def story(world: World) -> None:
        store = await cold(world, block("large", 600_000))
        world.storage.hooks.append(fail_with(errno.EIO, "read"))
        loading = asyncio.ensure_future(_bytes_of(store, ca.compute_block_id(*block("large", 600_000))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(store.put(*block("other", 600_000)))
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(OSError, match="Input/output"):
            await loading
        await waiting
        assert asyncio.get_running_loop().time() - started_s < 1.0
        await store.aclose()

    run(story)


def test_deleting_a_block_that_a_broken_disk_never_took_frees_its_memory() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        world.storage.hooks.append(fail_with(errno.EIO, "write", "sync", path_part=".seg", times=1000))
        ids = [await store.put(*block(f"{i}", 100_000)) for i in range(4)]
        with pytest.raises(BrokenTierError):
            await store.flush()
        assert [await _bytes_of(store, block_id) for block_id in ids] == [block(f"{i}", 100_000) for i in range(4)]
        for block_id in ids:
            await store.delete(block_id)
        await settle()
        assert store.statistics()["shm"]["allocated_bytes"] == 0
        with pytest.raises(BrokenTierError):
            await store.aclose()
        world.check_closed()

    run(story)


def test_a_clock_that_was_set_back_neither_undoes_a_deletion_nor_a_put() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        doomed = await store.put(*block("doomed"))
        again = await store.put(*block("again"), prefix=KEYS[0])
        await store.delete(again)
        await store.aclose()
        world.clock.advance(-7200)
        store = await world.open()
        await store.delete(doomed)
        assert await store.put(*block("again"), prefix=KEYS[0]) == again
        await store.flush()
        store = await crash_and_open(world)
        assert doomed not in store
        assert again in store
        assert KEYS[0] in store
        await store.aclose()

    run(story)


def test_a_long_prefix_of_small_blocks_does_not_wait_for_itself() -> None:
    async def story(world: World) -> None:
        keys = ca.prefix_keys(range(200 * 2), block_tokens=2)
        store = await world.open()
        parent = None
        for i, key in enumerate(keys):  # 200 blocks of two pages each through an arena of 256 pages
            await store.put(*block(str(i), 2000), prefix=key, parent=parent)
            parent = key
        await store.flush()
        started_s = asyncio.get_running_loop().time()
        async with store.get_prefix(keys) as blocks:
            assert 100 <= len(blocks) <= 128
            assert all(bytes(got.key) == block(str(i), 2000)[0] for i, got in enumerate(blocks))
            assert asyncio.get_running_loop().time() - started_s < 1.0
        await store.aclose()

    run(story)


@pytest.mark.parametrize("turns", range(30))
@pytest.mark.parametrize("call", ["refresh", "verify", "get", "get_prefix", "put", "flush", "read_into", "reserve"])
def test_closing_while_a_call_is_under_way(call: str, turns: int) -> None:
    async def story(world: World) -> None:
        other = await world.open()
        await other.put(*block("other"), prefix=KEYS[0])
        await other.flush()
        store = await world.open()
        await store.put(*block("own"))
        await other.put(*block("more"), prefix=KEYS[1])
        await other.flush()
        own = ca.compute_block_id(*block("own"))

        async def reserve() -> None:
            async with store.reserve(key_bytes=100, value_bytes=100):
                await asyncio.sleep(0)

        async def act() -> Any:
            if call == "get":
                return await _bytes_of(store, KEYS[0])
            if call == "get_prefix":
                async with store.get_prefix(KEYS[:2]) as blocks:
                    return len(blocks)
            if call == "put":
                return await store.put(*block("new"))
            if call == "read_into":
                return await store.read_into(own, bytearray(4000), bytearray(4000))
            if call == "reserve":
                return await reserve()
            return await getattr(store, call)()

        running = asyncio.ensure_future(act())
        for _ in range(turns):
            await asyncio.sleep(0)
        await store.aclose()
        outcome: Any
        (outcome,) = await asyncio.gather(running, return_exceptions=True)
        assert not isinstance(outcome, BaseException) or isinstance(outcome, ClosedError), repr(outcome)
        assert store._context.counters.damaged == 0
        await other.aclose()
        await settle()
        world.check_closed()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the store on .* was closed while", ResourceWarning)
        run(story)


def test_names_that_are_no_names_are_refused_clearly() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        names: list[Any] = [[1], bytearray(16), {}, b"short", "short", 3.5]
        for name in names:
            with pytest.raises(ConfigError):
                await store.get(name)
            with pytest.raises(ConfigError):
                await store.delete(name)
        prefixes: list[Any] = ["text", b"short", 7, [1]]
        for prefix in prefixes:
            with pytest.raises(ConfigError):
                await store.put(b"k", b"v", prefix=prefix)
            with pytest.raises(ConfigError):
                store.reserve(key_bytes=1, value_bytes=1, prefix=prefix)
        await store.aclose()

    run(story)


@pytest.mark.parametrize("turns", range(25))
def test_a_cancelled_refresh_is_made_good_by_the_next(turns: int) -> None:
    async def story(world: World) -> None:
        one = await world.open()
        two = await world.open()
        ids = [await two.put(*block(str(i), 30_000), prefix=KEYS[i]) for i in range(3)]
        await two.aclose()  # a sealed segment: its footer is read
        refreshing = asyncio.ensure_future(one.refresh())
        for _ in range(turns):
            await asyncio.sleep(0)
        refreshing.cancel()
        await asyncio.gather(refreshing, return_exceptions=True)
        await one.refresh()
        assert all(block_id in one for block_id in ids)
        assert all(key in one for key in KEYS[:3])
        await one.aclose()
        world.check_closed()

    run(story)


def test_a_block_moved_by_compaction_is_found_after_a_crash_and_by_other_stores() -> None:
    async def story(world: World) -> None:
        store = await world.open(disk_bytes=8 << 20, shm_bytes=4 << 20)
        reader = await world.open()
        kept = await store.put(*block("kept", 100_000), prefix=KEYS[0])
        for i in range(4):
            await store.put(*block(f"beside {i}", 200_000))
        await store.aclose()  # with a checkpoint that knows the old place
        store = await world.open(disk_bytes=8 << 20, shm_bytes=4 << 20)
        await reader.refresh()
        lease = await store.get(kept)  # stays in the arena, so compaction writes it again
        for i in range(60):
            await store.put(*block(f"filler {i}", 200_000))
            async with store.get(kept):
                pass  # hot: the disk's eviction takes others
        await store.flush()
        moved = store.statistics()["disk"]["rewritten_blocks"]
        assert moved > 0, store.statistics()["disk"]
        assert kept in store
        assert store._context.catalog.index.location(store._getter.find(kept)) is not None
        await reader.refresh()
        assert await _bytes_of(reader, KEYS[0]) == block("kept", 100_000)
        lease.release()
        store = await crash_and_open(world)
        assert await _bytes_of(store, KEYS[0]) == block("kept", 100_000)
        await store.aclose()

    run(story)


def test_a_damaged_record_is_reported_and_may_be_put_again() -> None:
    async def story(world: World) -> None:
        store = await cold(world, block("a", 100_000))
        block_id = ca.compute_block_id(*block("a", 100_000))
        (path,) = [path for path in world.disk.files if path.endswith(".seg")]
        world.disk.flip_bit(path, 8 * 50_000)
        with pytest.raises(CorruptionError) as caught:
            await store.get(block_id)
        assert caught.value.path == path
        with pytest.raises(BlockNotFoundError):
            await store.get(block_id)
        await store.put(*block("a", 100_000))
        await store.flush()
        store = await crash_and_open(world)
        assert await _bytes_of(store, block_id) == block("a", 100_000)
        await store.aclose()

    run(story)


@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("prefetched", [False, True])
def test_a_row_given_to_another_block_while_its_old_one_was_being_read(turns: int, prefetched: bool) -> None:
    async def story(world: World) -> None:
        store = await cold(world, block("old"))
        old = ca.compute_block_id(*block("old"))
        if prefetched:
            assert not store.prefetch([old]).done
        reading = asyncio.ensure_future(_bytes_of(store, old))
        for _ in range(turns):
            await asyncio.sleep(0)
        if old in store:
            await store.delete(old)
        new = await store.put(*block("new"))
        outcome: Any
        (outcome,) = await asyncio.gather(reading, return_exceptions=True)
        assert isinstance(outcome, BlockNotFoundError) or outcome == block("old")
        assert await _bytes_of(store, new) == block("new")
        assert old not in store
        await store.flush()
        await settle()
        check_idle(store)
        await store.aclose()
        world.check_closed()

    run(story)


@pytest.mark.parametrize("resident", [False, True])
def test_flush_promises_what_only_another_writer_has_written_without_a_sync(resident: bool) -> None:
    async def story(world: World) -> None:
        one, two = await world.open(tail_seconds_max=4.0), await world.open(tail_seconds_max=4.0)
        block_id = await two.put(*block("a"), prefix=KEYS[0])
        await asyncio.sleep(1.1)  # lingered and was written, is not synced
        assert two.statistics()["disk"]["unsynced_bytes"] > 0
        assert await one.refresh() == 1
        if resident:
            assert await _bytes_of(one, block_id) == block("a")
        await one.put(*block("a"), prefix=KEYS[1])
        await one.flush()
        one = await crash_and_open(world)
        assert await _bytes_of(one, KEYS[1]) == block("a")
        await one.flush()
        check_idle(one)
        await one.aclose()

    run(story)


@pytest.mark.parametrize("call", ["verify", "refresh"])
def test_closing_ends_a_call_that_reads_files_before_the_files_are_closed(call: str) -> None:
    async def story(world: World) -> None:
        other = await world.open()
        store = await world.open()
        for i in range(15):
            await store.put(*block(f"own {i}", 200_000))
            await other.put(*block(f"other {i}", 200_000))
        await other.aclose()
        await store.flush()
        world.storages[1].hooks.append(lambda operation: asyncio.sleep(0.5) if operation.name == "read" else None)
        calling = asyncio.ensure_future(getattr(store, call)())
        await asyncio.sleep(1.2)
        assert not calling.done()
        await store.aclose()
        with pytest.raises(ClosedError, match="closed during the call"):
            await calling
        await settle()
        world.check_closed()

    run(story)


def test_verify_reports_a_segment_that_cannot_be_opened() -> None:
    async def story(world: World) -> None:
        store = await cold(world, block("a"))
        world.storage.hooks.append(fail_with(errno.EACCES, "open"))
        report = await store.verify()
        (unreadable,) = report.unreadable
        assert unreadable.path is not None
        assert report.damage == ()
        async with store.get(ca.compute_block_id(*block("a"))) as found:  # nothing is distrusted for it
            assert (bytes(found.key), bytes(found.value)) == block("a")
        assert (await store.verify()).unreadable == ()
        await store.aclose()

    run(story)
