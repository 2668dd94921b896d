"""Looking at a root while others move what is in it: what they move is found before or behind, not lost between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cascade_aio.model import BlockId, prefix_keys
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import MemoryStorage, Operation
from cascade_aio.testing.world import World, check_invariants, pseudo_bytes, run

(NAME,) = prefix_keys([7], block_tokens=1)


def once(
    storage: MemoryStorage, when: Callable[[Operation], bool], work: Callable[[], Coroutine[Any, Any, object]]
) -> list[str]:
    """Before the first operation that ``when`` picks, ``work`` is done; what was picked."""
    picked: list[str] = []

    def hook(operation: Operation) -> Any:
        if picked or not when(operation):
            return None
        picked.append(operation.path)
        return work()

    storage.hooks.append(hook)
    return picked


async def with_dead_bytes(world: World) -> tuple[Store, BlockId]:
    """A store with a block in a sealed segment that is worth compacting."""
    store = await world.open()
    dead = await store.put(b"dead", pseudo_bytes("dead", 300_000))
    block_id = await store.put(b"key", pseudo_bytes("value", 30_000))
    await store.flush()
    await store.delete(dead)
    await store.flush()
    await store._context.disk.writer.rotate()
    return store, block_id


class Hooked(list[Any]):
    """Storages of a world: the next one gets a hook before anything is done with it."""

    def __init__(self, prepare: Callable[[MemoryStorage], None]) -> None:
        super().__init__()
        self._prepare = prepare

    def append(self, storage: MemoryStorage) -> None:
        self._prepare(storage)
        super().append(storage)


@pytest.mark.parametrize("read_only", [False, True])
def test_an_opening_beside_a_compaction_finds_what_that_moves(read_only: bool) -> None:
    """The segment was listed, and gone when it was to be read; where it had gone was not listed."""

    async def story() -> None:
        world = World()
        writer, block_id = await with_dead_bytes(world)
        picked: list[list[str]] = []
        world.storages = Hooked(
            lambda storage: picked.append(
                once(storage, lambda op: op.name == "open" and op.path.endswith(".seg"), writer.compact)
            )
        )
        reader = await world.open(read_only=read_only)
        assert picked[0], "the compaction came in between"
        assert block_id in reader
        async with reader.get(block_id) as block:
            assert bytes(block.value) == pseudo_bytes("value", 30_000)
        check_invariants(reader)
        await reader.aclose()
        await writer.aclose()

    run(story)


def test_a_deletion_that_moves_between_directories_while_they_are_listed_is_heard() -> None:
    """It moves from a directory that is listed last to one that was listed first."""

    async def story() -> None:
        world = World(shm_bytes=2 << 20)
        stores = sorted([await world.open() for _ in range(3)], key=lambda store: store._context.writer)
        first, middle, last = stores
        block_id = await middle.put(b"key", pseudo_bytes("value", 30_000))
        await middle.flush()
        await last.refresh()
        await last.delete(block_id)
        await last.flush()
        path = f"/kv/writers/{last._context.writer.hex()}"
        storage = last._context.platform.storage
        assert isinstance(storage, MemoryStorage)
        storage.freeze_at = 0  # it is killed
        world.disk.locked.discard(f"{path}/lock")

        async def move() -> None:
            await first.adopt()
            await first.compact()

        listings = 0

        def second_listing(operation: Operation) -> bool:  # the first looks for checkpoints
            nonlocal listings
            listings += (operation.name, operation.path, operation.after) == ("list_directory", path, False)
            return listings == 2

        picked: list[list[str]] = []
        world.storages = Hooked(lambda storage: picked.append(once(storage, second_listing, move)))
        reader = await world.open(read_only=True)
        assert picked[0]
        assert not any(name.startswith(path) and name.endswith(".seg") for name in world.disk.files), "it has moved"
        assert block_id not in reader, "deleted, and flushed"
        await reader.aclose()
        for store in (first, middle):
            await store.aclose()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    run(story)


def test_a_name_of_a_block_that_another_writer_moves_during_a_refresh_is_kept() -> None:
    async def story() -> None:
        world = World()
        writer = await world.open()
        dead = await writer.put(b"dead", pseudo_bytes("dead", 300_000))
        block_id = await writer.put(b"key", pseudo_bytes("value", 30_000))
        await writer.flush()
        await writer.put(b"more", b"")
        await writer.flush()
        reader = await world.open()
        assert block_id in reader
        await reader.put(b"key", pseudo_bytes("value", 30_000), prefix=NAME)
        await reader.flush()
        await writer.delete(dead)
        await writer.flush()
        storage = reader._context.platform.storage
        assert isinstance(storage, MemoryStorage)
        for copy in list(reader._context.catalog.copies.values()):
            reader._context.catalog.evict(copy)
        handles = reader._context.disk.table._handles
        for number in list(handles._handles):
            await handles._drop(number)
        picked = once(storage, lambda op: op.name == "open" and op.path.endswith(".seg"), writer.compact)
        await reader.refresh()
        assert picked
        await reader.refresh()
        assert NAME in reader, "flushed by the reader"
        async with reader.get(NAME) as block:
            assert block.block_id == block_id
        await reader.aclose()
        await writer.aclose()

    run(story)
