"""One segment's facts: from its footer, else from a scan; an own open one is verified and sealed on the way.

Implements the recovery rules of FORMAT.md for one file. Held back is only what lies beyond the last known sync.

Bytes that could not be read are not bytes that are no record: a read that failed may succeed tomorrow. A segment with
such a read is told as far as it is known, reported, and left exactly as it is (``SegmentEntry.unreadable``).

What it must not know: other segments, or the index the facts end up in.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from cascade_aio.abc.storage import PAGE_BYTES, ByteEngine, File, Storage
from cascade_aio.errors import CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.active import seal_file
from cascade_aio.segments.buffers import page_buffer, page_padded
from cascade_aio.segments.facts import BindingFact, BlockFact, DamageFact, Fact, TombstoneFact
from cascade_aio.segments.footer import FooterTables, Trailer, decode_trailer, footer_facts, record_facts
from cascade_aio.segments.scan import (
    READS_MAX,
    VERIFY_BYTES,
    Gap,
    check_payload,
    read_pages,
    scan_records,
    unreadable_reason,
    write_again,
)
from cascade_aio.segments.table import SegmentEntry, SegmentTable

_T = TypeVar("_T")

FACTS_PER_TURN = 32
"""Facts between two turns of the loop: whoever takes them in needs some 10 µs each, and a footer tells of a hundred
thousand after one read. Here and not there, so that a cancellation ends the reading from within."""

SPOILT_LOOK_BYTES = 1 << 20
"""So much behind a header that is none tells a creation that was cut short, all zeros, from a file that was spoilt."""

TORN_LISTED_MAX = 64
"""Torn records that a report names; beyond, they are only counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class TornRecord:
    """A record with a sound header whose payload was read and is not what its header says."""

    path: str
    offset: int
    record_bytes: int
    reason: str


@dataclasses.dataclass(slots=True)
class RecoveryReport:
    """What recovery did, for statistics and logs.

    ``torn_records`` of own segments, the first of them in ``torn``: writes that a crash cut short, or
    damage in what was acknowledged after the last sync that a later header speaks of. Nothing on disk
    tells which.
    """

    segments: int = 0
    from_footer: int = 0
    scanned: int = 0
    covered: int = 0
    sealed: int = 0
    removed: int = 0
    torn_records: int = 0
    seal_failures: int = 0
    damaged: int = 0
    unreadable: int = 0
    torn: list[TornRecord] = dataclasses.field(default_factory=list)


class SegmentRecovery:
    """Facts of one segment, from ``entry.scanned_bytes`` on, which advances."""

    def __init__(
        self,
        storage: Storage,
        engine: ByteEngine,
        table: SegmentTable,
        entry: SegmentEntry,
        store: bytes,
        report: RecoveryReport,
    ) -> None:
        self.removed = False
        self._storage = storage
        self._engine = engine
        self._table = table
        self._entry = entry
        self._store = store
        self._report = report
        self._tables = FooterTables()
        self._data_end = PAGE_BYTES
        self._sealable = True
        self._spoilt = False
        self._known_end: int | None = None

    async def facts(self, *, adopt: bool, search_bytes: int | None) -> AsyncIterator[Fact]:
        """``adopt``: the segment is ours and nobody writes it: verify its tail, then seal or remove it.

        Raises ``OSError`` if the file cannot be opened, ``ConfigError`` for another format version.
        """
        entry, start = self._entry, self._entry.scanned_bytes
        async with self._table.opened(entry.number) as file:
            size = await self._storage.size(file)
            end = size // PAGE_BYTES * PAGE_BYTES
            written, problem = await self._check_header(file, end, adopt=adopt)
            if problem is not None and (entry.unreadable or not written):
                yield problem
                if not written:
                    return
                problem = None
            if written:
                async for fact in self._records(file, size, end, adopt=adopt, search_bytes=search_bytes):
                    unread = isinstance(fact, DamageFact) and fact.unreadable
                    if problem is not None and start == 0 and not unread:
                        yield problem  # a torn header alone is a creation cut short; below records it is damage
                        problem = None
                    if _offset_of(fact) >= start:
                        yield fact
        if problem is not None and start == 0 and self._known_end is not None:
            self._known_end = 0  # what is below the header could not be read: the next look judges
        if self._known_end is not None:
            entry.scanned_bytes = min(entry.scanned_bytes, self._known_end)
        elif adopt and not entry.sealed and self._sealable:
            if self._spoilt and not self._tables.count:
                entry.damaged = True  # nothing in it can be recognised: it is kept as it is
                if problem is not None:
                    yield problem
            else:
                await self._seal()

    def note_unreadable(self, offset: int) -> None:
        """A read at ``offset`` failed: from there on the segment is to be read again, and not to be changed."""
        self._entry.unreadable = True
        self._known_end = offset if self._known_end is None else min(self._known_end, offset)

    def _unread(self, offset: int, nbytes: int, reason: str) -> DamageFact:
        self.note_unreadable(offset)
        return DamageFact(self._entry.path, self._entry.name, offset, nbytes, reason, True)

    async def _records(
        self, file: File, size: int, end: int, *, adopt: bool, search_bytes: int | None
    ) -> AsyncIterator[Fact]:
        """Facts from the footer, else from a scan."""
        entry = self._entry
        trailer: Trailer | None = None
        try:
            trailer = await self._trailer(file, size)
        except OSError as exc:  # sealed or not: its records can be scanned
            problem = self._unread(size - PAGE_BYTES, PAGE_BYTES, f"trailer is {unreadable_reason(exc)}")
            if entry.own or entry.sealed:  # the end of another writer's open segment may just have been cut off
                yield problem
            if entry.sealed:
                end = min(end, entry.data_end)  # an earlier look has read it: behind are the footer's bytes, not damage
        if trailer is not None:
            entry.sealed, entry.size_bytes = True, size
            entry.record_bytes, end = trailer.data_end - PAGE_BYTES, trailer.data_end
            footer_bytes = size - trailer.data_end
            try:
                for count, fact in enumerate(await self._twice(lambda: self._footer_facts(file, trailer)), 1):
                    yield fact
                    if not count % FACTS_PER_TURN:
                        await asyncio.sleep(0)
                self._report.from_footer += 1
                entry.scanned_bytes = size
                return
            except CorruptionError as exc:
                yield DamageFact(entry.path, entry.name, trailer.data_end, footer_bytes, exc.reason)
            except OSError as exc:
                yield self._unread(trailer.data_end, footer_bytes, f"footer is {unreadable_reason(exc)}")
        self._report.scanned += 1
        verify = adopt and trailer is None
        async for fact in self._scan(file, end, verify=verify, search_bytes=search_bytes):
            yield fact
        if trailer is not None:
            entry.scanned_bytes = size

    async def _check_header(self, file: File, end: int, *, adopt: bool) -> tuple[bool, DamageFact | None]:
        """Whether there may be records, and what is wrong with page 0."""
        entry = self._entry
        page = page_buffer(PAGE_BYTES)
        if end < PAGE_BYTES:
            return False, None
        try:
            header = await self._twice(lambda: self._read_header(file, page))
        except OSError as exc:
            return True, self._unread(0, PAGE_BYTES, f"segment header is {unreadable_reason(exc)}")
        except CorruptionError as exc:
            self._spoilt = adopt and await self._holds_bytes(file, end)
            return True, DamageFact(entry.path, entry.name, 0, PAGE_BYTES, exc.reason)
        if header is None:  # a creation cut short, or a page that was lost: what is ours is looked through
            if not adopt:
                return False, None
            return True, DamageFact(entry.path, entry.name, 0, PAGE_BYTES, "no segment header, only zeros")
        if header.identity != entry.identity or header.store != self._store:
            return False, DamageFact(
                entry.path, entry.name, 0, PAGE_BYTES, "this segment belongs to another store or writer: it is not read"
            )
        return True, None

    async def _read_header(self, file: File, page: memoryview) -> fmt.SegmentHeader | None:
        await read_pages(self._storage, file, page, 0)
        return fmt.decode_segment_header(page, path=self._entry.path)

    async def _twice(self, read: Callable[[], Awaitable[_T]]) -> _T:
        """What ``read`` gives; what is damaged is read once more before that is believed."""
        for _ in range(READS_MAX - 1):
            try:
                return await read()
            except CorruptionError:
                continue
        return await read()

    async def _holds_bytes(self, file: File, end: int) -> bool:
        """Whether anything follows page 0: its header was durable then, so this is no creation cut short."""
        nbytes = min(end - PAGE_BYTES, SPOILT_LOOK_BYTES)
        if not nbytes:
            return False
        piece = page_buffer(nbytes)
        try:
            await read_pages(self._storage, file, piece, PAGE_BYTES)
        except OSError:
            return True
        return bool(np.frombuffer(piece, dtype=np.uint8).any())

    async def _trailer(self, file: File, size: int) -> Trailer | None:
        if size % PAGE_BYTES or size < 2 * PAGE_BYTES:
            return None
        page = page_buffer(PAGE_BYTES)
        await read_pages(self._storage, file, page, size - PAGE_BYTES)
        return decode_trailer(page, self._entry.identity, size, path=self._entry.path)

    async def _footer_facts(self, file: File, trailer: Trailer) -> Iterator[Fact]:
        body = page_buffer(trailer.footer_bytes)[: page_padded(trailer.footer_bytes)]
        if body:
            await read_pages(self._storage, file, body, trailer.data_end)
        return footer_facts(body, trailer, self._entry.number, self._entry.path)

    async def _scan(self, file: File, end: int, *, verify: bool, search_bytes: int | None) -> AsyncIterator[Fact]:
        entry = self._entry
        theirs = not (entry.own or entry.sealed)
        position = PAGE_BYTES if verify or entry.sealed else max(PAGE_BYTES, entry.scanned_bytes)
        synced = end if entry.sealed else max(PAGE_BYTES, entry.synced_bytes)
        final = synced if theirs else end  # a gap below is one for ever: that was said before it was read
        known_end = entry.data_end if theirs else 0
        held: collections.deque[fmt.RecordHeader | Gap] = collections.deque()
        walking = True
        while walking:
            walking = False
            async for item in self._walk(file, position, end, verify, search_bytes, known_end):
                held.append(item)
                if isinstance(item, fmt.RecordHeader):
                    position = item.end
                    synced = max(synced, item.synced_bytes)
                while held and _end_of(held[0]) <= synced and not _is_gap(held[0], final, synced):
                    for fact in self._accept(held.popleft(), provisional=False):
                        yield fact
                if held and _is_gap(held[0], final, synced):  # its writer may have filled it since: read it again
                    position, final, walking = held[0].offset, synced, True
                    held.clear()
                    break
        self._note_extent(position, end)
        entry.synced_bytes = synced
        if verify:
            async for fact in self._verified_tail(file, held, synced):
                yield fact
            return
        # What is provisional is told again by the next look: a reader may have met it half written and forgotten it.
        doubtful = (item.offset for item in held if isinstance(item, fmt.RecordHeader) or item.offset >= synced)
        entry.scanned_bytes = next(doubtful, position)
        for item in held:
            if isinstance(item, fmt.RecordHeader) or item.offset < synced:
                for fact in self._accept(item, provisional=True):
                    yield fact

    async def _walk(
        self, file: File, start: int, end: int, verify: bool, search_bytes: int | None, known_end: int
    ) -> AsyncIterator[fmt.RecordHeader | Gap]:
        """Records and what lies between them, up to where nothing comes any more."""
        async for item in scan_records(
            self._storage, file, self._entry, start=start, end=end, search_bytes=search_bytes, known_end=known_end
        ):
            if isinstance(item, Gap) and self._is_end(item, verify=verify):
                return
            yield item

    def _note_extent(self, data_end: int, end: int) -> None:
        """An open segment was scanned. Of a sealed one the trailer has said it, whatever is damaged at its end."""
        if not self._entry.sealed:
            self._entry.size_bytes, self._entry.record_bytes = end, data_end - PAGE_BYTES

    def _is_end(self, gap: Gap, *, verify: bool) -> bool:
        """Whether nothing comes here, and nothing is known to have been here."""
        if gap.unreadable:
            self.note_unreadable(gap.offset)
        return not (gap.followed or self._entry.sealed or (gap.unreadable and verify))

    def _accept(self, item: fmt.RecordHeader | Gap, *, provisional: bool) -> Iterator[Fact]:
        self._data_end = _end_of(item)
        if isinstance(item, Gap):
            self._tables.add_damage(item.offset, item.nbytes)
            yield DamageFact(self._entry.path, self._entry.name, item.offset, item.nbytes, item.reason, item.unreadable)
            return
        self._tables.add(item)
        yield from record_facts(item, self._entry.number, provisional=provisional)

    async def _verified_tail(
        self, file: File, held: collections.deque[fmt.RecordHeader | Gap], synced: int
    ) -> AsyncIterator[Fact]:
        """Own records beyond the last known sync: the sound ones, made durable before they are told.

        They are written again: after a sync that failed, a page may be sound in memory and in memory only, and the
        next sync would pass over it. Holes between them, which writes that never ended have left, are filled with
        empty notes, so that whoever walks the sealed segment meets records only, and takes nothing for damage.
        """
        buffer = page_buffer(VERIFY_BYTES) if held else memoryview(b"")
        sound: list[fmt.RecordHeader | Gap] = []
        torn: list[int] = []
        for item in held:
            if isinstance(item, Gap):
                if item.offset < synced or item.unreadable:
                    sound.append(item)
                continue
            try:
                damage = await check_payload(self._storage, self._engine, file, self._entry, item, buffer)
            except OSError as exc:
                yield self._unread(item.offset, item.record_bytes, f"payload is {unreadable_reason(exc)}")
                damage = None  # it may be sound: it is told, and reading decides
            if damage is None:
                sound.append(item)
            else:
                torn.append(item.offset)
                self._report_torn(item, damage)
        if not sound:
            return
        durable = not self._entry.unreadable
        if durable:
            try:
                sound = await self._filled(sound, torn)
                await self._write_again([item for item in sound if _end_of(item) > synced], buffer)
                await self._storage.sync(file)
            except OSError:
                durable = False  # some may have been promised: they are told, and the next opening tries again
                self._report.seal_failures += 1
        for item in sound:
            for fact in self._accept(item, provisional=not durable):
                yield fact
        self._sealable = durable

    async def _write_again(self, items: Sequence[fmt.RecordHeader | Gap], buffer: memoryview) -> None:
        """The same bytes to the same places, through ``buffer``. Raises ``OSError``."""
        file = await self._storage.open(self._entry.path, writable=True)
        try:
            for item in items:
                if isinstance(item, fmt.RecordHeader):
                    await write_again(self._storage, self._engine, file, self._entry, item, buffer)
        finally:
            await file.close()

    def _report_torn(self, header: fmt.RecordHeader, damage: CorruptionError) -> None:
        report = self._report
        report.torn_records += 1
        if len(report.torn) < TORN_LISTED_MAX:
            report.torn.append(TornRecord(self._entry.path, header.offset, header.record_bytes, str(damage)))

    async def _filled(self, sound: list[fmt.RecordHeader | Gap], torn: list[int]) -> list[fmt.RecordHeader | Gap]:
        """``sound`` with empty notes, written to the file, wherever something is missing. Raises ``OSError``.

        A note begins wherever a torn record began: a process that knows the record finds the note.
        """
        whole: list[fmt.RecordHeader | Gap] = []
        fillers: list[fmt.RecordHeader] = []
        position = self._data_end
        for item in sound:
            cuts = [position, *(offset for offset in torn if position < offset < item.offset), item.offset]
            missing = [note for start, end in itertools.pairwise(cuts) for note in empty_notes(start, end)]
            fillers += missing
            whole += [*missing, item]
            position = _end_of(item)
        if fillers:
            file = await self._storage.open(self._entry.path, writable=True)
            try:
                for filler in fillers:
                    pages = page_buffer(filler.record_bytes)
                    fmt.encode_record(pages, filler, self._entry.identity)
                    await self._storage.write(file, [pages], filler.offset)
            finally:
                await file.close()
        return whole

    async def _seal(self) -> None:
        """Seal an own segment after its scan, or remove it if nothing is in it."""
        entry = self._entry
        try:
            if not self._tables.count:
                await self._storage.unlink(entry.path)
                self.removed = True
                self._report.removed += 1
                return
            file = await self._storage.open(entry.path, writable=True)
            entry.scanned_bytes = min(entry.scanned_bytes, self._data_end)  # the file is cut there, sealed or not
            try:
                await seal_file(self._storage, file, entry, self._tables, self._data_end)
                self._report.sealed += 1
            finally:
                await file.close()
        except OSError:
            self._report.seal_failures += 1  # nothing is lost: the next opening scans it again


def empty_notes(start: int, end: int) -> list[fmt.RecordHeader]:
    """Records that say nothing and take the bytes from ``start`` to ``end``, in as few pieces as headers allow."""
    step = fmt.HEADER_PAGES_MAX * PAGE_BYTES
    return [
        fmt.RecordHeader(fmt.NOTE, nbytes // PAGE_BYTES, nbytes, offset, 0, 0)
        for offset in range(start, end, step)
        for nbytes in (min(step, end - offset),)
    ]


def _offset_of(fact: Fact) -> int:
    if isinstance(fact, BlockFact | BindingFact | TombstoneFact):
        return fact.location.page * PAGE_BYTES
    return fact.offset if isinstance(fact, DamageFact) else 0


def _is_gap(item: fmt.RecordHeader | Gap, start: int, end: int) -> bool:
    """Whether it is a gap that begins from ``start`` on and before ``end``."""
    return isinstance(item, Gap) and start <= item.offset < end


def _end_of(item: fmt.RecordHeader | Gap) -> int:
    return item.end if isinstance(item, fmt.RecordHeader) else item.offset + item.nbytes
