"""KeyTable on its own: poor keys, wrap-around, and one-by-one against bulk loading."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_aio.core.hash_table import CELL_WORDS, SHARD_ENTRIES_MAX, KeyTable


def cells(keys: list[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(keys), dtype=np.uint64).copy()


POOR_KEYS = {
    "counting, big-endian": [number.to_bytes(32, "big") for number in range(5000)],
    "counting, little-endian": [number.to_bytes(32, "little") for number in range(5000)],
    "one word four times": [number.to_bytes(8, "little") * 4 for number in range(5000)],
    "one word four times, big-endian": [number.to_bytes(8, "big") * 4 for number in range(5000)],
}


@pytest.mark.parametrize("name", POOR_KEYS)
def test_keys_need_not_be_random(name: str) -> None:
    """Measured as the longest run of full slots: the cost of a miss. Random keys give about 60."""
    keys = POOR_KEYS[name]
    table = KeyTable(cells(keys), whole_keys=True, entries_max=len(keys))
    for entry in range(len(keys)):
        table.insert(entry)
    assert all(table.find(key) == entry for entry, key in enumerate(keys))
    longest = 0
    for slots in table._shards:
        for stretch in bytes(1 if slot else 0 for slot in slots).split(b"\0"):
            longest = max(longest, len(stretch))
    assert longest < 500


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=300),
    removals=st.lists(st.integers(0, 299), max_size=300),
    whole=st.booleans(),
    entries_max=st.sampled_from([1, 4 * SHARD_ENTRIES_MAX]),
)
def test_loading_at_once_equals_inserting_one_by_one(
    numbers: list[int], removals: list[int], whole: bool, entries_max: int
) -> None:
    keys = [number.to_bytes(8, "little") + bytes(24) for number in numbers]
    length = 32 if whole else 16
    words = cells(keys)
    single, bulk = (KeyTable(words, whole_keys=whole, entries_max=entries_max) for _ in range(2))
    for entry in range(len(keys)):
        single.insert(entry)
    bulk.load(np.arange(len(keys), dtype=np.int64))
    live = dict(enumerate(keys))
    for entry in removals:
        if live.pop(entry, None) is not None:
            single.remove(entry)
            bulk.remove(entry)
    for table in (single, bulk):
        assert len(table) == len(live)
        assert [table.find(key[:length]) for key in keys] == [e if e in live else -1 for e in range(len(keys))]


def test_entries_that_run_over_the_end_of_a_shard_are_found_at_its_start() -> None:
    """Chooses keys whose home is the last slots of a shard, so that probing must wrap around."""
    rng = np.random.default_rng(3)
    words = rng.integers(0, 2**64, 200_000 * CELL_WORDS, dtype=np.uint64)
    probe = KeyTable(words, whole_keys=True, entries_max=1)
    mixed = probe._mix_many(np.arange(200_000))
    late = np.flatnonzero(mixed >> np.uint64(54) == 1023)[:100]  # the last 1/1024 of the slots
    table = KeyTable(words, whole_keys=True, entries_max=1)
    table.load(late)
    assert table._shards[0][0] != 0, "nothing wrapped around: the test tests nothing"
    raw = words.tobytes()
    for entry in late.tolist():
        assert table.find(raw[32 * entry : 32 * entry + 32]) == entry
    for entry in late.tolist()[::2]:
        table.remove(entry)
    kept = set(late.tolist()[1::2])
    for entry in late.tolist():
        assert table.find(raw[32 * entry : 32 * entry + 32]) == (entry if entry in kept else -1)
    assert len(table) == len(kept)


def test_removals_leave_no_entry_unreachable() -> None:
    """A crowded shard: after every removal each remaining entry is still found from its home."""
    rng = np.random.default_rng(5)
    words = rng.integers(0, 2**64, 88 * CELL_WORDS, dtype=np.uint64)
    raw = words.tobytes()
    table = KeyTable(words, whole_keys=False, entries_max=1)
    for entry in range(88):
        table.insert(entry)
    assert len(table._shards[0]) == 128, "88 of 128 slots are as full as a shard gets"
    left = set(range(88))
    for entry in rng.permutation(88).tolist():
        table.remove(entry)
        left.discard(entry)
        assert {other for other in range(88) if table.find(raw[32 * other : 32 * other + 16]) == other} == left
    assert not any(table._shards[0])


def test_unknown_entries_are_assertions() -> None:
    table = KeyTable(cells([bytes(32), b"x" * 32]), whole_keys=False, entries_max=2)
    table.insert(0)
    with pytest.raises(AssertionError, match="entry 1 is not in the table"):
        table.remove(1)
