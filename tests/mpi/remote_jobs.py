"""What ranks do in the tests of the remote tier. Every byte that a rank gets is compared."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import cascade_aio
from cascade_aio.errors import BlockNotFoundError, BrokenTierError, ConfigError, TierFullError
from cascade_aio.model import BlockId, Tier
from cascade_aio.store.store import Store
from cascade_aio.testing.world import pseudo_bytes

SETTINGS: dict[str, Any] = {
    "shm_bytes": 8 << 20,
    "segment_bytes": 8 << 20,
    "stripe": "off",
    "adopt_seconds": None,
    "remote_seconds_max": 60.0,  # four ranks share two cores with others: one that was given no time is not lost
}

STEP_SECONDS = 0.01

READS_MIN = 20
"""Of other ranks' arenas while they change: a rank that was given little time goes on until it has so many."""


async def together() -> None:
    """A barrier that leaves the loop and the cores alone."""
    from mpi4py import MPI

    await until(MPI.COMM_WORLD.Ibarrier().Test)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what is bound to come; the job's time limit is the limit."""
    while True:
        if condition():
            return
        await asyncio.sleep(STEP_SECONDS)


def open_here(root: str, **settings: Any) -> Any:
    from mpi4py import MPI

    return cascade_aio.open_store(root, comm=MPI.COMM_WORLD, **{**SETTINGS, **settings})


def remote(store: Store) -> dict[str, Any]:
    statistics: dict[str, Any] = store.statistics()["remote"]
    return statistics


async def put(store: Store, seed: str, nbytes: int) -> BlockId:
    payload = pseudo_bytes(seed, nbytes)
    return await store.put(payload[: nbytes // 3], payload[nbytes // 3 :])


def id_of(seed: str, nbytes: int) -> BlockId:
    return BlockId(hashlib.sha256(pseudo_bytes(seed, nbytes)).digest()[:16])


async def check(store: Store, seed: str, nbytes: int) -> Tier:
    """Get the block, compare every byte, and tell where it came from."""
    async with store.get(id_of(seed, nbytes)) as block:
        assert bytes(block.key) + bytes(block.value) == pseudo_bytes(seed, nbytes), f"wrong bytes from {block.tier}"
        return block.tier


async def everybody_reads_everybody(root: str) -> dict[str, Any]:
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    sizes = [0, 1, 4096, 100_000, 1 << 20]
    async with open_here(root):  # windows of a store that was closed do not stand in the way of the next
        pass
    async with open_here(root) as store:
        for nbytes in sizes:
            await put(store, f"{rank}", nbytes)
        await until(lambda: remote(store)["to_list"] == 0)
        await together()
        tiers = [await check(store, f"{other}", nbytes) for other in range(size) for nbytes in sizes[1:]]
        found = remote(store)
        await together()
    return {"tiers": sorted(set(map(str, tiers))), "reads": found["reads"], "torn": found["torn"]}


async def arenas_change_under_readers(root: str, seconds: float) -> dict[str, Any]:
    """Every rank rewrites an arena of 8 MiB without rest, and reads what the others wrote last."""
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    wrong = reads = written = 0
    latest = [0] * size
    async with open_here(root, disk_bytes="64MiB") as store:
        await together()
        end_s = time.monotonic() + seconds

        async def write() -> None:
            nonlocal written
            while time.monotonic() < end_s:
                await put(store, f"{rank}-{written}", 200_000 + 1000 * (written % 7))
                written += 1

        async def read(reader: int) -> None:
            nonlocal reads, wrong
            turn = reader
            chance = random.Random(reader)
            while time.monotonic() < end_s or remote(store)["reads"] < READS_MIN:
                turn += 1
                other = (rank + 1 + turn % (size - 1)) % size
                # Nobody tells how far the others are: they write at much the same pace, so ask around our own.
                number = max(0, written - 8 + turn % 16) if turn % 4 else chance.randrange(2 * written + 16)
                try:
                    await check(store, f"{other}-{number}", 200_000 + 1000 * (number % 7))
                    reads += 1
                    latest[other] = max(latest[other], number)
                except (BlockNotFoundError, TierFullError):
                    await asyncio.sleep(0)
                except AssertionError:
                    wrong += 1

        await asyncio.gather(write(), *(read(reader) for reader in range(3)))
        counts = remote(store)
        await together()
    return {"wrong": wrong, "gets": reads, "written": written, **{k: counts[k] for k in ("reads", "stale", "torn")}}


async def one_closes_early(root: str) -> dict[str, Any]:
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    tiers: list[Tier] = []
    async with open_here(root) as store:
        for number in range(20):
            await put(store, f"{rank}-{number}", 30_000)
        await store.flush()
        await until(lambda: remote(store)["to_list"] == 0)
        await together()
        await store.refresh()
        if rank == 3:
            started = time.monotonic()
            await store.aclose()
            return {"closed_s": time.monotonic() - started}
        while 3 not in remote(store)["ranks_closed"]:
            tiers.append(await check(store, f"3-{len(tiers) % 20}", 30_000))
            await store.contains(BlockId(os.urandom(16)))
            await asyncio.sleep(STEP_SECONDS)
        tiers = [await check(store, f"{other}-{number}", 30_000) for other in range(4) for number in range(20)]
    return {"tiers": sorted(set(map(str, tiers)))}


async def one_is_killed(root: str) -> dict[str, Any]:
    """The others go on with what they have, with each other, and with the disk; and they come to an end."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    store: Store = await open_here(root, remote_seconds_max=0.5)
    for number in range(20):
        await put(store, f"{rank}-{number}", 60_000)
    await store.flush()
    await until(lambda: remote(store)["to_list"] == 0)
    await together()
    await store.refresh()
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.sleep(0.5)
    tiers = [await check(store, f"{other}-{number}", 60_000) for number in range(20) for other in range(4)]
    started = time.monotonic()
    await store.aclose()
    return {"tiers": sorted(set(map(str, tiers))), "closed_s": time.monotonic() - started}


async def one_cannot_open(root: str) -> str:
    from mpi4py import MPI

    settings = {"warm_restart": True} if MPI.COMM_WORLD.rank == 2 else {}
    try:
        async with open_here(root, **settings):
            return "opened"
    except (ConfigError, BrokenTierError) as error:
        return f"{type(error).__name__}: {error}"


async def leases_outlive_the_store(root: str) -> int:
    """Windows are not freed under somebody's feet."""
    store: Store = await open_here(root)
    block_id = await put(store, "kept", 50_000)
    block = await store.get(block_id)
    value = block.value
    await together()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        await store.aclose()
    await together()
    assert bytes(value) == pseudo_bytes("kept", 50_000)[50_000 // 3 :]
    nbytes = len(value)
    del value
    block.release()
    return nbytes


async def too_little_of_threads(root: str) -> str:
    import mpi4py

    mpi4py.rc.thread_level = "funneled"
    try:
        async with open_here(root):
            return "opened"
    except ConfigError as error:
        return str(error)
