"""What ranks do with each other's memory, as generators of commands. Pure: no transport, no time.

An *operation* yields commands that are to be carried out together, in any order, and is resumed when all of them
are done. Whoever drives it (the MPI thread, the fake of the tests, the scaling simulation) moves the bytes and
counts the messages. A command whose rank does not answer comes back ``lost``; operations pass that on and
never wait for anything else, so an operation ends after a fixed number of steps.

Who is there and who is gone is ``Membership``, which belongs to one event loop; operations take from it what they
need when they are made and tell in their result what they learnt.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from cascade_aio.core.remote_directory import (
    BUCKET_BYTES,
    CLOSED,
    ENTRY_BYTES,
    GENERATION_BYTES,
    TOKEN_BYTES,
    Choice,
    Geometry,
    Listing,
    Refusal,
    choose,
    encode_entry,
    found_in,
    is_closed,
)
from cascade_aio.core.rendezvous import buckets_of, hashes_of, owners, seeds_of

PUBLISH_ATTEMPTS_MAX = 4
"""How often a name whose entry another rank was faster to take looks for another."""

PIECES_AT_ONCE = 4
"""Pieces of one block that are under way at a time."""

T = TypeVar("T")


class Region(enum.IntEnum):
    """Which of a rank's two windows."""

    ARENA = 0
    CONTROL = 1


@dataclasses.dataclass(slots=True, eq=False)
class Get:
    """Copy ``len(into)`` bytes from a rank's region. ``tell``, if any, is called by the driver when they are there."""

    rank: int
    region: Region
    offset: int
    into: memoryview
    tell: Callable[[], None] | None = None
    lost: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class Put:
    """Copy ``payload`` into a rank's control region."""

    rank: int
    offset: int
    payload: bytes
    lost: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class Swap:
    """Compare-and-swap of the word at ``offset`` of a rank's control region; ``found`` is what was there."""

    rank: int
    offset: int
    expected: int
    desired: int
    found: int = 0
    lost: bool = False

    @property
    def done(self) -> bool:
        return not self.lost and self.found == self.expected


Command = Get | Put | Swap
Operation = Generator[Sequence[Command], None, T]


class Place(NamedTuple):
    """A bucket: of which rank, where in its control region."""

    rank: int
    offset: int


class Membership:
    """The ranks: what each holds, and who is gone. This rank itself never is."""

    def __init__(self, rank: int, geometries: Sequence[Geometry]) -> None:
        self.rank = rank
        self.geometries = tuple(geometries)
        self.gone: frozenset[int] = frozenset()
        self._seeds = seeds_of(len(geometries))
        self._buckets = np.array([geometry.buckets for geometry in geometries], dtype=np.int64)
        self._live = np.arange(len(geometries), dtype=np.int64)

    def set_gone(self, gone: frozenset[int]) -> None:
        """These ranks are not asked any more; the names that they kept move to others."""
        assert self.rank not in gone, gone
        self.gone = gone
        self._live = np.array([rank for rank in range(len(self.geometries)) if rank not in gone], dtype=np.int64)

    def places_of(self, names: Sequence[bytes]) -> list[Place]:
        """The bucket of each name among the ranks that are there."""
        if not names:
            return []
        hashes = hashes_of(names)
        ranks = owners(hashes, self._live, self._seeds)
        buckets = buckets_of(hashes, self._buckets[ranks])
        geometries = self.geometries
        return [
            Place(rank, geometries[rank].bucket_at(bucket))
            for rank, bucket in zip(ranks.tolist(), buckets.tolist(), strict=True)
        ]


class Learnt(NamedTuple):
    """What an operation found out about ranks: these have left, these do not answer."""

    closed: frozenset[int]
    lost: frozenset[int]


NOTHING = Learnt(frozenset(), frozenset())


class Found(NamedTuple):
    """Per name, in order, the copies that are listed."""

    listings: list[list[Listing]]
    learnt: Learnt


class Placed(NamedTuple):
    """An entry that is ours."""

    place: Place
    number: int
    token: int


class Published(NamedTuple):
    """Per listing, in order, its entry or why it has none."""

    entries: list[Placed | Refusal]
    learnt: Learnt


class ReadEnd(enum.Enum):
    """How the transfer of a copy ended. Only of a ``VALID`` one may the bytes be looked at: the copy was in its place
    from before the first byte was taken until after the last."""

    VALID = "valid"
    STALE = "stale"
    CLOSED = "closed"
    LOST = "lost"


class _Buckets:
    """One fetched bucket per place, however many names are in it."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.contents: dict[Place, bytearray] = {place: bytearray(BUCKET_BYTES) for place in places}
        self.gets = {
            place: Get(place.rank, Region.CONTROL, place.offset, memoryview(content))
            for place, content in self.contents.items()
        }

    def learnt(self) -> Learnt:
        closed = {place.rank for place, content in self.contents.items() if is_closed(bytes(content[:TOKEN_BYTES]))}
        return Learnt(frozenset(closed), frozenset(get.rank for get in self.gets.values() if get.lost))


def lookup(membership: Membership, names: Sequence[bytes]) -> Operation[Found]:
    """Which copies of ``names`` are listed. One step: one get per bucket."""
    return _lookup(membership.places_of(names), list(names))


def _lookup(places: Sequence[Place], names: Sequence[bytes]) -> Operation[Found]:
    buckets = _Buckets(places)
    yield list(buckets.gets.values())
    listings = [
        [] if buckets.gets[place].lost else found_in(bytes(buckets.contents[place]), name)
        for place, name in zip(places, names, strict=True)
    ]
    return Found(listings, buckets.learnt())


def in_turn(rank: int, name: bytes, listings: Sequence[Listing]) -> list[Listing]:
    """The copies of ``name`` as ``rank`` tries them: begun where its turn is, so that readers spread over them."""
    ordered = sorted(listings, key=lambda listing: listing.rank)
    first = (rank + name[0]) % len(ordered) if ordered else 0
    return ordered[first:] + ordered[:first]


def publish(membership: Membership, listings: Sequence[Listing], tokens: Sequence[int]) -> Operation[Published]:
    """Enter ``listings``, each under a new token. Get, swap, put: three steps, two more for each lost race."""
    places = membership.places_of([listing.name for listing in listings])
    return _publish(places, list(listings), list(tokens), membership.gone)


def _publish(
    places: Sequence[Place], listings: Sequence[Listing], tokens: Sequence[int], gone: frozenset[int]
) -> Operation[Published]:
    entries: list[Placed | Refusal] = [Refusal.FULL] * len(listings)
    closed: set[int] = set()
    lost: set[int] = set()
    pending = list(range(len(listings)))
    puts: list[Put] = []
    for _ in range(PUBLISH_ATTEMPTS_MAX):
        buckets = _Buckets([places[number] for number in pending])
        yield [*puts, *buckets.gets.values()]
        learnt = buckets.learnt()
        closed |= learnt.closed
        lost |= learnt.lost
        swaps = _swaps(pending, places, listings, tokens, gone, buckets, entries)
        yield list(swaps.values())
        puts, pending = [], []
        for number, swap in swaps.items():
            if swap.lost:
                entries[number] = Refusal.LOST
                lost.add(swap.rank)
            elif swap.done:
                offset = swap.offset + TOKEN_BYTES
                puts.append(Put(swap.rank, offset, encode_entry(tokens[number], listings[number])[TOKEN_BYTES:]))
            else:
                entries[number] = Refusal.FULL
                pending.append(number)
        if not pending:
            break
    if puts:
        yield puts
    return Published(entries, Learnt(frozenset(closed), frozenset(lost)))


def _swaps(
    pending: Sequence[int],
    places: Sequence[Place],
    listings: Sequence[Listing],
    tokens: Sequence[int],
    gone: frozenset[int],
    buckets: _Buckets,
    entries: list[Placed | Refusal],
) -> dict[int, Swap]:
    """The swaps that would give each of ``pending`` its entry; ``entries`` is set as if they will."""
    swaps: dict[int, Swap] = {}
    for number in pending:
        place = places[number]
        content = buckets.contents[place]
        choice = Refusal.LOST if buckets.gets[place].lost else choose(bytes(content), listings[number], gone)
        if isinstance(choice, Choice):
            start = choice.number * ENTRY_BYTES
            swaps[number] = Swap(place.rank, place.offset + start, choice.expected, tokens[number])
            content[start : start + ENTRY_BYTES] = encode_entry(tokens[number], listings[number])  # for the next name
            entries[number] = Placed(place, choice.number, tokens[number])
        else:
            entries[number] = choice
    return swaps


def withdraw(entries: Sequence[Placed]) -> Operation[Learnt]:
    """Free ``entries``, which are ours. What somebody has taken from us meanwhile stays his."""
    swaps = [
        Swap(entry.place.rank, entry.place.offset + entry.number * ENTRY_BYTES, entry.token, 0) for entry in entries
    ]
    yield swaps
    return Learnt(frozenset(), frozenset(swap.rank for swap in swaps if swap.lost))


def read(
    listing: Listing, into: memoryview, pieces: Sequence[tuple[int, int]], tell: Callable[[int, int], None]
) -> Operation[ReadEnd]:
    """Take the copy of ``listing`` in ``pieces`` (first byte and end within the record) into ``into``.

    Generation and first piece go together; a copy that has gone by then costs no more. ``tell(first, end)`` is
    called by the driver as pieces arrive; what they hold means nothing before the end is ``VALID``.
    """
    word = bytearray(GENERATION_BYTES)
    generation = Get(listing.rank, Region.CONTROL, GENERATION_BYTES * listing.slot, memoryview(word))

    def piece(first: int, end: int) -> Get:
        offset = listing.offset + first
        return Get(listing.rank, Region.ARENA, offset, into[first:end], lambda: tell(first, end))

    batches = [pieces[:1], *(pieces[start : start + PIECES_AT_ONCE] for start in range(1, len(pieces), PIECES_AT_ONCE))]
    for number, batch in enumerate(batches):
        gets = [piece(first, end) for first, end in batch]
        yield gets if number else [generation, *gets]
        if generation.lost or any(get.lost for get in gets):
            return ReadEnd.LOST
        if not number and (end := _judged(word, listing.generation)) is not ReadEnd.VALID:
            return end
    again = dataclasses.replace(generation)
    yield [again]
    return ReadEnd.LOST if again.lost else _judged(word, listing.generation)


def _judged(word: bytearray, generation: int) -> ReadEnd:
    found = int.from_bytes(word, "little")
    if found == generation:
        return ReadEnd.VALID
    return ReadEnd.CLOSED if found == CLOSED else ReadEnd.STALE


def probe(rank: int) -> Operation[bool | None]:
    """Whether ``rank`` answers again; ``None``: it has left."""
    word = bytearray(GENERATION_BYTES)
    get = Get(rank, Region.CONTROL, 0, memoryview(word))
    yield [get]
    if get.lost:
        return False
    return None if int.from_bytes(word, "little") == CLOSED else True
