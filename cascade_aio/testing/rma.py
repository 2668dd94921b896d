"""Ranks in one process: an ``RmaGroup`` in memory, as faithful as one-sided transports are cruel.

What it is: ``FakeRanks`` is a job; ``group(rank)`` is what one rank's store is opened with. Commands that are issued
together are carried out in any order; a get takes its bytes in pieces with other ranks' work in between, so that
an extent may be reused, and a word changed, in the middle of it. Ranks stop answering (``silence``), answer again
(``revive``), and answer late. Everything follows from the seed; time is the loop's, so a virtual one makes
waiting free.

Must not know: what the bytes mean.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import random
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from cascade_aio.core.remote_operations import Command, Get, Operation, Put, Region, Swap
from cascade_aio.errors import BrokenTierError, ClosedError
from cascade_aio.tiers.remote.group import FACTS_BYTES_MAX, Call, Regions

P = ParamSpec("P")
T = TypeVar("T")

STEP_SECONDS = 1e-4
"""A piece of a get, or a word: virtual time."""

PIECES_MAX = 6
"""A get is taken in at most so many pieces."""


class _AtOnce(Executor):
    """Does what it is given, in the call."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class FakeRanks:
    """One job. ``seconds_max`` is after how long a command of a silent rank is lost."""

    def __init__(self, size: int, *, seed: int = 0, seconds_max: float = 2.0) -> None:
        self.size = size
        self.seconds_max = seconds_max
        self.random = random.Random(seed)
        self.regions: dict[int, tuple[memoryview, memoryview]] = {}
        self.silent: dict[int, asyncio.Event] = {}
        self._votes: list[dict[int, bytes | BrokenTierError]] = [{}, {}]
        self._voted = [asyncio.Event(), asyncio.Event()]

    def group(self, rank: int) -> FakeGroup:
        """What ``rank`` opens its store with."""
        return FakeGroup(self, rank)

    def silence(self, rank: int) -> None:
        """``rank`` does not answer from now on: commands to it are lost, and its memory may be written late."""
        self.silent[rank] = asyncio.Event()

    def revive(self, rank: int) -> None:
        """It answers again, and what it owed arrives."""
        self.silent.pop(rank).set()

    async def pause(self) -> None:
        """A step's time, more or less."""
        await asyncio.sleep((0.1 + self.random.random()) * STEP_SECONDS)

    async def vote(self, number: int, rank: int, ballot: bytes | BrokenTierError) -> list[bytes]:
        """Everybody's ballots of this vote; raises the first refusal."""
        votes = self._votes[number]
        assert rank not in votes, f"rank {rank} votes twice"
        votes[rank] = ballot
        if len(votes) == self.size:
            self._voted[number].set()
        await self._voted[number].wait()
        ballots: list[bytes] = []
        for _, each in sorted(votes.items()):
            if isinstance(each, BrokenTierError):
                raise BrokenTierError(*each.args)
            ballots.append(each)
        return ballots


class FakeGroup:
    """``RmaGroup`` of one rank of ``FakeRanks``."""

    def __init__(self, ranks: FakeRanks, rank: int) -> None:
        self._ranks = ranks
        self.rank = rank
        self.size = ranks.size
        self.checks: Executor = _AtOnce()
        self._next_vote = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.messages = 0
        self.late = 0
        """Gets that wrote into their buffer after they were reported lost."""

    async def join(self, arena_bytes: int, control_bytes: int) -> Regions:
        """See ``RmaGroup``."""
        await self._vote(b"")
        arena, control = memoryview(mmap.mmap(-1, arena_bytes)), memoryview(mmap.mmap(-1, control_bytes))
        self._ranks.regions[self.rank] = (arena, control)
        return Regions(arena, control)

    async def agree(self, facts: bytes) -> list[bytes]:
        """See ``RmaGroup``."""
        assert len(facts) <= FACTS_BYTES_MAX, len(facts)
        return await self._vote(facts)

    async def refuse(self, reason: str) -> None:
        """See ``RmaGroup``."""
        try:
            await self._vote(BrokenTierError(f"rank {self.rank} could not open its store: {reason}"))
        except BrokenTierError:
            return

    async def _vote(self, ballot: bytes | BrokenTierError) -> list[bytes]:
        number, self._next_vote = self._next_vote, self._next_vote + 1
        return await self._ranks.vote(number, self.rank, ballot)

    def submit(self, operation: Operation[T]) -> Call[T]:
        """See ``RmaGroup``."""
        loop = asyncio.get_running_loop()
        call = Call(operation, loop)
        if self._closed:
            operation.close()
            call.outcome.set_exception(ClosedError("the store is closed"))
            call.settled.set_result(None)
            return call
        task = loop.create_task(self._drive(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return call

    async def _drive(self, call: Call[Any]) -> None:
        owed: list[asyncio.Task[None]] = []
        try:
            while not call.abandoned:
                commands = list(next(call.operation))
                self._ranks.random.shuffle(commands)
                await asyncio.gather(*(self._carry_out(command, owed) for command in commands))
            call.operation.close()
            if not call.outcome.done():
                call.outcome.set_exception(ClosedError("the operation was given up"))
        except StopIteration as end:
            if not call.outcome.done():
                call.outcome.set_result(end.value)
        if owed:
            await asyncio.wait(owed)
        call.settled.set_result(None)

    async def _carry_out(self, command: Command, owed: list[asyncio.Task[None]]) -> None:
        self.messages += 1
        await self._ranks.pause()
        silent = self._ranks.silent.get(command.rank)
        if silent is not None and command.rank != self.rank:
            await asyncio.sleep(self._ranks.seconds_max)
            command.lost = True
            if isinstance(command, Get):
                owed.append(asyncio.get_running_loop().create_task(self._late(command, silent)))
                self._tasks.add(owed[-1])
                owed[-1].add_done_callback(self._tasks.discard)
            return
        region = self._ranks.regions[command.rank][command.region if isinstance(command, Get) else Region.CONTROL]
        if isinstance(command, Get):
            await self._get(command, region)
            if command.tell is not None:
                command.tell()
        elif isinstance(command, Put):
            await self._put(command, region)
        else:
            _swap(command, region)

    async def _late(self, command: Get, silent: asyncio.Event) -> None:
        await silent.wait()
        self.late += 1
        await self._get(command, self._ranks.regions[command.rank][command.region])

    async def _get(self, command: Get, region: memoryview) -> None:
        """In pieces, front to back or back to front, as memory is copied; a word (8 bytes) in one."""
        cuts = self._cuts(len(command.into))
        if self._ranks.random.random() < 0.5:
            cuts.reverse()
        for first, end in cuts:
            command.into[first:end] = region[command.offset + first : command.offset + end]
            await self._ranks.pause()

    async def _put(self, command: Put, region: memoryview) -> None:
        for first, end in self._cuts(len(command.payload)):
            region[command.offset + first : command.offset + end] = command.payload[first:end]
            await self._ranks.pause()

    def _cuts(self, nbytes: int) -> list[tuple[int, int]]:
        if nbytes <= 8:
            return [(0, nbytes)]
        inner = sorted(self._ranks.random.randrange(0, nbytes) // 8 * 8 for _ in range(PIECES_MAX - 1))
        edges = [0, *inner, nbytes]
        return [(first, end) for first, end in itertools.pairwise(edges) if first < end]

    def statistics(self) -> dict[str, Any]:
        """Counts, JSON-ready."""
        return {"messages": self.messages, "late": self.late}

    async def aclose(self) -> None:
        """See ``RmaGroup``. Regions stay: others may read them still."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


def _swap(command: Swap, region: memoryview) -> None:
    command.found = int.from_bytes(region[command.offset : command.offset + 8], "little")
    if command.found == command.expected:
        region[command.offset : command.offset + 8] = command.desired.to_bytes(8, "little")
