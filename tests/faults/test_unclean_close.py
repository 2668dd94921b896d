"""A store that could not write everything at its end leaves nothing that says otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Coroutine
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.testing.memory import Operation
from cascade_aio.testing.world import World, fail_with

NAMES = ca.prefix_keys(range(4), block_tokens=2, namespace="unclean")
KEY, VALUE = b"key" * 1000, b"value" * 1000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
async def test_a_name_that_never_reached_the_disk_is_not_taken_for_durable_by_the_next_session(code: int) -> None:
    """Found by ``crashes campaign --file-system ext4 --seed 1``: the checkpoint spoke of it, no segment did."""
    world = World(when_full="refuse")
    async with contextlib.aclosing(await world.open()) as store:
        block_id = await store.put(KEY, VALUE)
        other_id = await store.put(VALUE, KEY)
    store = await world.open()
    world.storage.hooks.append(fail_with(code, "create", "write", path_part=".seg", times=10_000))
    await store.put(KEY, VALUE, prefix=NAMES[0])
    await store.delete(other_id)
    with pytest.raises((ca.TierFullError, ca.BrokenTierError)):
        await store.aclose()
    store = await world.open()
    assert other_id in store  # its deletion was not acknowledged, and every session sees the same
    await store.put(KEY, VALUE, prefix=NAMES[0])
    await store.flush()
    await world.crash()
    async with contextlib.aclosing(await world.open()) as store:
        assert len(store.lookup([NAMES[0]])) == 1
        async with store.get(NAMES[0]) as block:
            assert block.block_id == block_id


async def test_what_another_writer_had_not_made_durable_is_in_no_checkpoint() -> None:
    """Found by ``crashes campaign --file-system ext4 --seed 4003``: a block that had come to nothing stayed known."""
    world = World()
    writer = await world.open()
    block_id = await writer.put(KEY, VALUE)
    await writer.flush()

    def hang(operation: Operation) -> Coroutine[Any, Any, Any] | None:
        return asyncio.Event().wait() if operation.name == "sync" and not operation.after else None

    world.storage.hooks.append(hang)
    bystander = await world.open()
    unsynced = await writer.put(VALUE, KEY)
    await writer.put(KEY, VALUE, prefix=NAMES[0])
    flush = asyncio.create_task(writer.flush())
    while len(bystander.lookup([NAMES[0]])) == 0 or unsynced not in bystander:
        await bystander.refresh()
    await bystander.put(b"own", b"block")
    await bystander.aclose()
    await world.crash()
    assert flush.cancelled()
    store = await world.open()
    assert unsynced not in store
    assert len(store.lookup([NAMES[0]])) == 0
    await store.put(KEY, VALUE, prefix=NAMES[0])
    await store.flush()
    await world.crash()
    async with contextlib.aclosing(await world.open()) as store, store.get(NAMES[0]) as block:
        assert block.block_id == block_id
