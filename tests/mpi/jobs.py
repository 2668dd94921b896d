"""What ranks do in the tests of the launcher. Functions return JSON; mpi4py is imported inside, by the rank."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

LONGER_THAN_ANY_TEST_SECONDS = 600.0


def read_each_other() -> int:
    """What everything else needs of an MPI: it starts ranks, and they can read each other's memory."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    window = MPI.Win.Allocate(4096, 1, comm=world)
    np.frombuffer(window.tomemory(), np.uint8)[:] = world.rank
    window.Lock_all(MPI.MODE_NOCHECK)
    world.Barrier()
    into = np.zeros(1, np.uint8)
    window.Rget([into, 1, MPI.BYTE], (world.rank + 1) % world.size, (0, 1, MPI.BYTE)).Wait()
    world.Barrier()
    window.Unlock_all()
    window.Free()
    return int(into[0])


async def sum_of_ranks() -> list[Any]:
    from mpi4py import MPI

    await asyncio.sleep(0)
    world = MPI.COMM_WORLD
    return [world.allreduce(world.rank), world.size, MPI.Query_thread() >= MPI.THREAD_SERIALIZED]


def one_raises(rank: int) -> int:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.rank == rank:
        raise ValueError(f"rank {rank} does not want to")
    time.sleep(LONGER_THAN_ANY_TEST_SECONDS)
    return 0


def hang() -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    time.sleep(LONGER_THAN_ANY_TEST_SECONDS)


def read_from_sleepers_beside_a_corpse(done: str) -> list[int]:
    """Rank 0 reads from ranks 1 and 2, which make no MPI call meanwhile, after rank 3 was killed; what it read."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    window = MPI.Win.Allocate(1 << 20, 1, comm=world)
    np.frombuffer(window.tomemory(), np.uint8)[:] = world.rank + 1
    window.Lock_all(MPI.MODE_NOCHECK)
    world.Barrier()
    seen = []
    if world.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == 0:
        into = np.zeros(1 << 20, np.uint8)
        time.sleep(1.0)
        for target in (1, 2):
            window.Rget([into, into.nbytes, MPI.BYTE], target, target=[0, into.nbytes, MPI.BYTE]).Wait()
            seen += [int(into.min()), int(into.max())]
        Path(done).touch()
    else:
        while not Path(done).exists():
            time.sleep(0.05)
    return seen
