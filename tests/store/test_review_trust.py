"""What a review of compaction, adoption and repair found: each of these destroyed what had been acknowledged."""

from __future__ import annotations

import asyncio
import errno
import itertools
import posixpath

import crc32c
import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES, Platform
from cascade_aio.config import make_config
from cascade_aio.store.repairing import repair_root
from cascade_aio.store.space import SpaceKeeper
from cascade_aio.store.verifying import Verifier
from cascade_aio.testing import world as worlds
from cascade_aio.testing.memory import MemoryDisk, MemoryEngine, MemoryStorage, Operation
from cascade_aio.testing.world import ROOT, World, cancel_others, check_invariants, fail_with, pseudo_bytes, run
from tests.store.test_adopting import NBYTES, expect, kill, put

LONG_S = 30.0
"""Many looks of the space keeper."""


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
def test_segments_of_a_cut_off_adoption_are_not_reclaimed_unread(turns: int) -> None:
    """They are own ones then, and nothing in them is known to be live."""

    async def story() -> None:
        world = World()
        survivor, victim = await world.open(), await world.open()
        ids = await put(victim, range(60))
        path = kill(world, victim)
        adopting = asyncio.ensure_future(survivor.adopt())
        table = survivor._context.disk.table
        while not any(entry.identity.writer.hex() == posixpath.basename(path) for entry in table):  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        adopting.cancel()
        await asyncio.wait([adopting])
        await asyncio.sleep(LONG_S)
        check_invariants(survivor)
        await survivor.adopt()
        await expect(survivor, ids)
        check_invariants(survivor)
        assert not any(entry.unreadable or entry.writing for entry in table if entry.sealed)
        await survivor.aclose()
        await cancel_others()

    run(story)


def test_what_the_index_has_no_room_for_is_not_reclaimed() -> None:
    async def story() -> None:
        world = World(shm_bytes=4 << 20)
        store = await world.open()
        ids = [await store.put(b"", pseudo_bytes(str(number), 3000)) for number in range(1500)]
        await store.aclose()
        store = await world.open(index_blocks_max=1024)
        assert store.statistics()["disk"]["facts_refused"] == 476
        await asyncio.sleep(LONG_S)
        await store.compact()
        await store.aclose()
        store = await world.open()
        assert all(block_id in store for block_id in ids)
        await store.aclose()

    run(story)


def test_a_name_outlives_the_compaction_beside_a_segment_that_could_not_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The note is in one segment, the record that it names in another, which answers again another day."""
    names = ca.prefix_keys(range(8), block_tokens=4, namespace="review")

    async def story() -> None:
        world = World()
        store = await world.open()
        block_id = await store.put(b"", pseudo_bytes("named", NBYTES), prefix=names[0])
        await put(store, range(20))
        (entry,) = [entry for entry in store._context.disk.table if entry.identity.sequence == 1]
        await store.put(b"", pseudo_bytes("named", NBYTES), prefix=names[1])
        for gone in await put(store, range(20, 40)):
            await store.delete(gone)
        await store.aclose()
        world.disk.files.pop(posixpath.join(posixpath.dirname(entry.path), "checkpoint"))

        class Failing(MemoryStorage):
            def __init__(self, disk: MemoryDisk) -> None:
                super().__init__(disk)
                self.hooks.append(fail_with(errno.EIO, "read", path_part=entry.path, times=10**6))

        with monkeypatch.context() as patch:
            patch.setattr(worlds, "MemoryStorage", Failing)
            store = await world.open()
        assert block_id not in store
        report = await store.compact()
        assert report.kept_aside == 1
        assert store.statistics()["disk"]["compaction"]["removed_segments"]
        await store.aclose()
        store = await world.open()
        assert len(store.lookup(names)) == 2
        await store.aclose()

    run(story)


def test_a_repair_that_takes_its_time_sets_a_damaged_segment_aside_before_it_is_reclaimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        world = World()
        store = await world.open()
        block_id = await store.put(b"", pseudo_bytes("alone", 5 * NBYTES))
        await store.aclose()
        (path,) = [path for path in world.disk.files if path.endswith(".seg")]
        world.disk.flip_bit(path, 8 * (3 * PAGE_BYTES + 100))

        def platform() -> Platform:
            storage = MemoryStorage(world.disk)
            world.storages.append(storage)
            return Platform(storage, MemoryEngine(), world.clock)

        examine = Verifier.run

        async def slowly(self: Verifier) -> None:
            await examine(self)
            await asyncio.sleep(LONG_S)  # as in a root of many terabytes

        monkeypatch.setattr(Verifier, "run", slowly)
        report = await repair_root(make_config(ROOT, **world.settings), make_platform=platform)
        assert [one.path for one in report.quarantined] == [path]
        assert [lost.block_id for lost in report.lost_blocks] == [block_id.hex()]
        assert report.clean

    run(story)


def test_a_refresh_of_many_blocks_lets_others_run() -> None:
    """A sealed segment tells all of its facts after one read: they are applied in steps."""
    blocks = 2000

    async def story() -> None:
        world = World(shm_bytes=64 << 20, segment_bytes=64 << 20)
        reader, writer = await world.open(), await world.open()
        for number in range(blocks):
            await writer.put(number.to_bytes(8, "big"), b"")
        await writer.flush()
        await writer._context.disk.writer.rotate()
        known = []
        refreshing = asyncio.ensure_future(reader.refresh())
        while not refreshing.done():
            known.append(len(reader))
            await asyncio.sleep(0)
        assert await refreshing == blocks
        assert max(after - before for before, after in itertools.pairwise([*known, blocks])) <= 100
        await reader.aclose()
        await writer.aclose()

    run(story)


def test_a_segment_of_a_later_format_does_not_end_the_looking_for_dead_writers() -> None:
    async def story() -> None:
        world = World(adopt_seconds=5.0)
        survivor, victim = await world.open(), await world.open(adopt_seconds=None)
        await put(victim, range(4))
        path = kill(world, victim)
        segment = min(one for one in world.disk.files if one.startswith(path) and one.endswith(".seg"))
        page = bytearray(world.disk.content(segment)[:PAGE_BYTES])
        page[8] += 1
        page[-4:] = crc32c.crc32c(bytes(page[:-4])).to_bytes(4, "little")
        world.disk.poke(segment, 0, bytes(page))
        await asyncio.sleep(LONG_S)
        ids = await put(survivor, range(10, 14), prefix="after")
        assert all(block_id in survivor for block_id in ids)
        assert segment in world.disk.files
        await survivor.aclose()
        await cancel_others()

    run(story)


def test_a_removal_whose_sync_finds_no_room_is_no_end_of_the_keeper() -> None:
    async def story() -> None:
        world = World(disk_bytes=16 << 20, shm_bytes=4 << 20)
        store = await world.open()
        removed = False
        failures = 0

        def no_room(operation: Operation) -> OSError | None:
            nonlocal removed, failures
            if operation.name == "unlink" and operation.after and operation.path.endswith(".seg"):
                removed = True
            elif operation.name == "sync_directory" and not operation.after and removed:
                removed, failures = False, failures + 1
                return OSError(errno.ENOSPC, "no space", operation.path)
            return None

        world.storage.hooks.append(no_room)
        for number in range(500):
            await store.put(b"", pseudo_bytes(str(number), NBYTES))
        await store.flush()
        assert failures
        check_invariants(store)
        await store.aclose()

    run(story)


def test_nobody_waits_for_a_keeper_that_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        world = World(disk_bytes=16 << 20, shm_bytes=4 << 20)
        store = await world.open()

        async def unforeseen(self: SpaceKeeper, *, hurry: bool) -> bool:
            if hurry:
                raise RuntimeError("unforeseen")
            return False

        monkeypatch.setattr(SpaceKeeper, "_reclaim", unforeseen)

        async def fill() -> None:
            for number in range(800):
                await store.put(b"", pseudo_bytes(str(number), NBYTES))
                await store.flush()

        with pytest.raises(ca.CascadeError):
            await asyncio.wait_for(fill(), 3600)
        with pytest.raises(ca.TierFullError):
            await store.aclose()

    run(story)


def test_what_the_arena_has_of_a_file_that_somebody_removed_is_written_again() -> None:
    async def story() -> None:
        world = World(shm_bytes=4 << 20, compaction_bandwidth=0)
        store = await world.open()
        ids = await put(store, range(30))
        await store._context.disk.writer.rotate()
        for block_id in ids[:8]:
            await store.delete(block_id)
        await store.flush()
        del world.disk.files[min(entry.path for entry in store._context.disk.table)]
        await store.compact()
        await store.flush()
        await store.aclose()
        store = await world.open()
        assert [block_id in store for block_id in ids] == 8 * [False] + 22 * [True]
        check_invariants(store)
        await store.aclose()

    run(story)


@pytest.mark.parametrize("how", ["get", "verify"])
def test_a_read_that_was_wrong_once_costs_no_sound_record(how: str) -> None:
    """The block is a miss, and its segment stays as it is: the next opening finds every byte."""

    async def story() -> None:
        world = World()
        store = await world.open()
        ids = await put(store, range(40))
        await store.aclose()
        store = await world.open()
        block_id = ids[0]
        index = store._context.catalog.index
        location = index.location(index.find(block_id))
        assert location is not None
        entry = store._context.disk.table[location[0]]
        place = location[1] * PAGE_BYTES + 2 * PAGE_BYTES
        world.disk.flip_bit(entry.path, 8 * place)
        if how == "get":
            with pytest.raises(ca.CorruptionError):
                await store.get(block_id)
        else:
            assert len((await store.verify()).damage) == 1
        world.disk.flip_bit(entry.path, 8 * place)
        for other in ids[1:]:
            await store.delete(other)
        await store.flush()
        await asyncio.sleep(LONG_S)
        assert entry.path in world.disk.files
        await store.aclose()
        store = await world.open()
        await expect(store, ids[:1])
        await store.aclose()

    run(story)


def test_a_segment_of_which_nothing_is_recognised_is_kept() -> None:
    """Overwritten from end to end it looks like one that was never begun; only that may be removed."""

    async def story() -> None:
        world = World()
        store = await world.open()
        await put(store, range(40))
        await store.aclose()
        path = sorted(path for path in world.disk.files if path.endswith(".seg"))[-1]
        world.disk.poke(path, 0, pseudo_bytes("garbage", len(world.disk.content(path))))
        for _ in range(2):
            store = await world.open()
            await put(store, range(100, 110))
            await asyncio.sleep(LONG_S)
            assert path in world.disk.files
            assert path in {error.path for error in (await store.verify()).damage}
            await store.aclose()
        assert world.disk.content(path) == pseudo_bytes("garbage", len(world.disk.content(path)))

    run(story)
