"""Reading records back: neighbours in one request, straight into extents, and never unverified.

A batch is planned by ``core.ranges``, read with large vectored requests, and every record is checked
before its outcome says so: header, identity, digest and lengths as the index expects them, and the
CRC of each chunk (in worker threads, piece by piece as the pieces arrive). The outcome is per record:
one that is damaged or gone does not fail its neighbours.

What it must not know: who wants the bytes, or what an extent belongs to.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from cascade_aio.abc.storage import PAGE_BYTES, ByteEngine, File, Priority, Storage, Urgency
from cascade_aio.core.ranges import ReadRequest, Run, coalesce
from cascade_aio.errors import BlockNotFoundError, ClosedError, ConfigError, CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.arrival import Arrival
from cascade_aio.segments.facts import Location
from cascade_aio.segments.pieces import PIECE_BYTES_MAX, layered_pieces, plain_pieces
from cascade_aio.segments.table import SegmentEntry, SegmentTable

RUN_BYTES_MAX = PIECE_BYTES_MAX
"""Neighbours are joined up to this; a larger record is read in pieces, side by side."""

LAYERED_AT_ONCE = 4
"""Pieces of a record in layered order that are under way at a time: the device serves what it has got all at
once, so the first pieces come first only if the others are held back. Four of the largest keep it busy."""

LAYERED_BYTES_MIN = 2 << 20
"""A record from this size on may be read in layered order: below, nothing is gained."""

RUN_REQUESTS_MAX = 256
"""Buffers of one vectored read; the kernel takes 1024."""

_T = TypeVar("_T")
_GONE = frozenset({errno.ENOENT, errno.ESTALE})


@dataclasses.dataclass(slots=True, eq=False)
class RecordRead:
    """One record to read, and what came of it.

    ``extent`` is page-aligned, writable, ``record_bytes`` long, and belongs to the reader until
    ``SegmentReader.read`` returns. ``outcome`` is then the decoded header, or the exception:
    ``CorruptionError`` (the extent holds garbage), ``BlockNotFoundError`` (the segment has
    vanished), ``OSError``.

    ``arrival`` is told of chunks as they are verified; failures are left to whoever made it.
    ``layered`` asks for the first bytes of key and value before the rest.
    """

    location: Location
    record_bytes: int
    extent: memoryview
    digest: bytes
    key_bytes: int
    value_bytes: int
    arrival: Arrival | None = None
    layered: bool = False
    outcome: fmt.RecordHeader | BaseException | None = None


class SegmentReader:
    """Verified reads through a ``SegmentTable``. Owned by one event loop."""

    def __init__(self, storage: Storage, engine: ByteEngine, table: SegmentTable) -> None:
        self._storage = storage
        self._engine = engine
        self._table = table
        self.records = 0
        self.requests = 0
        self.read_bytes = 0
        self.damaged = 0

    async def read(
        self,
        reads: Sequence[RecordRead],
        *,
        priority: Priority | Urgency = Priority.DEMAND,
        deadline_s: float | None = None,
    ) -> None:
        """Read and verify; sets every ``outcome``. A record may appear once. Raises only ``CancelledError``.

        Cancelling waits until the kernel has given all extents back.
        """
        wanted = [
            ReadRequest(read.location.segment, read.location.page * PAGE_BYTES, read.record_bytes, read)
            for read in reads
        ]
        runs = coalesce(wanted, gap_bytes_max=0, run_bytes_max=RUN_BYTES_MAX, run_requests_max=RUN_REQUESTS_MAX)
        if len(runs) == 1:
            await self._read_run(runs[0], priority, deadline_s)
            return
        async with asyncio.TaskGroup() as tasks:
            for run in runs:
                tasks.create_task(self._read_run(run, priority, deadline_s))

    async def _read_run(self, run: Run, priority: Priority | Urgency, deadline_s: float | None) -> None:
        reads = [_read_of(request) for request in run.requests]
        entry = self._table.get(run.segment)
        try:
            if entry is None:
                raise FileNotFoundError(errno.ENOENT, "segment was removed")
            async with self._table.opened(run.segment) as file:
                if run.nbytes > RUN_BYTES_MAX or (reads[0].layered and run.nbytes >= LAYERED_BYTES_MIN):
                    await self._read_large(reads[0], file, entry, priority, deadline_s)
                else:
                    await self._read_small(reads, run, file, entry, priority, deadline_s)
        except (OSError, ClosedError) as exc:
            gone = isinstance(exc, OSError) and exc.errno in _GONE
            for read in reads:
                if read.outcome is None:
                    read.outcome = _vanished(read) if gone else exc
        self.records += len(reads)
        self.damaged += sum(isinstance(read.outcome, CorruptionError) for read in reads)

    async def _read_small(
        self,
        reads: Sequence[RecordRead],
        run: Run,
        file: File,
        entry: SegmentEntry,
        priority: Priority | Urgency,
        deadline_s: float | None,
    ) -> None:
        """Several neighbours with one request."""
        buffers = [read.extent for read in reads]
        self.requests += 1
        count = await self._storage.read(file, buffers, run.offset, priority=priority, deadline_s=deadline_s)
        self.read_bytes += count
        crcs = await self._engine.checksums([_payload(read) for read in reads], fmt.CHUNK_BYTES)
        end = run.offset
        for read, found in zip(reads, crcs, strict=True):
            end += read.record_bytes
            missing = end - (run.offset + count)
            if missing > 0:
                read.outcome = _judged(read, entry, _cut_short(read, entry, read.record_bytes - missing))
            else:
                read.outcome = _judged(read, entry, _verified(decode_expected(read, entry), found, entry))
                if read.arrival is not None and isinstance(read.outcome, fmt.RecordHeader):
                    read.arrival.verified(read.outcome, 0, len(found))

    async def _read_large(
        self, read: RecordRead, file: File, entry: SegmentEntry, priority: Priority | Urgency, deadline_s: float | None
    ) -> None:
        """One record in pieces side by side; each is checked while others still arrive."""
        start = read.location.page * PAGE_BYTES
        header_bytes = read.location.header_pages * PAGE_BYTES
        checked = _Checked(read, entry)

        async def piece(first: int, end: int) -> int:
            self.requests += 1
            count = await self._storage.read(
                file, [read.extent[first:end]], start + first, priority=priority, deadline_s=deadline_s
            )
            self.read_bytes += count
            if count == end - first:
                payload = read.extent[max(first, header_bytes) : end]
                checked.take(first, await self._engine.checksum(payload, fmt.CHUNK_BYTES))
            return count

        if read.layered:
            pieces = layered_pieces(header_bytes, read.record_bytes, fmt.value_offset_of(read.key_bytes))
        else:
            pieces = plain_pieces(header_bytes, read.record_bytes)
        short: list[int] = []  # where a piece ended before its end
        queue = iter(pieces)

        async def worker() -> None:
            for first, end in queue:
                count = await piece(first, end)
                if count < end - first:
                    short.append(first + count)

        await _gather([worker() for _ in range(LAYERED_AT_ONCE if read.layered else len(pieces))])
        read.outcome = _judged(read, entry, _cut_short(read, entry, min(short)) if short else checked.outcome())

    def statistics(self) -> dict[str, int]:
        return {
            "records": self.records,
            "requests": self.requests,
            "read_bytes": self.read_bytes,
            "damaged": self.damaged,
        }


class _Checked:
    """CRCs of one record's pieces, compared with the header's table as soon as that is there."""

    def __init__(self, read: RecordRead, entry: SegmentEntry) -> None:
        self._read = read
        self._entry = entry
        self._header_bytes = read.location.header_pages * PAGE_BYTES
        self._header: fmt.RecordHeader | CorruptionError | None = None
        self._crcs: dict[int, tuple[int, ...]] = {}  # by number of the first chunk

    def take(self, first: int, crcs: tuple[int, ...]) -> None:
        """The piece that starts at byte ``first`` of the record has been read."""
        chunk = max(0, first - self._header_bytes) // fmt.CHUNK_BYTES
        self._crcs[chunk] = crcs
        if first == 0:
            self._header = decode_expected(self._read, self._entry)
            for other, theirs in self._crcs.items():  # what came before the header could not be judged
                self._tell(other, theirs)
        else:
            self._tell(chunk, crcs)

    def _tell(self, chunk: int, crcs: tuple[int, ...]) -> None:
        """Only what agrees with a header that was checked itself has arrived."""
        header, arrival = self._header, self._read.arrival
        if arrival is None or not isinstance(header, fmt.RecordHeader):
            return
        if header.chunk_crcs[chunk : chunk + len(crcs)] == crcs:
            arrival.verified(header, chunk, len(crcs))

    def outcome(self) -> fmt.RecordHeader | CorruptionError:
        """All pieces are there."""
        assert self._header is not None, self._read.location
        crcs = tuple(crc for _, found in sorted(self._crcs.items()) for crc in found)
        return _verified(self._header, crcs, self._entry)


def verify_payload(header: fmt.RecordHeader, crcs: Sequence[int], entry: SegmentEntry) -> CorruptionError | None:
    """The first damaged chunk of a record as an error, or ``None``."""
    for number, (stored, found) in enumerate(zip(header.chunk_crcs, crcs, strict=True)):
        if stored != found:
            return CorruptionError(
                f"payload of block {header.digest[:16].hex()} is damaged",
                path=entry.path,
                segment=entry.name,
                offset=header.offset + header.header_pages * PAGE_BYTES + number * header.chunk_bytes,
                expected=f"{stored:08x}",
                found=f"{found:08x}",
            )
    return None


def _verified(
    header: fmt.RecordHeader | CorruptionError, crcs: tuple[int, ...], entry: SegmentEntry
) -> fmt.RecordHeader | CorruptionError:
    if isinstance(header, CorruptionError):
        return header
    return verify_payload(header, crcs, entry) or header


def _judged(
    read: RecordRead, entry: SegmentEntry, outcome: fmt.RecordHeader | CorruptionError
) -> fmt.RecordHeader | CorruptionError | BlockNotFoundError:
    """``outcome``, but a miss where a record was seen before it was known to be durable, and came to nothing.

    Its place may be torn; another writer's may have been cut off, or hold the empty note of its adopter.
    """
    if not isinstance(outcome, CorruptionError):
        return outcome
    offset = read.location.page * PAGE_BYTES
    if offset + read.record_bytes > entry.firm_end or (not entry.own and _is_note(read, entry)):
        return BlockNotFoundError(
            f"block {read.digest[:16].hex()} was not on stable storage when it was seen, and its writer has not "
            "finished it; recompute it"
        )
    return outcome


def _is_note(read: RecordRead, entry: SegmentEntry) -> bool:
    offset = read.location.page * PAGE_BYTES
    try:
        header = fmt.decode_record(read.extent, entry.identity, path=entry.path, offset=offset)
    except (CorruptionError, ConfigError):
        return False
    return header is not None and header.kind == fmt.NOTE


def decode_expected(read: RecordRead, entry: SegmentEntry) -> fmt.RecordHeader | CorruptionError:
    """The header in the extent, if it is the record that the index speaks of."""
    offset = read.location.page * PAGE_BYTES
    try:
        header = fmt.decode_record(read.extent, entry.identity, path=entry.path, offset=offset)
    except CorruptionError as exc:
        exc.segment = entry.name
        return exc
    except ConfigError as exc:  # another version has written here since the segment was recovered
        return CorruptionError(str(exc), path=entry.path, segment=entry.name, offset=offset)
    found = header and (header.digest.hex(), header.key_bytes, header.value_bytes, header.header_pages)
    expected = (read.digest.hex(), read.key_bytes, read.value_bytes, read.location.header_pages)
    if header is None or found != expected or header.record_bytes != read.record_bytes:
        return CorruptionError(
            "not the record that was written here",
            path=entry.path,
            segment=entry.name,
            offset=offset,
            expected=expected,
            found=found,
        )
    return header


def _payload(read: RecordRead) -> memoryview:
    return read.extent[read.location.header_pages * PAGE_BYTES :]


def _read_of(request: ReadRequest) -> RecordRead:
    assert isinstance(request.token, RecordRead), request
    return request.token


def _cut_short(read: RecordRead, entry: SegmentEntry, found: int) -> CorruptionError:
    return CorruptionError(
        "the file ends within a record",
        path=entry.path,
        segment=entry.name,
        offset=read.location.page * PAGE_BYTES,
        expected=f"{read.record_bytes} bytes",
        found=f"{max(0, found)} bytes",
    )


def _vanished(read: RecordRead) -> BlockNotFoundError:
    return BlockNotFoundError(
        f"block {read.digest[:16].hex()} was in a segment that has been removed; refresh() or recompute it"
    )


async def _gather(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All results in order. On a failure or cancellation the others are cancelled and waited for."""
    tasks: list[asyncio.Task[_T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in work]
    except* OSError as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
