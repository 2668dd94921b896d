"""A client's sight of a service's arena: the directory read-only, its own pin table, sealed bytes in place.

All of it is memory: no call blocks or asks the service. Belongs to one event loop. What cannot be had
here (misses, writes, blocks whose metadata is long) is asked for by message, which is not this module's
business; neither is what a lease looks like to its holder.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from typing import NamedTuple

from cascade_aio._native import map_shared
from cascade_aio._native.directory import Entry, NativeDirectory, PinTable
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.config import format_size
from cascade_aio.errors import LeaseError, ProtocolError
from cascade_aio.segments.buffers import page_padded
from cascade_aio.tiers import directory_format as fmt

MAPPING_ALIGNMENT = 2 << 20
"""Of the arena: a page of memory can only be part of a huge page at the same place in it."""


class Pinned(NamedTuple):
    """A block that stays where it is until ``DirectoryView.unpin``.

    Its key is at ``offset + header_bytes`` of the arena, its value at ``offset + header_bytes +
    value_offset``; ``nbytes`` is the whole extent, what the quota counts.
    """

    slot: int
    offset: int
    header_bytes: int
    key_bytes: int
    value_offset: int
    value_bytes: int
    digest: bytes
    meta: bytes
    nbytes: int


class DirectoryView:
    """Look-ups and pins of one client. Microseconds; never suspends."""

    def __init__(self, directory_fd: int, pin_fd: int) -> None:
        """Map both. ``directory_fd`` may be closed afterwards; of ``pin_fd``, the sign that this client lives,
        a duplicate is kept. Raises ``ProtocolError`` if they are not what they should be, ``OSError``."""
        memory = _map_whole(directory_fd, writable=False)
        identity = fmt.decode_superblock(memory)
        if isinstance(identity, str):
            raise ProtocolError(f"the directory that the service sent cannot be used: {identity}")
        geometry = fmt.geometry_of(identity.arena_bytes)
        pins = _map_whole(pin_fd, writable=True)
        described = fmt.decode_pins(pins)
        if isinstance(described, str) or described[0] != geometry.slots:
            raise ProtocolError(f"the pin table that the service sent does not fit its directory: {described}")
        if len(memory) < geometry.directory_bytes or len(pins) < geometry.pins_bytes:
            raise ProtocolError("the directory or the pin table that the service sent is cut short")
        self.arena_bytes = identity.arena_bytes
        self.quota_bytes = described[1]
        self._directory = NativeDirectory(memory, geometry.slots, geometry.buckets, fmt.CELLS_AT, geometry.slots_at)
        self._table = PinTable(pins, geometry.slots, fmt.TOUCHES_AT, fmt.COUNTS_AT, geometry.touched_at)
        self._revoked = memoryview(pins)[fmt.REVOKED_AT : fmt.REVOKED_AT + 8]
        self._memory = memory
        self.session = self._read_session()
        """Which opening of the service this view was made in."""
        self.pins = 0
        self.pinned_bytes = 0
        """Each pinned extent counted once, however many pins it has."""
        self._slot_pins: dict[int, int] = {}
        self._fd = os.dup(pin_fd)

    @property
    def current(self) -> bool:
        """Whether pins still count: same owner, table not revoked. Pins of a former owner's time hold (the next
        one honours them); new blocks of its successor are found by a new view."""
        return self._read_session() == self.session and not self._revoked[0]

    @property
    def revoked(self) -> bool:
        """The service has given up this client's pins: what was pinned may change at any time."""
        return bool(self._revoked[0])

    @property
    def blocks(self) -> int:
        """Blocks that the service knows, in any tier; up to date within a fraction of a second."""
        return self._directory.word(fmt.BLOCKS_AT)

    def __contains__(self, name: bytes) -> bool:
        return self._directory.find(fmt.directory_name(name)) >= 0

    def lookup(self, names: Iterable[bytes]) -> int:
        """How many of the leading names (ids or prefix keys) are in shared memory. Raises ``ConfigError`` for
        what is no name."""
        packed = [fmt.directory_name(name) for name in names]
        return self._directory.lookup(b"".join(packed), len(packed))

    def pin(self, name: bytes) -> Pinned | None:
        """Pin the block, or ``None``: ask the service. Each pin takes one ``unpin``.

        Raises ``LeaseError`` beyond the quota, ``ConfigError`` for what is no name.
        """
        entry = self._directory.pin(self._table, fmt.directory_name(name))
        if entry is None:
            return None
        pinned = pinned_of(entry)
        if not self.fits(pinned.slot, pinned.nbytes):
            self._table.drop(pinned.slot)
            raise LeaseError(
                f"this client has {format_size(self.pinned_bytes)} pinned and a quota of "
                f"{format_size(self.quota_bytes)}; release blocks sooner"
            )
        self.account(pinned.slot, pinned.nbytes)
        return pinned

    def fits(self, slot: int, nbytes: int) -> bool:
        """Whether a pin on ``slot``, whose extent has ``nbytes``, is within the quota. One block always is."""
        return slot in self._slot_pins or not self.pins or self.pinned_bytes + nbytes <= self.quota_bytes

    def account(self, slot: int, nbytes: int) -> None:
        """The service has pinned a block (of ``nbytes``, the extent's) for this client; ``unpin`` ends it."""
        count = self._slot_pins.get(slot, 0)
        self._slot_pins[slot] = count + 1
        self.pins += 1
        if not count:
            self.pinned_bytes += nbytes

    def unpin(self, slot: int, nbytes: int) -> None:
        """Give one pin back. Raises ``LeaseError`` if there is none on this slot."""
        try:
            self._table.drop(slot)
        except ValueError:
            raise LeaseError(f"slot {slot} of the directory is not pinned; release every block exactly once") from None
        count = self._slot_pins.pop(slot, 1) - 1
        self.pins -= 1
        if count:
            self._slot_pins[slot] = count
        else:
            self.pinned_bytes -= nbytes

    def close(self) -> None:
        """Let go of the table. Raises ``LeaseError`` while blocks are pinned; repeated calls do nothing."""
        if self.pins:
            raise LeaseError(f"{self.pins} blocks are still pinned; release them first")
        self.abandon()

    def abandon(self) -> None:
        """Let go of the table whatever is pinned: all of it may change from now on."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            fcntl.flock(fd, fcntl.LOCK_UN)  # by closing alone it would last as long as the mapping
            os.close(fd)

    def _read_session(self) -> bytes:
        return bytes(self._memory[fmt.SESSION_AT : fmt.SESSION_AT + 16])


def pinned_of(entry: Entry) -> Pinned:
    """What a client needs to know of a slot."""
    nbytes = entry.header_bytes + page_padded(entry.value_offset + entry.value_bytes)
    return Pinned(
        entry.slot, entry.offset, entry.header_bytes, entry.key_bytes, entry.value_offset, entry.value_bytes,
        entry.digest, entry.meta, nbytes,
    )  # fmt: skip


def map_arena(fd: int, nbytes: int) -> memoryview:
    """All of the arena, read-only; unmapped with its last view. Raises ``OSError``."""
    return map_shared(fd, nbytes, MAPPING_ALIGNMENT, writable=False)


def map_extent(fd: int, offset: int, nbytes: int) -> memoryview:
    """One extent to be filled (whole pages); unmapped with its last view. Raises ``OSError``.

    Its pages are not mapped in yet; huge ones are mapped as such, where the arena has them.
    """
    return map_shared(fd, nbytes, MAPPING_ALIGNMENT if nbytes >= MAPPING_ALIGNMENT else PAGE_BYTES, offset=offset)


def _map_whole(fd: int, *, writable: bool) -> memoryview:
    nbytes = os.fstat(fd).st_size
    if nbytes < PAGE_BYTES:
        raise ProtocolError(f"the service sent a file of {nbytes} bytes where a directory or pin table should be")
    return map_shared(fd, nbytes, PAGE_BYTES, writable=writable)
