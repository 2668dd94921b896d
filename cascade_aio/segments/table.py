"""Numbers for segments, and open files for those being read.

The index names a segment by a small local number; the table knows what it stands for. A number is
never given to another segment while the process lives, so a stale location can miss but never mean
something else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
from collections.abc import AsyncIterator, Iterator

from cascade_aio.abc.storage import PAGE_BYTES, File, Storage
from cascade_aio.segments.format import SegmentIdentity
from cascade_aio.segments.handles import FileHandles


def segment_path(root: str, identity: SegmentIdentity) -> str:
    return posixpath.join(root, "writers", identity.writer.hex(), f"{identity.sequence:010d}.seg")


@dataclasses.dataclass(slots=True, eq=False)
class SegmentEntry:
    """One segment. ``record_bytes`` counts all its records, ``live_bytes`` is kept by the store.

    ``scanned_bytes`` is the offset up to which its facts have been yielded. ``synced_bytes``: its writer
    said in the segment that all below was on stable storage (0: not known). ``writing`` while this
    process's writer has it open: a segment that was given up is neither written nor sealed.
    ``unreadable``: a read of it failed, so there may be more in it than is known. Until another look
    succeeds it is left as it is: not sealed, cut, reclaimed or covered by a checkpoint.
    ``damaged``: compaction met a record in it that is not what was written. The file is kept aside for
    ``repair``: not reclaimed, though what is sound in it may have been copied elsewhere.
    ``refused``: the index had no room for something that it says: it holds more than is known, and is not reclaimed.
    ``capacity_bytes`` is what was preallocated, until it is sealed; ``kept_bytes`` of its notes still matter, as
    far as compaction has written them; ``newest_stamp`` is of the newest record that was ever live in it.
    """

    number: int
    identity: SegmentIdentity
    path: str
    own: bool
    size_bytes: int = 0
    record_bytes: int = 0
    live_bytes: int = 0
    scanned_bytes: int = 0
    synced_bytes: int = 0
    sealed: bool = False
    writing: bool = False
    unreadable: bool = False
    damaged: bool = False
    refused: bool = False
    capacity_bytes: int = 0
    kept_bytes: int = 0
    newest_stamp: int = 0

    @property
    def allocated_bytes(self) -> int:
        """What the file takes on disk, preallocation included."""
        return self.size_bytes if self.sealed else max(self.size_bytes, self.capacity_bytes)

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def data_end(self) -> int:
        """Offset behind the last known record; behind it are a footer, or zeros, or news."""
        return PAGE_BYTES + self.record_bytes

    @property
    def firm_end(self) -> int:
        """What is wrong below this offset is damage. Beyond, in another writer's segment, it may be a write
        that never ended, or an end that whoever adopted the segment has cut off; in an own one that could not be
        read when its tail was to be verified, a write that a crash cut short."""
        if self.own and (self.sealed or not self.unreadable):
            return self.size_bytes
        return self.data_end if self.sealed else self.synced_bytes


class SegmentTable:
    """number ↔ segment. Owned by one event loop."""

    def __init__(self, storage: Storage, root: str, *, handles_max: int | None = None) -> None:
        self.root = root
        self._entries: dict[int, SegmentEntry] = {}
        self._numbers: dict[SegmentIdentity, int] = {}
        self._next_number = 0
        self._handles = FileHandles(storage, handles_max=handles_max)

    def add(self, identity: SegmentIdentity, *, own: bool) -> SegmentEntry:
        """The entry of a segment, made if there is none. Numbers count up from 0 in order of addition."""
        number = self._numbers.get(identity)
        if number is None:
            number = self._next_number
            self._next_number += 1
            self._numbers[identity] = number
            self._entries[number] = SegmentEntry(number, identity, segment_path(self.root, identity), own)
        entry = self._entries[number]
        entry.own = entry.own or own
        return entry

    def find(self, identity: SegmentIdentity) -> SegmentEntry | None:
        number = self._numbers.get(identity)
        return None if number is None else self._entries[number]

    def get(self, number: int) -> SegmentEntry | None:
        """The entry, or ``None`` if the segment has vanished."""
        return self._entries.get(number)

    def __getitem__(self, number: int) -> SegmentEntry:
        return self._entries[number]

    def __iter__(self) -> Iterator[SegmentEntry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    async def forget(self, number: int) -> None:
        """Drop a vanished segment; its file is closed once nobody reads it."""
        entry = self._entries.pop(number)
        del self._numbers[entry.identity]
        await self._handles.forget(number)

    @contextlib.asynccontextmanager
    async def opened(self, number: int) -> AsyncIterator[File]:
        """The segment's file, open for reading for the length of the scope. ``OSError`` as from ``open``."""
        entry = self._entries.get(number)
        if entry is None:
            raise FileNotFoundError(f"segment {number} is gone")
        async with self._handles.opened(number, entry.path) as file:
            yield file

    @property
    def open_handles(self) -> int:
        return len(self._handles)

    async def aclose(self) -> None:
        """Close every file. Readers must be gone."""
        await self._handles.aclose()
