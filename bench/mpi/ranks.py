"""What the ranks of a measurement share: a communicator of their own, meeting without blocking the loop, hearing all.

mpi4py is imported when a ``Ranks`` is made, not with the module. The store's MPI thread and this one call MPI side by
side, so the library must grant MPI_THREAD_MULTIPLE, as mpi4py asks it to.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, TypeVar

from bench.results import CannotRunError

T = TypeVar("T")

POLL_SECONDS = 0.0005


class Ranks:
    """This rank among the others. Collective calls must be made by all, in the same order."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # the latter: no library behind mpi4py
            raise CannotRunError(
                f"needs mpi4py and an MPI library ({error}): pip install 'cascade_aio[mpi]'"
            ) from error
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise CannotRunError("this MPI does not grant MPI_THREAD_MULTIPLE, which measuring beside a store needs")
        self.mpi = MPI
        self.world = MPI.COMM_WORLD
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank: int = self.comm.rank
        self.size: int = self.comm.size
        self.library = MPI.Get_library_version().split("\n")[0].strip("\0 ").split(",")[0]

    async def meet(self) -> None:
        """Until all are here."""
        request = self.comm.Ibarrier()
        while not request.Test():  # noqa: ASYNC110 (MPI has no event to wait for)
            await asyncio.sleep(POLL_SECONDS)

    async def gather(self, value: T) -> list[T]:
        """Everybody's value, on every rank. The others' loops go on until all are here."""
        await self.meet()
        return list(self.comm.allgather(value))

    def hosts(self) -> int:
        """How many machines. Names are compared and go nowhere."""
        return len(set(self.comm.allgather(socket.gethostname())))


class RawWindow:
    """Memory of every rank that all others read with plain ``Rget``: the limit that the tier is held against."""

    def __init__(self, ranks: Ranks, nbytes: int) -> None:
        self._ranks = ranks
        self._window: Any = ranks.mpi.Win.Allocate(nbytes, 1, comm=ranks.comm)
        self.memory = memoryview(self._window.tomemory()).cast("B")
        self._window.Lock_all(ranks.mpi.MODE_NOCHECK)

    def get(self, rank: int, offset: int, into: memoryview) -> Any:
        """Start one transfer; the request is to be tested until it is complete."""
        return self._window.Rget(
            [into, len(into), self._ranks.mpi.BYTE], rank, (offset, len(into), self._ranks.mpi.BYTE)
        )

    def close(self) -> None:
        """Collective."""
        self.memory = memoryview(b"")
        self._window.Unlock_all()
        self._window.Free()
