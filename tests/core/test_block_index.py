"""BlockIndex: against dicts, its limits, its checkpoint columns, and the memory it takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cascade_aio.core.index import FLAGS_ALL, BlockIndex, select_columns
from cascade_aio.errors import ConfigError, CorruptionError, DigestConflictError, TierFullError
from cascade_aio.model import BlockId, PrefixKey, compute_digest

CAPACITY = 12
BINDINGS = 16


def digest(number: int) -> bytes:
    return compute_digest(b"block", number.to_bytes(4, "little"))


def prefix(number: int) -> bytes:
    """Deliberately poor keys: only the last byte differs, which a weak hash would pile up."""
    return number.to_bytes(32, "big")


class IndexMachine(RuleBasedStateMachine):
    """The index against dicts: blocks, places, bindings, parents, limits, checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(capacity_max=CAPACITY, bindings_max=BINDINGS)
        self.row: dict[int, int] = {}
        self.lengths: dict[int, tuple[int, int]] = {}
        self.place: dict[int, tuple[int, int, int] | None] = {}
        self.stamp: dict[int, int] = {}
        self.flags: dict[int, int] = {}
        self.bound: dict[bytes, tuple[int, bytes | None]] = {}
        self.first: dict[int, bytes] = {}
        """Oldest name of each block that has one."""

    blocks = st.integers(0, 19)
    prefixes = st.integers(0, 23).map(prefix)

    @initialize()
    def empty(self) -> None:
        assert len(self.index) == 0
        assert list(self.index.rows()) == []

    def keys_held(self) -> set[bytes]:
        return set(self.bound) | {parent for _, parent in self.bound.values() if parent is not None}

    @rule(block=blocks, key_bytes=st.integers(0, 2**32 - 1), value_bytes=st.integers(0, 2**32 - 1))
    def add(self, block: int, key_bytes: int, value_bytes: int) -> None:
        if block in self.row:
            with pytest.raises(AssertionError, match="is known"):
                self.index.add(digest(block), key_bytes, value_bytes)
        elif len(self.row) == CAPACITY:
            with pytest.raises(TierFullError, match="index_blocks_max"):
                self.index.add(digest(block), key_bytes, value_bytes)
        else:
            row = self.index.add(digest(block), key_bytes, value_bytes)
            assert 0 <= row < CAPACITY
            assert row not in self.row.values()
            self.row[block] = row
            self.lengths[block] = (key_bytes, value_bytes)
            self.place[block], self.stamp[block], self.flags[block] = None, 0, 0

    @precondition(lambda self: self.row)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.row)))
        self.index.remove(self.row[block])
        for column in (self.row, self.lengths, self.place, self.stamp, self.flags):
            del column[block]
        self.bound = {key: entry for key, entry in self.bound.items() if entry[0] != block}
        self.first.pop(block, None)

    @precondition(lambda self: self.row)
    @rule(data=st.data(), segment=st.integers(0, 3), page=st.integers(0, 2**32 - 1), stamp=st.integers(0, 2**63))
    def place_one(self, data: st.DataObject, segment: int, page: int, stamp: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.row)))
        self.index.place(self.row[block], segment, page, 1 + page % 3, stamp)
        self.place[block], self.stamp[block] = (segment, page, 1 + page % 3), stamp

    @precondition(lambda self: self.row)
    @rule(data=st.data(), flags=st.integers(0, 127))
    def unplace_and_flag(self, data: st.DataObject, flags: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.row)))
        self.index.unplace(self.row[block])
        self.index.set_flags(self.row[block], flags << 1)
        self.place[block], self.flags[block] = None, flags << 1

    @precondition(lambda self: self.row)
    @rule(data=st.data(), key=prefixes, parent=st.none() | prefixes)
    def bind(self, data: st.DataObject, key: bytes, parent: bytes | None) -> None:
        block = data.draw(st.sampled_from(sorted(self.row)))
        held = self.keys_held()
        if parent == key:
            with pytest.raises(ConfigError, match="its own parent"):
                self.index.bind(key, self.row[block], parent)
        elif key in self.bound:
            assert not self.index.bind(key, self.row[block], parent)
        elif len(held | {key} | ({parent} if parent else set())) > BINDINGS:
            with pytest.raises(TierFullError, match="index_blocks_max"):
                self.index.bind(key, self.row[block], parent)
        else:
            assert self.index.bind(key, self.row[block], parent)
            self.bound[key] = (block, parent)
            self.first.setdefault(block, key)

    @rule(key=prefixes)
    def unbind(self, key: bytes) -> None:
        assert self.index.unbind(key) == (key in self.bound)
        block, _ = self.bound.pop(key, (None, None))
        if block is not None and self.first[block] == key:
            del self.first[block]
            rest = self.index.bindings(self.row[block])
            if rest:  # which one follows is the index's choice, but it is one of the block's
                assert self.bound[rest[0][0]][0] == block
                self.first[block] = rest[0][0]

    @rule()
    def checkpoint(self) -> None:
        columns = self.index.export_columns()
        self.index = BlockIndex.from_columns(columns, capacity_max=CAPACITY, bindings_max=BINDINGS)
        order = sorted(self.row.values())
        self.row = {block: order.index(row) for block, row in self.row.items()}

    @rule(gone=st.integers(0, 3))
    def drop_a_segment(self, gone: int) -> None:
        columns = self.index.export_columns()
        columns = select_columns(columns, columns["segment"] != gone)
        self.index = BlockIndex.from_columns(columns, capacity_max=CAPACITY, bindings_max=BINDINGS)
        dropped = {block for block, place in self.place.items() if place is not None and place[0] == gone}
        for block in dropped:
            for column in (self.row, self.lengths, self.place, self.stamp, self.flags):
                del column[block]
            self.first.pop(block, None)
        self.bound = {key: entry for key, entry in self.bound.items() if entry[0] not in dropped}
        order = sorted(self.row.values())
        self.row = {block: order.index(row) for block, row in self.row.items()}

    @invariant()
    def blocks_agree(self) -> None:
        assert len(self.index) == len(self.row)
        assert list(self.index.rows()) == sorted(self.row.values())
        for block in range(20):
            row = self.row.get(block, -1)
            assert self.index.find(digest(block)[:16]) == row
            assert self.index.find_digest(digest(block)) == row
            if row >= 0:
                assert self.index.digest(row) == digest(block)
                assert self.index.block_id(row) == BlockId(digest(block)[:16])
                assert self.index.lengths(row) == self.lengths[block]
                assert self.index.location(row) == self.place[block]
                assert self.index.stamp(row) == self.stamp[block]
                assert self.index.flags(row) == self.flags[block]
        for segment in range(4):
            placed = [self.row[block] for block, place in self.place.items() if place and place[0] == segment]
            assert self.index.rows_in_segment(segment).tolist() == sorted(placed)

    @invariant()
    def bindings_agree(self) -> None:
        assert self.index.bindings_count == len(self.bound)
        for key in map(prefix, range(24)):
            entry = self.bound.get(key)
            assert self.index.find_prefix(key) == (-1 if entry is None else self.row[entry[0]])
        for block, row in self.row.items():
            names = self.index.bindings(row)
            assert dict(names) == {key: parent for key, (owner, parent) in self.bound.items() if owner == block}
            assert [name for name, _ in names][:1] == ([self.first[block]] if block in self.first else [])
            parent = self.bound[self.first[block]][1] if block in self.first else None
            above = self.bound[parent][0] if parent is not None and parent in self.bound else None
            expected = -1 if above is None or above == block else self.row[above]
            assert self.index.parent_row(row) == expected


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


def test_another_digest_with_the_same_id_is_an_error() -> None:
    index = BlockIndex(capacity_max=4)
    index.add(digest(1), 1, 1)
    other = digest(1)[:16] + bytes(16)
    assert index.find(other[:16]) == 0
    with pytest.raises(DigestConflictError, match=digest(1).hex()):
        index.find_digest(other)


def test_a_row_that_is_not_live_is_an_assertion() -> None:
    index = BlockIndex(capacity_max=4)
    row = index.add(digest(1), 1, 1)
    index.remove(row)
    for bad in (row, 2, -1):
        for call in (index.digest, index.block_id, index.lengths, index.location, index.stamp, index.unplace):
            with pytest.raises(AssertionError, match="not live"):
                call(bad)
        with pytest.raises(AssertionError, match="not live"):
            index.bind(prefix(1), bad, None)
    row = index.add(digest(2), 1, 1)
    with pytest.raises(AssertionError, match="not the caller's"):
        index.set_flags(row, ~FLAGS_ALL & 0xFF)


def test_a_child_bound_before_its_parent_finds_it_later() -> None:
    index = BlockIndex(capacity_max=4)
    child, parent = index.add(digest(1), 1, 1), index.add(digest(2), 1, 1)
    assert index.bind(prefix(2), child, prefix(1))
    assert index.parent_row(child) == -1
    assert index.find_prefix(prefix(1)) == -1
    assert index.bind(prefix(1), parent, None)
    assert index.parent_row(child) == parent
    index.remove(parent)
    assert index.parent_row(child) == -1
    assert index.bindings(child) == [(PrefixKey(prefix(2)), prefix(1))]


def test_thousands_of_blocks_come_and_go_without_slowing_probes() -> None:
    """Every id is found, no removed one is, and the tables hold no more than the live blocks need."""
    index = BlockIndex(capacity_max=20_000)
    rows = {number: index.add(digest(number), 1, number) for number in range(6000)}
    for number, row in rows.items():
        index.bind(prefix(number), row, prefix(number - 1) if number % 50 else None)
    full = index.nbytes
    for generation in range(1, 4):
        for number in range(6000):
            index.remove(rows.pop(number + 6000 * (generation - 1)))
            row = rows[number + 6000 * generation] = index.add(digest(number + 6000 * generation), 1, 1)
            index.bind(prefix(number + 6000 * generation), row, None)
    assert index.nbytes <= 1.25 * full, "turnover must not grow the index"
    assert len(index) == 6000
    for number in range(4 * 6000):
        assert index.find(digest(number)[:16]) == rows.get(number, -1)
        assert index.find_prefix(prefix(number)) == rows.get(number, -1)


def test_a_deletion_takes_the_names_before_it_and_no_others() -> None:
    index = BlockIndex(capacity_max=8)
    row, other = index.add(digest(1), 1, 1), index.add(digest(2), 1, 1)
    for number, stamp in ((1, 10), (2, 20), (3, 30), (4, 21)):
        assert index.bind(prefix(number), row, None, stamp)
    assert index.bind(prefix(5), other, prefix(1), 5)
    assert not index.bind(prefix(2), row, None, 40)  # told again, later
    for _ in range(2):
        index.unbind_until(row, 20)
        assert {key for key, _ in index.bindings(row)} == {prefix(2), prefix(3), prefix(4)}
        index = BlockIndex.from_columns(index.export_columns(), capacity_max=8)
    assert index.find_prefix(prefix(1)) == -1
    assert index.find_prefix(prefix(5)) == other
    index.unbind_until(row, 40)
    assert index.bindings(row) == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("binding_row", lambda column: column + 100),
        ("binding_parent", lambda column: column - 100),
        ("digest", lambda column: column[:, :31]),
        ("stamp", lambda column: column.astype(np.int64)),
        ("page", lambda column: column[:-1]),
        ("digest", lambda column: np.repeat(column[:1], len(column), axis=0)),
        ("binding_stamp", lambda column: column[1:]),
        ("binding_key", lambda column: np.repeat(column[:1], len(column), axis=0)),
    ],
)
def test_columns_that_do_not_fit_are_refused(name: str, damage: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> None:
    index = BlockIndex(capacity_max=8)
    for number in range(3):
        index.bind(prefix(number + 1), index.add(digest(number), 1, 1), prefix(number))
    columns = index.export_columns()
    assert len(BlockIndex.from_columns(columns, capacity_max=8)) == 3
    with pytest.raises(CorruptionError, match="rebuild the index from the segments"):
        BlockIndex.from_columns({**columns, name: damage(columns[name])}, capacity_max=8)
    del columns[name]
    with pytest.raises(CorruptionError, match="is unusable"):
        BlockIndex.from_columns(columns, capacity_max=8)


def test_a_checkpoint_larger_than_the_capacity_is_refused() -> None:
    index = BlockIndex(capacity_max=8)
    for number in range(3):
        index.add(digest(number), 1, 1)
    with pytest.raises(TierFullError, match="3 blocks"):
        BlockIndex.from_columns(index.export_columns(), capacity_max=2)


MEMORY_PROBE = """
import numpy as np
from cascade_aio.core.index import BlockIndex

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

count, bound = 1_000_000, {bound}
rng = np.random.default_rng(1)
number = np.arange(count)
def plain(dtype):
    return number.astype(dtype)
slots = count if bound else 0
columns = dict(
    digest=rng.integers(0, 256, (count, 32), dtype=np.uint8), key_bytes=plain(np.uint32),
    value_bytes=plain(np.uint32), stamp=plain(np.uint64), segment=plain(np.int32), page=plain(np.uint32),
    header_pages=plain(np.uint8), flags=np.zeros(count, np.uint8),
    binding_key=rng.integers(0, 256, (slots, 32), dtype=np.uint8), binding_row=plain(np.int32)[:slots],
    binding_parent=np.where(number % 50 == 0, -1, number - 1).astype(np.int32)[:slots],
    binding_stamp=plain(np.uint64)[:slots],
)
before = resident_bytes()
index = BlockIndex.from_columns(columns)
grown = resident_bytes() - before
assert index.parent_row(7) == (6 if bound else -1)
assert len(index) == count
print(index.nbytes / count, grown / count)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(("bound", "limit"), [(False, 130), (True, 190)])
def test_memory_per_block_at_a_million_blocks(bound: bool, limit: int) -> None:
    """What the index says it holds, and what the process grew by, both stay within the bound."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE.format(bound=bound)], capture_output=True, text=True, check=True
    )
    said, grown = map(float, run.stdout.split())
    print(f"bytes per block: says {said:.0f}, process grew {grown:.0f}")
    assert said <= limit
    assert grown <= limit


def test_rows_by_stamp_are_in_order_of_age() -> None:
    index = BlockIndex(capacity_max=100)
    stamps = [5, 3, 9, 1, 7]
    for i, stamp in enumerate(stamps):
        row = index.add(bytes([i]) * 32, 1, 1)
        index.place(row, 0, i, 1, stamp)
    index.remove(index.find(bytes([2]) * 16))
    assert [index.stamp(row) for row in index.rows_by_stamp()] == [1, 3, 5, 7]


def test_identity_outlives_the_row() -> None:
    index = BlockIndex(capacity_max=100)
    unbound = index.add(bytes([1]) * 32, 1, 1)
    bound = index.add(bytes([2]) * 32, 1, 1)
    index.bind(bytes([9]) * 32, bound, None)
    before = index.identity(unbound), index.identity(bound)
    index.remove(bound)
    index.remove(unbound)
    recomputed = index.add(bytes([3]) * 32, 1, 1)  # other bytes of the same prompt
    index.bind(bytes([9]) * 32, recomputed, None)
    assert (index.identity(index.add(bytes([1]) * 32, 1, 1)), index.identity(recomputed)) == before
    assert len(set(before)) == 2
