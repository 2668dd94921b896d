"""Compaction: space comes back, nothing is lost at any step, other processes read on, damage stays where it is."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import Priority
from cascade_aio.store.store import Store
from cascade_aio.testing.world import World, check_invariants, pseudo_bytes, run

MIB = 1 << 20
BLOCK_BYTES = 60_000


async def put(store: Store, name: str, nbytes: int = BLOCK_BYTES, **options: Any) -> ca.BlockId:
    return await store.put(name.encode(), pseudo_bytes(name, nbytes), **options)


async def check(store: Store, alive: dict[ca.BlockId, str], nbytes: int = BLOCK_BYTES) -> None:
    for block_id, name in alive.items():
        async with store.get(block_id) as block:
            assert bytes(block.value) == pseudo_bytes(name, nbytes), name


def disk(store: Store) -> dict[str, Any]:
    found: dict[str, Any] = store.statistics()["disk"]
    return found


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  the store tells nobody
        await asyncio.sleep(0.01)


async def half_dead(store: Store, count: int = 80) -> tuple[dict[ca.BlockId, str], list[ca.BlockId]]:
    """Blocks of which every other one is deleted; all of it durable."""
    ids = {await put(store, f"block {i}"): f"block {i}" for i in range(count)}
    gone = list(ids)[::2]
    for block_id in gone:
        await store.delete(block_id)
        del ids[block_id]
    await store.flush()
    return ids, gone


def test_dead_bytes_come_back_without_a_budget() -> None:
    async def story() -> None:
        world = World()
        store = await world.open()
        alive, gone = await half_dead(store)
        before = disk(store)
        assert before["dead_bytes"] > 2 * MIB
        await asyncio.sleep(60)
        after = disk(store)
        assert after["dead_bytes"] < 0.35 * after["record_bytes"]
        assert after["compaction"]["copied_blocks"] > 0
        assert after["compaction"]["removed_segments"] > 0
        check_invariants(store)
        await check(store, alive)
        assert not [block_id for block_id in gone if block_id in store]
        await store.aclose()
        store = await world.open()
        await check(store, alive)
        assert len(store) == len(alive)
        await store.aclose()
        world.check_closed()

    run(story)


def test_compaction_keeps_to_its_bandwidth_and_to_its_class() -> None:
    async def story() -> None:
        world = World(compaction_bandwidth=MIB)
        store = await world.open()
        await half_dead(store)
        classes: list[tuple[str, Any]] = []
        storage = world.storage
        read, write = storage.read, storage.write

        async def reading(file: Any, buffers: Any, offset: int, **options: Any) -> int:
            if sum(map(len, buffers)) > BLOCK_BYTES:
                classes.append(("read", options["priority"]))
            return await read(file, buffers, offset, **options)

        async def writing(file: Any, buffers: Any, offset: int, **options: Any) -> None:
            if sum(map(len, buffers)) > BLOCK_BYTES:
                classes.append(("write", options["priority"]))
            await write(file, buffers, offset, **options)

        storage.read, storage.write = reading, writing  # type: ignore[method-assign]
        started_s = asyncio.get_running_loop().time()
        await until(lambda: disk(store)["compaction"]["copied_bytes"])
        seconds = asyncio.get_running_loop().time() - started_s
        assert seconds >= 0.8 * disk(store)["compaction"]["copied_bytes"] / MIB - 0.2
        assert {kind for kind, _ in classes} == {"read", "write"}
        assert {priority for _, priority in classes} == {Priority.IDLE}
        await store.aclose()

    run(story)


def test_compact_does_not_wait_for_a_round_at_leisure() -> None:
    """A round in the background at a bandwidth of nearly nothing has the turn: it goes on without pauses then."""

    async def story() -> None:
        world = World(compaction_bandwidth=4096)
        store = await world.open()
        await half_dead(store)
        await until(store._space._turn.locked)
        started_s = asyncio.get_running_loop().time()
        report = await store.compact()
        assert report.bytes_after < report.bytes_before
        assert asyncio.get_running_loop().time() - started_s < 10, "a MiB at that bandwidth takes minutes"
        await store.aclose()

    run(story)


def test_compact_on_demand_reports_progress_and_may_be_run_again() -> None:
    async def story() -> None:
        world = World()
        store = await world.open(compaction_bandwidth=0)
        alive, gone = await half_dead(store)
        told: list[tuple[int, int]] = []
        task = asyncio.ensure_future(store.compact(lambda done, total: told.append((done, total)), bandwidth="1MiB"))
        await until(lambda: told)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        check_invariants(store)
        await check(store, alive)
        told.clear()
        report = await store.compact(lambda done, total: told.append((done, total)))
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1]
        assert report.segments_after < report.segments_before
        assert report.freed_bytes > 2 * MIB
        assert report.kept_aside == 0
        assert disk(store)["dead_bytes"] < 0.05 * disk(store)["record_bytes"]
        again = await store.compact()
        assert again.copied_blocks == 0
        check_invariants(store)
        await check(store, alive)
        await store.aclose()
        store = await world.open()
        assert not [block_id for block_id in gone if block_id in store]
        await check(store, alive)
        await store.aclose()
        world.check_closed()

    run(story)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_loss_of_power_at_any_step_leaves_old_or_new(seed: int | None) -> None:
    """The disk stops at every event of a compaction in turn; in one run it gets to its end."""

    async def once(step: int) -> bool:
        world = World(compaction_bandwidth=0)
        keys = ca.prefix_keys(range(40), block_tokens=1)
        store = await world.open()
        alive = {await put(store, str(i), 30_000, prefix=keys[i]): str(i) for i in range(40)}
        gone = list(alive)[::3]
        for block_id in gone:
            await store.delete(block_id)
            del alive[block_id]
        await store.flush()
        task = asyncio.ensure_future(store.compact())
        world.storage.freeze_at = world.storage.events + step
        frozen = asyncio.ensure_future(world.storage.frozen.wait())
        await asyncio.wait([task, frozen], return_when=asyncio.FIRST_COMPLETED)
        ended = task.done()
        await world.crash(seed)
        store = await world.open()
        await check(store, alive, 30_000)
        assert not [block_id for block_id in gone if block_id in store]
        named = [key for key in keys if key in store]
        assert len(named) == len(alive) == len(store)
        assert (await store.verify()).damage == ()
        check_invariants(store)
        await store.aclose()
        return ended

    async def story() -> None:
        step = 0
        while not await once(step):
            step += 3 if seed is None else 7
        assert step > 20

    run(story)


def test_another_process_reads_on() -> None:
    async def story() -> None:
        world = World()
        writer = await world.open(compaction_bandwidth=0)
        alive, gone = await half_dead(writer)
        reader = await world.open(read_only=True)
        some = dict(list(alive.items())[:3])
        await check(reader, some)  # its files are open
        report = await writer.compact()
        assert report.copied_blocks == len(alive)
        await check(reader, alive)  # meets files that are gone, and finds the new ones by itself
        check_invariants(reader)
        assert reader.statistics()["damage"] == []
        await reader.refresh()
        assert not [block_id for block_id in gone if block_id in reader]
        await reader.aclose()
        await writer.aclose()
        world.check_closed()

    run(story)


def test_a_damaged_record_is_kept_aside() -> None:
    async def story() -> None:
        world = World()
        store = await world.open(compaction_bandwidth=0)
        alive, _ = await half_dead(store)
        await store.aclose()
        store = await world.open(compaction_bandwidth=0)
        victim = next(iter(alive))
        index = store._context.catalog.index
        location = index.location(index.find(victim))
        assert location is not None
        entry = store._context.disk.table[location[0]]
        world.disk.poke(entry.path, location[1] * 4096 + 3 * 4096, os.urandom(16))
        report = await store.compact()
        assert report.kept_aside == 1
        assert entry.path in world.disk.files
        assert disk(store)["kept_aside_bytes"] == entry.size_bytes
        assert victim not in store
        assert len(store.statistics()["damage"]) == 1
        del alive[victim]
        await check(store, alive)
        check_invariants(store)
        await store.aclose()

    run(story)


def test_an_unreadable_segment_stays_and_the_others_are_compacted() -> None:
    async def story() -> None:
        world = World()
        store = await world.open(compaction_bandwidth=0)
        alive, _ = await half_dead(store)
        path = next(entry.path for entry in store._context.disk.table if entry.sealed)

        def refuse(operation: Any) -> OSError | None:
            failing = operation.name == "read" and operation.path == path and not operation.after
            return OSError(errno.EIO, "bad sector", path) if failing else None

        world.storage.hooks.append(refuse)
        report = await store.compact()
        assert report.segments_after < report.segments_before
        assert path in world.disk.files
        world.storage.hooks.clear()
        check_invariants(store)
        await check(store, alive)
        assert disk(store)["used_bytes"] >= world.disk.inode(path).size
        await store.aclose()

    run(story)


class Rivals:
    """Two writers of one root, doing what chance says. ``deleted`` must stay away from both, and from a third."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = World(compaction_bandwidth=0)
        self.names = {ca.compute_block_id(str(i).encode(), pseudo_bytes(str(i), 20_000)): str(i) for i in range(30)}
        self.deleted: set[ca.BlockId] = set()
        self.dropped = 0

    async def session(self) -> None:
        stores = [await self.world.open(), await self.world.open()]
        for _ in range(60):
            await self.step(self.rng.choice(stores))
            for store in stores:
                await store.refresh()
                check_invariants(store)
                self.check(store)
        for path in [path for path in self.world.disk.files if "checkpoint" in path]:
            del self.world.disk.files[path]
        if self.rng.random() < 0.5:
            await self.world.crash(self.rng.randrange(100))
        else:
            for store in stores:
                await store.aclose()
        store = await self.world.open()
        self.check(store)
        await store.aclose()

    def check(self, store: Store) -> None:
        assert not self.deleted & {info.block_id for info in store.blocks()}

    async def step(self, store: Store) -> None:
        block_id = self.rng.choice(list(self.names))
        what = self.rng.random()
        if what < 0.5:
            await put(store, self.names[block_id], 20_000)
            await store.flush()
            self.deleted.discard(block_id)
        elif what < 0.8:
            if block_id in store:
                await store.delete(block_id)
                await store.flush()
                self.deleted.add(block_id)
        elif what < 0.9:
            self.world.clock.advance(self.rng.choice([1.0, 100.0]))
        else:
            self.dropped += (await store.compact()).dropped_tombstones


@pytest.mark.parametrize("seed", range(3))
def test_deletions_end_beside_another_writer_and_nothing_comes_back(seed: int) -> None:
    """Two writers put, delete, compact and lose power; what was deleted with the other's knowledge stays away."""

    async def story() -> None:
        rivals = Rivals(seed)
        for _ in range(3):
            await rivals.session()
        assert rivals.dropped

    run(story)


def test_a_block_that_can_never_fit_the_budget_is_refused_at_once() -> None:
    async def story() -> None:
        world = World(shm_bytes=32 * MIB, disk_bytes=8 * MIB)
        store = await world.open()
        with pytest.raises(ca.BlockTooLargeError, match="disk_bytes"):
            await put(store, "whale", 8 * MIB)
        await put(store, "dolphin", 3 * MIB)
        await store.flush()
        assert disk(store)["used_bytes"] <= 8 * MIB
        await store.aclose()

    run(story)


def test_the_budget_is_never_exceeded_however_fast_the_puts() -> None:
    async def story() -> None:
        world = World(shm_bytes=8 * MIB, disk_bytes=12 * MIB)
        store = await world.open()
        most = 0

        def watch(operation: Any) -> None:
            nonlocal most
            most = max(most, sum(inode.allocated_bytes for path, inode in world.disk.files.items() if ".seg" in path))

        world.storage.hooks.append(watch)
        rng = random.Random(3)

        async def many(worker: int) -> None:
            for i in range(60):
                await put(store, f"{worker} {i}", rng.choice([5_000, 100_000, 700_000, 1_500_000]))
                if rng.random() < 0.1:
                    await store.flush()

        await asyncio.gather(*(many(worker) for worker in range(4)))
        await store.flush()
        assert 8 * MIB < most <= 12 * MIB
        check_invariants(store)
        await store.aclose()

    run(story)


def test_more_names_than_a_header_holds_move_with_their_block() -> None:
    names = [ca.PrefixKey(number.to_bytes(32, "big")) for number in range(1, 300)]

    async def story() -> None:
        world = World()
        store = await world.open(compaction_bandwidth=0)
        shared = await put(store, "shared", prefix=names[0])
        gone = [await put(store, f"gone {i}") for i in range(40)]
        for before, name in itertools.pairwise(names):
            await put(store, "shared", prefix=name, parent=before)
        await store.flush()
        for block_id in gone:
            await store.delete(block_id)
        await store.flush()
        report = await store.compact()
        assert report.copied_blocks == 1
        check_invariants(store)
        await store.aclose()
        store = await world.open()
        assert len(store.lookup(names)) == len(names)
        await check(store, {shared: "shared"})
        assert next(iter(store.blocks())).prefixes == len(names)
        await store.delete(names[7])
        await store.flush()
        await store.aclose()
        store = await world.open()
        assert len(store) == len(store.lookup(names)) == 0
        await store.aclose()

    run(story)
