"""The bytes of the directory that ranks share: geometry, entries, what a bucket says. Pure.

What it is: the codec and the decisions for a hash table that lies in pieces in the memory of all ranks and is
read and written with one-sided operations only. A rank's control region holds its *generations* (one word
per published copy, 0 when the copy has gone) and its share of the *buckets*. ``docs/remote.md`` has the tables.

Invariants: an entry belongs to whoever swapped its token in; nobody else writes it. Its check covers the token
and all other fields, so that an entry seen half written, or put late over another's, is no entry. What an
entry says is a hint; the generation and the bytes themselves decide.

Must not know: how bytes travel.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import struct
from collections.abc import Collection
from typing import NamedTuple

from cascade_aio.core.rendezvous import NAME_BYTES

PAGE_BYTES = 4096

SLOT_ARENA_BYTES = 256 << 10
"""One generation for so much arena: of smaller blocks, those beyond are not published. Everything together takes
about 0.15 % of the arena."""

SLOTS_MIN = 1024
SLOTS_MAX = 1 << 20

ENTRIES_PER_SLOT = 4
"""A copy has two entries as a rule, its block id and one prefix key: so buckets are half full at most."""

BUCKET_ENTRIES = 12
"""At half load one bucket in a hundred overflows; what does not fit is not found by others."""

REPLICAS_MAX = 4
"""Copies of one name that are listed: readers spread over them. Later ones are not worth an entry."""

CLOSED = (1 << 64) - 1
"""Token of every entry and every generation of a rank that has left in good order."""

GENERATION_BYTES = 8
_TOKEN_COUNTER_BITS = 40
_BODY = struct.Struct("<Q16s16sIHHIIQQ")
_CHECK_BYTES = 8
ENTRY_BYTES = _BODY.size + _CHECK_BYTES
BUCKET_BYTES = ENTRY_BYTES * BUCKET_ENTRIES
TOKEN_BYTES = 8
_NAME_AT = TOKEN_BYTES
_TOKEN = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """What one rank's control region holds, in bytes from its start."""

    slots: int
    buckets: int

    @property
    def buckets_at(self) -> int:
        return -(-GENERATION_BYTES * self.slots // PAGE_BYTES) * PAGE_BYTES

    @property
    def control_bytes(self) -> int:
        return self.buckets_at + BUCKET_BYTES * self.buckets

    def bucket_at(self, bucket: int) -> int:
        return self.buckets_at + BUCKET_BYTES * bucket


def geometry_of(arena_bytes: int) -> Geometry:
    """A function of the arena's size alone, so that ranks know each other's."""
    slots = min(SLOTS_MAX, max(SLOTS_MIN, arena_bytes // SLOT_ARENA_BYTES))
    return Geometry(slots, -(-slots * ENTRIES_PER_SLOT // BUCKET_ENTRIES))


class Listing(NamedTuple):
    """A copy in a rank's arena under one of its names: a block id itself, or a hashed prefix key (16 bytes each).

    ``generation`` stands in the rank's slot as long as the copy is where ``first_page`` says.
    """

    name: bytes
    block_id: bytes
    rank: int
    slot: int
    generation: int
    first_page: int
    record_pages: int
    header_pages: int

    @property
    def offset(self) -> int:
        return self.first_page * PAGE_BYTES

    @property
    def record_bytes(self) -> int:
        return self.record_pages * PAGE_BYTES


class Refusal(enum.Enum):
    """Why a name gets no entry."""

    FULL = "full"
    ENOUGH = "enough"
    CLOSED = "closed"
    LOST = "lost"


class Choice(NamedTuple):
    """Which entry of a bucket to take: if its token still is ``expected``."""

    number: int
    expected: int


def new_token(rank: int, counter: int) -> int:
    """A token that no entry has had before, for 2^40 entries of a rank."""
    return (rank + 1) << _TOKEN_COUNTER_BITS | counter & ((1 << _TOKEN_COUNTER_BITS) - 1)


def token_rank(token: int) -> int:
    """Who made it; -1 for a free entry."""
    return (token >> _TOKEN_COUNTER_BITS) - 1


def encode_entry(token: int, listing: Listing) -> bytes:
    """All ``ENTRY_BYTES``, token first."""
    body = _BODY.pack(
        token, listing.name, listing.block_id, listing.rank, listing.header_pages, 0, listing.slot,
        listing.record_pages, listing.first_page, listing.generation,
    )  # fmt: skip
    return body + _check(body)


def is_closed(bucket: bytes) -> bool:
    """Whether the rank of this bucket has left."""
    return _token_at(bucket, 0) == CLOSED


def found_in(bucket: bytes, name: bytes) -> list[Listing]:
    """The sound entries of ``name``."""
    listings: list[Listing] = []
    start = bucket.find(name)
    while start >= 0:
        number, rest = divmod(start - _NAME_AT, ENTRY_BYTES)
        if not rest:
            listing = _decoded(bucket[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES])
            if listing is not None:
                listings.append(listing)
        start = bucket.find(name, start + 1)
    return listings


def choose(bucket: bytes, listing: Listing, gone: Collection[int]) -> Choice | Refusal:
    """Where in its bucket ``listing`` goes. An entry of the same name and rank is a leftover and is replaced."""
    if is_closed(bucket):
        return Refusal.CLOSED
    others = 0
    for found in found_in(bucket, listing.name):
        others += found.rank != listing.rank and found.rank not in gone
    if others >= REPLICAS_MAX:
        return Refusal.ENOUGH
    first = listing.rank % BUCKET_ENTRIES  # ranks that publish at the same time try different entries
    free: Choice | None = None
    for step in range(BUCKET_ENTRIES):
        number = (first + step) % BUCKET_ENTRIES
        token = _token_at(bucket, number)
        rank = token_rank(token)
        start = number * ENTRY_BYTES + _NAME_AT
        if rank == listing.rank and bucket[start : start + NAME_BYTES] == listing.name:
            return Choice(number, token)
        if free is None and (rank < 0 or rank in gone):
            free = Choice(number, token)
    return Refusal.FULL if free is None else free


def _decoded(entry: bytes) -> Listing | None:
    body = entry[: _BODY.size]
    if _check(body) != entry[_BODY.size :]:
        return None
    token, name, block_id, rank, header_pages, flags, slot, record_pages, first_page, generation = _BODY.unpack(body)
    if flags or not token or not generation:
        return None
    return Listing(name, block_id, rank, slot, generation, first_page, record_pages, header_pages)


def _check(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECK_BYTES).digest()


def _token_at(bucket: bytes, number: int) -> int:
    token: int = _TOKEN.unpack_from(bucket, number * ENTRY_BYTES)[0]
    return token


assert (ENTRY_BYTES, BUCKET_BYTES) == (80, 960)  # docs/remote.md says so
