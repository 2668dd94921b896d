"""The pure parts of the remote tier: which rank keeps a name, the bytes of the directory, the operations."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.core.remote_directory import (
    BUCKET_BYTES,
    BUCKET_ENTRIES,
    CLOSED,
    ENTRY_BYTES,
    REPLICAS_MAX,
    Choice,
    Listing,
    Refusal,
    choose,
    encode_entry,
    found_in,
    geometry_of,
    new_token,
    token_rank,
)
from cascade_aio.core.remote_operations import (
    Command,
    Get,
    Membership,
    Operation,
    Placed,
    Put,
    ReadEnd,
    Region,
    Swap,
    lookup,
    probe,
    publish,
    read,
    withdraw,
)
from cascade_aio.core.rendezvous import hashes_of, owners, seeds_of

T = TypeVar("T")


def name_of(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()[:16]


def listing_of(number: int, *, rank: int = 0, name: bytes | None = None) -> Listing:
    return Listing(name or name_of(number), name_of("block", number), rank, number, number + 1, 16 * number, 8, 1)


# -- rendezvous -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 16, 64, 256])
def test_names_spread_evenly_over_ranks(ranks: int) -> None:
    per_rank = 400
    names = [name_of(ranks, number) for number in range(per_rank * ranks)]
    counts = np.bincount(owners(hashes_of(names), np.arange(ranks), seeds_of(ranks)), minlength=ranks)
    # Chi-squared with ranks - 1 degrees of freedom: its mean, plus five standard deviations.
    statistic = float(((counts - per_rank) ** 2 / per_rank).sum())
    assert statistic < ranks - 1 + 5 * (2 * (ranks - 1)) ** 0.5
    assert counts.max() < per_rank + 6 * per_rank**0.5


def test_names_that_differ_in_one_bit_or_count_upwards_spread_as_well() -> None:
    for names in ([number.to_bytes(16, "little") for number in range(6400)],
                  [number.to_bytes(16, "big") for number in range(6400)]):  # fmt: skip
        counts = np.bincount(owners(hashes_of(names), np.arange(64), seeds_of(64)), minlength=64)
        assert counts.min() > 50
        assert counts.max() < 165


def test_when_a_rank_goes_only_its_names_move_and_they_spread() -> None:
    hashes = hashes_of([name_of(number) for number in range(4000)])
    everyone = np.arange(8)
    before = owners(hashes, everyone, seeds_of(8))
    after = owners(hashes, everyone[everyone != 3], seeds_of(8))
    assert (before[before != 3] == after[before != 3]).all()
    assert set(after[before == 3].tolist()) == {0, 1, 2, 4, 5, 6, 7}


def test_the_owner_of_a_name_does_not_depend_on_the_batch() -> None:
    membership = Membership(0, [geometry_of(1 << 26)] * 5)
    names = [name_of(number) for number in range(50)]
    assert membership.places_of(names) == [membership.places_of([name])[0] for name in names]
    assert membership.places_of([]) == []


# -- entries and buckets --------------------------------------------------------------------------


def bucket_of(*entries: tuple[int, bytes]) -> bytes:
    bucket = bytearray(BUCKET_BYTES)
    for number, entry in entries:
        bucket[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES] = entry
    return bytes(bucket)


def test_an_entry_is_found_by_its_name_alone() -> None:
    listing = listing_of(7, rank=3)
    bucket = bucket_of((5, encode_entry(new_token(3, 9), listing)))
    assert found_in(bucket, listing.name) == [listing]
    assert found_in(bucket, name_of("other")) == []
    assert found_in(bucket, listing.block_id) == []  # it stands elsewhere in the entry
    assert found_in(bytes(BUCKET_BYTES), bytes(16)) == []


@given(st.integers(0, ENTRY_BYTES * 8 - 1))
def test_an_entry_with_any_bit_flipped_is_none(bit: int) -> None:
    listing = listing_of(1)
    entry = bytearray(encode_entry(new_token(0, 1), listing))
    entry[bit // 8] ^= 1 << bit % 8
    assert listing not in found_in(bucket_of((0, bytes(entry))), listing.name)


@given(st.data())
def test_a_mixture_of_two_entries_is_never_a_third(data: st.DataObject) -> None:
    """What a get sees while an entry is written over another's: words of the one and of the other."""
    name = name_of("same")
    old = encode_entry(new_token(0, 1), listing_of(1, name=name))
    new = encode_entry(new_token(1, 1), listing_of(2, rank=1, name=name))
    words = [(new if data.draw(st.booleans()) else old)[start : start + 8] for start in range(0, ENTRY_BYTES, 8)]
    for found in found_in(bucket_of((0, b"".join(words))), name):
        assert found in (listing_of(1, name=name), listing_of(2, rank=1, name=name))


def test_a_full_bucket_refuses_unless_one_of_its_ranks_is_gone() -> None:
    entries = [(n, encode_entry(new_token(n % 3, n), listing_of(n, rank=n % 3))) for n in range(BUCKET_ENTRIES)]
    bucket = bucket_of(*entries)
    assert choose(bucket, listing_of(99, rank=5), ()) is Refusal.FULL
    choice = choose(bucket, listing_of(99, rank=5), {2})
    assert isinstance(choice, Choice)
    assert token_rank(choice.expected) == 2


def test_only_so_many_copies_of_a_name_are_listed_and_those_of_gone_ranks_do_not_count() -> None:
    name = name_of("hot")
    entries = [
        (rank, encode_entry(new_token(rank, 1), listing_of(rank, rank=rank, name=name))) for rank in range(REPLICAS_MAX)
    ]
    bucket = bucket_of(*entries)
    assert choose(bucket, listing_of(9, rank=9, name=name), ()) is Refusal.ENOUGH
    assert isinstance(choose(bucket, listing_of(9, rank=9, name=name), {0}), Choice)


def test_a_leftover_of_ones_own_is_replaced() -> None:
    name = name_of("again")
    bucket = bucket_of((4, encode_entry(new_token(2, 1), listing_of(1, rank=2, name=name))))
    assert choose(bucket, listing_of(8, rank=2, name=name), ()) == Choice(4, new_token(2, 1))


def test_geometry_is_small_against_the_arena() -> None:
    for arena_bytes in (1 << 30, 1 << 36, 1 << 38):
        assert geometry_of(arena_bytes).control_bytes < arena_bytes * 0.002


# -- operations, driven by hand -------------------------------------------------------------------


class Memories:
    """What ranks hold, and a driver that counts. ``silent`` ranks lose every command."""

    def __init__(self, ranks: int, arena_bytes: int = 1 << 20) -> None:
        self.geometry = geometry_of(arena_bytes)
        self.control = [bytearray(self.geometry.control_bytes) for _ in range(ranks)]
        self.arena = [bytearray(arena_bytes) for _ in range(ranks)]
        self.silent: set[int] = set()
        self.steps: list[Counter[int]] = []
        self.between: Callable[[], None] = lambda: None

    def membership(self, rank: int) -> Membership:
        return Membership(rank, [self.geometry] * len(self.control))

    def run(self, operation: Operation[T]) -> T:
        try:
            commands = next(operation)
            while True:
                self.steps.append(Counter(command.rank for command in commands))
                for command in random.Random(1).sample(list(commands), len(commands)):
                    self.carry_out(command)
                self.between()
                commands = next(operation)
        except StopIteration as end:
            outcome: T = end.value
            return outcome

    def carry_out(self, command: Command) -> None:
        if command.rank in self.silent:
            command.lost = True
            return
        control = self.control[command.rank]
        if isinstance(command, Get):
            region = control if command.region is Region.CONTROL else self.arena[command.rank]
            command.into[:] = region[command.offset : command.offset + len(command.into)]
            if command.tell is not None:
                command.tell()
        elif isinstance(command, Put):
            control[command.offset : command.offset + len(command.payload)] = command.payload
        elif isinstance(command, Swap):
            command.found = int.from_bytes(control[command.offset : command.offset + 8], "little")
            if command.done:
                control[command.offset : command.offset + 8] = command.desired.to_bytes(8, "little")


def published(memories: Memories, listings: Sequence[Listing], first_token: int = 1) -> list[Placed]:
    tokens = [new_token(listing.rank, first_token + n) for n, listing in enumerate(listings)]
    answer = memories.run(publish(memories.membership(0), listings, tokens))
    assert all(isinstance(entry, Placed) for entry in answer.entries), answer
    return [entry for entry in answer.entries if isinstance(entry, Placed)]


def test_what_is_published_is_found_until_it_is_withdrawn() -> None:
    memories = Memories(4)
    listings = [listing_of(number, rank=1) for number in range(200)]
    entries = published(memories, listings)
    names = [listing.name for listing in listings]
    assert memories.run(lookup(memories.membership(2), names)).listings == [[listing] for listing in listings]
    memories.run(withdraw(entries[:100]))
    found = memories.run(lookup(memories.membership(3), names)).listings
    assert found == [[]] * 100 + [[listing] for listing in listings[100:]]


def test_looking_many_names_up_is_one_step() -> None:
    memories = Memories(4)
    names = [name_of(number) for number in range(64)]
    memories.run(lookup(memories.membership(0), names))
    (step,) = memories.steps
    assert set(step) == {0, 1, 2, 3}
    assert sum(step.values()) <= 64


def test_two_ranks_that_publish_at_once_both_get_an_entry() -> None:
    """The other takes the very entries between our look and our swap."""
    memories = Memories(1)
    name = name_of("wanted by both")
    ours, theirs = listing_of(1, rank=0, name=name), listing_of(2, rank=12, name=name)  # the same first choice
    taken = False

    def take() -> None:
        nonlocal taken
        if not taken:
            taken = True
            memories.between = lambda: None
            published(memories, [theirs])
            memories.between = take

    memories.between = take
    published(memories, [ours])
    assert sorted(memories.run(lookup(memories.membership(0), [name])).listings[0]) == sorted([ours, theirs])


def test_an_entry_that_another_rank_took_over_is_not_withdrawn() -> None:
    memories = Memories(2)
    (entry,) = published(memories, [listing_of(1, rank=1)])
    place, at = entry.place, entry.place.offset + entry.number * ENTRY_BYTES
    memories.control[place.rank][at : at + ENTRY_BYTES] = encode_entry(new_token(0, 77), listing_of(5))
    memories.run(withdraw([entry]))
    assert memories.run(lookup(memories.membership(0), [listing_of(5).name])) is not None
    assert memories.control[place.rank][at : at + 8] == new_token(0, 77).to_bytes(8, "little")


def test_a_closed_rank_and_a_silent_one_are_told_apart() -> None:
    memories = Memories(3)
    memories.control[1][:] = CLOSED.to_bytes(8, "little") * (len(memories.control[1]) // 8)
    memories.silent.add(2)
    names = [name_of(number) for number in range(60)]
    answer = memories.run(lookup(memories.membership(0), names))
    assert answer.learnt == (frozenset({1}), frozenset({2}))
    assert answer.listings == [[]] * 60
    assert memories.run(probe(1)) is None
    assert memories.run(probe(2)) is False
    assert memories.run(probe(0)) is True


def test_nothing_is_entered_with_ranks_that_are_not_there() -> None:
    memories = Memories(2)
    memories.silent.add(1)
    listings = [listing_of(number) for number in range(40)]
    answer = memories.run(publish(memories.membership(0), listings, [new_token(0, n + 1) for n in range(40)]))
    assert {entry for entry in answer.entries if not isinstance(entry, Placed)} == {Refusal.LOST}
    assert answer.learnt.lost == {1}
    membership = memories.membership(0)
    membership.set_gone(frozenset({1}))
    again = memories.run(publish(membership, listings, [new_token(0, n + 100) for n in range(40)]))
    assert all(isinstance(entry, Placed) and entry.place.rank == 0 for entry in again.entries)


# -- reading --------------------------------------------------------------------------------------


def reading(memories: Memories, listing: Listing) -> tuple[Operation[ReadEnd], bytearray, list[tuple[int, int]]]:
    into = bytearray(listing.record_bytes)
    told: list[tuple[int, int]] = []
    pieces = [(start, start + 4096) for start in range(0, listing.record_bytes, 4096)]
    return read(listing, memoryview(into), pieces, lambda first, end: told.append((first, end))), into, told


def test_a_copy_in_its_place_is_read_whole() -> None:
    memories = Memories(2)
    listing = listing_of(3, rank=1)
    memories.control[1][8 * 3 : 8 * 4] = listing.generation.to_bytes(8, "little")
    memories.arena[1][listing.offset : listing.offset + listing.record_bytes] = random.Random(3).randbytes(8 * 4096)
    operation, into, told = reading(memories, listing)
    assert memories.run(operation) is ReadEnd.VALID
    assert into == memories.arena[1][listing.offset : listing.offset + listing.record_bytes]
    assert sorted(told) == [(start, start + 4096) for start in range(0, 8 * 4096, 4096)]


def test_a_copy_that_has_gone_costs_one_piece() -> None:
    memories = Memories(2)
    operation, _, told = reading(memories, listing_of(3, rank=1))
    assert memories.run(operation) is ReadEnd.STALE
    assert len(memories.steps) == 1
    assert len(told) == 1


@pytest.mark.parametrize("step", [1, 2])
def test_a_copy_that_goes_while_it_is_read_is_stale_however_late(step: int) -> None:
    memories = Memories(2)
    listing = listing_of(3, rank=1)
    memories.control[1][8 * 3 : 8 * 4] = listing.generation.to_bytes(8, "little")

    def go() -> None:
        if len(memories.steps) == step:
            memories.control[1][8 * 3 : 8 * 4] = (listing.generation + 1).to_bytes(8, "little")

    memories.between = go
    assert memories.run(reading(memories, listing)[0]) is ReadEnd.STALE


def test_a_rank_that_leaves_or_falls_silent_while_it_is_read_ends_the_read() -> None:
    memories = Memories(2)
    listing = listing_of(3, rank=1)
    memories.control[1][8 * 3 : 8 * 4] = listing.generation.to_bytes(8, "little")
    memories.between = lambda: memories.silent.add(1)
    assert memories.run(reading(memories, listing)[0]) is ReadEnd.LOST
    memories.silent.clear()
    memories.between = lambda: None
    memories.control[1][:] = CLOSED.to_bytes(8, "little") * (len(memories.control[1]) // 8)
    assert memories.run(reading(memories, listing)[0]) is ReadEnd.CLOSED
