"""The directory of an arena and its pin tables, typed: one mapping of each, and the calls of ``c/cascade_directory.c``.

No policy: which slot a block gets, who may pin how much and where files lie is ``tiers.directory``'s business.
Bytes, states and the argument for safety: ``tiers/DIRECTORY.md``. Nothing here blocks or allocates in
proportion to anything but its result. Geometry is what the caller computed, never what shared memory says.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from cascade_aio._native._library import ffi, lib

NAME_BYTES = 16
NAMES_PER_SLOT_MAX = 4
INLINE_META_BYTES_MAX = 88
SLOT_BYTES = 256
BUCKET_BYTES = 64
HARVEST_MAX = 1024
"""Slots that one ``harvested`` or ``held`` returns at most: below 100 µs of the caller's turn."""

_ENTRY = struct.Struct("<QQQQQIIII32s88s")


class SlotState(enum.IntEnum):
    """The low byte of a slot's word. See ``tiers/DIRECTORY.md``."""

    FREE = 0
    BUSY = 1
    SEALED = 2
    EVICTING = 3
    RETIRED = 4
    FILLING = 5
    DORMANT = 6


_STATES = {int(state): state for state in SlotState}


class Entry(NamedTuple):
    """What a slot says. Lengths and offsets in bytes; the payload begins ``header_bytes`` behind ``offset``.

    ``word`` is generation and state; ``by_message``: metadata does not fit, clients cannot pin it.
    """

    word: int
    offset: int
    key_bytes: int
    value_bytes: int
    value_offset: int
    slot: int
    header_bytes: int
    by_message: bool
    digest: bytes
    meta: bytes

    @property
    def generation(self) -> int:
        return self.word >> 8


_NO_ENTRY = Entry(0, 0, 0, 0, 0, 0, 0, False, bytes(32), b"")


class PinTable:
    """One mapping of a pin table: ``counts`` and ``touched`` per slot, and how often something was touched.

    ``memory`` is writable, page-aligned and kept alive: a word of touches at ``touches_at``, four bytes a
    slot at ``counts_at``, one at ``touched_at``.
    """

    def __init__(self, memory: memoryview, slots: int, touches_at: int, counts_at: int, touched_at: int) -> None:
        assert counts_at + 4 * slots <= len(memory), "the counts are inside"
        assert touched_at + slots <= len(memory), "the touched bytes are inside"
        assert not (touches_at | counts_at | touched_at) & 7, "aligned for atomics"
        self._memory = memory
        self.slots = slots
        base = ffi.cast("char *", ffi.from_buffer(memory))
        self.pointer = ffi.new("struct cascade_pins *")
        self.pointer.touches = base + touches_at
        self.pointer.counts = self.counts = base + counts_at
        self.pointer.touched = base + touched_at
        self.pointer.slot_count = slots
        self._found = ffi.new("uint32_t[]", HARVEST_MAX)
        self._next = ffi.new("uint32_t *")

    def add(self, slot: int) -> None:
        """One more pin. For the owner, on a slot that cannot be withdrawn now. Raises ``ValueError``: no such slot."""
        if lib.cascade_pins_add(self.pointer, slot) < 0:
            raise ValueError(f"slot {slot} is none of this directory's")

    def drop(self, slot: int) -> None:
        """One pin less. Raises ``ValueError`` if there was none."""
        if lib.cascade_pins_drop(self.pointer, slot) < 0:
            raise ValueError(f"slot {slot} is not pinned")

    @property
    def touches(self) -> int:
        return lib.cascade_word_load(self.pointer.touches)

    def harvested(self, start: int) -> tuple[list[int], int]:
        """Slots from ``start`` on that were touched since they were last asked for (at most ``HARVEST_MAX``),
        and where to go on."""
        count = lib.cascade_pins_harvest(self.pointer, start, self._found, HARVEST_MAX, self._next)
        return ffi.unpack(self._found, count), self._next[0]

    def held(self, start: int) -> tuple[list[int], int]:
        """The same for slots that have a pin now."""
        count = lib.cascade_pins_held(self.pointer, start, self._found, HARVEST_MAX, self._next)
        return ffi.unpack(self._found, count), self._next[0]


class PinTables:
    """All pin tables that a withdrawal has to look at, as C wants them."""

    def __init__(self, tables: Sequence[PinTable] = ()) -> None:
        self._alive = tuple(tables)
        self.count = len(self._alive)
        self.pointer = ffi.new("uint32_t *[]", [ffi.cast("uint32_t *", table.counts) for table in tables] or 1)


class NativeDirectory:
    """One mapping of a directory: ``cells_at`` and ``slots_at`` are where table and slots begin in ``memory``.

    The methods up to ``pin`` are for everybody, the others for its one owner, whose ``memory`` is writable.
    """

    def __init__(self, memory: memoryview, slots: int, buckets: int, cells_at: int, slots_at: int) -> None:
        assert buckets & (buckets - 1) == 0, "a power of two"
        assert cells_at + BUCKET_BYTES * buckets <= len(memory), "the table is inside"
        assert slots_at + SLOT_BYTES * slots <= len(memory), "the slots are inside"
        assert not (cells_at | slots_at) & (BUCKET_BYTES - 1), "aligned to cache lines"
        self._memory = memory
        base = ffi.cast("char *", ffi.from_buffer(memory))
        self._base = base
        self._directory = ffi.new("struct cascade_directory *")
        self._directory.cells = base + cells_at
        self._directory.slots = base + slots_at
        self._directory.slot_count = slots
        self._directory.buckets = buckets
        self._entry = ffi.new("struct cascade_entry *")
        self._entry_bytes = memoryview(ffi.buffer(self._entry, _ENTRY.size))

    def find(self, name: bytes) -> int:
        """The slot of the sealed block that has ``name`` (16 bytes), or -1. A moment's truth."""
        slot = lib.cascade_directory_find(self._directory, name)
        return slot if slot >= 0 else -1

    def lookup(self, names: bytes, count: int) -> int:
        """How many of ``count`` names, back to back, are those of sealed blocks: leading ones."""
        assert len(names) == count * NAME_BYTES, "whole names"
        return lib.cascade_directory_lookup(self._directory, names, count)

    def pin(self, pins: PinTable, name: bytes) -> Entry | None:
        """Pin the block with ``name`` (16 bytes) until ``pins.drop(entry.slot)``; ``None`` if it cannot be had here."""
        if lib.cascade_directory_pin(self._directory, pins.pointer, name, self._entry) < 0:
            return None
        return self._unpacked()

    def word(self, at: int) -> int:
        """The shared 64-bit word at byte ``at`` (acquire)."""
        return lib.cascade_word_load(self._base + at)

    def set_word(self, at: int, word: int) -> None:
        """Change it (release)."""
        lib.cascade_word_store(self._base + at, word)

    def publish(self, entry: Entry, state: SlotState) -> bool:
        """Fill the free slot ``entry.slot`` (``word`` does not matter). ``False``: the table of names is full there."""
        self._entry_bytes[:] = _ENTRY.pack(
            0, entry.offset, entry.key_bytes, entry.value_bytes, entry.value_offset, entry.slot, entry.header_bytes,
            len(entry.meta), entry.by_message, entry.digest, entry.meta,
        )  # fmt: skip
        rc = lib.cascade_directory_publish(self._directory, self._entry, state)
        assert rc in (0, -errno.ENOSPC), f"slot {entry.slot} cannot be published: {-rc}"
        return rc == 0

    def bind(self, slot: int, name: bytes) -> bool:
        """A further name of a sealed slot. ``False``: no room for it."""
        return lib.cascade_directory_bind(self._directory, slot, name) == 0

    def unbind(self, slot: int, name: bytes) -> None:
        """Forget a name, if the slot has it."""
        lib.cascade_directory_unbind(self._directory, slot, name)

    def withdraw(self, slot: int, tables: PinTables) -> bool:
        """Free the slot unless somebody has a pin. ``False``: nothing has changed."""
        return lib.cascade_directory_withdraw(self._directory, slot, tables.pointer, tables.count) > 0

    def is_pinned(self, slot: int, tables: PinTables) -> bool:
        """Whether somebody has a pin now."""
        return lib.cascade_directory_is_pinned(self._directory, slot, tables.pointer, tables.count) > 0

    def retire(self, slot: int, tables: PinTables) -> bool:
        """No new pins from now on. ``True``: the slot is free; ``False``: pins are left, ask again."""
        return lib.cascade_directory_retire(self._directory, slot, tables.pointer, tables.count) > 0

    def inspect(self, slot: int) -> tuple[SlotState | None, Entry]:
        """State and entry of any slot, whatever lies there; state ``None`` for one that is not sound."""
        rc = lib.cascade_directory_inspect(self._directory, slot, self._entry)
        if rc == SlotState.FREE:
            return SlotState.FREE, _NO_ENTRY
        return _STATES.get(rc), self._unpacked()

    def mark(self, slot: int, state: SlotState) -> bool:
        """Change the state. SEALED: findable by its id, without names (``False``: no room in the table).
        FREE: of a new generation."""
        return lib.cascade_directory_mark(self._directory, slot, state) == 0

    def clear_names(self) -> None:
        """Empty the table: nobody finds anything."""
        lib.cascade_directory_clear_names(self._directory)

    def _unpacked(self) -> Entry:
        (
            word, offset, key_bytes, value_bytes, value_offset, slot, header_bytes, meta_bytes, flags, digest, meta,
        ) = _ENTRY.unpack(self._entry_bytes)  # fmt: skip
        return Entry(
            word, offset, key_bytes, value_bytes, value_offset, slot, header_bytes, flags != 0, digest,
            meta[:meta_bytes] if meta_bytes else b"",
        )  # fmt: skip
