"""What is known does not depend on the order in which it was told."""

from __future__ import annotations

import asyncio
import hashlib
import itertools

import pytest

from cascade_aio.segments.facts import BlockFact, Fact, Location, TombstoneFact, VanishedFact
from cascade_aio.segments.format import SegmentIdentity
from cascade_aio.store import merging
from cascade_aio.store.catalog import Catalog
from cascade_aio.store.merging import PROVISIONAL
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import MemoryStorage
from cascade_aio.testing.world import World, check_invariants, pseudo_bytes, run

DIGEST = hashlib.sha256(b"a block").digest()
BLOCK_ID = DIGEST[:16]


def segment_of(store: Store, writer: int, *, own: bool = False) -> int:
    return store._context.disk.table.add(SegmentIdentity(bytes([writer]) * 16, 1), own=own).number


def record(segment: int, stamp: int, *, provisional: bool) -> BlockFact:
    return BlockFact(Location(segment, 1, 1), 8192, DIGEST, 100, 1000, stamp, provisional)


def deletion(segment: int, stamp: int) -> TombstoneFact:
    return TombstoneFact(Location(segment, 3, 1), BLOCK_ID, stamp, True)


def told(store: Store, facts: list[Fact]) -> Catalog:
    for fact in facts:
        store._context.merger.apply(fact)
        check_invariants(store)
    store._context.merger.names.settle()
    return store._context.catalog


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_record_that_may_vanish_and_is_newer_than_a_deletion_survives_it(
    order: tuple[int, int, int], own: bool
) -> None:
    async def story() -> None:
        store = await World().open()
        old, new = segment_of(store, 1, own=own), segment_of(store, 2)
        facts: list[Fact] = [record(old, 10, provisional=False), deletion(new, 20), record(new, 30, provisional=True)]
        catalog = told(store, [facts[index] for index in order])
        row = catalog.index.find(BLOCK_ID)
        assert catalog.index.location(row) == Location(new, 1, 1)
        assert catalog.index.flags(row) & PROVISIONAL, "whoever puts it again has to write it"
        told(store, [deletion(new, 30)])
        assert catalog.index.find(BLOCK_ID) < 0
        await store.aclose()

    run(story)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_block_is_read_from_a_record_that_outlives_its_deletions(order: tuple[int, int, int], before: bool) -> None:
    """Simulation: of an own record, another writer's and a deletion between them the own one stayed the one that
    counts; the other was adopted and reclaimed as dead, and the next opening found the own one deleted."""

    async def story() -> None:
        store = await World().open()
        ours, theirs = segment_of(store, 1, own=True), segment_of(store, 2)
        old, gone, new = (
            record(ours, 10, provisional=False),
            deletion(theirs, 20),
            record(theirs, 30, provisional=False),
        )
        facts: list[Fact] = [old, gone._replace(provisional=False), new]
        catalog = told(store, [facts[index] for index in order])
        row = catalog.index.find(BLOCK_ID)
        assert catalog.index.location(row) == Location(theirs, 1, 1)
        if before:
            told(store, [deletion(theirs, 40)])
            assert catalog.index.find(BLOCK_ID) < 0
        await store.aclose()

    run(story)


@pytest.mark.parametrize("vanished", [False, True])
def test_a_newer_record_of_another_writer_is_remembered_while_the_own_one_is_read(vanished: bool) -> None:
    async def story() -> None:
        store = await World().open()
        merger = store._context.merger
        ours, theirs = segment_of(store, 1, own=True), segment_of(store, 2)
        catalog = told(store, [record(theirs, 30, provisional=False), record(ours, 10, provisional=False)])
        row = catalog.index.find(BLOCK_ID)
        assert catalog.index.location(row) == Location(ours, 1, 1), "whatever their writer does with theirs"
        assert merger.reads_older == 1
        told(store, [record(ours, 15, provisional=False)._replace(location=Location(ours, 5, 1))])
        assert catalog.index.location(row) == Location(ours, 5, 1), "the newest of the own ones"
        if vanished:
            await store._context.disk.table.forget(theirs)
            told(store, [VanishedFact(theirs), deletion(ours, 20)])
            assert catalog.index.find(BLOCK_ID) < 0
        else:
            for _ in merger.adopted({theirs}):
                check_invariants(store)
            assert catalog.index.location(row) == Location(theirs, 1, 1), "it is ours now, and the other may go"
        assert merger.reads_older == 0
        await store.aclose()

    run(story)


def test_of_more_newer_records_than_are_remembered_theirs_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        monkeypatch.setattr(merging, "NEWER_MAX", 0)
        store = await World().open()
        ours, theirs = segment_of(store, 1, own=True), segment_of(store, 2)
        catalog = told(store, [record(ours, 10, provisional=False), record(theirs, 30, provisional=False)])
        told(store, [deletion(theirs, 20)])
        assert catalog.index.location(catalog.index.find(BLOCK_ID)) == Location(theirs, 1, 1)
        await store.aclose()

    run(story)


@pytest.mark.parametrize("told_later", ["as durable", "vanished", "deleted"])
def test_a_record_that_stands_by_is_forgotten_once_it_is_not_needed(told_later: str) -> None:
    async def story() -> None:
        store = await World().open()
        merger = store._context.merger
        old, new = segment_of(store, 1), segment_of(store, 2)
        catalog = told(store, [record(old, 10, provisional=False), record(new, 30, provisional=True)])
        row = catalog.index.find(BLOCK_ID)
        assert catalog.index.location(row) == Location(old, 1, 1), "read from where it is durable"
        assert len(merger._standbys) == 1
        if told_later == "as durable":
            told(store, [record(new, 30, provisional=False)])
        elif told_later == "vanished":
            await store._context.disk.table.forget(new)
            told(store, [VanishedFact(new)])
        else:
            assert merger.delete(row, 15) == 30, "older than what it deletes"
            told(store, [record(new, 30, provisional=True)])
        told(store, [deletion(old, 20)])
        assert not merger._standbys
        assert (catalog.index.find(BLOCK_ID) >= 0) is (told_later == "as durable")
        await store.aclose()

    run(story)


def test_of_more_than_may_stand_by_those_told_last_do(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        monkeypatch.setattr(merging, "STANDBYS_MAX", 2)
        store = await World().open()
        old, new = segment_of(store, 1), segment_of(store, 2)
        digests = [hashlib.sha256(b"%d" % number).digest() for number in range(3)]
        late: list[Fact] = []
        for digest in digests:
            late.append(record(new, 30, provisional=True)._replace(digest=digest))
            told(store, [record(old, 10, provisional=False)._replace(digest=digest), late[-1]])
        catalog = told(store, [deletion(new, 20)._replace(block_id=digest[:16]) for digest in digests])
        assert [catalog.index.find(digest[:16]) >= 0 for digest in digests] == [False, True, True]
        told(store, late)  # the next look
        assert all(catalog.index.find(digest[:16]) >= 0 for digest in digests)
        await store.aclose()

    run(story)


@pytest.mark.parametrize(
    "written", ["before the deletion is heard of", "before it is put again", "after it is put again"]
)
def test_an_own_record_that_a_deletion_covers_is_no_reason_not_to_write_again(written: str) -> None:
    """Known to be live was another writer's alone, of which nothing was left after the loss of power."""

    async def story() -> None:
        world = World(tail_seconds_max=1000.0)
        writer, deleter = sorted([await world.open() for _ in range(2)], key=lambda other: other._context.writer)
        store = await world.open()
        value = pseudo_bytes("value", 60_000)
        block_id = await store.put(b"key", value)
        assert await deleter.put(b"key", value) == block_id
        await deleter.delete(block_id)
        await writer.put(b"first", b"")
        await writer.flush()
        storage = writer._context.platform.storage
        assert isinstance(storage, MemoryStorage)
        storage.hooks.append(lambda operation: asyncio.sleep(1000) if operation.name == "sync" else None)
        await writer.put(b"key", value)  # newer than the deletion, written, and never on stable storage
        flushing = asyncio.ensure_future(writer.flush())
        await asyncio.sleep(1.0)
        assert not flushing.done()
        if written == "before the deletion is heard of":
            await store.refresh()
            await store.flush()
        await deleter.flush()
        await store.refresh()  # tells the newer record before the deletion
        assert block_id in store
        check_invariants(store)
        if written == "before it is put again":
            await store.flush()
        await store.put(b"key", value)  # knows of the deletion
        check_invariants(store)
        await store.flush()
        check_invariants(store)
        await world.crash()
        store = await world.open()
        async with store.get(block_id) as block:
            assert bytes(block.value) == value
        await store.aclose()

    run(story)
