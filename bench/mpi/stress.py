"""Ranks under fire: puts, gets of each other's blocks, evictions, deletions, cancellations, one killed at the end.

What a block holds follows from its owner, number and edition, written in its first bytes; so every rank checks every
byte of whatever it gets, without asking. Arenas hold a fraction of what is put: extents are reused all the time,
also under reads. A block that is not found is no error (ranks see each other late), a wrong byte is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import struct
import time
from collections import Counter
from typing import Any

import numpy as np

import cascade_aio as ca
from bench.results import BenchError
from cascade_aio.errors import BlockNotFoundError, TierFullError
from cascade_aio.testing.mpi import JobOutcome, MpiRuntime

ARENA_BYTES = 24 << 20
BLOCK_BYTES_MIN = 8 << 10
BLOCK_BYTES_MAX = 2 << 20
PUTTERS = 2
GETTERS = 4
LIVING = 60
"""Blocks of one rank that are there at a time: two to three arenas."""
EDITIONS = 3
"""Contents that one name has had: a deleted block is put again with other bytes."""
CANCELLED_SHARE = 0.05
DELETE_SHARE = 0.3
REFRESH_SECONDS = 0.5
AFTERLIFE_SHARE = 0.25
"""Of the time, how long the others go on after a rank was killed."""

SLACK_SECONDS = 120.0
"""For starting and ending; a job that needs more hangs."""

_FACTS = struct.Struct("<QQQ")


def content(owner: int, number: int, edition: int) -> tuple[bytes, bytes]:
    """Key and value of a block."""
    chance = np.random.default_rng((owner, number, edition))
    nbytes = int(2 ** chance.uniform(np.log2(BLOCK_BYTES_MIN), np.log2(BLOCK_BYTES_MAX)))
    key_bytes = int(chance.integers(_FACTS.size, nbytes // 2))
    return _FACTS.pack(owner, number, edition) + chance.bytes(key_bytes - _FACTS.size), chance.bytes(nbytes - key_bytes)


def name_of(owner: int, number: int) -> ca.PrefixKey:
    """What every rank asks for it by."""
    return ca.prefix_keys([owner, number], block_tokens=2, namespace="remote stress")[0]


class Stress:
    """One rank."""

    def __init__(self, store: ca.Store, rank: int, ranks: int, seed: int) -> None:
        self.store = store
        self.rank = rank
        self.ranks = ranks
        self.chance = random.Random(seed * ranks + rank)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._put = 0
        self._stop = asyncio.Event()

    async def run(self, seconds: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(PUTTERS):
                tasks.create_task(self._until_stopped(self._put_or_delete))
            for _ in range(GETTERS):
                tasks.create_task(self._until_stopped(self._get))
            tasks.create_task(self._until_stopped(self._refresh))
            await asyncio.sleep(seconds)
            self._stop.set()

    async def _until_stopped(self, act: Any) -> None:
        while not self._stop.is_set():
            await act()
            await asyncio.sleep(0)

    async def _put_or_delete(self) -> None:
        number = self._put
        self._put += 1
        # The name of an older block comes back with other bytes once that was deleted.
        slot, edition = number % LIVING, number // LIVING % EDITIONS
        if number >= LIVING and self.chance.random() < DELETE_SHARE:
            with contextlib.suppress(BlockNotFoundError):
                await self.store.delete(name_of(self.rank, slot))
                self.counts["deleted"] += 1
        try:
            await self.store.put(*content(self.rank, slot, edition), prefix=name_of(self.rank, slot))
        except TierFullError:
            self.counts["full"] += 1
            return
        self.counts["put"] += 1

    async def _get(self) -> None:
        owner = self.chance.randrange(self.ranks)
        number = self.chance.randrange(LIVING)
        name = name_of(owner, number)
        try:
            if self.chance.random() < CANCELLED_SHARE:
                async with asyncio.timeout(self.chance.random() * 0.01):
                    await self._get_checked(name, owner, number)
            else:
                await self._get_checked(name, owner, number)
        except TimeoutError:
            self.counts["cancelled"] += 1
        except BlockNotFoundError:
            self.counts["missed"] += 1
            await asyncio.sleep(0.001)
        except TierFullError:
            self.counts["full"] += 1

    async def _get_checked(self, name: ca.PrefixKey, owner: int, number: int) -> None:
        async with self.store.get(name) as block:
            key, value = bytes(block.key), bytes(block.value)
        facts = _FACTS.unpack_from(key) if len(key) >= _FACTS.size else (-1, -1, -1)
        self.counts["got"] += 1
        self.counts["got_bytes"] += len(key) + len(value)
        if facts[:2] != (owner, number) or facts[2] >= EDITIONS or content(*facts) != (key, value):
            self.wrong.append(f"asked for {(owner, number)}, got {facts}, {len(key)} + {len(value)} bytes")

    async def _refresh(self) -> None:
        await self.store.refresh()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), REFRESH_SECONDS)


async def rank(root: str, seconds: float, seed: int, victim: int | None = None) -> dict[str, Any]:
    """What one rank does, of ``testing.mpi.run_ranks``. ``victim`` kills itself when three quarters have passed."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    async with ca.open_store(root, comm=world, shm_bytes=ARENA_BYTES, disk_bytes=1 << 30) as store:
        stress = Stress(store, world.rank, world.size, seed)
        if victim == world.rank:
            asyncio.get_running_loop().call_later(seconds * (1 - AFTERLIFE_SHARE), _die)
        await stress.run(seconds)
        remote = store.statistics()["remote"]
        closing_s = time.monotonic()
    return {
        "counts": dict(stress.counts),
        "wrong": stress.wrong[:10],
        "remote": {
            name: remote[name] for name in ("reads", "read_bytes", "stale", "torn", "lost", "published", "withdrawn")
        },
        "closing_s": time.monotonic() - closing_s,
    }


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def summary(outcome: JobOutcome, survivors: int, runtime: MpiRuntime) -> str:
    """What happened, in a few lines. Raises ``BenchError`` for a wrong byte, a failed rank or a hang."""
    if outcome.timed_out or len(outcome.ranks) < survivors or any(one.error for one in outcome.ranks.values()):
        raise BenchError(outcome.describe([rank for rank in range(survivors) if rank not in outcome.ranks]))
    totals: Counter[str] = Counter()
    for one in outcome.ranks.values():
        totals.update(one.result["counts"])
        totals.update({f"remote {name}": count for name, count in one.result["remote"].items()})
        if one.result["wrong"]:
            raise BenchError(f"WRONG BYTES: {one.result['wrong']}")
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(totals.items()))
    return f"{runtime.version}: {survivors} ranks came to the end in {outcome.seconds:.0f} s, no wrong byte; {told}"
