"""Ranks as a user would write them: every call of a store on blocks of another rank; several communicators."""

from __future__ import annotations

import asyncio
from typing import Any

import cascade_aio as ca
from cascade_aio.errors import BlockNotFoundError, ConfigError
from tests.mpi.remote_jobs import SETTINGS, STEP_SECONDS, together, until

NUMBERS = range(6)


def keys_of(namespace: str) -> list[ca.PrefixKey]:
    return ca.prefix_keys(NUMBERS, block_tokens=1, namespace=namespace)


async def put_all(store: ca.Store, keys: list[ca.PrefixKey]) -> list[str]:
    return [str(await store.put(bytes([n]) * 5000, bytes([n]) * 6000, prefix=key)) for n, key in enumerate(keys)]


async def every_call(root: str) -> dict[str, Any]:
    """Rank 0 puts, the others use; then rank 1 deletes and puts something else."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    found: dict[str, Any] = {}
    keys = keys_of("every call")
    async with ca.open_store(root, comm=world, **SETTINGS) as store:
        ids = await put_all(store, keys) if world.rank == 0 else []
        await until(
            lambda: not store.statistics()["remote"]["to_list"] and not store.statistics()["remote"]["under_way"]
        )
        await together()
        ids = world.bcast(ids)
        if world.rank:
            found["cached"] = len(await store.lookup(keys))
            key, value = bytearray(5000), bytearray(6000)
            await store.read_into(keys[1], key, value)
            found["read_into"] = [set(key) == {1}, set(value) == {1}]
            async with store.get_prefix(keys[:3]) as blocks:
                found["get_prefix"] = [int(block.key[0]) for block in blocks]
            async with store.stream(keys[:5]) as blocks_in_turn:
                found["stream"] = [int(block.value[-1]) async for block in blocks_in_turn]
            async with store.get(ids[5]) as block:
                found["by_id"] = int(block.key[0])
            found["known_now"] = keys[0] in store and ids[5] in store
            try:
                (await store.get(keys_of("never put")[0])).release()
            except BlockNotFoundError:
                found["unknown"] = "not found"
        await together()
        if world.rank == 1:
            await store.delete(keys[0])
            try:
                (await store.get(keys[0])).release()
            except BlockNotFoundError:
                found["deleted"] = "not found"
            await store.put(b"new" * 1000, b"er" * 1000, prefix=keys[0])
            async with store.get(keys[0]) as block:
                found["put_again"] = bytes(block.key[:3]).decode()
        await together()
    return found


async def communicators(root: str) -> dict[str, Any]:
    """A store of one's own, one of half of the ranks, and two of all at once; roots that differ are refused."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    found: dict[str, Any] = {}
    async with ca.open_store(f"{root}-{world.rank}", comm=MPI.COMM_SELF, **SETTINGS) as alone:
        (name,) = {await alone.put(b"a" * 5000, b"b" * 5000)}
        async with alone.get(name) as block:
            found["alone"] = len(block.key)
    half = world.Split(world.rank % 2)
    with_half = ca.open_store(f"{root}-half-{world.rank % 2}", comm=half, **SETTINGS)
    async with with_half as store, ca.open_store(root, comm=world, **SETTINGS) as wide:
        (key,) = keys_of("shared")[:1]
        if half.rank == 0:
            await store.put(b"half" * 1000, bytes([world.rank]) * 4000, prefix=key)
        if world.rank == 3:
            await wide.put(b"all" * 1000, b"every" * 1000, prefix=key)
        await found_in(store, key)
        await found_in(wide, key)
        async with store.get(key) as narrow, wide.get(key) as broad:
            found["half"] = [bytes(narrow.key[:4]).decode(), int(narrow.value[0]) == world.rank % 2]
            found["all"] = bytes(broad.key[:3]).decode()
        await together()
    try:
        async with ca.open_store(f"{root}-half-{world.rank % 2}", comm=world, **SETTINGS):
            found["two roots"] = "opened"
    except ConfigError as error:
        found["two roots"] = "open the same root on every rank" in str(error)
    return found


async def found_in(store: ca.Store, key: ca.PrefixKey) -> None:
    """Until another rank's put has been heard of."""
    while True:
        if await store.contains(key):
            return
        await asyncio.sleep(STEP_SECONDS)
