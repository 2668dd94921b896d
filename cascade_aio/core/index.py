"""Every block the store knows, by content and by name: a columnar index in memory.

A block is a *row*, a small int that is reused after removal; a column per property, hash tables of
row numbers, prefix bindings beside them. A million Python objects would cost ten times the memory
and a pause at every garbage collection. Knows nothing of arenas, files and leases: where a block lies
on disk is three numbers it is told.

Columns are never copied: they are reserved whole (``core.columns``), and the kernel gives a page when
it is first written. So growth costs nothing, vectorised scans see one array, and ``capacity_max`` is
a real limit with its own error; an index of ten blocks holds a few pages. Scalar access goes through
memoryviews, which read an element in a third of the time NumPy takes.

Invariants: block ids are unique; a dead row has no flags, no segment (-1) and no binding; every
prefix key names at most one row. Every call is O(1) and takes microseconds, unless it says otherwise.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_aio.core.columns import reserve
from cascade_aio.core.hash_table import CELL_WORDS, KeyTable
from cascade_aio.core.prefix_bindings import ROW_BYTES as BINDING_ROW_BYTES
from cascade_aio.core.prefix_bindings import PrefixBindings
from cascade_aio.errors import CorruptionError, DigestConflictError, TierFullError
from cascade_aio.model import BLOCK_ID_BYTES, DIGEST_BYTES, BlockId, PrefixKey

CAPACITY_DEFAULT = 1 << 22
"""Blocks: 8 TiB of 2 MiB blocks; reserves 0.7 GB of address space, not of memory."""
CAPACITY_LIMIT = 1 << 30
"""Row and slot numbers plus one fit 32 bits, with room for two slots per row."""
BINDINGS_PER_BLOCK_DEFAULT = 2
"""Prefix keys (and unbound parents) reserved per block of capacity."""
PART_BYTES_MAX = (1 << 32) - 1
"""Lengths of key and value are 32-bit columns."""
ROW_BYTES = DIGEST_BYTES + 4 + 4 + 8 + 4 + 4 + 1 + 1 + BINDING_ROW_BYTES
"""Memory per row, without hash tables and bindings."""

_LIVE = 1
FLAGS_ALL = 0xFE
"""Bits of ``flags`` that belong to the caller; the lowest is the index's own."""
_SCAN_ROWS = 4096

Columns = dict[str, npt.NDArray[Any]]


class BlockIndex:
    """Blocks by id and by prefix key. Rows that are not live are assertions. Not thread-safe; nothing
    blocks."""

    def __init__(self, *, capacity_max: int = CAPACITY_DEFAULT, bindings_max: int | None = None) -> None:
        assert 0 < capacity_max <= CAPACITY_LIMIT, f"capacity_max={capacity_max} is out of range"
        self._capacity_max = capacity_max
        self._digest_array = reserve(capacity_max * CELL_WORDS, np.uint64)
        self._key_bytes_array = reserve(capacity_max, np.uint32)
        self._value_bytes_array = reserve(capacity_max, np.uint32)
        self._stamp_array = reserve(capacity_max, np.uint64)
        self._segment_array = reserve(capacity_max, np.int32)
        self._page_array = reserve(capacity_max, np.uint32)
        self._header_pages_array = reserve(capacity_max, np.uint8)
        self._flags_array = reserve(capacity_max, np.uint8)
        self._digests = memoryview(self._digest_array).cast("B")
        self._digest_words = memoryview(self._digest_array)
        self._key_bytes = memoryview(self._key_bytes_array)
        self._value_bytes = memoryview(self._value_bytes_array)
        self._stamp = memoryview(self._stamp_array)
        self._segment = memoryview(self._segment_array)
        self._page = memoryview(self._page_array)
        self._header_pages = memoryview(self._header_pages_array)
        self._flags = memoryview(self._flags_array)
        self._table = KeyTable(self._digest_array, whole_keys=False, entries_max=capacity_max)
        slots_max = BINDINGS_PER_BLOCK_DEFAULT * capacity_max if bindings_max is None else bindings_max
        self._bindings = PrefixBindings(rows_max=capacity_max, slots_max=slots_max)
        self._used = 0
        self._free = array("I")
        self.on_bind: Callable[[bytes, int], None] | None = None
        """Told of every name that a row gets: (prefix, row)."""
        self.on_unbind: Callable[[bytes, int], None] | None = None
        """Told of every name that a row loses and outlives."""

    def find(self, block_id: bytes) -> int:
        """The row of the block with this id (16 bytes), or -1."""
        return self._table.find(block_id)

    def find_digest(self, digest: bytes) -> int:
        """The row of the block with this digest (32 bytes), or -1.

        Raises ``DigestConflictError`` if another digest has the same first 128 bits.
        """
        row = self._table.find(digest[:BLOCK_ID_BYTES])
        if row >= 0 and self._digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES] != digest:
            raise DigestConflictError(
                f"block {digest[:BLOCK_ID_BYTES].hex()} is stored with digest {self.digest(row).hex()}, "
                f"not {digest.hex()}; the two blocks cannot be kept in one store"
            )
        return row

    def add(self, digest: bytes, key_bytes: int, value_bytes: int) -> int:
        """A new row for a block that is not in the index (an assertion otherwise), nowhere on disk.

        Raises ``TierFullError`` when ``capacity_max`` blocks are in the index.
        """
        assert len(digest) == DIGEST_BYTES, "a digest has 32 bytes"
        assert 0 <= key_bytes <= PART_BYTES_MAX, f"key_bytes={key_bytes} is out of range"
        assert 0 <= value_bytes <= PART_BYTES_MAX, f"value_bytes={value_bytes} is out of range"
        assert self._table.find(digest[:BLOCK_ID_BYTES]) < 0, f"block {digest[:BLOCK_ID_BYTES].hex()} is known"
        if self._free:
            row = self._free.pop()
        elif self._used < self._capacity_max:
            row = self._used
            self._used += 1
        else:
            raise TierFullError(
                f"the index holds {self._capacity_max} blocks, its limit; open the store with larger "
                "index_blocks_max or delete blocks"
            )
        self._digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES] = digest
        self._key_bytes[row] = key_bytes
        self._value_bytes[row] = value_bytes
        self._stamp[row] = 0
        self._segment[row] = -1
        self._page[row] = self._header_pages[row] = 0
        self._flags[row] = _LIVE
        self._table.insert(row)
        return row

    def remove(self, row: int) -> None:
        """Forget the block and all of its names: O(its bindings). The number may be reused at once."""
        assert self._flags[row], f"row {row} is not live"
        self._bindings.unbind_row(row)
        self._table.remove(row)
        self._flags[row] = 0
        self._segment[row] = -1
        self._free.append(row)

    def digest(self, row: int) -> bytes:
        assert self._flags[row], f"row {row} is not live"
        return bytes(self._digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES])

    def block_id(self, row: int) -> BlockId:
        assert self._flags[row], f"row {row} is not live"
        return BlockId(self._digests[row * DIGEST_BYTES : row * DIGEST_BYTES + BLOCK_ID_BYTES])

    def lengths(self, row: int) -> tuple[int, int]:
        """(key_bytes, value_bytes)."""
        assert self._flags[row], f"row {row} is not live"
        return self._key_bytes[row], self._value_bytes[row]

    def place(self, row: int, segment: int, page: int, header_pages: int, stamp: int) -> None:
        """The block's record is at ``page`` (4096-byte units) of ``segment``; it replaces an older place."""
        assert self._flags[row], f"row {row} is not live"
        assert segment >= 0, f"segment {segment} is no segment"
        self._segment[row] = segment
        self._page[row] = page
        self._header_pages[row] = header_pages
        self._stamp[row] = stamp

    def unplace(self, row: int) -> None:
        """The block is on disk no longer. Its stamp stays: older records must not bring it back."""
        assert self._flags[row], f"row {row} is not live"
        self._segment[row] = -1
        self._page[row] = self._header_pages[row] = 0

    def location(self, row: int) -> tuple[int, int, int] | None:
        """(segment, page, header_pages) of the newest record, or ``None`` if it is not on disk."""
        assert self._flags[row], f"row {row} is not live"
        segment = self._segment[row]
        return None if segment < 0 else (segment, self._page[row], self._header_pages[row])

    def stamp(self, row: int) -> int:
        """Stamp of the newest record; 0 before the first."""
        assert self._flags[row], f"row {row} is not live"
        return self._stamp[row]

    def flags(self, row: int) -> int:
        """The caller's flags: a subset of ``FLAGS_ALL``, kept in checkpoints."""
        assert self._flags[row], f"row {row} is not live"
        return self._flags[row] & FLAGS_ALL

    def set_flags(self, row: int, flags: int) -> None:
        """Replace the caller's flags."""
        assert self._flags[row], f"row {row} is not live"
        assert not flags & ~FLAGS_ALL, f"flags {flags:#x} are not the caller's"
        self._flags[row] = flags | _LIVE

    def bind(self, prefix: bytes, row: int, parent: bytes | None, stamp: int = 0) -> bool:
        """Let ``prefix`` name the block since ``stamp``. ``False``: it names one already, and still does; told
        again of the same block, it keeps the newest stamp.

        ``parent`` is the key before it in the prompt, bound or not. Raises ``ConfigError`` for a key
        that is its own parent and ``TierFullError`` at the limit of prefix keys.
        """
        assert self._flags[row], f"row {row} is not live"
        fresh = self._bindings.bind(prefix, row, parent, stamp)
        if fresh and self.on_bind is not None:
            self.on_bind(prefix, row)
        return fresh

    def find_prefix(self, prefix: bytes) -> int:
        """The row that ``prefix`` (32 bytes) names, or -1."""
        return self._bindings.find(prefix)

    def binding(self, prefix: bytes) -> tuple[int, bytes | None, int] | None:
        """(row, parent or ``None``, stamp) of the name ``prefix``, or ``None`` if it names nothing."""
        return self._bindings.get(prefix)

    def unbind(self, prefix: bytes) -> bool:
        """Forget a name; ``False`` if it named nothing. The block stays."""
        if self.on_unbind is not None and (row := self._bindings.find(prefix)) >= 0:
            self.on_unbind(prefix, row)
        return self._bindings.unbind(prefix)

    def unbind_until(self, row: int, stamp: int) -> None:
        """Forget the block's names that are not newer than ``stamp``, a deletion that the block itself
        outlived: O(its bindings)."""
        assert self._flags[row], f"row {row} is not live"
        if self.on_unbind is not None:
            for prefix, _, bound in self._bindings.newer_than(row, -1):
                if bound <= stamp:
                    self.on_unbind(prefix, row)
        self._bindings.unbind_until(row, stamp)

    def bindings_newer_than(self, row: int, stamp: int) -> list[tuple[PrefixKey, bytes | None, int]]:
        """(prefix, parent or ``None``, stamp) of the block's names that are newer than ``stamp``."""
        assert self._flags[row], f"row {row} is not live"
        return list(self._bindings.newer_than(row, stamp))

    def oldest_bindings(self, row: int, count: int) -> list[tuple[PrefixKey, bytes | None, int]]:
        """The same for at most ``count`` of its names, the oldest first: O(count)."""
        assert self._flags[row], f"row {row} is not live"
        return list(itertools.islice(self._bindings.newer_than(row, -1), count))

    def bindings(self, row: int) -> list[tuple[PrefixKey, bytes | None]]:
        """(prefix, parent or ``None``) of each name of the block; the oldest is the first."""
        assert self._flags[row], f"row {row} is not live"
        return list(self._bindings.of_row(row))

    def parent_row(self, row: int) -> int:
        """The block before this one in a prompt: what the parent of its oldest name names, or -1."""
        return self._bindings.parent_row(row)

    def identity(self, row: int) -> int:
        """64 bits that name the block also after it was forgotten and came back: of its oldest prefix key, which
        recomputed bytes keep, or of its digest."""
        word = self._bindings.first_word(row)
        return word if word >= 0 else self._digest_words[row * CELL_WORDS]

    def rows(self, first: int = 0) -> Iterator[int]:
        """Live rows from ``first`` on, ascending. The index may change meanwhile: then a row added or removed while
        iterating may or may not be seen."""
        for start in range(first, self._used, _SCAN_ROWS):
            yield from (np.flatnonzero(self._flags_array[start : min(start + _SCAN_ROWS, self._used)]) + start).tolist()

    def rows_by_stamp(self) -> Iterator[int]:
        """Live rows, those with the oldest records first (~0.1 s per million before the first).

        In pieces: a list of a million numbers would leave holes in the heap for good.
        """
        live = np.flatnonzero(self._flags_array[: self._used])
        order = live[np.argsort(self._stamp_array[live], kind="stable")]
        for start in range(0, len(order), _SCAN_ROWS):
            yield from order[start : start + _SCAN_ROWS].tolist()

    def rows_in_segment(self, segment: int) -> npt.NDArray[np.int64]:
        """Rows whose newest record is in ``segment`` (>= 0), ascending. One vectorised scan (~0.5 ms
        per million rows)."""
        assert segment >= 0, f"segment {segment} is no segment"
        return np.flatnonzero(self._segment_array[: self._used] == segment)

    def rows_between(self, segment: int, start_page: int, end_page: int) -> npt.NDArray[np.int64]:
        """Rows whose newest record begins in these pages of ``segment``, the last excluded. As ``rows_in_segment``."""
        rows = self.rows_in_segment(segment)
        pages = self._page_array[rows]
        return rows[(pages >= start_page) & (pages < end_page)]

    def newest_stamps(self) -> dict[int, int]:
        """Segment -> stamp of its newest record that is in the index. Vectorised (~20 ms per million rows)."""
        segments = self._segment_array[: self._used]
        placed = segments >= 0
        newest = np.zeros(int(segments.max(initial=-1)) + 1, dtype=np.uint64)
        np.maximum.at(newest, segments[placed], self._stamp_array[: self._used][placed])
        return {number: stamp for number, stamp in enumerate(newest.tolist()) if stamp}

    def is_in_segment(self, row: int, segment: int) -> bool:
        """Whether the row, which need not be live any more, has its newest record in ``segment`` (>= 0)."""
        return self._segment[row] == segment

    def __len__(self) -> int:
        return self._used - len(self._free)

    @property
    def bindings_count(self) -> int:
        """Prefix keys that name a block."""
        return len(self._bindings)

    @property
    def capacity_max(self) -> int:
        return self._capacity_max

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes: what was touched, not what is reserved."""
        free = self._free.itemsize * len(self._free)
        return self._used * ROW_BYTES + free + self._table.nbytes + self._bindings.nbytes

    def export_columns(self) -> Columns:
        """Copies of all live rows, compacted in row order, and of the bindings: for checkpoints.

        ``digest`` uint8[n, 32], ``key_bytes`` and ``value_bytes`` uint32, ``stamp`` uint64, ``segment``
        int32, ``page`` uint32, ``header_pages`` and ``flags`` uint8, all [n]; ``binding_key``,
        ``binding_row``, ``binding_parent`` and ``binding_stamp`` as ``PrefixBindings.export_columns`` says.
        Vectorised (~0.2 s per million blocks: not on a loop that must not stop).
        """
        used = self._used
        live = np.flatnonzero(self._flags_array[:used])
        new_row = np.full(used, -1, dtype=np.int32)
        new_row[live] = np.arange(len(live), dtype=np.int32)
        digests = self._digest_array[: used * CELL_WORDS].view(np.uint8).reshape(-1, DIGEST_BYTES)
        columns: Columns = {"digest": digests[live]}
        for name, column in self._plain_columns().items():
            columns[name] = column[live]
        columns["flags"] = self._flags_array[live] & np.uint8(FLAGS_ALL)
        columns.update(self._bindings.export_columns(new_row))
        return columns

    @classmethod
    def from_columns(
        cls,
        columns: Mapping[str, npt.NDArray[Any]],
        *,
        capacity_max: int = CAPACITY_DEFAULT,
        bindings_max: int | None = None,
    ) -> BlockIndex:
        """The index that ``export_columns`` described; row i is the i-th of the columns.

        ``columns`` are copied. Raises ``CorruptionError`` if they do not fit each other and
        ``TierFullError`` if they exceed the capacity. Vectorised (~0.7 s per million blocks).
        """
        check_columns(columns)
        count, slots = len(columns["key_bytes"]), len(columns["binding_row"])
        slots_max = BINDINGS_PER_BLOCK_DEFAULT * capacity_max if bindings_max is None else bindings_max
        if count > capacity_max or slots > slots_max:
            raise TierFullError(
                f"the root has {count} blocks and {slots} prefix keys, more than the index may hold "
                f"({capacity_max} and {slots_max}); open it with larger index_blocks_max"
            )
        index = cls(capacity_max=capacity_max, bindings_max=slots_max)
        index._used = count
        index._digest_array[: count * CELL_WORDS].view(np.uint8)[:] = columns["digest"].reshape(-1)
        for name, column in index._plain_columns().items():
            column[:count] = columns[name]
        index._flags_array[:count] = columns["flags"] | np.uint8(_LIVE)
        index._table.load(np.arange(count, dtype=np.int64))
        bindings = (columns[f"binding_{name}"] for name in ("key", "row", "parent", "stamp"))
        index._bindings.load(*bindings)
        return index

    def _plain_columns(self) -> dict[str, npt.NDArray[Any]]:
        """Columns that checkpoints hold as they are."""
        return {
            "key_bytes": self._key_bytes_array,
            "value_bytes": self._value_bytes_array,
            "stamp": self._stamp_array,
            "segment": self._segment_array,
            "page": self._page_array,
            "header_pages": self._header_pages_array,
        }


_COLUMN_TYPES: dict[str, type[np.generic]] = {
    "digest": np.uint8,
    "key_bytes": np.uint32,
    "value_bytes": np.uint32,
    "stamp": np.uint64,
    "segment": np.int32,
    "page": np.uint32,
    "header_pages": np.uint8,
    "flags": np.uint8,
    "binding_key": np.uint8,
    "binding_row": np.int32,
    "binding_parent": np.int32,
    "binding_stamp": np.uint64,
}


def check_columns(columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise ``CorruptionError`` unless the columns are complete and refer only to each other."""
    for name, kind in _COLUMN_TYPES.items():
        column = columns.get(name)
        owner = "binding_row" if name.startswith("binding_") else "key_bytes"
        width = (DIGEST_BYTES,) if name in ("digest", "binding_key") else ()
        expected = (len(columns.get(owner, ())), *width)
        if column is None or column.dtype != kind or column.shape != expected:
            found = "missing" if column is None else f"{column.dtype}{column.shape}"
            raise CorruptionError(
                f"index column {name!r} is unusable; rebuild the index from the segments",
                expected=f"{np.dtype(kind)}{expected}",
                found=found,
            )
    for name, owner in (("binding_row", "key_bytes"), ("binding_parent", "binding_row")):
        if np.any(columns[name] < -1) or np.any(columns[name] >= len(columns[owner])):
            raise CorruptionError(f"index column {name!r} refers to nothing; rebuild the index from the segments")


def select_columns(columns: Mapping[str, npt.NDArray[Any]], keep: npt.NDArray[np.bool_]) -> Columns:
    """The columns with only the blocks where ``keep`` (one bool per block) is true: for dropping the
    blocks of segments that are gone, before ``from_columns``. Names of dropped blocks go with them;
    as parents of what stays they become placeholders. Vectorised."""
    assert len(keep) == len(columns["key_bytes"]), "keep has one entry per block"
    chosen: Columns = {name: columns[name][keep] for name in _COLUMN_TYPES if not name.startswith("binding_")}
    new_row = np.full(len(keep) + 1, -1, dtype=np.int32)  # the last is what placeholders (-1) look up
    new_row[:-1][keep] = np.arange(np.count_nonzero(keep), dtype=np.int32)
    row = new_row[columns["binding_row"]]
    parent = np.where(row >= 0, columns["binding_parent"], -1)
    wanted = row >= 0
    wanted[parent[parent >= 0]] = True
    new_slot = np.full(len(row) + 1, -1, dtype=np.int32)
    new_slot[:-1][wanted] = np.arange(np.count_nonzero(wanted), dtype=np.int32)
    chosen["binding_key"] = columns["binding_key"][wanted]
    chosen["binding_row"] = row[wanted]
    chosen["binding_parent"] = new_slot[parent[wanted]]
    chosen["binding_stamp"] = columns["binding_stamp"][wanted]
    return chosen
