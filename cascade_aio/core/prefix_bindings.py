"""Which prefix key names which block: columns of bindings, linked to rows and to their parents.

A binding says "prefix key P names the block in row R, and P's parent in the prompt is Q". The first
writer of a key wins. Children may be bound before their parents: a parent nobody has bound yet is a
*placeholder*, a slot without a row, which lives as long as a binding refers to it. So the 32 bytes of
a parent are stored once, however many children it has, and finding a parent's row is two steps
without a hash.

Invariants: a slot is bound (has a row) or referred to (has children), else it is free; the bindings
of a row form a doubly linked list whose head is its oldest binding. Slots and rows are stored plus
one, so that zeroed memory means none. Knows nothing of tiers and bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_aio.core.columns import reserve
from cascade_aio.core.hash_table import CELL_WORDS, KeyTable
from cascade_aio.errors import ConfigError, TierFullError
from cascade_aio.model import PREFIX_KEY_BYTES, PrefixKey

SLOT_BYTES = PREFIX_KEY_BYTES + 5 * 4 + 8
"""Memory per binding or placeholder, without its share of the hash table."""
ROW_BYTES = 4
"""Memory per row of the index: the head of its list."""


class PrefixBindings:
    """Bindings of an index of at most ``rows_max`` rows. Not thread-safe; nothing blocks.

    Columns are reserved for ``slots_max`` slots and cost memory only where they were used.
    """

    def __init__(self, *, rows_max: int, slots_max: int) -> None:
        self._slots_max = slots_max
        self._key_array = reserve(slots_max * CELL_WORDS, np.uint64)
        self._row_array = reserve(slots_max, np.uint32)
        self._parent_array = reserve(slots_max, np.uint32)
        self._next_array = reserve(slots_max, np.uint32)
        self._prev_array = reserve(slots_max, np.uint32)
        self._children_array = reserve(slots_max, np.uint32)
        self._stamp_array = reserve(slots_max, np.uint64)
        self._first_array = reserve(rows_max, np.uint32)
        self._keys = memoryview(self._key_array).cast("B")
        self._key_words = memoryview(self._key_array)
        self._row = memoryview(self._row_array)
        self._parent = memoryview(self._parent_array)
        self._next = memoryview(self._next_array)
        self._prev = memoryview(self._prev_array)
        self._children = memoryview(self._children_array)
        self._stamp = memoryview(self._stamp_array)
        self._first = memoryview(self._first_array)
        self._table = KeyTable(self._key_array, whole_keys=True, entries_max=slots_max)
        self._used = 0
        self._free = array("I")
        self._bound = 0

    def bind(self, prefix: bytes, row: int, parent: bytes | None, stamp: int = 0) -> bool:
        """Let ``prefix`` name ``row`` since ``stamp``. ``False``: it names a block already and still does; told
        again of the same block, it keeps the newest stamp.

        Raises ``ConfigError`` for a key that is its own parent, ``TierFullError`` at ``slots_max``.
        """
        if parent == prefix:
            raise ConfigError(f"prefix key {prefix.hex()} is given as its own parent")
        slot = self._table.find(prefix)
        if slot >= 0 and self._row[slot]:
            if self._row[slot] == row + 1:
                self._stamp[slot] = max(self._stamp[slot], stamp)
            return False
        above = -1 if parent is None else self._table.find(parent)
        wanted = (slot < 0) + (parent is not None and above < 0)
        if wanted > self._slots_max - self._used + len(self._free):
            raise TierFullError(
                f"the index holds {self._slots_max} prefix keys, its limit; open the store with larger "
                "index_blocks_max or delete blocks"
            )
        if slot < 0:
            slot = self._new_slot(prefix)
        if parent is not None:
            if above < 0:
                above = self._new_slot(parent)
            self._children[above] += 1
            self._parent[slot] = above + 1
        self._row[slot] = row + 1
        self._stamp[slot] = stamp
        self._bound += 1
        self._link(slot, row)
        return True

    def find(self, prefix: bytes) -> int:
        """The row that ``prefix`` names, or -1."""
        slot = self._table.find(prefix)
        return self._row[slot] - 1 if slot >= 0 else -1

    def get(self, prefix: bytes) -> tuple[int, bytes | None, int] | None:
        """(row, parent or ``None``, stamp) of what ``prefix`` names, or ``None``."""
        slot = self._table.find(prefix)
        if slot < 0 or not self._row[slot]:
            return None
        above = self._parent[slot]
        return self._row[slot] - 1, self._key(above - 1) if above else None, self._stamp[slot]

    def unbind(self, prefix: bytes) -> bool:
        """Forget what ``prefix`` names; ``False`` if it named nothing. Its children keep it as parent."""
        slot = self._table.find(prefix)
        if slot < 0 or not self._row[slot]:
            return False
        self._unbind_slot(slot)
        return True

    def unbind_row(self, row: int) -> None:
        """Forget all names of ``row``: O(its bindings)."""
        while first := self._first[row]:
            self._unbind_slot(first - 1)

    def unbind_until(self, row: int, stamp: int) -> None:
        """Forget the names of ``row`` that are not newer than ``stamp``: O(its bindings)."""
        slot = self._first[row]
        while slot:
            following = self._next[slot - 1]
            if self._stamp[slot - 1] <= stamp:
                self._unbind_slot(slot - 1)
            slot = following

    def newer_than(self, row: int, stamp: int) -> Iterator[tuple[PrefixKey, bytes | None, int]]:
        """(prefix, parent, stamp) of the names of ``row`` that are newer than ``stamp``."""
        slot = self._first[row]
        while slot:
            if self._stamp[slot - 1] > stamp:
                above = self._parent[slot - 1]
                yield PrefixKey(self._key(slot - 1)), self._key(above - 1) if above else None, self._stamp[slot - 1]
            slot = self._next[slot - 1]

    def of_row(self, row: int) -> Iterator[tuple[PrefixKey, bytes | None]]:
        """(prefix, parent) of each name of ``row``: the oldest first, the others newest first."""
        slot = self._first[row]
        while slot:
            above = self._parent[slot - 1]
            yield PrefixKey(self._key(slot - 1)), self._key(above - 1) if above else None
            slot = self._next[slot - 1]

    def parent_row(self, row: int) -> int:
        """The row named by the parent of the oldest name of ``row``; -1 for none, or ``row`` itself."""
        first = self._first[row]
        if not first:
            return -1
        above = self._parent[first - 1]
        if not above:
            return -1
        found = self._row[above - 1] - 1
        return found if found != row else -1  # equal blocks in a row of a prompt

    def first_word(self, row: int) -> int:
        """64 bits of the oldest name of ``row``; -1 if it has none."""
        first = self._first[row]
        return int(self._key_words[(first - 1) * CELL_WORDS]) if first else -1

    def __len__(self) -> int:
        """Bindings, without placeholders."""
        return self._bound

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes, without ``ROW_BYTES`` per row."""
        return self._used * SLOT_BYTES + self._free.itemsize * len(self._free) + self._table.nbytes

    def export_columns(self, new_row: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[Any]]:
        """Bindings and placeholders, compacted; ``new_row`` maps rows to what they are called outside.

        ``binding_key`` uint8[n, 32], ``binding_row`` int32[n] (-1: placeholder), ``binding_parent``
        int32[n] (index into these columns, -1: none), ``binding_stamp`` uint64[n]. A row's oldest
        binding precedes its others.
        """
        used = self._used
        row = self._row_array[:used].astype(np.int64) - 1
        slots = np.flatnonzero((row >= 0) | (self._children_array[:used] != 0))
        is_first = np.zeros(used, dtype=bool)
        heads = self._first_array[: len(new_row)]
        is_first[heads[heads != 0].astype(np.int64) - 1] = True
        slots = np.concatenate((slots[is_first[slots]], slots[~is_first[slots]]))
        new_slot = np.full(used + 1, -1, dtype=np.int32)  # the last is what "no parent" looks up
        new_slot[slots] = np.arange(len(slots), dtype=np.int32)
        bound = row[slots] >= 0
        outer_row = np.full(len(slots), -1, dtype=np.int32)
        outer_row[bound] = new_row[row[slots][bound]]
        cells = self._key_array[: used * CELL_WORDS].view(np.uint8).reshape(-1, PREFIX_KEY_BYTES)
        return {
            "binding_key": cells[slots],
            "binding_row": outer_row,
            "binding_parent": new_slot[self._parent_array[slots].astype(np.int64) - 1],
            "binding_stamp": self._stamp_array[slots],
        }

    def load(
        self,
        key: npt.NDArray[np.uint8],
        row: npt.NDArray[np.int32],
        parent: npt.NDArray[np.int32],
        stamp: npt.NDArray[np.uint64],
    ) -> None:
        """Fill an empty object from checked columns as ``export_columns`` gives them."""
        count = len(row)
        assert self._used == 0, "only empty bindings can be loaded"
        assert count <= self._slots_max, "the caller made room"
        self._used = count
        self._key_array[: count * CELL_WORDS].view(np.uint8)[:] = key.reshape(-1)
        self._row_array[:count] = row + 1
        self._parent_array[:count] = parent + 1
        self._stamp_array[:count] = stamp
        self._children_array[:count] = np.bincount(parent[parent >= 0], minlength=count)
        bound = np.flatnonzero(row >= 0)
        self._bound = len(bound)
        order = bound[np.argsort(row[bound], kind="stable")]
        follows = row[order][1:] == row[order][:-1]
        before, after = order[:-1][follows], order[1:][follows]
        self._next_array[before] = after + 1
        self._prev_array[after] = before + 1
        heads = order[np.concatenate(([True], ~follows))] if len(order) else order
        self._first_array[row[heads]] = heads + 1
        self._table.load(np.arange(count, dtype=np.int64))

    def _key(self, slot: int) -> bytes:
        return bytes(self._keys[slot * PREFIX_KEY_BYTES : (slot + 1) * PREFIX_KEY_BYTES])

    def _new_slot(self, prefix: bytes) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._used
            self._used += 1
        self._keys[slot * PREFIX_KEY_BYTES : (slot + 1) * PREFIX_KEY_BYTES] = prefix
        self._table.insert(slot)
        return slot

    def _link(self, slot: int, row: int) -> None:
        # Behind the head: the head stays the oldest, and no walk is needed for a block of zeros that
        # thousands of prompts share.
        first = self._first[row]
        if not first:
            self._first[row] = slot + 1
            return
        after = self._next[first - 1]
        self._next[first - 1] = slot + 1
        self._prev[slot] = first
        self._next[slot] = after
        if after:
            self._prev[after - 1] = slot + 1

    def _unbind_slot(self, slot: int) -> None:
        before, after = self._prev[slot], self._next[slot]
        if before:
            self._next[before - 1] = after
        else:
            self._first[self._row[slot] - 1] = after
        if after:
            self._prev[after - 1] = before
        above = self._parent[slot]
        self._row[slot] = self._parent[slot] = self._next[slot] = self._prev[slot] = 0
        self._bound -= 1
        self._free_unless_used(slot)
        if above:
            self._children[above - 1] -= 1
            self._free_unless_used(above - 1)

    def _free_unless_used(self, slot: int) -> None:
        if not self._row[slot] and not self._children[slot]:
            self._table.remove(slot)
            self._free.append(slot)
