"""Walking a segment header by header, and past whatever is in the way.

Bounded: one buffer of ``SCAN_WINDOW_BYTES``, whatever the segment holds. Used by recovery and by
verification; decides nothing about what a gap means.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np

from cascade_aio.abc.storage import PAGE_BYTES, ByteEngine, File, Priority, Storage
from cascade_aio.errors import CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.buffers import page_buffer
from cascade_aio.segments.reader import verify_payload
from cascade_aio.segments.table import SegmentEntry

SCAN_WINDOW_BYTES = 1 << 20
"""Read at once where records are small, and when searching."""

HEADER_WINDOW_BYTES = fmt.HEADER_PAGES_MAX * PAGE_BYTES
"""Read at once where records are large: enough for any header."""

SMALL_RECORD_BYTES = 128 << 10
"""Below this, reading the payloads between the headers costs less than separate requests."""

VERIFY_BYTES = 8 << 20
"""Payload read and checked at once; a multiple of the checksum chunk."""

_MAGIC_WORD = int.from_bytes(fmt.RECORD_MAGIC, "little")


class Gap(NamedTuple):
    """Bytes that are no record. ``followed``: a valid record comes behind them."""

    offset: int
    nbytes: int
    reason: str
    followed: bool


class _Window:
    """A sliding view of the file. A page that cannot be read raises ``CorruptionError``."""

    def __init__(self, storage: Storage, file: File, path: str, end: int) -> None:
        self.end = end
        self._storage = storage
        self._file = file
        self._path = path
        self._buffer = page_buffer(SCAN_WINDOW_BYTES)
        self._start = 0
        self._filled = 0

    async def view(self, offset: int, nbytes: int, ahead_bytes: int) -> memoryview:
        """Up to ``nbytes`` from ``offset``, less only at the end; valid until the next call."""
        nbytes = min(nbytes, self.end - offset)
        if offset < self._start or offset + nbytes > self._start + self._filled:
            await self._fill(offset, min(max(nbytes, ahead_bytes), self.end - offset))
        first = offset - self._start
        return self._buffer[first : min(first + nbytes, self._filled)]

    async def _fill(self, offset: int, nbytes: int) -> None:
        self._start, self._filled = offset, 0
        for length in (nbytes, PAGE_BYTES):
            try:
                count = await self._storage.read(
                    self._file, [self._buffer[:length]], offset, priority=Priority.BACKGROUND
                )
            except OSError as exc:
                if length == PAGE_BYTES:
                    raise CorruptionError(f"unreadable ({exc.strerror})", path=self._path, offset=offset) from exc
                continue
            self._filled = count // PAGE_BYTES * PAGE_BYTES
            return


async def scan_records(
    storage: Storage,
    file: File,
    entry: SegmentEntry,
    *,
    start: int,
    end: int,
    search_bytes: int | None = None,
) -> AsyncIterator[fmt.RecordHeader | Gap]:
    """Headers of the records from ``start`` to ``end``, and the gaps between them, in order of offset.

    Past a gap it looks for the next valid header up to ``search_bytes`` (``None``: to the end). The
    last item is a gap that is not ``followed``, unless the records end exactly at ``end``.
    """
    window = _Window(storage, file, entry.path, end)
    position = start
    ahead = HEADER_WINDOW_BYTES
    while position + PAGE_BYTES <= end:
        header, reason = await _header_at(window, entry, position, ahead)
        if header is None:
            limit = end if search_bytes is None else min(end, position + search_bytes)
            found = await _search(window, entry, position + PAGE_BYTES, limit)
            if found is None:
                yield Gap(position, end - position, reason, False)
                return
            yield Gap(position, found.offset - position, reason, True)
            header = found
        yield header
        position = header.end
        ahead = SCAN_WINDOW_BYTES if header.record_bytes <= SMALL_RECORD_BYTES else HEADER_WINDOW_BYTES


async def _header_at(
    window: _Window, entry: SegmentEntry, position: int, ahead: int
) -> tuple[fmt.RecordHeader | None, str]:
    try:
        view = await window.view(position, PAGE_BYTES, ahead)
        pages = fmt.header_pages_at(view, path=entry.path, offset=position) if view else 0
        if not pages:
            return None, "no record, only zeros"
        view = await window.view(position, pages * PAGE_BYTES, ahead)
        header = fmt.decode_record(view, entry.identity, path=entry.path, offset=position)
    except CorruptionError as exc:
        return None, exc.args[0].partition(" in ")[0]
    if header is not None and header.end > window.end:
        return None, "the file ends within a record"
    return header, ""


async def _search(window: _Window, entry: SegmentEntry, position: int, limit: int) -> fmt.RecordHeader | None:
    """The next valid header at or after ``position``, page by page."""
    while position + PAGE_BYTES <= limit:
        try:
            view = await window.view(position, min(SCAN_WINDOW_BYTES, limit - position), SCAN_WINDOW_BYTES)
        except CorruptionError:
            position += PAGE_BYTES
            continue
        if not view:
            return None
        words = np.frombuffer(view, dtype="<u8")[:: PAGE_BYTES // 8]
        pages = [int(page) for page in np.flatnonzero(words == _MAGIC_WORD)]
        scanned = len(view)
        del view, words
        for page in pages:
            header, _ = await _header_at(window, entry, position + page * PAGE_BYTES, HEADER_WINDOW_BYTES)
            if header is not None:
                return header
        position += scanned
    return None


async def check_payload(
    storage: Storage, engine: ByteEngine, file: File, entry: SegmentEntry, header: fmt.RecordHeader, buffer: memoryview
) -> CorruptionError | None:
    """Read a record's payload through ``buffer`` (a multiple of its chunk) and check it: the damage, or ``None``.

    An unreadable or missing part is damage too.
    """
    step = len(buffer) // header.chunk_bytes * header.chunk_bytes
    assert step > 0, "the buffer holds at least one chunk"
    crcs: list[int] = []
    start = header.offset + header.header_pages * PAGE_BYTES
    for offset in range(start, header.end, step):
        piece = buffer[: min(step, header.end - offset)]
        try:
            count = await storage.read(file, [piece], offset, priority=Priority.BACKGROUND)
        except OSError as exc:
            reason = f"payload is unreadable ({exc.strerror})"
            return CorruptionError(reason, path=entry.path, segment=entry.name, offset=offset)
        if count < len(piece):
            return CorruptionError("the file ends within a record", path=entry.path, segment=entry.name, offset=offset)
        crcs.extend(await engine.checksum(piece, header.chunk_bytes))
    return verify_payload(header, crcs, entry)


async def verify_records(
    storage: Storage, engine: ByteEngine, file: File, entry: SegmentEntry, *, end: int
) -> AsyncIterator[tuple[fmt.RecordHeader | Gap, CorruptionError | None]]:
    """Every record of a segment with the damage found in it, and every gap, which is damage.

    Reads everything up to ``end``, through one buffer of ``VERIFY_BYTES``. Neither trailing zeros are damage
    nor what another writer has not made durable yet.
    """
    buffer = page_buffer(VERIFY_BYTES)
    async for item in scan_records(storage, file, entry, start=PAGE_BYTES, end=end):
        if isinstance(item, fmt.RecordHeader):
            error = await check_payload(storage, engine, file, entry, item, buffer)
            if error is None or entry.own or item.end <= entry.firm_end:
                yield item, error
        elif entry.sealed or (item.followed and (entry.own or item.offset < entry.firm_end)):
            yield item, CorruptionError(item.reason, path=entry.path, segment=entry.name, offset=item.offset)
