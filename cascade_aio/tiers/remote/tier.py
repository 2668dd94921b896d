"""The remote tier on the loop's side: what this rank shows to others, and what it takes from them.

Own copies are *announced*: a slot whose generation others compare, set before anybody can hear of the copy and
ended (``retract``) before its memory is used again, both by a plain store. Names are entered in and taken out of the
shared directory by ``publish`` and ``withdraw``, and found by ``lookup``. ``read`` brings a copy over.

Nothing here fails a caller: what cannot be had is a miss, counted. A rank that has left, or did not answer in
time, is *gone*: it is not asked any more, and the names that it kept are other ranks' from then on. One that only
did not answer is tried again every ``PROBE_SECONDS``. If the transport itself hangs, the tier serves nothing until
it moves again.

Must not know: catalogs, leases, when a block is worth fetching.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cascade_aio.core.remote_directory import (
    CLOSED,
    GENERATION_BYTES,
    Listing,
    Refusal,
    geometry_of,
    new_token,
)
from cascade_aio.core.remote_operations import (
    NOTHING,
    Learnt,
    Membership,
    Operation,
    Placed,
    Published,
    ReadEnd,
    in_turn,
    lookup,
    probe,
    publish,
    withdraw,
)
from cascade_aio.errors import BrokenTierError, ClosedError, ConfigError, ThrottledError
from cascade_aio.segments.format import HEADER_PAGES_MAX, RecordHeader
from cascade_aio.tiers.remote.group import RmaGroup
from cascade_aio.tiers.remote.reading import RemoteRead, Torn

logger = logging.getLogger("cascade_aio.remote")

PROTOCOL_VERSION = 1

LOOKUP_NAMES_MAX = 256
"""Names of one operation: half a millisecond for which the interpreter is not the loop's …"""

LOOKUP_CELLS_MAX = 1 << 16
"""… and names times ranks, which are hashed on the loop: another half."""

PROBE_SECONDS = 30.0
"""Between two attempts to reach a rank that did not answer."""

HEADERS_TRIED_MAX = 3
"""Reads of a header that is written anew at that very moment."""

HANG_FACTOR = 3
"""An operation that has no outcome after so many times ``seconds_max`` hangs in the transport itself."""

T = TypeVar("T")
U = TypeVar("U")


class WindowArena:
    """An arena in memory that other ranks can read: the ``Arena`` of a store with a communicator."""

    def __init__(self, memory: memoryview, rank: int) -> None:
        self._memory = memory
        self._rank = rank

    @property
    def memory(self) -> memoryview:
        return self._memory

    @property
    def description(self) -> str:
        return f"MPI window of rank {self._rank}"

    def close(self) -> None:
        self._memory = memoryview(b"")


class Announced(NamedTuple):
    """A slot of ours and what it says while the copy is there."""

    slot: int
    generation: int


@dataclasses.dataclass(slots=True)
class RemoteCounters:
    """Events since opening: names and copies unless the name says bytes."""

    lookups: int = 0
    looked_up: int = 0
    found: int = 0
    reads: int = 0
    read_bytes: int = 0
    stale: int = 0
    """Copies that had gone, or went while they were read."""
    torn: int = 0
    """Copies that were in place, but whose bytes were not the block's."""
    lost: int = 0
    """Reads whose rank did not answer."""
    published: int = 0
    withdrawn: int = 0
    unlisted: int = 0
    """Names that got no entry: their bucket is full, or enough copies are listed."""
    unannounced: int = 0
    """Copies beyond the slots of this rank."""
    refused: int = 0
    """Operations that were not carried out: too many under way, or the transport hangs."""


class RemoteTier:
    """Loop thread only. Open with ``RemoteTier.open``."""

    def __init__(
        self,
        group: RmaGroup,
        control: memoryview,
        facts: Sequence[dict[str, Any]],
        seconds_max: float,
    ) -> None:
        self._group = group
        self._control = control
        self._seconds_max = seconds_max
        self._digest: str = facts[group.rank]["digest"]
        self._arena_bytes = [int(fact["arena_bytes"]) for fact in facts]
        self.membership = Membership(group.rank, [geometry_of(nbytes) for nbytes in self._arena_bytes])
        geometry = self.membership.geometries[group.rank]
        self._generations = np.frombuffer(control[: GENERATION_BYTES * geometry.slots], dtype=np.uint64)
        self._free_slots = list(range(geometry.slots))
        self._next_generation = itertools.count(1)
        self._next_token = itertools.count(1)
        self._closed_ranks: frozenset[int] = frozenset()
        self._lost_ranks: frozenset[int] = frozenset()
        self._lost_any = asyncio.Event()
        self._hangs = 0
        self._closed = False
        self.counters = RemoteCounters()
        self._read_bytes_from: collections.Counter[int] = collections.Counter()
        self.on_moved: Callable[[], None] = lambda: None
        """Called when ranks, or the transport, went or came back: look again where names are to be listed."""

    @classmethod
    async def open(
        cls, group: RmaGroup, control: memoryview, *, store: bytes, digest: str, arena_bytes: int,
        seconds_max: float,
    ) -> RemoteTier:  # fmt: skip
        """Collective. Raises ``ConfigError`` where the ranks do not belong together, ``BrokenTierError`` where one
        could not open its store."""
        mine = {"version": PROTOCOL_VERSION, "store": store.hex(), "digest": digest, "arena_bytes": arena_bytes}
        facts = [json.loads(fact) for fact in await group.agree(json.dumps(mine).encode())]
        for rank, fact in enumerate(facts):
            for key, cure in (
                ("version", "run the same version of cascade_aio on every rank"),
                ("store", "open the same root on every rank"),
                ("digest", "open with the same digest on every rank"),
            ):
                if fact[key] != facts[0][key]:
                    raise ConfigError(f"rank {rank} has {key} {fact[key]} and rank 0 {facts[0][key]}: {cure}")
        return cls(group, control, facts, seconds_max)

    @property
    def rank(self) -> int:
        return self._group.rank

    # -- what this rank shows -----------------------------------------------------------------

    def announce(self) -> Announced | None:
        """A slot for a copy that is complete; ``None`` without a free one. Then ``listing`` it under its names."""
        if not self._free_slots:
            self.counters.unannounced += 1
            return None
        announced = Announced(self._free_slots.pop(), next(self._next_generation))
        self._generations[announced.slot] = announced.generation
        return announced

    def retract(self, announced: Announced) -> None:
        """The copy goes: from now on whoever reads it finds out. Before its memory is used for anything else."""
        if not self._closed:
            self._generations[announced.slot] = 0
            self._free_slots.append(announced.slot)

    async def publish(self, listings: Sequence[Listing]) -> list[Placed | Refusal]:
        """Enter ``listings`` in the directory: per listing, in order, its entry or why it has none."""
        tokens = [new_token(self.rank, next(self._next_token)) for _ in listings]
        published = await self._carry_out(publish(self.membership, listings, tokens), Published([], NOTHING))
        self._learn(published.learnt)
        entries = published.entries or [Refusal.LOST] * len(listings)
        placed = sum(isinstance(entry, Placed) for entry in entries)
        self.counters.published += placed
        self.counters.unlisted += len(entries) - placed
        return entries

    async def withdraw(self, entries: Sequence[Placed]) -> None:
        """Take ``entries`` out of the directory."""
        there = [entry for entry in entries if entry.place.rank not in self.membership.gone]
        if there:
            self.counters.withdrawn += len(there)
            self._learn(await self._carry_out(withdraw(there), NOTHING))

    # -- what it takes from others ------------------------------------------------------------

    @property
    def serves(self) -> bool:
        """Whether there is anybody to ask."""
        return not self._closed and not self._hangs and len(self.membership.gone) < self._group.size - 1

    async def lookup(self, names: Sequence[bytes]) -> list[list[Listing]]:
        """Per 16-byte name, in order, the copies that other ranks have, the one to try first first.

        One round trip per rank asked. A hint: they may be gone by the time they are read.
        """
        listings: list[list[Listing]] = []
        step = min(LOOKUP_NAMES_MAX, max(16, LOOKUP_CELLS_MAX // self._group.size))
        for start in range(0, len(names), step):
            part = names[start : start + step]
            listings += await self._look_up(part) if self.serves else [[] for _ in part]
        return listings

    async def _look_up(self, names: Sequence[bytes]) -> list[list[Listing]]:
        counters = self.counters
        counters.lookups += 1
        counters.looked_up += len(names)
        found = await self._carry_out(lookup(self.membership, names), None)
        if found is None:
            return [[] for _ in names]
        self._learn(found.learnt)
        listings = [
            in_turn(self.rank, name, [listing for listing in each if self._is_usable(listing)]) if each else each
            for name, each in zip(names, found.listings, strict=True)
        ]
        counters.found += sum(map(bool, listings))
        return listings

    def _is_usable(self, listing: Listing) -> bool:
        rank = listing.rank
        return (
            0 <= rank < self._group.size
            and rank != self.rank
            and rank not in self.membership.gone
            and 0 < listing.header_pages <= min(HEADER_PAGES_MAX, listing.record_pages)
            and listing.slot < self.membership.geometries[rank].slots
            and listing.offset + listing.record_bytes <= self._arena_bytes[rank]
        )

    async def read(self, listing: Listing, memory: memoryview, free: Callable[[], None]) -> RecordHeader | None:
        """Bring the copy of ``listing`` into ``memory`` (page-aligned, of its length) and verify it.

        Its header, or ``None``: then, and when this raises (``CancelledError`` only), ``free`` is called as soon as
        nobody touches the memory any more, which may be later.
        """
        if not self.serves or listing.rank in self.membership.gone:
            free()
            return None
        transfer = RemoteRead(self._group, listing, memory, self._digest)
        header: RecordHeader | None = None
        try:
            header = await self._verdict(transfer, listing)
        finally:
            if header is None:
                transfer.give_up()
                transfer.when_settled(free)
        return header

    async def _verdict(self, transfer: RemoteRead, listing: Listing) -> RecordHeader | None:
        counters = self.counters
        for attempts_left in reversed(range(HEADERS_TRIED_MAX)):
            end = await self._wait(transfer.call.outcome, None)
            if end is not ReadEnd.VALID:
                self._note_end(end, listing.rank)
                return None
            verdict = await transfer.judged()
            if isinstance(verdict, RecordHeader):
                counters.reads += 1
                counters.read_bytes += listing.record_bytes
                self._read_bytes_from[listing.rank] += listing.record_bytes
                return verdict
            if verdict is Torn.HEADER and attempts_left:
                transfer.read_header_again()
                continue
            break
        counters.torn += 1
        return None

    def _note_end(self, end: ReadEnd | None, rank: int) -> None:
        """A read that did not end well; ``None``: it did not end."""
        self.counters.stale += end in (ReadEnd.STALE, ReadEnd.CLOSED)
        self.counters.lost += end is ReadEnd.LOST
        ranks = frozenset({rank})
        if end is ReadEnd.CLOSED:
            self._learn(Learnt(ranks, frozenset()))
        elif end is ReadEnd.LOST:
            self._learn(Learnt(frozenset(), ranks))

    async def _carry_out(self, operation: Operation[T], otherwise: U) -> T | U:
        if self._closed or self._hangs:
            operation.close()
            self.counters.refused += 1
            return otherwise
        return await self._wait(self._group.submit(operation).outcome, otherwise)

    async def _wait(self, outcome: asyncio.Future[T], otherwise: U) -> T | U:
        """The outcome, or ``otherwise`` if there is none; an operation goes on if its caller is cancelled."""
        loop = asyncio.get_running_loop()
        verdict: asyncio.Future[bool] = loop.create_future()

        def ended(outcome: asyncio.Future[T]) -> None:
            if not outcome.cancelled():
                outcome.exception()  # heard of, also if nobody waits any more
            if not verdict.done():
                verdict.set_result(True)

        def hangs() -> None:
            if not verdict.done():
                verdict.set_result(False)

        outcome.add_done_callback(ended)
        watchdog = loop.call_later(HANG_FACTOR * self._seconds_max, hangs)
        try:
            if not await verdict:
                self._note_hang(outcome)
                return otherwise
        finally:
            watchdog.cancel()
        error = outcome.exception()
        if error is None:
            return outcome.result()
        if not isinstance(error, BrokenTierError | ThrottledError | ClosedError):
            raise error
        self.counters.refused += 1
        return otherwise

    def _note_hang(self, outcome: asyncio.Future[Any]) -> None:
        if not self._hangs:
            logger.warning("MPI does not return: the remote tier serves nothing until it does")
        self._hangs += 1
        outcome.add_done_callback(self._moves_again)

    def _moves_again(self, outcome: asyncio.Future[Any]) -> None:
        if not outcome.cancelled():
            outcome.exception()
        self._hangs -= 1
        if not self._hangs:
            self.on_moved()  # what could not be listed meanwhile is listed now

    # -- who is there -------------------------------------------------------------------------

    def _learn(self, learnt: Learnt) -> None:
        closed = self._closed_ranks | (learnt.closed - {self.rank})
        lost = (self._lost_ranks | (learnt.lost - {self.rank})) - closed
        if (closed, lost) == (self._closed_ranks, self._lost_ranks):
            return
        for rank in closed - self._closed_ranks:
            logger.info("rank %d has closed its store", rank)
        for rank in lost - self._lost_ranks:
            logger.warning("rank %d did not answer within %g s: it is not asked for now", rank, self._seconds_max)
        self._set_ranks(closed, lost)

    def _set_ranks(self, closed: frozenset[int], lost: frozenset[int]) -> None:
        self._closed_ranks, self._lost_ranks = closed, lost
        self.membership.set_gone(closed | lost)
        if lost:
            self._lost_any.set()
        else:
            self._lost_any.clear()
        self.on_moved()

    async def run(self) -> None:
        """Try ranks that did not answer again, until cancelled; asleep while there is none."""
        while True:
            await self._lost_any.wait()
            await asyncio.sleep(PROBE_SECONDS)
            for rank in sorted(self._lost_ranks):
                answer = await self._carry_out(probe(rank), False)
                if answer is None:
                    self._learn(Learnt(frozenset({rank}), frozenset()))
                elif answer:
                    logger.info("rank %d answers again", rank)
                    self._set_ranks(self._closed_ranks, self._lost_ranks - {rank})

    def statistics(self) -> dict[str, Any]:
        """Counts, JSON-ready."""
        return {
            "rank": self.rank,
            "ranks": self._group.size,
            "ranks_closed": sorted(self._closed_ranks),
            "ranks_lost": sorted(self._lost_ranks),
            "hangs": bool(self._hangs),
            "announced": len(self._generations) - len(self._free_slots),
            **dataclasses.asdict(self.counters),
            "read_bytes_from": dict(sorted(self._read_bytes_from.items())),
            **self._group.statistics(),
        }

    async def aclose(self) -> None:
        """Everything that others know of this rank ends now, and they will find out. Bounded. The group goes on."""
        if self._closed:
            return
        self._closed = True
        words = np.frombuffer(self._control, dtype=np.uint64)
        await asyncio.to_thread(words.fill, CLOSED)
        announced = len(self._generations)
        self._generations = np.zeros(announced, dtype=np.uint64)
        self._control = memoryview(b"")
        del words
