"""What segments say, one statement at a time. Recovery yields these; the store merges them.

The rule for merging (FORMAT.md, "What wins") is ``FactMerger``: facts come in any order, from many
segments, and a tombstone may arrive before or after what it deletes.
"""

from __future__ import annotations

from typing import NamedTuple

from cascade_aio.model import BLOCK_ID_BYTES


class Location(NamedTuple):
    """Where a record is: local segment number (``SegmentTable``), first page, pages of header."""

    segment: int
    page: int
    header_pages: int


class BlockFact(NamedTuple):
    """A BLOCK record. ``provisional``: not known to be durable; reading decides."""

    location: Location
    record_bytes: int
    digest: bytes
    key_bytes: int
    value_bytes: int
    stamp: int
    provisional: bool

    @property
    def block_id(self) -> bytes:
        return self.digest[:BLOCK_ID_BYTES]


class BindingFact(NamedTuple):
    """A prefix key bound to a block, from the block's own record or from a NOTE."""

    location: Location
    block_id: bytes
    key: bytes
    parent: bytes | None
    stamp: int
    provisional: bool


class TombstoneFact(NamedTuple):
    """Blocks and bindings of ``block_id`` not newer than ``stamp`` are deleted."""

    location: Location
    block_id: bytes
    stamp: int
    provisional: bool


class DamageFact(NamedTuple):
    """Bytes that were acknowledged and cannot be read any more. Never silently skipped.

    ``unreadable``: reading failed, which says nothing about the bytes; the next attempt may succeed.
    """

    path: str
    segment: str
    offset: int
    nbytes: int
    reason: str
    unreadable: bool = False


class VanishedFact(NamedTuple):
    """A segment that was removed: nothing at locations with this number is there any more."""

    segment: int


class LostFact(NamedTuple):
    """A file is gone, or shorter than it was known to be, and nobody who may do so did it.

    A ``VanishedFact`` follows; what is still there, if anything, is told after it.
    """

    segment: int
    path: str
    name: str
    offset: int
    nbytes: int
    reason: str


Fact = BlockFact | BindingFact | TombstoneFact | DamageFact | VanishedFact | LostFact


class FactMerger:
    """Decides from tombstones which facts are live. Pure; order does not matter.

    ``is_live`` is asked as facts arrive; ``bury`` returns True if the tombstone is news, upon which
    the caller drops what it holds of that id with a stamp not newer.
    """

    def __init__(self) -> None:
        self._tombstones: dict[bytes, int] = {}

    def bury(self, block_id: bytes, stamp: int) -> bool:
        if self._tombstones.get(block_id, -1) >= stamp:
            return False
        self._tombstones[block_id] = stamp
        return True

    def is_live(self, block_id: bytes, stamp: int) -> bool:
        return stamp > self._tombstones.get(block_id, -1)

    def stamp_min(self, block_id: bytes) -> int:
        """The smallest stamp that a new record or binding of this id needs to be live."""
        return self._tombstones.get(block_id, -1) + 1

    def forget(self, block_id: bytes, stamp: int) -> None:
        """This tombstone, unless a newer one is known, is not needed any more: no segment holds what it deletes."""
        if self._tombstones.get(block_id) == stamp:
            del self._tombstones[block_id]

    def __len__(self) -> int:
        """Blocks with a tombstone."""
        return len(self._tombstones)

    def tombstones(self) -> dict[bytes, int]:
        """Newest tombstone of each id, for the checkpoint."""
        return dict(self._tombstones)
