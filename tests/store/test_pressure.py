"""Many tasks on a tiny arena, full arenas, full and failing disks: bounded waits, right bytes, nothing lost."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import (
    BlockNotFoundError,
    BrokenTierError,
    TierFullError,
)
from cascade_aio.testing.memory import Operation
from cascade_aio.testing.world import (
    World,
    check_idle,
    check_invariants,
    fail_with,
    pseudo_bytes,
    settle,
    virtual_loop,
)
from tests.store.conftest import OpenStore

KEYS = ca.prefix_keys(range(64), block_tokens=1, namespace="pressure")
SEEDS = range(int(os.environ.get("CASCADE_TEST_EXAMPLES", "60")) // 15)

Block = tuple[bytes, bytes]


def block(name: str, nbytes: int = 60_000) -> Block:
    return pseudo_bytes("k" + name, nbytes // 2), pseudo_bytes("v" + name, nbytes - nbytes // 2)


def run(story: Callable[[World], Awaitable[None]], **settings: Any) -> None:
    with asyncio.Runner(loop_factory=virtual_loop) as runner:

        async def tell() -> None:
            await story(World(**settings))

        runner.run(tell())


async def read(store: ca.Store, name: Any) -> Block:
    async with store.get(name) as got:
        return bytes(got.key), bytes(got.value)


async def close(world: World, store: ca.Store) -> None:
    await store.flush()
    await settle()
    check_idle(store)
    await store.aclose()
    world.check_closed()


async def _put_many(store: ca.Store, count: int) -> None:
    for i in range(count):
        await store.put(*block(f"one of many {i}"))


class Crowd:
    """Tasks that put, get, delete and follow prefixes as their seed says, and compare every byte."""

    def __init__(self, store: ca.Store, blocks: list[Block], pause_s: float) -> None:
        self.store = store
        self.blocks = blocks
        self.ids = [ca.compute_block_id(*content) for content in blocks]
        self.pause_s = pause_s
        self.calls = 0
        self.longest_s = 0.0

    async def member(self, seed: int, calls: int) -> None:
        rng = random.Random(seed)
        loop = asyncio.get_running_loop()
        for _ in range(calls):
            started_s = loop.time()
            await self.act(rng)
            self.longest_s = max(self.longest_s, loop.time() - started_s)
            self.calls += 1

    async def act(self, rng: random.Random) -> None:
        number = rng.randrange(len(self.blocks))
        choice = rng.random()
        try:
            if choice < 0.35:
                key = KEYS[number % len(KEYS)]
                parent = KEYS[number % len(KEYS) - 1] if number % len(KEYS) else None
                await self.store.put(*self.blocks[number], prefix=key, parent=parent)
            elif choice < 0.75:
                async with self.store.get(self.ids[number]) as got:
                    await asyncio.sleep(rng.random() * self.pause_s)
                    assert (bytes(got.key), bytes(got.value)) == self.blocks[number]
            elif choice < 0.85:
                start = rng.randrange(len(KEYS))
                async with self.store.get_prefix(KEYS[start : start + 4]) as found:
                    await asyncio.sleep(rng.random() * self.pause_s)
                    for got in found:
                        content = self.blocks[self.ids.index(got.block_id)]
                        assert (bytes(got.key), bytes(got.value)) == content
            elif choice < 0.95:
                await self.store.delete(self.ids[number])
            else:
                await self.store.flush()
        except BlockNotFoundError:
            pass  # deleted by another, or not put yet


async def crowd(store: ca.Store, seed: int, *, tasks: int, calls: int, pause_s: float) -> Crowd:
    rng = random.Random(seed)
    sizes = [100, 4000, 20_000, 60_000, 150_000]
    blocks = [block(f"{seed} {i}", rng.choice(sizes)) for i in range(48)]
    people = Crowd(store, blocks, pause_s)
    async with asyncio.TaskGroup() as group:
        for member in range(tasks):
            group.create_task(people.member(seed * 1000 + member, calls))
    return people


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("budget", [None, 8 << 20])
def test_a_crowd_in_memory(seed: int, budget: int | None) -> None:
    async def story(world: World) -> None:
        store = await world.open(disk_bytes=budget, shm_bytes=2 << 20)
        people = await crowd(store, seed, tasks=64, calls=25, pause_s=0.01)
        assert people.calls == 64 * 25
        assert people.longest_s < 5.0  # put_wait_seconds_max: nobody waited that long
        assert store.statistics()["shm"]["evicted_blocks"] > 0
        assert store.statistics()["store"]["damaged"] == 0
        await close(world, store)

    run(story)


async def test_a_crowd_over_real_files(open_small: OpenStore) -> None:
    async with open_small(shm_bytes="2MiB", segment_bytes="1MiB", disk_bytes="24MiB") as store:
        people = await crowd(store, 1, tasks=64, calls=15, pause_s=0.002)
        assert people.calls == 64 * 15
        assert store.statistics()["store"]["damaged"] == 0
        await store.flush()
        await settle()
        check_idle(store)


def test_a_large_block_is_not_starved_by_small_ones() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        small = [await store.put(*block(f"small {i}", 50_000)) for i in range(40)]
        stop = asyncio.Event()

        async def churn(start: int) -> None:
            i = start
            while not stop.is_set():
                async with store.get(small[i % len(small)]):
                    await asyncio.sleep(0.01)
                await store.put(*block(f"more {start} {i}", 50_000))
                i += 7

        async with asyncio.TaskGroup() as tasks:
            for start in range(6):
                tasks.create_task(churn(start))
            await asyncio.sleep(0.1)
            started_s = asyncio.get_running_loop().time()
            large = await store.put(*block("large", 800_000))
            assert await read(store, large) == block("large", 800_000)
            assert asyncio.get_running_loop().time() - started_s < 4.0
            stop.set()
        await close(world, store)

    run(story)


def test_an_arena_full_of_leases_makes_waiters_wait_and_serves_them_in_order() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        ids = [await store.put(*block(str(i), 100_000)) for i in range(9)]
        await store.flush()
        leases = [await store.get(block_id) for block_id in ids]
        waited = store.statistics()["shm"]["waits_for_room"]
        order: list[str] = []

        async def put(name: str, nbytes: int) -> None:
            await store.put(*block(name, nbytes))
            order.append(name)

        puts = [asyncio.ensure_future(put(name, nbytes)) for name, nbytes in (("large", 400_000), ("small", 100_000))]
        await asyncio.sleep(1.0)
        assert order == []
        assert store.statistics()["shm"]["waits_for_room"] == waited + 2
        for lease in leases:
            lease.release()
        await asyncio.gather(*puts)
        assert order == ["large", "small"]
        for lease in [await store.get(block_id) for block_id in ids[:8]]:
            lease.release()
        await close(world, store)

    run(story)


def test_waiters_in_a_full_arena_give_up_in_time_and_leave_no_trace() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        ids = [await store.put(*block(str(i), 100_000)) for i in range(12)]
        await store.flush()
        leases = [await store.get(block_id) for block_id in ids[-9:]]
        started_s = asyncio.get_running_loop().time()
        outcomes = await asyncio.gather(
            *(store.put(*block(f"new {i}", 200_000)) for i in range(8)),
            *(read(store, block_id) for block_id in ids[:3]),
            return_exceptions=True,
        )
        assert all(isinstance(outcome, TierFullError) for outcome in outcomes[:8]), outcomes
        assert 4.9 < asyncio.get_running_loop().time() - started_s < 6.0
        check_invariants(store)
        for lease in leases:
            lease.release()
        await close(world, store)

    run(story)


# -- a disk that fails ------------------------------------------------------------------------------


async def cold(world: World, *blocks: Block, **settings: Any) -> ca.Store:
    store = await world.open(**settings)
    for i, content in enumerate(blocks):
        await store.put(*content, prefix=KEYS[i])
    await store.aclose()
    return await world.open(**settings)


@pytest.mark.parametrize("nbytes", [10_000, 700_000])
def test_a_failed_read_is_an_error_for_all_who_wait_and_works_the_next_time(nbytes: int) -> None:
    async def story(world: World) -> None:
        store = await cold(world, block("a", nbytes))
        world.storage.hooks.append(fail_with(errno.EIO, "read"))
        outcomes = await asyncio.gather(*(read(store, KEYS[0]) for _ in range(3)), return_exceptions=True)
        assert [getattr(outcome, "errno", None) for outcome in outcomes] == [errno.EIO] * 3
        check_invariants(store)
        assert store.statistics()["store"]["read_errors"] == 1
        assert await read(store, KEYS[0]) == block("a", nbytes)
        await close(world, store)

    run(story)


@pytest.mark.parametrize("failing", ["open", "read"])
def test_a_prefix_ends_before_the_block_that_cannot_be_read(failing: str) -> None:
    async def story(world: World) -> None:
        store = await world.open()
        for i in range(5):
            await store.put(*block(str(i), 300_000), prefix=KEYS[i])  # three to a segment
            await store.flush()
        await store.aclose()
        store = await world.open(shm_bytes=4 << 20)
        world.storage.hooks.append(fail_with(errno.EIO, failing, path_part="0000000002.seg"))
        async with store.get_prefix(KEYS[:5]) as found:
            assert 1 <= len(found) < 5
            assert all(bytes(got.key) == block(str(i), 300_000)[0] for i, got in enumerate(found))
        await settle()
        async with store.get_prefix(KEYS[:5]) as found:
            assert len(found) == 5
        await close(world, store)

    run(story)


@pytest.mark.parametrize("failing", ["write", "sync", "create", "sync_directory"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_failing_disk_is_tried_elsewhere_and_flush_still_means_durable(failing: str, times: int) -> None:
    async def story(world: World) -> None:
        store = await world.open()
        await store.put(*block("before"), prefix=KEYS[0])
        await store.flush()
        world.storage.hooks.append(fail_with(errno.EIO, failing, path_part="writers", times=times))
        for i in range(1, 30):
            await store.put(*block(str(i)), prefix=KEYS[i])
        await store.delete(KEYS[0])
        await store.flush()
        check_invariants(store)
        await world.crash()
        store = await world.open()
        assert KEYS[0] not in store
        for i in range(1, 30):
            assert await read(store, KEYS[i]) == block(str(i))
        await close(world, store)

    run(story)


def test_a_broken_disk_fails_flush_and_everything_stored_still_reads() -> None:
    async def story(world: World) -> None:
        store = await cold(world, *(block(str(i)) for i in range(4)))
        world.storage.hooks.append(fail_with(errno.EIO, "write", "create", path_part=".seg", times=1 << 30))
        fresh = [await store.put(*block(f"fresh {i}")) for i in range(4)]
        with pytest.raises(BrokenTierError):
            await store.flush()
        check_invariants(store)
        for _ in range(3):
            for i in range(4):
                assert await read(store, KEYS[i]) == block(str(i))
                assert await read(store, fresh[i]) == block(f"fresh {i}")
        with pytest.raises(TierFullError):  # what cannot be written stays, and what stays fills the arena
            await _put_many(store, 30)
        assert await read(store, fresh[0]) == block("fresh 0")
        with pytest.raises(BrokenTierError):
            await store.aclose()
        world.check_closed()

    run(story)


def test_a_full_disk_still_reads_and_recovers_when_there_is_room_again() -> None:
    async def story(world: World) -> None:
        store = await cold(world, *(block(str(i)) for i in range(4)), when_full="refuse")
        world.disk.capacity_bytes = world.disk.allocated_bytes + PAGE_BYTES
        fresh = await store.put(*block("fresh"), prefix=KEYS[10])
        for _ in range(2):
            with pytest.raises(TierFullError, match="no room"):
                await store.flush()
        assert await read(store, fresh) == block("fresh")
        for i in range(4):
            assert await read(store, KEYS[i]) == block(str(i))
        check_invariants(store)
        world.disk.capacity_bytes = 1 << 40
        await asyncio.sleep(5.0)
        await store.flush()
        await world.crash()
        store = await world.open()
        assert await read(store, KEYS[10]) == block("fresh")
        await close(world, store)

    run(story)


def test_a_full_disk_with_a_budget_is_emptied_without_being_written_to() -> None:
    async def story(world: World) -> None:
        world.disk.capacity_bytes = 27 << 18  # 6.75 MiB: not even the seventh segment of eight fits
        store = await world.open(disk_bytes=8 << 20)
        for i in range(300):
            await store.put(*block(str(i), 100_000), prefix=KEYS[i % 64])
            if i % 7 == 6 and (block_id := ca.compute_block_id(*block(str(i), 100_000))) in store:
                await store.delete(block_id)
        await asyncio.sleep(5.0)
        assert store.statistics()["disk"]["reclaimed_segments"] > 10
        check_invariants(store)
        await close(world, store)

    run(story)


def test_the_budget_holds_while_blocks_stream_in_and_past_abandoned_segments() -> None:
    async def story(world: World) -> None:
        budget = 8 << 20
        store = await world.open(disk_bytes=budget, shm_bytes=4 << 20)
        for i in range(300):
            if i % 60 == 30:
                world.storage.hooks[:] = [fail_with(errno.EIO, "write", path_part=".seg")]
            await store.put(*block(str(i), 200_000))
            assert store.statistics()["disk"]["used_bytes"] <= budget + (2 << 20)
            if i % 40 == 0:
                check_invariants(store)
        await store.flush()
        await asyncio.sleep(5.0)
        statistics = store.statistics()["disk"]
        assert statistics["used_bytes"] <= budget
        assert statistics["live_bytes"] >= budget // 4  # it is kept full, not emptied
        assert sum(inode.allocated_bytes for inode in world.disk.files.values()) <= budget + (1 << 20)
        assert await read(store, ca.compute_block_id(*block("299", 200_000))) == block("299", 200_000)
        await close(world, store)

    run(story)


def test_a_segment_removed_by_hand_neither_breaks_reads_nor_the_budget() -> None:
    async def story(world: World) -> None:
        store = await world.open(disk_bytes=8 << 20)
        for i in range(30):
            await store.put(*block(str(i), 100_000), prefix=KEYS[i])
        await store.flush()
        await asyncio.sleep(1.0)
        gone = sorted(path for path in world.disk.files if path.endswith(".seg"))[0]
        del world.disk.files[gone]
        found = 0
        for i in range(30):
            try:
                assert await read(store, KEYS[i]) == block(str(i), 100_000)
                found += 1
            except BlockNotFoundError:
                assert KEYS[i] not in store
        assert found >= 15
        check_invariants(store)
        for i in range(200):
            await store.put(*block(f"more {i}", 100_000))
        await store.flush()
        await asyncio.sleep(5.0)
        assert store.statistics()["disk"]["used_bytes"] <= 8 << 20
        await close(world, store)

    run(story)


def test_a_late_read_is_a_miss_and_the_block_comes_back_when_the_disk_does() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        for i in range(3):
            await store.put(*block(str(i), 100_000), prefix=KEYS[i])
        await store.aclose()
        store = await world.open(read_seconds_max=0.2)
        slow = True

        def hang(operation: Operation) -> Awaitable[None] | None:
            hangs = slow and operation.name == "read" and not operation.after
            return asyncio.sleep(3.0) if hangs else None

        world.storage.hooks.append(hang)
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(BlockNotFoundError, match="read_seconds_max"):
            await store.get(KEYS[0])
        async with store.get_prefix(KEYS[:3]) as found:
            assert found == []
        assert asyncio.get_running_loop().time() - started_s < 0.5
        assert store.statistics()["store"]["late_reads"] == 1  # the others were refused at once
        check_invariants(store)
        slow = False
        await asyncio.sleep(5.0)
        assert [await read(store, KEYS[i]) for i in range(3)] == [block(str(i), 100_000) for i in range(3)]
        await close(world, store)

    run(story)


def test_a_segment_of_another_writer_vanishes_under_a_reader() -> None:
    async def story(world: World) -> None:
        other = await cold(world, *(block(str(i), 200_000) for i in range(8)))
        store = await world.open()
        held = await store.get(KEYS[0])
        loads = [asyncio.ensure_future(read(store, KEYS[i])) for i in range(1, 8)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for path in [path for path in world.disk.files if path.endswith(".seg")]:
            del world.disk.files[path]
        outcomes: list[Any] = await asyncio.gather(*loads, return_exceptions=True)
        for i, outcome in enumerate(outcomes, start=1):
            assert isinstance(outcome, BlockNotFoundError) or outcome == block(str(i), 200_000)
        await store.refresh()
        check_invariants(store)
        assert bytes(held.key) == block("0", 200_000)[0]
        held.release()
        for i in range(8):  # a copy in the arena stays; what was only on disk is a miss
            try:
                assert await read(store, KEYS[i]) == block(str(i), 200_000)
            except BlockNotFoundError:
                assert KEYS[i] not in store
        await store.flush()
        await settle()
        check_idle(store)
        await store.aclose()
        await other.aclose()
        world.check_closed()

    run(story)
