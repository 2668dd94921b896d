"""Writers that died: their segments are adopted exactly once, at any moment, and reclaimed like own ones."""

from __future__ import annotations

import asyncio
import posixpath
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import Operation
from cascade_aio.testing.world import (
    ROOT,
    World,
    cancel_others,
    check_idle,
    check_invariants,
    pseudo_bytes,
    run,
)

NBYTES = 60_000
MIB = 1 << 20


def directory_of(store: Store) -> str:
    return posixpath.join(ROOT, "writers", store._context.writer.hex())


def kill(world: World, store: Store) -> str:
    """The process of ``store`` ends where it is; others go on. Returns its writer directory."""
    (storage,) = [one for one in world.storages if one is store._context.platform.storage]
    storage.freeze_at = 0
    path = directory_of(store)
    world.disk.locked.discard(posixpath.join(path, "lock"))
    return path


async def put(store: Store, numbers: range, *, prefix: str = "") -> list[ca.BlockId]:
    ids = [await store.put(b"", pseudo_bytes(f"{prefix}{number}", NBYTES)) for number in numbers]
    await store.flush()
    return ids


async def expect(store: Store, ids: list[ca.BlockId], *, prefix: str = "") -> None:
    for number, block_id in enumerate(ids):
        async with store.get(block_id) as block:
            assert bytes(block.value) == pseudo_bytes(f"{prefix}{number}", NBYTES)


def disk(store: Store) -> dict[str, Any]:
    found: dict[str, Any] = store.statistics()["disk"]
    return found


def test_the_open_segment_of_a_dead_writer_is_sealed_and_its_blocks_are_kept() -> None:
    async def story() -> None:
        world = World()
        survivor, victim = await world.open(), await world.open()
        ids = await put(victim, range(20))
        await survivor.refresh()
        await victim.put(b"", b"never flushed")
        path = kill(world, victim)
        report = await survivor.adopt()
        assert report.writers == (posixpath.basename(path),)
        assert report.segments == 2
        assert not report.left
        check_invariants(survivor)
        await expect(survivor, ids)
        entries = [entry for entry in survivor._context.disk.table if path in entry.path]
        assert all(entry.own and entry.sealed for entry in entries)
        assert (await survivor.adopt()).writers == (), "once"
        assert disk(survivor)["adopted_segments"] == 2
        await survivor.aclose()
        async with world_store(world) as again:
            await expect(again, ids)
        await cancel_others()

    run(story)


def world_store(world: World) -> Any:
    class Scope:
        async def __aenter__(self) -> Store:
            self.store = await world.open()
            return self.store

        async def __aexit__(self, *_: object) -> None:
            await self.store.aclose()

    return Scope()


def test_what_was_seen_half_written_is_a_miss_after_adoption_and_no_damage() -> None:
    async def story() -> None:
        world = World()
        survivor, victim = await world.open(), await world.open()
        await put(victim, range(3))
        torn_at: list[tuple[str, int]] = []

        def note(operation: Operation) -> None:
            if operation.name == "write" and not operation.after and operation.nbytes > NBYTES:
                torn_at.append((operation.path, operation.offset))

        victim._context.platform.storage.hooks.append(note)  # type: ignore[attr-defined]
        torn = await victim.put(b"", pseudo_bytes("torn", NBYTES))
        await asyncio.sleep(0.4)  # long enough to be written, too short to be synced: then a mark would say so
        path, offset = torn_at[-1]
        await survivor.refresh()
        assert torn in survivor
        kill(world, victim)
        world.disk.poke(path, offset + 8192, b"\xff" * 512)
        await survivor.adopt()
        check_invariants(survivor)
        assert torn not in survivor
        assert survivor.statistics()["damage"] == []
        assert (await survivor.verify()).damage == ()
        await survivor.aclose()
        await cancel_others()

    run(story)


def test_two_adopters_race_and_one_adopts() -> None:
    async def story() -> None:
        for delays in range(12):
            world = World()
            first, second, victim = await world.open(), await world.open(), await world.open()
            ids = await put(victim, range(20))
            path = kill(world, victim)

            async def later(store: Store, turns: int) -> tuple[str, ...]:
                for _ in range(turns):
                    await asyncio.sleep(0)
                return (await store.adopt()).writers

            outcomes = await asyncio.gather(later(first, 0), later(second, delays))
            assert sorted(outcomes) == [(), (posixpath.basename(path),)]
            for store in (first, second):
                await store.refresh()
                check_invariants(store)
                await expect(store, ids)
                assert store.statistics()["damage"] == []
                await store.aclose()
            await cancel_others()

    run(story)


@pytest.mark.parametrize("lost_power", [False, True])
def test_an_adoption_that_is_cut_off_anywhere_is_done_by_the_next(lost_power: bool) -> None:
    async def story() -> None:
        step = int(lost_power)
        while True:
            world = World()
            survivor, victim = await world.open(), await world.open()
            ids = await put(victim, range(8))
            path = kill(world, victim)
            storage: Any = survivor._context.platform.storage
            events = storage.events
            storage.freeze_at = events + step
            adopting = asyncio.ensure_future(survivor.adopt())
            await asyncio.wait((adopting, asyncio.ensure_future(storage.frozen.wait())), return_when="FIRST_COMPLETED")
            done = adopting.done()
            if lost_power:
                await world.crash(seed=step)
            else:
                kill(world, survivor)
                world.disk.locked.clear()
                await cancel_others()
                world.storages.clear()
            next_one = await world.open()
            await next_one.adopt()
            await expect(next_one, ids)
            check_invariants(next_one)
            assert next_one.statistics()["damage"] == []
            assert all(entry.sealed for entry in next_one._context.disk.table if path in entry.path)
            await next_one.aclose()
            world.check_closed()
            if done:
                assert step > 10
                return
            step += 3

    run(story)


def test_the_space_of_a_dead_writer_counts_and_is_reclaimed() -> None:
    async def story() -> None:
        world = World(disk_bytes=16 * MIB)
        survivor, victim = await world.open(), await world.open()
        await put(victim, range(180), prefix="cold ")
        kill(world, victim)
        mine = await put(survivor, range(20))
        before = disk(survivor)["used_bytes"]
        await survivor.adopt()
        assert disk(survivor)["used_bytes"] > before + 9 * MIB
        for number in range(20, 160):
            mine.append(await survivor.put(b"", pseudo_bytes(str(number), NBYTES)))
            await survivor.flush()
        await asyncio.sleep(30)
        check_invariants(survivor)
        assert disk(survivor)["used_bytes"] <= 16 * MIB
        assert disk(survivor)["reclaimed_segments"] > 5
        await survivor.flush()
        await asyncio.sleep(1)
        check_idle(survivor)
        await survivor.aclose()
        await cancel_others()

    run(story)


def test_deletions_of_a_dead_writer_outlive_its_segments() -> None:
    """What it deleted in our segments stays deleted while our segments hold it, reclaimed or not."""

    async def story() -> None:
        world = World(disk_bytes=12 * MIB)
        survivor, victim = await world.open(), await world.open()
        ids = await put(survivor, range(10))
        await victim.refresh()
        for block_id in ids[:5]:
            await victim.delete(block_id)
        await put(victim, range(20), prefix="of the victim ")
        path = kill(world, victim)
        await survivor.adopt()
        assert not any(block_id in survivor for block_id in ids[:5])
        for number in range(300):
            await survivor.put(b"", pseudo_bytes(f"new {number}", NBYTES))
            await survivor.flush()
        await asyncio.sleep(30)
        assert not any(path in entry.path for entry in survivor._context.disk.table), "its segments are reclaimed"
        await survivor.aclose()
        async with world_store(world) as again:
            assert not any(block_id in again for block_id in ids[:5])
        await cancel_others()

    run(story)


def test_a_directory_of_which_nothing_is_left_is_free_for_a_newcomer() -> None:
    async def story() -> None:
        world = World(disk_bytes=12 * MIB)
        survivor, victim = await world.open(), await world.open()
        await put(victim, range(20), prefix="of the victim ")
        path = kill(world, victim)
        await survivor.adopt()
        for number in range(300):
            await survivor.put(b"", pseudo_bytes(f"new {number}", NBYTES))
            await survivor.flush()
        await survivor.adopt()
        async with world_store(world) as newcomer:
            assert directory_of(newcomer) == path
        await survivor.aclose()
        await cancel_others()

    run(story)


def test_a_store_looks_for_dead_writers_by_itself_and_leaves_closed_ones_alone() -> None:
    async def story() -> None:
        world = World(adopt_seconds=60.0)
        survivor, victim, closed = await world.open(), await world.open(), await world.open()
        ids = await put(victim, range(5))
        await put(closed, range(5), prefix="closed ")
        await closed.aclose()
        path = kill(world, victim)
        await asyncio.sleep(61)
        assert disk(survivor)["adopted_writers"] == 1
        await survivor.refresh()
        await expect(survivor, ids)
        async with world_store(world) as back:
            assert directory_of(back) != path
            assert len(back) == 10
        await survivor.aclose()
        await cancel_others()

    run(story)


def test_a_checkpoint_goes_before_the_first_segment_it_lists() -> None:
    """Else names that were deleted, and whose deletions have ended, would come back after a kill."""

    async def story() -> None:
        world = World(disk_bytes=12 * MIB)
        store = await world.open()
        checkpoint = posixpath.join(directory_of(store), "checkpoint")
        await put(store, range(20))
        await store.aclose()
        assert checkpoint in world.disk.files
        store = await world.open()
        gone: list[bool] = []

        def look(operation: Operation) -> None:
            if operation.name == "unlink" and operation.path.endswith(".seg"):
                gone.append(checkpoint not in world.disk.files)

        world.storage.hooks.append(look)
        for number in range(300):
            await store.put(b"", pseudo_bytes(f"new {number}", NBYTES))
            await store.flush()
        assert gone
        assert all(gone)
        await store.aclose()
        assert checkpoint in world.disk.files

    run(story)
