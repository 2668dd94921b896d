"""From a key to the number of its entry: an open-addressing table over somebody else's key column.

It stores entry numbers only (4 bytes a slot); the keys stay in the owner's column of 32-byte cells,
of which the first 16 or all 32 bytes count. Linear probing with backward-shift deletion, so removals
leave nothing behind and probes stay short however long the table lives.

Growth without a pause: the table is cut into shards by the first bits of the hash, and each shard
doubles by itself, vectorised, in well under a millisecond (at most ``SHARD_ENTRIES_MAX`` entries move).
That is simpler than migrating an old table slot by slot, needs no second lookup, and holds no old table.

Invariants: entry numbers are unique; an entry's key does not change while it is in the table; between
its home slot and its place no slot is empty. Memory shrinks only with the whole table.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cascade_aio.errors import CorruptionError

CELL_WORDS = 4
"""A key cell is four native 64-bit words (32 bytes), of which the table may use the first two only."""
SHARD_ENTRIES_MAX = 4096
"""Entries of one shard when the owner is full (average): what one growth step moves."""

_SLOTS_MIN = 8
_LOAD_NUMERATOR, _LOAD_DENOMINATOR = 7, 10
_MASK64 = (1 << 64) - 1
# Odd constants (splitmix64, xxHash): keys need not be random, a PrefixKey may be any 32 bytes. The
# high bits of the sum are used, which depend on all words. Callers are trusted not to attack it.
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xC2B2AE3D27D4EB4F)
_M0, _M1, _M2, _M3 = _MULTIPLIERS
_unpack_short: Callable[[bytes], tuple[int, int]] = struct.Struct("=2Q").unpack
_unpack_whole: Callable[[bytes], tuple[int, int, int, int]] = struct.Struct("=4Q").unpack


class KeyTable:
    """Finds entries by key. ``words`` is the owner's key column (flat uint64, four words an entry);
    ``whole_keys`` tells whether all 32 bytes of a cell are the key, or the first 16.

    ``entries_max`` sizes the number of shards. Not thread-safe; no call takes a millisecond but ``load``.
    """

    def __init__(self, words: npt.NDArray[np.uint64], *, whole_keys: bool, entries_max: int) -> None:
        self._array = words
        self._words = memoryview(words)
        self._whole = whole_keys
        shard_bits = max(0, (entries_max - 1) // SHARD_ENTRIES_MAX).bit_length()
        self._shard_shift = 64 - shard_bits
        self._low_shift = 32 - shard_bits  # the 32 bits after the shard's choose the slot
        self._shards = [array("I", bytes(4 * _SLOTS_MIN)) for _ in range(1 << shard_bits)]
        self._slot_shifts = [32 - (_SLOTS_MIN.bit_length() - 1)] * len(self._shards)
        self._counts = [0] * len(self._shards)

    def find(self, key: bytes) -> int:
        """The entry with ``key`` (16 or 32 bytes, as ``whole_keys`` says; else ``struct.error``), or -1."""
        words = self._words
        if self._whole:
            w0, w1, w2, w3 = _unpack_whole(key)
            mixed = (w0 * _M0 + w1 * _M1 + w2 * _M2 + w3 * _M3) & _MASK64
        else:
            w0, w1 = _unpack_short(key)
            w2 = w3 = 0
            mixed = (w0 * _M0 + w1 * _M1) & _MASK64
        shard = mixed >> self._shard_shift
        slots = self._shards[shard]
        mask = len(slots) - 1
        at = (mixed >> self._low_shift & 0xFFFFFFFF) >> self._slot_shifts[shard]
        while stored := slots[at]:
            cell = (stored << 2) - 4
            if (
                words[cell] == w0
                and words[cell + 1] == w1
                and (not self._whole or (words[cell + 2] == w2 and words[cell + 3] == w3))
            ):
                return stored - 1
            at = (at + 1) & mask
        return -1

    def insert(self, entry: int) -> None:
        """Add ``entry``, whose key is in its cell already and not in the table."""
        mixed = self._mix(entry)
        shard = mixed >> self._shard_shift
        slots = self._shards[shard]
        if (self._counts[shard] + 1) * _LOAD_DENOMINATOR > len(slots) * _LOAD_NUMERATOR:
            slots = self._double(shard)
        self._counts[shard] += 1
        mask = len(slots) - 1
        at = (mixed >> self._low_shift & 0xFFFFFFFF) >> self._slot_shifts[shard]
        while slots[at]:
            at = (at + 1) & mask
        slots[at] = entry + 1

    def remove(self, entry: int) -> None:
        """Take ``entry`` out; its cell still holds its key. Unknown entries are assertions."""
        mixed = self._mix(entry)
        shard = mixed >> self._shard_shift
        slots = self._shards[shard]
        mask = len(slots) - 1
        slot_shift = self._slot_shifts[shard]
        hole = (mixed >> self._low_shift & 0xFFFFFFFF) >> slot_shift
        while (stored := slots[hole]) != entry + 1:
            assert stored, f"entry {entry} is not in the table"
            hole = (hole + 1) & mask
        self._counts[shard] -= 1
        at = (hole + 1) & mask
        while stored := slots[at]:
            home = (self._mix(stored - 1) >> self._low_shift & 0xFFFFFFFF) >> slot_shift
            # An entry may fill the hole if that does not put it before its home.
            if (at - home) & mask >= (at - hole) & mask:
                slots[hole] = stored
                hole = at
            at = (at + 1) & mask
        slots[hole] = 0

    def load(self, entries: npt.NDArray[np.int64]) -> None:
        """Fill an empty table with ``entries`` at once (~0.3 s per million). Raises ``CorruptionError``
        if two of them have the same key."""
        assert not any(self._counts), "only an empty table can be loaded"
        mixed = self._mix_many(entries)
        order = np.argsort(mixed)
        mixed, entries = mixed[order], entries[order]
        self._refuse_duplicates(mixed, entries)
        shard_count = len(self._shards)
        if shard_count == 1:
            bounds = np.array([0, len(entries)])
        else:
            edges = np.arange(1, shard_count, dtype=np.uint64) << np.uint64(self._shard_shift)
            bounds = np.concatenate(([0], np.searchsorted(mixed, edges), [len(entries)]))
        low = (mixed >> np.uint64(self._low_shift)) & np.uint64(0xFFFFFFFF)
        limits = bounds.tolist()
        for shard in range(shard_count):
            start, stop = limits[shard], limits[shard + 1]
            count = stop - start
            slots = _SLOTS_MIN
            while count * _LOAD_DENOMINATOR > slots * _LOAD_NUMERATOR:
                slots *= 2
            self._counts[shard] = count
            self._rebuild(shard, entries[start:stop], low[start:stop], slots)

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def nbytes(self) -> int:
        """Memory held by the table, its lists included, without the owner's keys."""
        slots = sum(len(shard) for shard in self._shards)
        return 4 * slots + len(self._shards) * 120  # an array object and three list cells each

    def _mix(self, entry: int) -> int:
        words, cell = self._words, entry << 2
        mixed = words[cell] * _M0 + words[cell + 1] * _M1
        if self._whole:
            mixed += words[cell + 2] * _M2 + words[cell + 3] * _M3
        return mixed & _MASK64

    def _mix_many(self, entries: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        cells = self._array.reshape(-1, CELL_WORDS)
        mixed = np.zeros(len(entries), dtype=np.uint64)
        for word in range(CELL_WORDS if self._whole else 2):
            mixed += cells[entries, word] * np.uint64(_MULTIPLIERS[word])
        return mixed

    def _double(self, shard: int) -> array[int]:
        slots = np.frombuffer(self._shards[shard], dtype=np.uint32)
        entries = slots[slots != 0].astype(np.int64) - 1
        low = (self._mix_many(entries) >> np.uint64(self._low_shift)) & np.uint64(0xFFFFFFFF)
        order = np.argsort(low)
        self._rebuild(shard, entries[order], low[order], 2 * len(slots))
        return self._shards[shard]

    def _rebuild(self, shard: int, entries: npt.NDArray[np.int64], low: npt.NDArray[np.uint64], slots: int) -> None:
        """Place ``entries`` (sorted by ``low``, the 32 bits that choose the slot) into ``slots`` new slots."""
        slot_shift = 32 - (slots.bit_length() - 1)
        fresh = array("I", bytes(4 * slots))
        self._shards[shard] = fresh
        self._slot_shifts[shard] = slot_shift
        if not len(entries):
            return
        # Linear probing of sorted homes: each goes to its home, or right after the one before it.
        steps = np.arange(len(entries))
        places = np.maximum.accumulate((low >> np.uint64(slot_shift)).astype(np.int64) - steps) + steps
        fits = int(np.searchsorted(places, slots))
        np.frombuffer(fresh, dtype=np.uint32)[places[:fits]] = entries[:fits] + 1
        for entry in entries[fits:].tolist():  # the few that run over the end start again at slot 0
            at = 0
            while fresh[at]:
                at += 1
            fresh[at] = entry + 1

    def _refuse_duplicates(self, mixed: npt.NDArray[np.uint64], entries: npt.NDArray[np.int64]) -> None:
        same = np.flatnonzero(mixed[1:] == mixed[:-1])
        cells = self._array.reshape(-1, CELL_WORDS)[:, : CELL_WORDS if self._whole else 2]
        if np.any(np.all(cells[entries[same]] == cells[entries[same + 1]], axis=1)):
            raise CorruptionError("the index columns name one key twice; rebuild the index from the segments")
