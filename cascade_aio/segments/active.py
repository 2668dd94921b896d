"""One segment being written: offsets, writes in flight, what is durable, and how it is sealed.

Bookkeeping of a single file; which record goes where, and what happens after a failure, is the
writer's. Invariants:

* ``synced <= written <= placed``; all below ``written`` was written without error, all below
  ``synced`` is on stable storage;
* after the first failed write or sync (``failed``) no further byte goes to the file and it is never
  synced again;
* a record is settled (reported durable) exactly once, when its end is at or below ``synced``;
* ``announced <= synced``: what the headers placed so far say is durable. Recovery has to verify and write again what
  lies beyond, so a *mark*, an empty NOTE, says so where no further record is about to.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import Sequence

from cascade_aio.abc.storage import PAGE_BYTES, File, Storage
from cascade_aio.segments import format as fmt
from cascade_aio.segments.buffers import page_buffer
from cascade_aio.segments.footer import FooterTables, footer_bytes
from cascade_aio.segments.pending import Append, TicketFifo
from cascade_aio.segments.table import SegmentEntry

DISCARD_SECONDS_MAX = 1.0
"""Whoever is cancelled while making a file waits so long for its removal: storage may hang."""


@dataclasses.dataclass(slots=True, eq=False)
class Placed:
    """A record with its place. ``appends`` is what it carries (several for a NOTE, by ticket; none for a mark),
    ``buffer`` its bytes.

    Places are not in order of ticket: notes go before records, and what a failed segment held comes later.
    """

    header: fmt.RecordHeader
    appends: Sequence[Append]
    buffer: memoryview

    @property
    def end(self) -> int:
        return self.header.end

    @property
    def first_ticket(self) -> int:
        return self.appends[0].ticket


@dataclasses.dataclass(slots=True, eq=False)
class Write:
    """One vectored write. ``ticket`` is the oldest append it carries; ``joins``: more records may be added."""

    offset: int
    nbytes: int
    buffers: list[memoryview]
    ticket: int
    joins: bool
    done: bool = False


class ActiveSegment:
    """State of one segment file that this process writes."""

    def __init__(self, storage: Storage, file: File, entry: SegmentEntry, capacity_bytes: int) -> None:
        self.entry = entry
        self.capacity_bytes = capacity_bytes
        self.placed = self.written = self.synced = PAGE_BYTES
        self.announced = 0
        self.failed: BaseException | None = None
        self.unsynced_since_s: float | None = None
        self.users = 0
        self.sync_lock = asyncio.Lock()
        self.idle = asyncio.Event()
        self.idle.set()
        self._storage = storage
        self._file = file
        self._writes: collections.deque[Write] = collections.deque()
        self._unsettled: collections.deque[Placed] = collections.deque()
        self._unwritten_tickets = TicketFifo()
        self._unsettled_tickets = TicketFifo()
        self._tables = FooterTables()
        self._rows = [0, 0, 0]  # records, bindings, tombstones placed: what the footer will say

    @property
    def room_bytes(self) -> int:
        """What is left of the preallocation. A record needs some of it for its rows in the footer: see ``fits``."""
        return self.capacity_bytes - self.placed

    def fits(self, nbytes: int, *, bindings: int, tombstones: int) -> bool:
        """Whether a record and then the footer fit: a segment never outgrows what was preallocated for it."""
        records, more_bindings, more_tombstones = self._rows
        end = footer_bytes(records + 1, more_bindings + bindings, more_tombstones + tombstones)
        return self.placed + nbytes + end <= self.capacity_bytes

    @property
    def unsynced_bytes(self) -> int:
        return self.written - self.synced

    @property
    def first_unwritten_ticket(self) -> int | None:
        """The oldest append whose bytes are not written yet."""
        return self._unwritten_tickets.smallest

    @property
    def first_unsettled_ticket(self) -> int | None:
        """The oldest append that is placed here and not durable yet."""
        return self._unsettled_tickets.smallest

    # -- users: writes in flight and the placer while it is at work -----------------------------

    def enter(self) -> None:
        self.users += 1
        self.idle.clear()

    def leave(self) -> None:
        self.users -= 1
        if not self.users:
            self.idle.set()

    # -- placing and writing -------------------------------------------------------------------

    def place(self, placed: Placed) -> None:
        """Give the record the next offset and compose its header. It must fit."""
        header = placed.header
        rows = (1, len(header.bindings) + len(header.note_bindings), len(header.tombstones))
        assert self.fits(header.record_bytes, bindings=rows[1], tombstones=rows[2]), (header, self.room_bytes)
        self._rows = [placed + more for placed, more in zip(self._rows, rows, strict=True)]
        header.offset = self.placed
        header.synced_bytes = self.announced = self.synced
        fmt.encode_record(placed.buffer[: header.header_pages * PAGE_BYTES], header, self.entry.identity)
        self.placed = header.end
        self._unsettled.append(placed)
        if placed.appends:
            self._unsettled_tickets.push(placed.first_ticket)

    def place_mark(self, stamp: int, settled_ticket: int) -> Write:
        """Place an empty NOTE, whose header says what is durable, and plan its write, which nobody waits for.

        ``settled_ticket``: of anything that is durable. The mark must fit. It need not be synced: what it says is true
        as soon as it can be read.
        """
        mark = Placed(fmt.RecordHeader(fmt.NOTE, 1, PAGE_BYTES, 0, stamp, 0), (), page_buffer(PAGE_BYTES))
        self.place(mark)
        write = Write(mark.header.offset, PAGE_BYTES, [mark.buffer], settled_ticket, joins=False)
        self.plan(write)
        return write

    def plan(self, write: Write) -> None:
        """Announce a write, in order of offset, before any of them is started. Its ticket is final."""
        self._writes.append(write)
        self._unwritten_tickets.push(write.ticket)

    async def write(self, write: Write) -> None:
        """Do a planned write. Raises ``OSError``."""
        await self._storage.write(self._file, write.buffers, write.offset)
        write.done = True
        if self.unsynced_since_s is None and self._unsettled_tickets.smallest is not None:  # a mark alone can wait
            self.unsynced_since_s = asyncio.get_running_loop().time()
        while self._writes and self._writes[0].done:
            done = self._writes.popleft()
            self._unwritten_tickets.pop(done.ticket)
            self.written = done.offset + done.nbytes

    async def sync(self) -> list[Placed]:
        """Make the written prefix durable; returns the records this settles. Raises ``OSError``.

        The caller holds ``sync_lock``.
        """
        upto = self.written
        if upto > self.synced:
            started_s = asyncio.get_running_loop().time()
            await self._storage.sync(self._file)
            self.synced = upto
            self.unsynced_since_s = started_s if self.written > upto else None
        settled = []
        while self._unsettled and self._unsettled[0].end <= self.synced:
            placed = self._unsettled.popleft()
            if placed.appends:
                self._unsettled_tickets.pop(placed.first_ticket)
            self._tables.add(placed.header)
            settled.append(placed)
        self.entry.size_bytes = self.entry.scanned_bytes = self.synced
        self.entry.record_bytes = self.synced - PAGE_BYTES
        return settled

    def give_up(self) -> list[Placed]:
        """After a failure and once idle: the records that are not durable, in order."""
        assert self.failed is not None, self.entry.name
        assert not self.users, self.entry.name
        orphans = list(self._unsettled)
        self._unsettled.clear()
        self._writes.clear()
        self._unsettled_tickets.clear()
        self._unwritten_tickets.clear()
        return orphans

    # -- the end -------------------------------------------------------------------------------

    async def seal(self) -> int:
        """Footer, trailer, truncate, sync. All records are settled. Returns bytes written. Raises ``OSError``."""
        assert not self._unsettled, self.entry.name
        return await seal_file(self._storage, self._file, self.entry, self._tables, self.synced)

    async def close(self) -> None:
        await self._file.close()


async def create_segment(
    storage: Storage, entry: SegmentEntry, header: fmt.SegmentHeader, directory: str
) -> ActiveSegment:
    """A new, preallocated segment whose header and name are durable. Raises ``OSError``; leaves no file then."""
    file = await create_file(storage, entry, header, directory)
    return ActiveSegment(storage, file, entry, header.capacity_bytes)


async def create_file(storage: Storage, entry: SegmentEntry, header: fmt.SegmentHeader, directory: str) -> File:
    """As ``create_segment``: the file, open for writing."""
    file = await storage.create(entry.path, preallocate_bytes=header.capacity_bytes)
    try:
        page = page_buffer(PAGE_BYTES)
        fmt.encode_segment_header(page, header)
        await storage.write(file, [page], 0)
        await storage.sync(file)
        await storage.sync_directory(directory)
    except asyncio.CancelledError:
        with contextlib.suppress(TimeoutError, OSError):  # else an empty file is left, which the next adopter removes
            async with asyncio.timeout(DISCARD_SECONDS_MAX):
                await file.close()
                await storage.unlink(entry.path)
        raise
    except BaseException:
        await file.close()
        await storage.unlink(entry.path)
        raise
    entry.size_bytes = entry.scanned_bytes = PAGE_BYTES
    return file


async def seal_file(storage: Storage, file: File, entry: SegmentEntry, tables: FooterTables, data_end: int) -> int:
    """Write footer and trailer at ``data_end`` and end the file there. Everything below is durable already.

    The trailer is written after the footer is durable, so a trailer whose footer does not match is
    damage and not an interrupted seal. Returns the bytes written. Raises ``OSError``.
    """
    buffer = tables.encode(entry.identity, data_end)
    size = data_end + len(buffer)
    if len(buffer) > PAGE_BYTES:
        await storage.write(file, [buffer[:-PAGE_BYTES]], data_end)
    await storage.truncate(file, size)
    await storage.sync(file)
    await storage.write(file, [buffer[-PAGE_BYTES:]], size - PAGE_BYTES)
    await storage.sync(file)
    entry.size_bytes = entry.scanned_bytes = size
    entry.record_bytes = data_end - PAGE_BYTES
    entry.sealed = True
    return len(buffer)
