"""A name that several blocks claim: which has it does not depend on who was heard first, and passes on with its end."""

from __future__ import annotations

import asyncio
import hashlib
import itertools

import pytest

from cascade_aio.core.index import BlockIndex
from cascade_aio.errors import TierFullError
from cascade_aio.model import BlockId, compute_block_id, prefix_keys
from cascade_aio.segments.facts import BindingFact, BlockFact, Fact, Location, TombstoneFact
from cascade_aio.store import naming
from cascade_aio.store.naming import Name, NameKeeper
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import MemoryStorage
from cascade_aio.testing.world import World, cancel_others, check_invariants, pseudo_bytes, run
from tests.store.test_merging import segment_of

NAME, OTHER = prefix_keys([1, 2], block_tokens=1)


def digest_of(block: int) -> bytes:
    return hashlib.sha256(b"block %d" % block).digest()


def record(segment: int, block: int, stamp: int) -> BlockFact:
    return BlockFact(Location(segment, block, 1), 8192, digest_of(block), 100, 1000, stamp, False)


def binding(segment: int, block: int, stamp: int) -> BindingFact:
    return BindingFact(Location(segment, block, 1), digest_of(block)[:16], NAME, None, stamp, False)


def named(store: Store) -> bytes | None:
    index = store._context.catalog.index
    row = index.find_prefix(NAME)
    return None if row < 0 else index.digest(row)


FACTS = [("record", 1), ("name", 1), ("record", 2), ("name", 2), ("delete", 1)]


@pytest.mark.parametrize("deleted", [False, True])
def test_the_oldest_claim_wins_in_whatever_order_it_is_told(deleted: bool) -> None:
    async def story() -> None:
        for order in itertools.permutations(FACTS if deleted else FACTS[:4]):
            store = await World().open()
            segment = segment_of(store, 1)
            facts: dict[tuple[str, int], Fact] = {
                ("record", 1): record(segment, 1, 10),
                ("name", 1): binding(segment, 1, 10),
                ("record", 2): record(segment, 2, 20),
                ("name", 2): binding(segment, 2, 20),
                ("delete", 1): TombstoneFact(Location(segment, 3, 1), digest_of(1)[:16], 15, False),
            }
            for what in order:
                store._context.merger.apply(facts[what])
            store._context.merger.names.settle()
            check_invariants(store)
            assert named(store) == digest_of(2 if deleted else 1), order
            await store.aclose()

    run(story)


async def two_writers_claim(world: World) -> tuple[Store, Store, BlockId, BlockId]:
    """Two stores that do not know of each other put different bytes under one name, durable; the first is older."""
    first, second = await world.open(), await world.open()
    ids = [
        await store.put(b"%d" % number, pseudo_bytes(f"value {number}", 20_000), prefix=NAME)
        for number, store in enumerate((first, second))
    ]
    for store in (first, second):
        await store.flush()
    return first, second, ids[0], ids[1]


async def name_of(store: Store) -> BlockId | None:
    if not store.lookup([NAME]):
        return None
    async with store.get(NAME) as block:
        return block.block_id


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("attempt", range(3))
def test_all_who_read_a_root_agree_on_a_name_that_two_writers_gave(attempt: int, checkpoint: bool) -> None:
    """Before, whoever was heard first had it: the directory that comes first, and directories have random names."""

    async def story() -> None:
        world = World()
        first, second, older, younger = await two_writers_claim(world)
        await first.refresh()
        await second.refresh()
        assert [await name_of(store) for store in (first, second)] == [older, older]
        if checkpoint:
            await first.aclose()
            await second.aclose()
        else:
            await world.crash()
        store = await world.open()
        assert await name_of(store) == older
        assert younger in store
        await store.delete(older)
        assert await name_of(store) == younger, "its put under that name was flushed, too"
        await store.flush()
        await world.crash()
        store = await world.open()
        assert await name_of(store) == younger
        await store.aclose()

    run(story)


def test_a_block_put_under_the_name_of_one_that_was_never_finished_gets_the_name() -> None:
    """Another writer's record, not known to be durable, has the name; what it held was lost with its writer."""

    async def story() -> None:
        world = World(tail_seconds_max=1000.0)
        first, second = await world.open(), await world.open()
        await second.put(b"is", b"open")
        await second.flush()
        storage = first._context.platform.storage
        assert isinstance(storage, MemoryStorage)
        await first.put(b"is", b"open too")
        await first.flush()
        storage.hooks.append(lambda operation: asyncio.sleep(1000) if operation.name == "sync" else None)
        lost = await first.put(b"lost", pseudo_bytes("lost", 20_000), prefix=NAME)
        flushing = asyncio.ensure_future(first.flush())
        await asyncio.sleep(1.0)
        await second.refresh()
        assert await name_of(second) == lost, "seen, and not known to be durable"
        for copy in list(second._context.catalog.copies.values()):
            if not copy.holds:
                second._context.catalog.evict(copy)
        assert await second.put(b"kept", pseudo_bytes("kept", 20_000), prefix=NAME) == lost
        await second.flush()
        world.disk.crash_directory(f"/kv/writers/{first._context.writer.hex()}", seed=3)
        first._context.platform.storage.freeze_at = 0  # type: ignore[attr-defined]
        flushing.cancel()
        world.disk.locked.discard(f"/kv/writers/{first._context.writer.hex()}/lock")
        await second.adopt()
        assert lost not in second
        kept = compute_block_id(b"kept", pseudo_bytes("kept", 20_000))
        assert kept in second
        assert await name_of(second) == kept
        await second.aclose()
        await cancel_others()

    run(story)


def test_a_put_under_a_name_that_was_only_heard_makes_it_durable() -> None:
    """Seed 60365: the block was durable elsewhere, so the put was answered as bound, and flushed; the name was not."""

    async def story() -> None:
        world = World()
        store = await world.open()
        block_id = await store.put(b"key", pseudo_bytes("value", 20_000))
        await store.flush()
        heard = BindingFact(Location(segment_of(store, 9), 1, 1), block_id, NAME, OTHER, 7, True)
        stamp = store._context.catalog.index.stamp(store._context.catalog.index.find(block_id))
        store._context.merger.apply(heard._replace(stamp=stamp))
        assert await store.put(b"key", pseudo_bytes("value", 20_000), prefix=NAME, parent=OTHER) == block_id
        await store.flush()
        notes = store._context.disk.writer.statistics.notes
        await store.put(b"key", pseudo_bytes("value", 20_000), prefix=NAME, parent=OTHER)
        assert store._context.disk.writer.statistics.notes == notes, "once"
        await world.crash()
        store = await world.open()
        assert await name_of(store) == block_id
        assert store._context.catalog.index.bindings(store._context.catalog.index.find(block_id)) == [(NAME, OTHER)]
        await store.aclose()

    run(story)


@pytest.mark.parametrize("moved", [True, False])
def test_compaction_keeps_the_name_of_a_block_that_lost_it_to_another(moved: bool) -> None:
    """The other may be deleted, or never become durable. ``moved``: its record is copied, too, or it is elsewhere."""

    async def story() -> None:
        world = World(shm_bytes=2 << 20)
        first, second = await world.open(), await world.open()
        older = await first.put(b"older", pseudo_bytes("older", 20_000), prefix=NAME)
        dead = await second.put(b"dead", pseudo_bytes("dead", 300_000))
        if not moved:
            await second.put(b"younger", pseudo_bytes("younger", 20_000))
            await second.flush()
            await second.compact()
        younger = await second.put(b"younger", pseudo_bytes("younger", 20_000), prefix=NAME)
        await second.flush()
        await first.flush()
        await second.refresh()
        assert await name_of(second) == older
        await second.delete(dead)
        await second.flush()
        report = await second.compact()
        assert report.bytes_after < report.bytes_before
        await first.delete(older)
        await first.flush()
        await world.crash()
        store = await world.open()
        assert older not in store
        assert await name_of(store) == younger
        await store.aclose()

    run(story)


# -- the keeper itself ------------------------------------------------------------------------------


def keeper(blocks: int, *, bindings_max: int | None = None) -> NameKeeper:
    index = BlockIndex(capacity_max=16, bindings_max=bindings_max)
    for block in range(blocks):
        index.add(digest_of(block), 1, 1)
    return NameKeeper(index)


def claim(block: int, stamp: int, *, parent: bytes | None = None) -> Name:
    return Name(digest_of(block)[:16], NAME, parent, stamp)


def holder(names: NameKeeper) -> int:
    return names.index.find_prefix(NAME)


def test_of_equal_claims_the_smaller_id_wins() -> None:
    smallest = min(range(3), key=digest_of)
    for order in itertools.permutations(range(3)):
        names = keeper(3)
        for block in order:
            names.claim(claim(block, 7))
        assert holder(names) == smallest


def test_a_claim_that_is_told_again_of_later_counts_as_later() -> None:
    """As in a segment that was compacted: of several claims of one block the newest is left."""
    told = [claim(0, 5), claim(0, 20), claim(1, 9)]
    for order in itertools.permutations(told):
        names = keeper(2)
        for name in order:
            names.claim(name)
        assert holder(names) == 1, order
        names.index.remove(1)
        names.freed([NAME])
        assert holder(names) == 0, order


def test_more_rivals_than_are_remembered_cost_only_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "RIVALS_MAX", 2)
    names = keeper(2)
    keys = prefix_keys(range(4), block_tokens=1)
    for key in keys:
        names.claim(claim(0, 5)._replace(key=key))
        names.claim(claim(1, 9)._replace(key=key))
    assert names.rivals_count == 2
    contested = names.contested(0)
    names.index.remove(0)
    names.freed(contested)
    assert [names.index.find_prefix(key) for key in keys] == [-1, -1, 1, 1]
    assert names.rivals_count == 0


def test_without_room_for_the_parent_of_the_winner_the_name_stays_where_it_is() -> None:
    names = keeper(2, bindings_max=1)
    names.claim(claim(0, 9))
    names.claim(claim(1, 5, parent=OTHER))
    assert holder(names) == 0
    assert [name.block_id for name in names.rivals()] == [digest_of(1)[:16]]
    full = keeper(2, bindings_max=1)
    full.claim(claim(0, 9))
    with pytest.raises(TierFullError):
        full.claim(claim(1, 5)._replace(key=OTHER))
