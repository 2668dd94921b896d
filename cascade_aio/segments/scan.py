"""Walking a segment header by header, and past whatever is in the way.

Bounded: one buffer of ``SCAN_WINDOW_BYTES``, whatever the segment holds. Used by recovery and by
verification; decides nothing about what a gap means. Keeps apart what was read and is no record, and what
could not be read, which may be anything.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

import numpy as np

from cascade_aio.abc.storage import PAGE_BYTES, ByteEngine, File, Priority, Storage
from cascade_aio.core.index import PART_BYTES_MAX
from cascade_aio.errors import CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.buffers import page_buffer
from cascade_aio.segments.reader import verify_payload
from cascade_aio.segments.table import SegmentEntry

SCAN_WINDOW_BYTES = 1 << 23
"""Read at once where records are small, and when searching: two requests, so that the device has work."""

HEADER_WINDOW_BYTES = fmt.HEADER_PAGES_MAX * PAGE_BYTES
"""Read at once where records are large: enough for any header."""

SMALL_RECORD_BYTES = 128 << 10
"""Below this, reading the payloads between the headers costs less than separate requests."""

VERIFY_BYTES = 8 << 20
"""Payload read and checked at once; a multiple of the checksum chunk."""

UNREADABLE_PAGES_MAX = 256
"""A search gives up after so many: a file system that is gone may take seconds to fail each read."""

READS_MAX = 2
"""What is wrong is read once more before it is believed: a device, a bus or memory that errs once is no damage of the
medium, and what is believed damaged is cut off, written over or kept from use."""

_MAGIC_WORD = int.from_bytes(fmt.RECORD_MAGIC, "little")


class Gap(NamedTuple):
    """Bytes that are no record. ``followed``: a valid record comes behind them.

    ``unreadable``: not every page of it could be read, so there may be records in it.
    """

    offset: int
    nbytes: int
    reason: str
    followed: bool
    unreadable: bool = False


async def read_pages(storage: Storage, file: File, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` (whole pages) from a place within the file. Raises ``OSError``, also when fewer bytes come."""
    count = await storage.read(file, [buffer], offset, priority=Priority.BACKGROUND)
    if count < len(buffer):
        raise OSError(errno.EIO, f"{count} of {len(buffer)} bytes came", file.path)


def unreadable_reason(error: OSError) -> str:
    """For a report: what failed."""
    return f"unreadable ({error.strerror or os.strerror(error.errno or errno.EIO)})"


class _Window:
    """A sliding view of the file up to ``end``. A page that cannot be read raises ``OSError``."""

    def __init__(self, storage: Storage, file: File, end: int) -> None:
        self.end = end
        self._storage = storage
        self._file = file
        self._buffer = page_buffer(SCAN_WINDOW_BYTES)
        self._start = 0
        self._filled = 0

    async def view(self, offset: int, nbytes: int, ahead_bytes: int) -> memoryview:
        """``nbytes`` from ``offset``, less only at the end; valid until the next call."""
        nbytes = min(nbytes, self.end - offset)
        if offset < self._start or offset + nbytes > self._start + self._filled:
            await self._fill(offset, nbytes, min(max(nbytes, ahead_bytes), self.end - offset))
        first = offset - self._start
        return self._buffer[first : first + nbytes]

    async def view_ahead(self, offset: int, limit: int) -> memoryview:
        """A page from ``offset``, or more of what lies before ``limit``."""
        await self.view(offset, PAGE_BYTES, min(SCAN_WINDOW_BYTES, limit - offset))
        return self._buffer[offset - self._start : min(limit - self._start, self._filled)]

    def forget(self) -> None:
        """What was read may be wrong: the next view reads again."""
        self._filled = 0

    async def _fill(self, offset: int, nbytes: int, ahead_bytes: int) -> None:
        self._start, self._filled = offset, 0
        length = ahead_bytes
        try:
            await read_pages(self._storage, self._file, self._buffer[:length], offset)
        except OSError:
            if length == nbytes:
                raise
            length = nbytes  # the bad page may be behind what is asked for
            await read_pages(self._storage, self._file, self._buffer[:length], offset)
        self._filled = length


async def scan_records(
    storage: Storage,
    file: File,
    entry: SegmentEntry,
    *,
    start: int,
    end: int,
    search_bytes: int | None = None,
    known_end: int = 0,
) -> AsyncIterator[fmt.RecordHeader | Gap]:
    """Headers of the records from ``start`` to ``end``, and the gaps between them, in order of offset.

    Past a gap it looks for the next valid header up to ``search_bytes`` (``None``: to the end), and up to the offset
    ``known_end`` in any case. The last item is a gap that is not ``followed``, unless the records end exactly at
    ``end``.
    """
    window = _Window(storage, file, end // PAGE_BYTES * PAGE_BYTES)
    position = start
    ahead = HEADER_WINDOW_BYTES
    while position + PAGE_BYTES <= end:
        header, reason, unread = await _header_at(window, entry, position, ahead)
        if header is None:
            limit = window.end if search_bytes is None else min(window.end, max(position + search_bytes, known_end))
            found, skipped = await _search(window, entry, position + PAGE_BYTES, limit)
            behind = end if found is None else found.offset
            if skipped and not unread:
                reason += ", and unreadable pages behind"
            yield Gap(position, behind - position, reason, found is not None, unread or skipped)
            if found is None:
                return
            header = found
        yield header
        position = header.end
        ahead = SCAN_WINDOW_BYTES if header.record_bytes <= SMALL_RECORD_BYTES else HEADER_WINDOW_BYTES


async def _header_at(
    window: _Window, entry: SegmentEntry, position: int, ahead: int
) -> tuple[fmt.RecordHeader | None, str, bool]:
    """The header at ``position``, or why there is none, and whether that is because it could not be read."""
    header, reason = None, ""
    try:
        for attempt in range(READS_MAX):
            if attempt:
                window.forget()
            view = await window.view(position, PAGE_BYTES, ahead)
            try:
                pages = fmt.header_pages_at(view, path=entry.path, offset=position)
                if not pages:
                    return None, "no record, only zeros", False
                view = await window.view(position, pages * PAGE_BYTES, ahead)
                header = fmt.decode_record(view, entry.identity, path=entry.path, offset=position)
                break
            except CorruptionError as exc:
                reason = exc.args[0].partition(" in ")[0]
    except OSError as exc:
        return None, unreadable_reason(exc), True
    if header is None:
        return None, reason, False
    if header.end > window.end:
        return None, "the file ends within a record", False
    if max(header.key_bytes, header.value_bytes) > PART_BYTES_MAX:
        return None, "record header is unusable: a part longer than any block has", False
    return header, "", False


async def _search(
    window: _Window, entry: SegmentEntry, position: int, limit: int
) -> tuple[fmt.RecordHeader | None, bool]:
    """The next valid header at or after ``position``, page by page; and whether a page on the way is unreadable."""
    unread = 0
    while position + PAGE_BYTES <= limit and unread < UNREADABLE_PAGES_MAX:
        try:
            view = await window.view_ahead(position, limit)
        except OSError:
            unread += 1
            position += PAGE_BYTES
            continue
        words = np.frombuffer(view, dtype="<u8")[:: PAGE_BYTES // 8]
        pages = [int(page) for page in np.flatnonzero(words == _MAGIC_WORD)]
        scanned = len(view)
        del view, words
        for page in pages:
            header, _, failed = await _header_at(window, entry, position + page * PAGE_BYTES, HEADER_WINDOW_BYTES)
            if header is not None:
                return header, unread > 0
            unread += failed
        position += scanned
    return None, unread > 0


async def check_payload(
    storage: Storage,
    engine: ByteEngine,
    file: File,
    entry: SegmentEntry,
    header: fmt.RecordHeader,
    buffer: memoryview,
    priority: Priority = Priority.BACKGROUND,
) -> CorruptionError | None:
    """Read a record's payload through ``buffer`` (a multiple of its chunk) and check it: the damage, or ``None``.

    A part behind the end of the file is damage. Raises ``OSError`` for one that cannot be read: that says nothing
    about its bytes.
    """
    error: CorruptionError | None = None
    for _ in range(READS_MAX):
        error = await _check_once(storage, engine, file, entry, header, buffer, priority)
        if error is None:
            return None
    return error


async def _check_once(
    storage: Storage,
    engine: ByteEngine,
    file: File,
    entry: SegmentEntry,
    header: fmt.RecordHeader,
    buffer: memoryview,
    priority: Priority,
) -> CorruptionError | None:
    crcs: list[int] = []
    for offset, piece in payload_pieces(header, buffer):
        count = await storage.read(file, [piece], offset, priority=priority)
        if count < len(piece):
            return CorruptionError("the file ends within a record", path=entry.path, segment=entry.name, offset=offset)
        crcs.extend(await engine.checksum(piece, header.chunk_bytes))
    return verify_payload(header, crcs, entry)


def payload_pieces(header: fmt.RecordHeader, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(Offset, so much of ``buffer``) of the pieces of a record's payload: whole chunks but for the last."""
    step = len(buffer) // header.chunk_bytes * header.chunk_bytes
    assert step > 0, "the buffer holds at least one chunk"
    for offset in range(header.offset + header.header_pages * PAGE_BYTES, header.end, step):
        yield offset, buffer[: min(step, header.end - offset)]


async def write_again(
    storage: Storage,
    engine: ByteEngine,
    file: File,
    entry: SegmentEntry,
    header: fmt.RecordHeader,
    buffer: memoryview,
) -> None:
    """Write a sound record's bytes to the same place again, checked as they were read: no read that errs gets there.

    ``file`` is open for writing. Raises ``OSError``, also if its bytes cannot be read as they ought to be.
    """
    pages = buffer[: header.header_pages * PAGE_BYTES]
    fmt.encode_record(pages, header, entry.identity)
    await storage.write(file, [pages], header.offset)
    done = 0
    for offset, piece in payload_pieces(header, buffer):
        chunks = -(-len(piece) // header.chunk_bytes)
        wanted = header.chunk_crcs[done : done + chunks]
        done += chunks
        for _ in range(READS_MAX):
            await read_pages(storage, file, piece, offset)
            if await engine.checksum(piece, header.chunk_bytes) == wanted:
                break
        else:
            raise OSError(errno.EIO, "what was sound when it was verified is read otherwise now", entry.path)
        await storage.write(file, [piece], offset)


async def verify_records(
    storage: Storage,
    engine: ByteEngine,
    file: File,
    entry: SegmentEntry,
    *,
    end: int,
    priority: Priority = Priority.BACKGROUND,
) -> AsyncIterator[tuple[fmt.RecordHeader | Gap, CorruptionError | None]]:
    """Every record of a segment with the damage found in it, and every gap, which is damage.

    Reads everything up to ``end``, through one buffer of ``VERIFY_BYTES``. Neither trailing zeros are damage
    nor what another writer has not made durable yet.
    """
    buffer = page_buffer(VERIFY_BYTES)
    async for item in scan_records(storage, file, entry, start=PAGE_BYTES, end=end):
        if isinstance(item, fmt.RecordHeader):
            try:
                error = await check_payload(storage, engine, file, entry, item, buffer, priority)
            except OSError as exc:
                reason = f"payload is {unreadable_reason(exc)}"
                error = CorruptionError(
                    reason, path=entry.path, segment=entry.name, offset=item.offset, unreadable=True
                )
                error.__cause__ = exc
            if error is None or item.end <= entry.firm_end or (entry.own and error.unreadable):
                yield item, error
        elif entry.sealed or (item.followed and (item.offset < entry.firm_end or (entry.own and item.unreadable))):
            yield (
                item,
                CorruptionError(
                    item.reason, path=entry.path, segment=entry.name, offset=item.offset, unreadable=item.unreadable
                ),
            )
