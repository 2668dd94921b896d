"""The disk budget under failure: nothing kept is lost, nothing blocks for ever, nothing grows without bound."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.core.compaction import SMALL_GROUP
from cascade_aio.errors import BrokenTierError, TierFullError
from cascade_aio.segments.facts import BindingFact, TombstoneFact
from cascade_aio.store.space import SpaceKeeper
from cascade_aio.store.store import Store
from cascade_aio.testing.world import World, check_invariants, pseudo_bytes, run

MIB = 1 << 20
BUDGET_BYTES = 8 * MIB


async def put(store: Store, name: str, nbytes: int = 60_000, **options: Any) -> ca.BlockId:
    return await store.put(name.encode(), pseudo_bytes(name, nbytes), **options)


async def put_until_refused(store: Store, hot: ca.BlockId) -> None:
    for i in range(200):
        await put(store, f"cold {i}")
        async with store.get(hot):
            pass  # the eviction takes others
        await store.flush()


def disk(store: Store) -> dict[str, Any]:
    found: dict[str, Any] = store.statistics()["disk"]
    return found


async def facts(store: Store) -> list[Any]:
    """Everything that this store's files say."""
    return [
        fact
        for entry in store._context.disk.table
        if entry.own
        async for fact in store._context.recovery.facts_of(entry.number)
    ]


def test_a_copied_block_survives_a_disk_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """No space is another matter: then blocks are given up."""
    code = errno.EIO

    async def story() -> None:
        world = World(shm_bytes=16 * MIB, disk_bytes=BUDGET_BYTES)
        store = await world.open()
        hot = await put(store, "hot")
        await store.flush()
        lease = await store.get(hot)
        armed = False
        original = SpaceKeeper._reclaim

        async def reclaim(keeper: SpaceKeeper, *, hurry: bool) -> bool:
            nonlocal armed
            armed = True
            return await original(keeper, hurry=hurry)

        def fail(operation: Any) -> OSError | None:
            failing = armed and not operation.after and operation.name in ("create", "write", "sync")
            return OSError(code, "no", operation.path) if failing else None

        monkeypatch.setattr(SpaceKeeper, "_reclaim", reclaim)
        world.storage.hooks.append(fail)
        with pytest.raises((TierFullError, BrokenTierError)):
            await put_until_refused(store, hot)
        await asyncio.sleep(20)
        assert armed
        check_invariants(store)
        lease.release()
        await world.kill()
        store = await world.open()
        assert hot in store
        async with store.get(hot) as found:
            assert bytes(found.value) == pseudo_bytes("hot", 60_000)
        await store.aclose()

    run(story)


def test_puts_go_on_when_segments_end_long_after_their_last_record() -> None:
    async def story() -> None:
        world = World(shm_bytes=32 * MIB, disk_bytes=BUDGET_BYTES)
        store = await world.open()
        world.storage.hooks.append(
            lambda operation: asyncio.sleep(0.2) if operation.name == "truncate" and not operation.after else None
        )
        await asyncio.gather(*(put(store, str(i), 2 * MIB) for i in range(6)))
        await store.flush()
        await asyncio.sleep(30)
        for i in range(3):
            await put(store, f"later {i}", 2 * MIB)
        await store.flush()
        await asyncio.sleep(5)
        assert disk(store)["used_bytes"] <= BUDGET_BYTES
        await store.aclose()

    run(story)


def test_a_lower_budget_on_a_full_disk_is_reached() -> None:
    async def story() -> None:
        world = World(shm_bytes=2 * MIB)
        store = await world.open()
        deleted, i = [], 0
        while disk(store)["segments"] < 13:
            block_id = await put(store, str(i))
            await store.flush()
            if i % 7 == 6:
                await store.delete(block_id)
                deleted.append(block_id)
            i += 1
        await store.aclose()
        world.disk.capacity_bytes = world.disk.allocated_bytes
        store = await world.open(disk_bytes=BUDGET_BYTES)
        await asyncio.sleep(1000)
        check_invariants(store)
        assert disk(store)["used_bytes"] <= BUDGET_BYTES
        assert disk(store)["live_bytes"] >= BUDGET_BYTES // 4
        assert disk(store)["writer"]["notes"] <= 2 * len(deleted)
        await put(store, "after")
        await store.flush()
        await world.kill()
        store = await world.open(disk_bytes=BUDGET_BYTES)
        assert not [block_id for block_id in deleted if block_id in store]
        await store.aclose()

    run(story)


def test_a_segment_that_could_not_be_opened_is_not_removed() -> None:
    async def story() -> None:
        world = World(shm_bytes=2 * MIB)
        store = await world.open()
        kept = await put(store, "kept")
        await store.aclose()
        (path,) = [path for path in world.disk.files if path.endswith(".seg")]
        for name in [name for name in world.disk.files if "checkpoint" in name]:
            del world.disk.files[name]
        world.settings["disk_bytes"] = BUDGET_BYTES

        def refuse(operation: Any) -> OSError | None:
            failing = operation.path == path and operation.name == "open" and not operation.after
            return OSError(errno.EMFILE, "too many", path) if failing else None

        class Refusing(list[Any]):
            def append(self, storage: Any) -> None:
                storage.hooks.append(refuse)
                super().append(storage)

        world.storages = Refusing()
        store = await world.open()
        for i in range(300):
            await put(store, f"more {i}")
        await store.flush()
        await asyncio.sleep(5)
        assert disk(store)["reclaimed_segments"] > 3
        assert path in world.disk.files
        await store.aclose()
        world.storages = []
        store = await world.open(disk_bytes=64 * MIB)
        assert kept in store
        await store.aclose()

    run(story)


def test_tombstones_of_one_block_are_merged_and_dropped() -> None:
    async def story() -> None:
        world = World(shm_bytes=2 * MIB, disk_bytes=BUDGET_BYTES)
        store = await world.open()
        for _ in range(600):
            await store.delete(await put(store, "again"))
            await store.flush()
        for i in range(400):
            await put(store, f"filler {i}")
        await store.flush()
        await asyncio.sleep(5)
        tombstones = [fact for fact in await facts(store) if isinstance(fact, TombstoneFact)]
        assert len(tombstones) < SMALL_GROUP  # so many small segments are merged
        await store.compact()
        tombstones = [fact for fact in await facts(store) if isinstance(fact, TombstoneFact)]
        assert not tombstones  # nothing is left of what they deleted
        assert len(store._context.merger.facts.tombstones()) == 0
        again = ca.compute_block_id(b"again", pseudo_bytes("again", 60_000))
        assert again not in store
        await world.kill()
        store = await world.open()
        assert again not in store
        await store.aclose()

    run(story)


def test_a_rewritten_block_keeps_the_stamp_of_each_name() -> None:
    async def story() -> None:
        world = World(shm_bytes=4 * MIB, disk_bytes=BUDGET_BYTES)
        keys = ca.prefix_keys(range(2), block_tokens=1)
        store = await world.open()
        hot = await put(store, "hot", prefix=keys[0])
        await put(store, "beside")
        assert await put(store, "hot", prefix=keys[1]) == hot
        await store.flush()

        async def stamps() -> dict[bytes, list[int]]:
            found: dict[bytes, list[int]] = {}
            for fact in await facts(store):
                if isinstance(fact, BindingFact):
                    found.setdefault(fact.key, []).append(fact.stamp)
            return found

        before = await stamps()
        lease = await store.get(hot)
        for i in range(500):
            await put(store, f"filler {i}")
            async with store.get(hot):
                pass  # the disk's eviction takes others
        await store.flush()
        await asyncio.sleep(5)
        assert disk(store)["rewritten_blocks"] > 1
        after = await stamps()
        assert {key: set(found) for key, found in after.items()} == {key: set(found) for key, found in before.items()}
        assert max(len(found) for found in after.values()) <= 2  # names do not multiply
        lease.release()
        await world.kill()
        store = await world.open()
        assert keys[0] in store
        assert keys[1] in store
        await store.aclose()

    run(story)


@pytest.mark.parametrize("seed", range(4))
def test_what_was_deleted_and_flushed_stays_deleted(seed: int) -> None:
    """Deletions of blocks that are still being written, over many rounds of reclaiming and losses of power."""

    async def story() -> None:
        rng = random.Random(seed)
        world = World(shm_bytes=2 * MIB, disk_bytes=BUDGET_BYTES)
        for _ in range(4):
            store = await world.open()
            alive: set[ca.BlockId] = {block_id for block_id in names if block_id in store}
            gone = {names[block_id] for block_id in flushed}
            assert not [name for block_id, name in names.items() if block_id in alive and name in gone]
            deleted: set[ca.BlockId] = set()
            for _ in range(rng.randrange(200, 400)):
                name = f"block {rng.randrange(60)}" if rng.random() < 0.5 else f"once {rng.random()}"
                block_id = await put(store, name, rng.choice([3000, 60_000, 200_000]) if "once" in name else 60_000)
                names[block_id] = name
                deleted.discard(block_id)
                flushed.discard(block_id)
                if rng.random() < 0.5:
                    await store.delete(block_id)
                    deleted.add(block_id)
                if rng.random() < 0.03:
                    await store.flush()
                    flushed.update(deleted)
                    check_invariants(store)
            await asyncio.sleep(rng.randrange(12) * 0.25)
            for path in [path for path in world.disk.files if "checkpoint" in path]:
                del world.disk.files[path]
            await world.crash(seed)
        assert flushed

    names: dict[ca.BlockId, str] = {}
    flushed: set[ca.BlockId] = set()
    run(story)
