"""Reading everything: every record against its checksums, and what speaks of the records against the records.

One walk over each segment compares it with all that was ever said of it: the index of this store, the footer, and
the checkpoints of all writers. What is missing, damaged, contradicted and what could not be read are four things:
bytes that could not be read may be sound, so nothing that relies on them is given up.

What it must not know: how any of it is repaired.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import posixpath
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_aio.abc.storage import PAGE_BYTES, File
from cascade_aio.core.index import check_columns
from cascade_aio.errors import CorruptionError
from cascade_aio.model import BLOCK_ID_BYTES
from cascade_aio.segments import format as fmt
from cascade_aio.segments.buffers import page_buffer
from cascade_aio.segments.checkpoint import Checkpoint, CheckpointFailure, read_checkpoint
from cascade_aio.segments.footer import FooterTables
from cascade_aio.segments.format import RecordHeader, SegmentIdentity
from cascade_aio.segments.layout import CHECKPOINT_FILE, WRITERS, list_segments
from cascade_aio.segments.recovery import CUT, GONE
from cascade_aio.segments.scan import Gap, read_pages, unreadable_reason, verify_records
from cascade_aio.segments.table import SegmentEntry, segment_path
from cascade_aio.store.context import StoreContext
from cascade_aio.store.merging import PROVISIONAL, LostSegment

STEP_ROWS = 256
"""Rows of the index, or of a checkpoint, looked at between two turns of the loop: some microseconds each."""

STEP_COVERS = 16
"""Segments of a checkpoint taken in between two turns of the loop."""

SEGMENTS_AT_ONCE = 4
"""Segments read side by side: each through one buffer of 8 MiB."""


@dataclasses.dataclass(frozen=True, slots=True)
class Inconsistency:
    """Something that speaks of records contradicts them. No block is damaged by it; ``repair`` writes it anew."""

    path: str
    what: str


@dataclasses.dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found.

    ``damage``: every record that is not what was written. ``unreadable``: what could not be read, which says
    nothing about it. ``lost``: segment files that are gone or cut. ``inconsistent``: footers, checkpoints and
    index entries that do not fit the records. ``blocks`` and ``bytes`` of sound records.
    """

    blocks: int
    bytes: int
    damage: tuple[CorruptionError, ...]
    unreadable: tuple[CorruptionError, ...] = ()
    lost: tuple[LostSegment, ...] = ()
    inconsistent: tuple[Inconsistency, ...] = ()

    @property
    def clean(self) -> bool:
        return not (self.damage or self.unreadable or self.lost or self.inconsistent)


@dataclasses.dataclass(slots=True)
class Examination:
    """One walk over a segment. ``records``: block id of each sound BLOCK record, by its page. ``wrong``: ranges
    that are not what was written, with the header where that is sound. ``cut``: the file ends at this offset,
    before it should."""

    entry: SegmentEntry
    records: dict[int, bytes] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    wrong: list[tuple[int, int, CorruptionError, RecordHeader | None]] = dataclasses.field(default_factory=list)
    unreadable: list[CorruptionError] = dataclasses.field(default_factory=list)
    inconsistent: list[Inconsistency] = dataclasses.field(default_factory=list)
    cut: int | None = None
    end: int = 0
    """Where the records ended that were walked over: a segment that is being written grows meanwhile."""
    alien: bool = False
    """The file is a segment of another store or writer."""

    def doubtful(self, offset: int) -> bool:
        """Whether this place has been reported already, or was not looked at."""
        if self.cut is not None and offset >= self.cut:
            return True
        if offset >= self.end or any(start <= offset < start + nbytes for start, nbytes, _, _ in self.wrong):
            return True
        return bool(self.unreadable)


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self._done = 0
        self._total = total
        self._report = report

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._report is not None:
            self._report(min(self._done, self._total), self._total)


class Verifier:
    """One verification of a root: examinations as they are made, and what the checkpoints say."""

    def __init__(
        self,
        context: StoreContext,
        on_progress: Callable[[int, int], None] | None,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        """``only``: look at the segments with these paths."""
        self.context = context
        self.suspects: dict[bytes, tuple[bytes, ...]] = {}
        """Blocks whose record is damaged or gone, with their names."""
        self.examinations: list[Examination] = []
        self.lost: list[LostSegment] = list(context.merger.lost)
        self.inconsistent: list[Inconsistency] = []
        self._claims: dict[SegmentIdentity, list[tuple[str, npt.NDArray[np.uint32], npt.NDArray[np.uint8]]]] = {}
        self._entries = [entry for entry in context.disk.table if only is None or entry.path in only]
        self._progress = _Progress(sum(entry.record_bytes for entry in self._entries), on_progress)

    async def run(self) -> None:
        await self._read_checkpoints()
        gate = asyncio.Semaphore(SEGMENTS_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for entry in self._entries:
                tasks.create_task(self._examine(entry, gate))

    def report(self) -> VerifyReport:
        """What was found, in order of place: after ``run``."""
        found = self.examinations
        damage = [error for one in found for _, _, error, _ in one.wrong]
        unreadable = [error for one in found for error in one.unreadable]
        lost = list({(one.path, one.offset): one for one in self.lost}.values())
        seen = {(error.path, error.offset) for error in [*damage, *unreadable]}
        seen.update((one.path, one.offset) for one in lost)
        for error in self.context.damage:  # what opening and reading have met; some of it cannot be met again
            if (error.path, error.offset) not in seen:
                (unreadable if error.unreadable else damage).append(error)
        return VerifyReport(
            sum(len(one.records) for one in found),
            sum(one.bytes for one in found),
            tuple(sorted(damage, key=_place)),
            tuple(sorted(unreadable, key=_place)),
            tuple(sorted(lost, key=lambda one: (one.path, one.offset))),
            (*self.inconsistent, *(each for one in found for each in one.inconsistent)),
        )

    # -- segments -----------------------------------------------------------------------------

    async def _examine(self, entry: SegmentEntry, gate: asyncio.Semaphore) -> None:
        async with gate:
            found = Examination(entry)
            try:
                async with self.context.disk.table.opened(entry.number) as file:
                    await self._walk(file, found)
                    await self._check_header(file, found)
            except FileNotFoundError:
                self._note_gone(entry)
                return
            except OSError as error:
                reason = f"segment is {unreadable_reason(error)}"
                found.unreadable.append(CorruptionError(reason, path=entry.path, segment=entry.name, unreadable=True))
            self.examinations.append(found)
            await self._check_claims(found)
            await self._check_index(found)

    async def _walk(self, file: File, found: Examination) -> None:
        """Every record, and with them the tables that the footer has to be."""
        context, entry = self.context, found.entry
        storage, engine = context.platform.storage, context.platform.engine
        sealed = entry.sealed  # one that is sealed meanwhile had another size, and no footer
        size = await storage.size(file)
        found.end = end = entry.data_end
        if size < min(end, entry.firm_end):
            found.cut = end = size // PAGE_BYTES * PAGE_BYTES
            self._note_lost(entry, size, min(entry.data_end, entry.firm_end) - size, CUT)
        records = verify_records(storage, engine, file, entry, end=end)
        tables = FooterTables()
        async with contextlib.aclosing(records):  # type: ignore[type-var]
            async for item, error in records:
                header = item if isinstance(item, RecordHeader) else None
                nbytes = item.nbytes if isinstance(item, Gap) else item.record_bytes
                if header is not None:
                    tables.add(header)
                else:
                    tables.add_damage(item.offset, nbytes)
                if error is not None and error.unreadable:
                    found.unreadable.append(error)
                elif error is not None and not (header is None and item.offset + nbytes == found.cut):
                    found.wrong.append((item.offset, nbytes, error, header))
                    self._distrust(entry, item.offset, item.offset + nbytes)
                elif header is not None and header.kind == fmt.BLOCK:
                    found.records[item.offset // PAGE_BYTES] = header.digest[:BLOCK_ID_BYTES]
                    found.bytes += header.key_bytes + header.value_bytes
                self._progress.advance(nbytes)
        if sealed and found.cut is None and not found.unreadable:
            await self._check_footer(file, found, tables, size)

    async def _check_footer(self, file: File, found: Examination, tables: FooterTables, size: int) -> None:
        entry = found.entry
        expected = tables.encode(entry.identity, entry.data_end)
        actual = page_buffer(len(expected))
        same = size == entry.data_end + len(expected)
        if same:
            await read_pages(self.context.platform.storage, file, actual, entry.data_end)
            same = actual == expected
        # Where records have become unrecognisable since, the footer knows more than they say.
        if not same and all(header is not None for _, _, _, header in found.wrong):
            found.inconsistent.append(Inconsistency(entry.path, "its footer does not say what its records say"))

    async def _check_header(self, file: File, found: Examination) -> None:
        entry, page = found.entry, page_buffer(PAGE_BYTES)
        if found.cut == 0:
            return
        await read_pages(self.context.platform.storage, file, page, 0)
        try:
            header = fmt.decode_segment_header(page, path=entry.path)
        except CorruptionError as error:
            found.wrong.append((0, PAGE_BYTES, error, None))
            return
        if header is not None and (header.identity != entry.identity or header.store != self.context.store_id):
            what = "this segment belongs to another store or writer: it is not read"
            found.alien = True
            alien = CorruptionError(what, path=entry.path, segment=entry.name, offset=0)
            found.wrong.append((0, PAGE_BYTES, alien, None))
        if header is None and entry.firm_end > PAGE_BYTES:
            zeros = CorruptionError("no segment header, only zeros", path=entry.path, segment=entry.name, offset=0)
            found.wrong.append((0, PAGE_BYTES, zeros, None))

    def _note_gone(self, entry: SegmentEntry) -> None:
        """Own segments are forgotten before they are unlinked, others' may go at any time."""
        if entry.own and self.context.disk.table.get(entry.number) is entry:
            self._note_lost(entry, 0, entry.size_bytes, GONE)

    def _note_lost(self, entry: SegmentEntry, offset: int, nbytes: int, reason: str) -> None:
        catalog = self.context.catalog
        rows = [
            row
            for row, at in rows_between(self.context, entry, 0, entry.data_end)
            if at + catalog.stored_bytes(row) > offset
        ]
        if rows or offset:
            self.lost.append(LostSegment(entry.path, entry.name, offset, nbytes, len(rows), reason))
        for row in rows:
            self._distrust_row(row)

    async def _check_index(self, found: Examination) -> None:
        """What the index of this store says of the segment."""
        index, entry = self.context.catalog.index, found.entry
        for count, row in enumerate(index.rows_in_segment(entry.number).tolist(), 1):
            if not count % STEP_ROWS:
                await asyncio.sleep(0)
            if self.context.disk.table.get(entry.number) is not entry:
                return  # removed meanwhile
            if not index.is_in_segment(row, entry.number):
                continue
            location = index.location(row)
            if location is None or index.flags(row) & PROVISIONAL:
                continue
            page, block_id = location[1], index.block_id(row)
            if found.records.get(page) != block_id and not found.doubtful(page * PAGE_BYTES):
                what = f"the index names block {block_id.hex()} at offset {page * PAGE_BYTES}, which is not there"
                found.inconsistent.append(Inconsistency(entry.path, what))
                self._distrust(entry, page * PAGE_BYTES, (page + 1) * PAGE_BYTES)

    def _distrust(self, entry: SegmentEntry, start: int, end: int) -> None:
        entry.damaged = True  # the bytes stay for ``repair``; a read that was wrong once costs no sound record
        for row, _ in rows_between(self.context, entry, start, end):
            self._distrust_row(row)

    def _distrust_row(self, row: int) -> None:
        index = self.context.catalog.index
        self.suspects[index.block_id(row)] = tuple(name for name, _ in index.bindings(row))
        distrust_row(self.context, row)

    # -- checkpoints --------------------------------------------------------------------------

    async def _read_checkpoints(self) -> None:
        """What each writer's checkpoint says. One that is there lists what must be there."""
        storage, engine = self.context.platform.storage, self.context.platform.engine
        writers = posixpath.join(self.context.disk.table.root, WRITERS)
        for directory in await storage.list_directory(writers):
            path = posixpath.join(writers, directory.name)
            if not directory.is_dir:
                continue
            checkpoint = posixpath.join(path, CHECKPOINT_FILE)
            found = await read_checkpoint(storage, engine, checkpoint, store=self.context.store_id)
            if isinstance(found, CheckpointFailure):
                what = f"checkpoint {found.reason}; opening reads the segments instead"
                self.inconsistent.append(Inconsistency(checkpoint, what))
            elif found is not None:
                sizes = dict(list_segments(await storage.list_directory(path)))
                await self._take_claims(checkpoint, path, found, sizes)

    async def _take_claims(self, name: str, directory: str, found: Checkpoint, sizes: dict[int, int]) -> None:
        columns = found.columns
        try:
            claimed = await asyncio.to_thread(_rows_by_cover, columns, len(found.covers))
        except CorruptionError as error:
            self.inconsistent.append(Inconsistency(name, str(error)))
            return
        for count, (cover, rows) in enumerate(zip(found.covers, claimed, strict=True), 1):
            if not count % STEP_COVERS:
                await asyncio.sleep(0)
            pages, digests = columns["page"][rows], columns["digest"][rows]
            self._claims.setdefault(cover.identity, []).append((name, pages, digests))
            if cover.identity.writer.hex() != posixpath.basename(directory) or cover.upto <= PAGE_BYTES:
                continue  # others' segments may have been removed since
            size = sizes.get(cover.identity.sequence, 0)
            if size < cover.upto:
                gone = rows[_ends(columns, rows) > size]
                blocks = len(gone)
                for row in gone.tolist():
                    names = columns["binding_key"][columns["binding_row"] == row]
                    block_id = columns["digest"][row].tobytes()[:BLOCK_ID_BYTES]
                    self.suspects[block_id] = tuple(name.tobytes() for name in names)
                path = segment_path(self.context.disk.table.root, cover.identity)
                reason = CUT if size else GONE
                lost = LostSegment(path, cover.identity.name, size, cover.upto - size, blocks, reason)
                self.lost.append(lost)

    async def _check_claims(self, found: Examination) -> None:
        for name, pages, digests in self._claims.get(found.entry.identity, ()):
            wrong = 0
            for count, (page, digest) in enumerate(zip(pages.tolist(), digests, strict=True), 1):
                if not count % STEP_ROWS:
                    await asyncio.sleep(0)
                wrong += found.records.get(page) != digest.tobytes()[:BLOCK_ID_BYTES] and not found.doubtful(
                    page * PAGE_BYTES
                )
            if wrong:
                what = f"checkpoint names {wrong} records of {found.entry.path} that are not there"
                found.inconsistent.append(Inconsistency(name, what))


async def verify_root(context: StoreContext, on_progress: Callable[[int, int], None] | None) -> VerifyReport:
    """See ``Store.verify``. A segment that its writer removes meanwhile is no damage."""
    await context.disk.flush()
    verifier = Verifier(context, on_progress)
    await verifier.run()
    return verifier.report()


def distrust(context: StoreContext, entry: SegmentEntry, start: int, end: int) -> int:
    """Records that begin in this range are not what was written: nothing may rely on them any more.

    Returns how many blocks were written again.
    """
    return sum(distrust_row(context, row) for row, _ in rows_between(context, entry, start, end))


def distrust_row(context: StoreContext, row: int) -> bool:
    """A block that the arena has as well is written again (``True``); another is forgotten, so that whoever has
    its bytes stores them anew instead of being told that they are there."""
    copy = context.catalog.copies.get(row)
    if copy is None or context.config.read_only:
        context.catalog.unplace(row)
        return False
    context.append_again(copy)
    return True


def rows_between(context: StoreContext, entry: SegmentEntry, start: int, end: int) -> list[tuple[int, int]]:
    """(row, offset) of the blocks whose newest record begins in this range of the segment."""
    index = context.catalog.index
    found = []
    for row in index.rows_between(entry.number, -(-start // PAGE_BYTES), -(-end // PAGE_BYTES)).tolist():
        location = index.location(row)
        assert location is not None, row
        found.append((row, location[1] * PAGE_BYTES))
    return found


def _rows_by_cover(columns: Mapping[str, npt.NDArray[Any]], covers: int) -> list[npt.NDArray[np.int64]]:
    """Rows of a checkpoint that are known to be durable, by the segment that they are in. In a worker thread.

    Raises ``CorruptionError`` for columns that cannot be used.
    """
    check_columns(columns)
    firm = np.flatnonzero(columns["flags"] & PROVISIONAL == 0)
    segments = columns["segment"][firm]
    order = np.argsort(segments, kind="stable")
    bounds = np.searchsorted(segments[order], np.arange(covers + 1))
    return [firm[order[bounds[at] : bounds[at + 1]]] for at in range(covers)]


def _ends(columns: Mapping[str, npt.NDArray[Any]], rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Where the records of these rows of a checkpoint end in their files."""
    key_bytes, value_bytes = (columns[name][rows].astype(np.int64) for name in ("key_bytes", "value_bytes"))
    payload = -(-key_bytes // fmt.VALUE_ALIGNMENT) * fmt.VALUE_ALIGNMENT + value_bytes
    pages = columns["page"][rows].astype(np.int64) + columns["header_pages"][rows] + -(-payload // PAGE_BYTES)
    return np.asarray(pages * PAGE_BYTES, dtype=np.int64)


def _place(error: CorruptionError) -> tuple[str, int]:
    return error.path or "", error.offset or 0
