"""Copying records into a new segment: what compaction writes.

One segment at a time, strictly in order, through one buffer of ``COPY_BYTES`` whatever the size of the
records: neighbours are read together, checked against their headers and checksums, given the header of
their new place, and written. A record that fails its check leaves no trace, the next one takes its
place. The segment counts only once ``seal`` has returned: until then it is an open segment with copies
of what is elsewhere, and whoever finds it after a crash may seal it or not.

Failure contract: what is wrong with a source is the ``outcome`` of the record; what is wrong with the
new file is raised, and ``discard`` is all that may follow.

What it must not know: the index, which records are worth it, why.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from cascade_aio.abc.storage import PAGE_BYTES, ByteEngine, File, Priority, Storage
from cascade_aio.core.ranges import ReadRequest, coalesce
from cascade_aio.errors import CorruptionError
from cascade_aio.model import BLOCK_ID_BYTES
from cascade_aio.segments import format as fmt
from cascade_aio.segments.active import create_file, seal_file
from cascade_aio.segments.buffers import page_buffer
from cascade_aio.segments.facts import Location
from cascade_aio.segments.footer import FooterTables, footer_bytes
from cascade_aio.segments.layout import Root, WriterClaim
from cascade_aio.segments.reader import RecordRead, decode_expected, verify_payload
from cascade_aio.segments.table import SegmentEntry, SegmentTable

COPY_BYTES = 8 << 20
"""Read, checked and written at once: large enough for the device, small beside any arena."""

RUN_RECORDS_MAX = 256
"""Buffers of one vectored write; the kernel takes 1024."""

Pace = Callable[[int], Awaitable[None]]
"""Awaited before so many bytes are moved."""


@dataclasses.dataclass(slots=True, eq=False)
class Item:
    """A record to be copied, with all names its block has now, and what came of it.

    ``outcome`` is the place of the copy, or why there is none: ``CorruptionError``, ``OSError``.
    """

    location: Location
    record_bytes: int
    digest: bytes
    key_bytes: int
    value_bytes: int
    bindings: tuple[fmt.Binding, ...]
    outcome: Location | Exception | None = None


def capacity_for(items: Sequence[Item], bindings: int, tombstones: int) -> int:
    """Bytes of a segment that holds copies of ``items`` and notes with so many entries, at most.

    How many names of a block fit the header of its record is known only when it is read: all may need a note.
    """
    entries = bindings + tombstones + sum(len(item.bindings) for item in items)
    full, rest = divmod(entries, fmt.NOTE_ENTRIES_MAX)
    notes = full * fmt.HEADER_PAGES_MAX + (fmt.note_pages_for(rest, 0) if rest else 0)
    names = bindings + sum(len(item.bindings) for item in items)
    footer = footer_bytes(len(items) + full + 1, names, tombstones)
    return PAGE_BYTES + sum(item.record_bytes for item in items) + notes * PAGE_BYTES + footer


class SegmentCopy:
    """A new segment of ``claim``'s directory, being filled with copies. Owned by one task."""

    def __init__(self, storage: Storage, engine: ByteEngine, table: SegmentTable, entry: SegmentEntry) -> None:
        self.entry = entry
        self.written_bytes = 0
        self._storage = storage
        self._engine = engine
        self._table = table
        self._tables = FooterTables()
        self._crowded_out: list[fmt.NoteBinding] = []
        self._end = PAGE_BYTES
        self._file: File | None = None
        self._buffer = memoryview(b"")

    @classmethod
    async def create(
        cls,
        storage: Storage,
        engine: ByteEngine,
        table: SegmentTable,
        root: Root,
        claim: WriterClaim,
        stamp: int,
        entry: SegmentEntry,
    ) -> SegmentCopy:
        """Its file, preallocated with ``entry.capacity_bytes``. Raises ``OSError``; leaves no file then."""
        copy = cls(storage, engine, table, entry)
        header = fmt.SegmentHeader(root.store, entry.identity, root.digest, entry.capacity_bytes, stamp)
        copy._file = await create_file(storage, entry, header, claim.path)
        copy._buffer = page_buffer(COPY_BYTES)
        return copy

    @property
    def records(self) -> int:
        return self._tables.count

    # -- filling ---------------------------------------------------------------------------------

    async def copy(self, items: Sequence[Item], pace: Pace) -> None:
        """Copy records of one segment; sets every ``outcome``. Raises ``OSError`` of the new file only."""
        wanted = [
            ReadRequest(item.location.segment, item.location.page * PAGE_BYTES, item.record_bytes, item)
            for item in sorted(items, key=lambda item: item.location.page)
        ]
        runs = coalesce(wanted, gap_bytes_max=0, run_bytes_max=COPY_BYTES, run_requests_max=RUN_RECORDS_MAX)
        for run in runs:
            await pace(run.nbytes)
            some = [request.token for request in run.requests if isinstance(request.token, Item)]
            source = self._table.get(run.segment)
            try:
                if source is None:
                    raise FileNotFoundError(f"segment {run.segment} is gone")
                async with self._table.opened(run.segment) as file:
                    if run.nbytes > COPY_BYTES:
                        await self._copy_large(some[0], file, source, pace)
                    else:
                        await self._copy_run(some, run.offset, run.nbytes, file, source)
            except _TargetError as error:
                raise error.cause from None
            except OSError as error:
                for item in some:
                    item.outcome = error

    async def _read(self, file: File, buffer: memoryview, offset: int) -> int:
        return await self._storage.read(file, [buffer], offset, priority=Priority.IDLE)

    async def _copy_run(
        self, items: Sequence[Item], offset: int, nbytes: int, file: File, source: SegmentEntry
    ) -> None:
        """Neighbours, with one read and one write."""
        count = await self._read(file, self._buffer[:nbytes], offset)
        views: list[memoryview] = []
        start = 0
        for item in items:
            views.append(self._buffer[start : start + item.record_bytes])
            start += item.record_bytes
        crcs = await asyncio.gather(
            *(
                self._engine.checksum(view[item.location.header_pages * PAGE_BYTES :], fmt.CHUNK_BYTES)
                for item, view in zip(items, views, strict=True)
            )
        )
        sound: list[tuple[Item, memoryview, fmt.RecordHeader]] = []
        end = 0
        for item, view, found in zip(items, views, crcs, strict=True):
            end += item.record_bytes
            header = _decoded(item, view, source) if end <= count else _cut_short(item, source)
            if isinstance(header, fmt.RecordHeader):
                header = verify_payload(header, found, source) or header
            if isinstance(header, CorruptionError):
                item.outcome = header
            else:
                sound.append((item, view, header))
        place = self._end
        for item, view, header in sound:
            self._address(item, header, view, place)
            place = header.end
        if sound:
            await self._write([view for _, view, _ in sound], self._end)
        for item, _, header in sound:
            self._take(item, header)

    async def _copy_large(self, item: Item, file: File, source: SegmentEntry, pace: Pace) -> None:
        """A record that does not fit the buffer, piece by piece. One that is damaged is overwritten by the next."""
        start = item.location.page * PAGE_BYTES
        head = self._buffer[: item.location.header_pages * PAGE_BYTES]
        if await self._read(file, head, start) < len(head):
            item.outcome = _cut_short(item, source)
            return
        header = _decoded(item, head, source)
        if isinstance(header, CorruptionError):
            item.outcome = header
            return
        stored = header.chunk_crcs
        found: list[int] = []
        self._address(item, header, head, self._end)
        await self._write([head], self._end)
        for position in range(len(head), item.record_bytes, COPY_BYTES):
            piece = self._buffer[: min(COPY_BYTES, item.record_bytes - position)]
            if position > len(head):
                await pace(0)  # the bytes were paid for; a chance to be slowed down or stopped
            if await self._read(file, piece, start + position) < len(piece):
                item.outcome = _cut_short(item, source)
                return
            found.extend(await self._engine.checksum(piece, fmt.CHUNK_BYTES))
            if tuple(found) != stored[: len(found)]:
                found.extend(stored[len(found) :])
                original = dataclasses.replace(header, offset=start)
                item.outcome = verify_payload(original, found, source)
                return
            await self._write([piece], self._end + position)
        self._take(item, header)

    def _address(self, item: Item, header: fmt.RecordHeader, view: memoryview, offset: int) -> None:
        """Give the record its new place and as many of its names as fit; its stamp and bytes stay."""
        room = fmt.bindings_room(header.header_pages, len(header.chunk_crcs), len(header.meta))
        header.offset = offset
        header.synced_bytes = PAGE_BYTES
        header.bindings = item.bindings[:room]
        fmt.encode_record(view[: header.header_pages * PAGE_BYTES], header, self.entry.identity)

    def _take(self, item: Item, header: fmt.RecordHeader) -> None:
        self._tables.add(header)
        block_id = item.digest[:BLOCK_ID_BYTES]
        self._crowded_out += [
            fmt.NoteBinding(block_id, name.key, name.parent, name.stamp)
            for name in item.bindings[len(header.bindings) :]
        ]
        item.outcome = Location(self.entry.number, header.offset // PAGE_BYTES, header.header_pages)
        self._end = header.end

    async def _write(self, buffers: Sequence[memoryview], offset: int) -> None:
        assert self._file is not None, "created"
        try:
            await self._storage.write(self._file, buffers, offset, priority=Priority.IDLE)
        except OSError as error:
            raise _TargetError(error) from error
        self.written_bytes += sum(map(len, buffers))

    async def note(
        self, bindings: Sequence[fmt.NoteBinding], tombstones: Sequence[fmt.Tombstone], stamp: Callable[[], int]
    ) -> None:
        """Append names and deletions, and the names that no header had room for. Raises ``OSError``."""
        try:
            await self._note(bindings, tombstones, stamp)
        except _TargetError as error:
            raise error.cause from None

    async def _note(
        self, bindings: Sequence[fmt.NoteBinding], tombstones: Sequence[fmt.Tombstone], stamp: Callable[[], int]
    ) -> None:
        step = fmt.NOTE_ENTRIES_MAX
        entries: list[fmt.NoteBinding | fmt.Tombstone] = [*self._crowded_out, *bindings, *tombstones]
        for start in range(0, len(entries), step):
            some = entries[start : start + step]
            names = tuple(entry for entry in some if isinstance(entry, fmt.NoteBinding))
            gone = tuple(entry for entry in some if isinstance(entry, fmt.Tombstone))
            pages = fmt.note_pages_for(len(names), len(gone))
            header = fmt.RecordHeader(
                fmt.NOTE,
                pages,
                pages * PAGE_BYTES,
                self._end,
                stamp(),
                PAGE_BYTES,
                note_bindings=names,
                tombstones=gone,
            )
            view = self._buffer[: header.record_bytes]
            fmt.encode_record(view, header, self.entry.identity)
            await self._write([view], self._end)
            self._tables.add(header)
            self._end = header.end
            self.entry.kept_bytes += header.record_bytes

    # -- the end ---------------------------------------------------------------------------------

    async def seal(self) -> None:
        """Everything durable, footer and trailer included: from here on the copies count. Raises ``OSError``."""
        assert self._file is not None, "created"
        await self._storage.sync(self._file)
        self.written_bytes += await seal_file(self._storage, self._file, self.entry, self._tables, self._end)
        await self.close()

    async def discard(self) -> None:
        """Give the segment up: its copies were of no use to anybody yet. Raises ``OSError`` if the file stays."""
        await self.close()
        await self._storage.unlink(self.entry.path)

    async def close(self) -> None:
        self._buffer = memoryview(b"")
        self.entry.writing = False
        if self._file is not None:
            await self._file.close()


class _TargetError(Exception):
    """Internal: writing the new segment failed, not reading an old one."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


def _decoded(item: Item, view: memoryview, source: SegmentEntry) -> fmt.RecordHeader | CorruptionError:
    read = RecordRead(item.location, item.record_bytes, view, item.digest, item.key_bytes, item.value_bytes)
    return decode_expected(read, source)


def _cut_short(item: Item, source: SegmentEntry) -> CorruptionError:
    return CorruptionError(
        "the file ends within a record",
        path=source.path,
        segment=source.name,
        offset=item.location.page * PAGE_BYTES,
        expected=f"{item.record_bytes} bytes",
    )
