"""What the simulation has found, each as a story of its own: a name says what was wrong."""

from __future__ import annotations

import asyncio
import errno
import itertools
from typing import Any

import pytest

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import BlockNotFoundError
from cascade_aio.model import compute_block_id, prefix_keys
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import Operation
from cascade_aio.testing.simulation.oracle import Life, Oracle
from cascade_aio.testing.world import World, fail_with, pseudo_bytes, run


def test_what_an_adopter_found_after_a_failed_sync_survives_the_next_loss_of_power() -> None:
    """Seeds 10, 41, 178: pages that a failed sync left in the page cache are clean there, a sync passes over them."""

    async def story() -> None:
        world = World()
        store = await world.open()
        await store.put(b"first", b"")
        await store.flush()
        block_id = await store.put(b"key", pseudo_bytes("value", 60_000))
        world.storage.hooks.append(fail_with(errno.EIO, "sync", path_part=".seg", times=100))
        await asyncio.sleep(1.1)  # written and synced in vain; killed before that is done elsewhere
        paths = [path for path, inode in world.disk.files.items() if inode.lost]
        assert paths
        await world.kill()
        store = await world.open()
        assert block_id in store
        assert await store.put(b"key", pseudo_bytes("value", 60_000)) == block_id
        await store.flush()
        await world.crash()
        store = await world.open()
        async with store.get(block_id) as block:
            assert bytes(block.value) == pseudo_bytes("value", 60_000)
        assert (await store.verify()).damage == ()
        await store.aclose()

    run(story)


def test_two_writers_who_hold_the_same_block_do_not_both_reclaim_it() -> None:
    """Seed 219: each took the other's record for the one that counts, and its own for dead."""

    async def story() -> None:
        world = World(shm_bytes=2 << 20)
        first, second = await world.open(), await world.open()
        for number, store in enumerate((first, second)):
            await store.put(b"%d" % number, pseudo_bytes(f"dead {number}", 300_000))
        await first.put(b"both", pseudo_bytes("both", 60_000))
        await first.flush()
        await second.refresh()  # not known to be durable: the second writes it again, with the same stamp
        await second.put(b"both", pseudo_bytes("both", 60_000))
        await second.flush()
        await first.put(b"more", b"")
        await first.flush()  # now it is known, and told again
        await second.refresh()
        await first.aclose()
        await second.aclose()
        stores = [await world.open(), await world.open()]
        both = compute_block_id(b"both", pseudo_bytes("both", 60_000))
        for number, store in enumerate(stores):
            await store.delete(compute_block_id(b"%d" % number, pseudo_bytes(f"dead {number}", 300_000)))
            await store.flush()
        for store in stores:
            await store.refresh()
        for store in stores:
            await store.compact()
        await world.crash()
        store = await world.open()
        async with store.get(both) as block:
            assert bytes(block.value) == pseudo_bytes("both", 60_000)
        await store.aclose()

    run(story)


def test_names_of_blocks_in_a_segment_that_could_not_be_read_survive_a_checkpoint() -> None:
    """Seed 627: the checkpoint covered the note with the name, and left out the block."""

    async def story() -> None:
        world = World(tail_seconds_max=0.5)
        (name,) = prefix_keys(range(1), block_tokens=1)
        store = await world.open()
        block_id = await store.put(b"key", pseudo_bytes("value", 60_000))
        await store.flush()
        await store.put(b"more", b"")  # its header says that the first is on stable storage
        await store.flush()
        await world.kill()

        class Failing(list[Any]):
            """Reads of payloads and trailers fail in the first storage that is added."""

            def append(self, storage: Any) -> None:
                if not self:
                    storage.hooks.append(fail_with(errno.EIO, "read", path_part=".seg", times=1))
                super().append(storage)

        world.storages = Failing()
        store = await world.open()
        assert any(entry.unreadable for entry in store._context.disk.table)
        assert await store.put(b"key", pseudo_bytes("value", 60_000), prefix=name) == block_id
        await store.aclose()
        world.storages = []
        store = await world.open()
        assert block_id in store
        assert name in store
        await store.aclose()

    run(story)


def test_names_of_blocks_in_a_segment_that_could_not_be_sealed_survive_a_checkpoint() -> None:
    """Seed 2524: the checkpoint covered the note with the name, and left out the block, whose segment is read again."""

    async def story() -> None:
        world = World()
        (name,) = prefix_keys(range(1), block_tokens=1)
        store = await world.open()
        block_id = await store.put(b"key", pseudo_bytes("value", 60_000))
        await store.flush()
        await world.kill()

        class Failing(list[Any]):
            """The storage that is added cannot cut a segment to its size, the first step of sealing it."""

            def append(self, storage: Any) -> None:
                storage.hooks.append(fail_with(errno.EIO, "truncate", path_part=".seg"))
                super().append(storage)

        world.storages = Failing()
        store = await world.open()
        assert store._context.recovery.report.seal_failures == 1
        assert block_id in store
        assert await store.put(b"key", pseudo_bytes("value", 60_000), prefix=name) == block_id
        await store.aclose()
        world.storages = []
        store = await world.open()
        assert block_id in store
        assert name in store
        await store.aclose()

    run(story)


def test_an_own_segment_that_an_opening_could_not_read_is_read_by_the_next_and_by_no_refresh() -> None:
    """Seed 4625: the oracle took a refresh for a look at what the dead had left in the directory, too."""

    async def story() -> None:
        world, oracle = World(), Oracle(skewed=False)

        async def opened(*, counts: bool) -> tuple[Store, Life]:
            life = oracle.born(0, budget=False)
            token = oracle.look_begins(life)
            store = await world.open()
            oracle.look_ends(life, token, counts=counts)
            return store, life

        store, life = await opened(counts=True)
        put = oracle.put_begins(life, 0, None)
        block_id = await store.put(b"key", pseudo_bytes("value", 60_000))
        oracle.put_ends(put, stored=True)
        began = oracle.now()
        await store.flush()
        oracle.flushed(life, began)
        await world.kill()
        oracle.died(life)

        class Failing(list[Any]):
            """The storage that is added cannot open a segment once."""

            def append(self, storage: Any) -> None:
                storage.hooks.append(fail_with(errno.EIO, "open", path_part=".seg"))
                super().append(storage)

        world.storages = Failing()
        store, life = await opened(counts=False)
        assert store.statistics()["disk"]["recovery"]["unreadable"] == 1
        token = oracle.look_begins(life)
        assert await store.refresh() == 0
        oracle.look_ends(life, token, counts=True)
        assert block_id not in store
        assert not oracle.must_see(life, 0)
        await store.aclose()
        oracle.died(life)
        world.storages = []
        store, life = await opened(counts=True)
        assert block_id in store
        assert oracle.must_see(life, 0)
        await store.aclose()

    run(story)


def test_verify_does_not_doubt_what_is_written_while_it_reads() -> None:
    """Seed 804: a segment that grew during the walk was called inconsistent, and its newest blocks were forgotten."""

    async def story() -> None:
        world = World()
        store = await world.open()
        await store.put(b"first", pseudo_bytes("first", 60_000))
        await store.flush()
        slow = [asyncio.sleep(1.0)]
        world.storage.hooks.append(
            lambda operation: slow.pop() if slow and operation.name == "read" and not operation.after else None
        )
        verifying = asyncio.ensure_future(store.verify())
        await asyncio.sleep(0.5)
        assert not slow
        block_id = await store.put(b"second", pseudo_bytes("second", 60_000))
        await store.flush()
        assert (await verifying).clean
        assert block_id in store
        await store.aclose()

    run(story)


def test_a_footer_is_not_reported_as_damage_when_the_trailer_behind_it_cannot_be_read() -> None:
    """Seed 400: one look could not read the footer, the next not the trailer, and took the footer for a lost record."""

    async def story() -> None:
        world = World()
        reader, writer = await world.open(), await world.open()
        storage = world.storages[0]
        block_id = await writer.put(b"key", pseudo_bytes("value", 60_000))
        await writer.aclose()
        (path,) = (path for path in world.disk.files if path.endswith(".seg"))
        size = len(world.disk.content(path))
        for bad in (size - 2 * PAGE_BYTES, size - PAGE_BYTES):

            def fail(operation: Operation, bad: int = bad) -> OSError | None:
                hit = operation.name == "read" and operation.offset <= bad < operation.offset + operation.nbytes
                return OSError(errno.EIO, "read failed", path) if hit and operation.path == path else None

            storage.hooks[:] = [fail]
            await reader.refresh()
            assert block_id in reader
        storage.hooks.clear()
        reports = reader.statistics()["damage"]
        assert reports
        assert all("unreadable" in report for report in reports), reports
        await reader.refresh()
        report = await reader.verify()
        assert (report.damage, report.inconsistent) == ((), ())
        await reader.aclose()

    run(story)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_deletion_does_not_take_what_was_put_after_it_along_in_whatever_order_they_are_read(
    order: tuple[int, int, int],
) -> None:
    """Seed 385: the put had given way to an older record, which is known to be durable; then the deletion was read."""

    async def story() -> None:
        world = World(tail_seconds_max=0.05)
        (name,) = prefix_keys(range(1), block_tokens=1)
        value = pseudo_bytes("value", 60_000)
        stores = sorted([await world.open() for _ in order], key=lambda store: store._context.writer)  # as it is listed
        first, deleter, second = (stores[index] for index in order)
        block_id = await first.put(b"key", value)
        await first.aclose()  # sealed: this record is durable beyond doubt
        await deleter.refresh()
        await deleter.delete(block_id)
        await asyncio.sleep(1.0)
        assert await second.put(b"key", value, prefix=name) == block_id  # knows neither of the two
        await second.flush()
        store = await world.open()
        for _ in range(2):
            assert block_id in store
            assert name in store
            async with store.get(name) as block:
                assert bytes(block.value) == value
            await store.refresh()
        await store.delete(block_id)
        await store.flush()
        await world.kill()
        store = await world.open()
        assert block_id not in store
        assert name not in store
        await store.aclose()

    run(story)


def test_a_deletion_behind_a_lost_write_is_heard_once_the_segment_is_sealed_and_by_an_opening() -> None:
    """Seed 1927: what a refresh of others cannot hear, because it waits at a hole for the writer to fill it."""

    async def story() -> None:
        world = World()
        reader, writer = await world.open(), await world.open()
        block_id = await reader.put(b"key", pseudo_bytes("value", 60_000))
        await reader.flush()
        await writer.put(b"lost", pseudo_bytes("lost", 60_000))
        await writer.flush()
        directory = f"/writers/{writer._context.writer.hex()}/"
        (path,) = (path for path in world.disk.files if directory in path and path.endswith(".seg"))
        world.disk.poke(path, PAGE_BYTES, bytes(PAGE_BYTES))  # a header, before anybody has seen it
        await writer.refresh()
        await writer.delete(block_id)
        await writer.flush()
        await reader.refresh()
        opened = await world.open()
        assert block_id not in opened
        await writer.aclose()
        await reader.refresh()
        assert block_id not in reader
        for store in (opened, reader):
            await store.aclose()

    run(story)


def test_what_a_crash_cut_short_is_no_damage_to_an_opening_that_could_not_verify_it() -> None:
    """Seeds 5045, 5464: its payload could not be read then; a get and ``verify`` could read it, and it was torn."""

    async def story() -> None:
        world = World(segment_bytes=8 << 20)  # so that a flush of this size is not marked
        store = await world.open()
        await store.put(b"first", b"")
        await store.flush()
        block_id = await store.put(b"key", pseudo_bytes("value", 60_000))
        await store.flush()
        row = store._context.catalog.index.find(block_id)
        location = store._context.catalog.index.location(row)
        assert location is not None
        path = store._context.disk.table[location[0]].path
        payload = (location[1] + location[2]) * PAGE_BYTES
        await world.kill()
        world.disk.poke(path, payload, bytes(PAGE_BYTES))

        class Failing(list[Any]):
            """The first read of the payload fails."""

            def append(self, storage: Any) -> None:
                storage.hooks.append(fail_once)
                super().append(storage)

        failures = [OSError(errno.EIO, "read failed", path)]

        def fail_once(operation: Operation) -> OSError | None:
            return failures.pop() if failures and (operation.name, operation.offset) == ("read", payload) else None

        world.storages = Failing()
        store = await world.open()
        assert not failures
        assert block_id in store
        assert (await store.verify()).damage == ()
        with pytest.raises(BlockNotFoundError):
            await store.get(block_id)
        await store.aclose()

    run(story)
