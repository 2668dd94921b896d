"""What the simulation has found, each as a story of its own: a name says what was wrong."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

from cascade_aio.testing.world import World, cancel_others, fail_with, pseudo_bytes, virtual_loop


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = virtual_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(story())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def kill(world: World) -> None:
    """The processes end where they are; the kernel and its page cache live."""
    world.disk = world.disk.kill()
    for storage in world.storages:
        storage.freeze_at = 0
    await cancel_others()
    world.storages.clear()


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
        await kill(world)
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
