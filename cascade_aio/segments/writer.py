"""The segment writer: many records into few large writes, many flushes into one sync.

One per open store. ``append`` queues; the placer gives consecutive offsets to what is queued and
writes it straight from the extents, several writes in flight; the syncer makes the written prefix
durable whenever a flush, the amount or the age of what is unsynced asks for it. Segments are created
ahead of need and sealed in the background, so that neither stalls the stream.

Failure contract: a record is reported durable only when a sync that covers it has returned. After a
failed write or sync its segment is abandoned and everything not durable in it is placed again in a
new one, after a pause that doubles from failure to failure; after ``failures_max`` failed attempts in
a row the writer is broken. No space is different: the records stay queued (their copies in memory are
the only ones), flush raises ``TierFullError``, and the writer tries again every ``retry_seconds`` and
when told of freed space. A shortage (descriptors, memory) says nothing about the device: it never
breaks the writer, and flush waits for its end, but after ``SHORTAGE_SECONDS_MAX`` it is as no space.

What it must not know: the index, eviction, the arena.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from cascade_aio.abc.storage import PAGE_BYTES, Storage
from cascade_aio.errors import BrokenTierError, CascadeError, ClosedError, ConfigError, TierFullError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.active import ActiveSegment, Placed, Write, create_segment
from cascade_aio.segments.buffers import page_buffer
from cascade_aio.segments.facts import Location
from cascade_aio.segments.footer import footer_bytes
from cascade_aio.segments.layout import Root, WriterClaim
from cascade_aio.segments.pending import Append, PendingQueue, PendingRecord
from cascade_aio.segments.table import SegmentTable

__all__ = ["PendingRecord", "SegmentWriter", "WriterLimits", "WriterStatistics"]

PLACED_PER_TURN_MAX = 128
"""Records placed in one loop turn: at some 5 µs each, well below a millisecond."""

JOINED_RECORD_BYTES_MAX = 512 << 10
"""Records up to this share a vectored write. A larger one goes alone: its request costs little beside
its bytes, and only a request with a single buffer can use memory registered with io_uring."""

WRITE_BUFFERS_MAX = 512
"""Buffers of one vectored write; the kernel takes 1024."""

LINGER_SHARE = 0.25
"""Small records wait at most this share of ``tail_seconds_max`` before they are written."""

SYNC_SHARE = 0.5
"""What is written is synced after this share of ``tail_seconds_max``; the rest is for write and sync."""

FIRST_PAUSE_SHARE = 1 / 8
"""After a first failure nothing is tried for this share of ``retry_seconds``; then twice as long, up to all of it."""

SHORTAGE_SECONDS_MAX = 30.0
"""A flush waits this long for descriptors or memory before it is told."""

DUE_SECONDS = 1e-6
"""What is due so soon is due now: a timer this short may end without the clock having moved, and again, for ever."""

NAMES_IN_HEADER_MAX = 64
"""More prefix keys than fit the single header page of most records."""

NOTE_BYTES_MAX = fmt.HEADER_PAGES_MAX * PAGE_BYTES

_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class SpaceGate(Protocol):
    """Who answers for the space that segments take: asked before each is created."""

    @property
    def may_evict(self) -> bool:
        """Whether a disk without room is met by giving something up."""
        ...

    def admits(self, nbytes: int) -> bool:
        """Whether a segment of ``nbytes`` may be created now."""
        ...

    async def make_room(self, nbytes: int, *, disk_full: bool) -> bool:
        """Wait until so much may be created, or, with ``disk_full``, until anything was removed; ``False``:
        there is nothing to give up."""
        ...

    def ended(self) -> None:
        """A segment gets no more bytes: what is dead in it can be reclaimed."""
        ...


class OpenGate:
    """No budget and nothing to give up."""

    may_evict = False

    def admits(self, nbytes: int) -> bool:
        return True

    async def make_room(self, nbytes: int, *, disk_full: bool) -> bool:
        return False

    def ended(self) -> None:
        return


class BudgetError(OSError):
    """The budget leaves no room for a segment, and nothing can be given up."""

    def __init__(self, path: str) -> None:
        super().__init__(
            errno.EDQUOT,
            "disk_bytes is used up and nothing can be evicted (what is kept aside because of damage "
            "counts, too: statistics()['disk']['kept_aside_bytes'], and `cascade-aio repair` gives it back)",
            path,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class WriterLimits:
    """Bounds of the writer. Bytes are multiples of the page.

    ``mark_bytes``: a flush is answered after a mark, a page, once so much of a segment is durable and no header says
    so. It bounds what recovery has to read and write again after a kill.
    """

    segment_bytes: int = 1 << 30
    write_bytes_max: int = 8 << 20
    inflight_bytes_max: int = 64 << 20
    linger_bytes: int = 1 << 20
    sync_bytes: int = 256 << 20
    mark_bytes: int = 16 << 20
    tail_seconds_max: float = 1.0
    failures_max: int = 4
    retry_seconds: float = 2.0

    def __post_init__(self) -> None:
        smallest = _capacity_for(NOTE_BYTES_MAX, fmt.NOTE_ENTRIES_MAX)
        if self.segment_bytes < smallest or self.segment_bytes % PAGE_BYTES:
            raise ConfigError(f"segment_bytes={self.segment_bytes} must be a multiple of 4096, at least {smallest}")
        if self.write_bytes_max < PAGE_BYTES or self.write_bytes_max % PAGE_BYTES:
            raise ConfigError(f"write_bytes_max={self.write_bytes_max} must be a multiple of 4096, at least 4096")
        sizes, others = ("inflight_bytes_max", "sync_bytes", "mark_bytes"), ("tail_seconds_max", "failures_max")
        for name in (*sizes, *others, "retry_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")


@dataclasses.dataclass(slots=True)
class WriterStatistics:
    """Counts since opening. ``write_sizes`` maps a power of two to how many writes were at most that large."""

    records: int = 0
    record_bytes: int = 0
    notes: int = 0
    durable_records: int = 0
    writes: int = 0
    written_bytes: int = 0
    syncs: int = 0
    segments_created: int = 0
    segments_sealed: int = 0
    footer_bytes: int = 0
    failures: int = 0
    seal_failures: int = 0
    no_space: int = 0
    replaced_records: int = 0
    write_sizes: dict[int, int] = dataclasses.field(default_factory=dict)


class SegmentWriter:
    """Appends to segments of one claimed writer directory. Owned by one event loop.

    ``stamp`` gives hybrid-clock stamps. ``run`` must be running (in the owner's task group) for
    anything to be written; ``aclose`` ends it.
    """

    def __init__(
        self,
        storage: Storage,
        root: Root,
        claim: WriterClaim,
        table: SegmentTable,
        stamp: Callable[[], int],
        limits: WriterLimits | None = None,
    ) -> None:
        self.limits = WriterLimits() if limits is None else limits
        self.gate: SpaceGate = OpenGate()
        self.statistics = WriterStatistics()
        self._storage = storage
        self._root = root
        self._claim = claim
        self._table = table
        self._stamp = stamp
        self._pending = PendingQueue()
        self._gave_up = False
        self._active: ActiveSegment | None = None
        self._segments: set[ActiveSegment] = set()
        self._prepared: asyncio.Task[ActiveSegment | OSError] | None = None
        self._inflight_bytes = 0
        self._failures_in_a_row = 0
        self._pause_s = 0.0
        self._attempt_from_s = -math.inf
        self._short_since_s: float | None = None
        self._full: OSError | None = None
        self._broken: BaseException | None = None
        self._closing = False
        self._seal_at_end = True
        self._started = False
        self._tasks: asyncio.TaskGroup
        self._place_wake = asyncio.Event()
        self._sync_wake = asyncio.Event()
        self._inflight_freed = asyncio.Event()
        self._retry = asyncio.Event()
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    # -- for the store: all synchronous but flush and aclose ------------------------------------

    @property
    def backlog_bytes(self) -> int:
        """Appended and not durable yet: arena copies that may not be dropped."""
        return self._pending.backlog_bytes

    @property
    def unsynced_bytes(self) -> int:
        """Written to the active segment and not covered by a sync yet."""
        return 0 if self._active is None else self._active.unsynced_bytes

    @property
    def full(self) -> bool:
        """The file system has no room; records wait in memory."""
        return self._full is not None

    @property
    def broken(self) -> bool:
        return self._broken is not None

    def capacity_for(self, nbytes: int) -> int:
        """Bytes of the smallest segment in which a record of ``nbytes`` is written."""
        return max(self.limits.segment_bytes, _capacity_for(nbytes, NAMES_IN_HEADER_MAX))

    @property
    def last_ticket(self) -> int:
        """Number of the newest append."""
        return self._pending.last_ticket

    @property
    def settled_ticket(self) -> int:
        """All appends up to this number are durable."""
        return self._pending.settled_ticket

    @property
    def complete(self) -> bool:
        """Whether everything appended so far is on stable storage or still on its way there: nothing was given up."""
        return self._broken is None and not self._gave_up

    @property
    def ending(self) -> bool:
        """Whether a segment is about to be sealed or given up."""
        spare = self._prepared is not None and self._prepared.done()
        return len(self._segments) > (self._active is not None) + spare

    @property
    def settled(self) -> bool:
        """Everything appended is durable, or has been given up."""
        return self._pending.last_ticket <= self._pending.settled_ticket

    def refuse_flushes(self, error: Callable[[], BaseException]) -> None:
        """Answer every flush that waits now with an error; the writing goes on."""
        self._pending.refuse(error)

    def append(self, record: PendingRecord) -> None:
        """Queue a block. Never blocks. Raises ``ClosedError`` or ``BrokenTierError``, and then took nothing."""
        nbytes = len(record.extent)
        self._push(Append(self._pending.last_ticket + 1, nbytes, self._now_s(), record))
        self.statistics.records += 1
        self.statistics.record_bytes += nbytes

    def append_note(self, bindings: Sequence[fmt.NoteBinding] = (), tombstones: Sequence[fmt.Tombstone] = ()) -> None:
        """Queue bindings of blocks that were appended before, and deletions. Raises as ``append``.

        A binding is written once the record of its block is durable.
        """
        step = fmt.NOTE_ENTRIES_MAX // 2
        for start in range(0, max(len(bindings), len(tombstones)), step):
            some, others = bindings[start : start + step], tombstones[start : start + step]
            append = Append(self._pending.last_ticket + 1, 0, self._now_s(), None, some, others)
            self._push(append)
            self.statistics.notes += 1

    async def flush(self) -> None:
        """Return once everything appended before this call is on stable storage.

        Raises what prevents it: ``TierFullError`` (records stay queued), ``BrokenTierError``,
        ``ClosedError``. May be cancelled; the writing goes on.
        """
        pending = self._pending
        if self._broken is not None:
            raise self._broken_error()
        if pending.last_ticket <= pending.settled_ticket:
            return
        if self._ended.is_set():
            raise ClosedError("the segment writer has ended; open the store again")
        first = pending.first_queued
        if self._full is not None and first is not None and not self.gate.may_evict:
            raise self._full_error()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        pending.want(future)
        self._wake()
        await future

    def expedite(self) -> None:
        """Make everything appended so far durable soon: somebody waits for its memory."""
        self._pending.want(None)
        self._wake()

    def space_freed(self) -> None:
        """Room was made on the file system: a full writer tries again now."""
        self._retry.set()

    async def rotate(self) -> None:
        """End the active segment now and return once it is sealed, so that its space can be reclaimed.

        Does nothing while the segment is empty. A failure counts as any other; may be cancelled.
        """
        segment = self._active
        if segment is None or segment.placed == PAGE_BYTES or self._closing:
            return
        self._active = None
        await asyncio.wait([self._tasks.create_task(self._seal(segment))])

    async def aclose(self, *, seal: bool = True) -> None:
        """Flush, seal the active segment (or leave it to the next adopter), end ``run``.

        Raises what flush raises, after everything has ended; what could not be written has then been
        told ``on_failed``. Repeated calls do nothing. Cancelled, it returns at once and the end goes
        on in ``run``: cancel that too if the device hangs.
        """
        if self._closing:
            await self._ended.wait()
            return
        self._closing = True
        self._seal_at_end = seal
        await asyncio.sleep(0)  # a run that was only just made a task starts now
        if not self._started:
            self._forget_rest()
            return
        error: CascadeError | None = None
        try:
            await self.flush()
        except CascadeError as exc:
            error = exc
        finally:
            self._stopping.set()
        await self._ended.wait()
        if error is not None:
            raise error

    # -- the background ------------------------------------------------------------------------

    async def run(self) -> None:
        """Write until ``aclose``. Cancelling it stops at once: what is not durable is told ``on_failed``."""
        assert not self._started, "one run per writer"
        self._started = True
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                loops = [tasks.create_task(self._place_loop()), tasks.create_task(self._sync_loop())]
                await self._stopping.wait()
                for loop in loops:
                    loop.cancel()
                await asyncio.wait(loops)
                await self._finish()
            await self._save_claim()
        finally:
            for segment in list(self._segments):
                await self._close(segment)
            self._forget_rest()

    async def _save_claim(self) -> None:
        try:
            await self._claim.save(self._storage)
        except OSError:
            self.statistics.failures += 1  # the files in the directory still keep their numbers from being reused

    async def _close(self, segment: ActiveSegment) -> None:
        self._segments.discard(segment)
        await segment.close()
        segment.entry.writing = False
        self.gate.ended()

    async def _finish(self) -> None:
        if self._prepared is not None:
            spare = await self._prepared
            if isinstance(spare, ActiveSegment):
                await self._discard(spare)
        if self._active is not None:
            segment, self._active = self._active, None
            if self._seal_at_end:
                await self._seal(segment)
            else:
                await segment.idle.wait()
                await self._close(segment)

    def _forget_rest(self) -> None:
        self._closing = True
        self._pending.refuse(self._broken_error if self._broken else _closed_error)
        rest = self._pending.abandon()
        self._gave_up = bool(rest)
        for append in rest:
            if append.record is not None:
                append.record.on_failed(self._broken_error() if self._broken else _closed_error())
        self._ended.set()

    def _push(self, append: Append) -> None:
        if self._broken is not None:
            raise self._broken_error()
        if self._closing:
            raise _closed_error()
        self._pending.push(append)
        self._place_wake.set()

    def _wake(self) -> None:
        self._place_wake.set()
        self._sync_wake.set()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    # -- placing -------------------------------------------------------------------------------

    def _place_in_s(self) -> float | None:
        """When the placer has work: seconds from now, ``None`` for not before it is woken."""
        pending = self._pending
        first = pending.first_queued
        if first is None or self._broken is not None:
            return None
        if self._full is not None:
            return 0.0  # the pause between attempts sets the pace
        now_s = self._now_s()
        due_s = first.appended_s + LINGER_SHARE * self.limits.tail_seconds_max
        if pending.queued_bytes >= self.limits.linger_bytes or first.ticket <= pending.last_wanted:
            due_s = now_s
        return max(due_s, self._attempt_from_s) - now_s

    async def _place_loop(self) -> None:
        while True:
            await _until_due(self._place_wake, self._place_in_s)
            if self._full is not None and not await self._relieved():
                await self._pause()
            segment = await self._segment()
            if segment is not None:
                await self._place_some(segment)
            await asyncio.sleep(0)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self.limits.retry_seconds):
                await self._retry.wait()
        except TimeoutError:
            return
        finally:
            self._retry.clear()

    async def _relieved(self) -> bool:
        """Whether something was given up for the sake of what waits; if nothing can be, flushes are told."""
        if await self.gate.make_room(self._next()[0], disk_full=True):
            return True
        self._refuse_full()
        return False

    def _next(self) -> tuple[int, int]:
        """(bytes, names) of what is to be placed next, at most."""
        if self._pending.notes:
            return NOTE_BYTES_MAX, fmt.NOTE_ENTRIES_MAX
        if not self._pending.records:
            return PAGE_BYTES, 0
        append = self._pending.records[0]
        return append.nbytes, _names_of(append)

    async def _segment(self) -> ActiveSegment | None:
        """A segment with room for what comes next; ``None`` after a failure that has been dealt with."""
        nbytes, names = self._next()
        if self._active is not None and self._active.fits(nbytes, bindings=names, tombstones=0):
            return self._active
        capacity = _capacity_for(nbytes, names)
        try:
            if capacity > self.limits.segment_bytes:
                segment = await self._create(capacity)
            else:
                if self._active is not None:
                    full, self._active = self._active, None
                    self._tasks.create_task(self._seal(full))
                segment = self._active = await self._next_segment(capacity)
        except OSError as exc:
            self._count_failure(exc)
            return None
        self._full = None
        return segment

    async def _next_segment(self, capacity: int) -> ActiveSegment:
        if self._prepared is not None:
            task, self._prepared = self._prepared, None
            spare = await task
            if isinstance(spare, ActiveSegment):
                return spare
        try:
            return await self._create(self.limits.segment_bytes)
        except BudgetError:
            raise
        except OSError as exc:
            small = max(capacity, self.limits.segment_bytes // 16 // PAGE_BYTES * PAGE_BYTES)
            if exc.errno not in _NO_SPACE or small >= self.limits.segment_bytes:
                raise
            return await self._create(small)

    async def _create(self, capacity_bytes: int, *, wait: bool = True) -> ActiveSegment:
        identity = fmt.SegmentIdentity(self._claim.writer, await self._claim.take_sequence(self._storage))
        while not self.gate.admits(capacity_bytes):
            if not wait or not await self.gate.make_room(capacity_bytes, disk_full=False):
                raise BudgetError(self._claim.path)
        entry = self._table.add(identity, own=True)
        entry.writing = True
        entry.capacity_bytes = capacity_bytes
        header = fmt.SegmentHeader(self._root.store, identity, self._root.digest, capacity_bytes, self._stamp())
        segment: ActiveSegment | None = None
        try:
            segment = await create_segment(self._storage, entry, header, self._claim.path)
        finally:
            if segment is None:
                await self._table.forget(entry.number)
        self._segments.add(segment)
        self.statistics.segments_created += 1
        return segment

    async def _prepare(self) -> ActiveSegment | OSError:
        try:
            return await self._create(self.limits.segment_bytes, wait=False)
        except OSError as exc:
            return exc  # not a failure yet: the placer tries again when it needs the segment

    async def _discard(self, segment: ActiveSegment) -> None:
        """Nothing in it counts. It stays one that is being written until it is gone: nobody else removes it."""
        self._segments.discard(segment)
        await segment.close()
        try:
            await self._storage.unlink(segment.entry.path)
        except OSError:
            self.statistics.seal_failures += 1  # the next adopter removes or seals it
        await self._table.forget(segment.entry.number)
        self.gate.ended()

    async def _place_some(self, segment: ActiveSegment) -> None:
        segment.enter()
        try:
            writes = self._plan(segment)
            if segment is not self._active:
                self._tasks.create_task(self._seal(segment))
            elif self._prepared is None and segment.room_bytes < segment.capacity_bytes // 2:
                self._prepared = self._tasks.create_task(self._prepare())
            for write in writes:
                while self._inflight_bytes and self._inflight_bytes + write.nbytes > self.limits.inflight_bytes_max:
                    self._inflight_freed.clear()
                    await self._inflight_freed.wait()
                if segment.failed is not None:
                    return
                segment.enter()
                self._inflight_bytes += write.nbytes
                self._tasks.create_task(self._write(segment, write))
        finally:
            segment.leave()

    def _plan(self, segment: ActiveSegment) -> list[Write]:
        """Place what is queued and fits, and return the writes that bring it there."""
        pending = self._pending
        writes: list[Write] = []
        if segment is self._active:
            while pending.notes and segment.fits(NOTE_BYTES_MAX, bindings=fmt.NOTE_ENTRIES_MAX, tombstones=0):
                self._plan_record(segment, self._take_note(), writes)
        for _ in range(PLACED_PER_TURN_MAX):
            append = pending.records[0] if pending.records else None
            if append is None or not segment.fits(append.nbytes, bindings=_names_of(append), tombstones=0):
                break
            pending.records.popleft()
            pending.queued_bytes -= append.nbytes
            self._plan_record(segment, _placed_block(append, self._root.digest), writes)
        for write in writes:
            segment.plan(write)
        return writes

    def _take_note(self) -> Placed:
        """As many queued note entries as fit one NOTE record."""
        notes = self._pending.notes
        taken = [notes.popleft()]
        entries = len(taken[0].bindings) + len(taken[0].tombstones)
        while notes and entries + len(notes[0].bindings) + len(notes[0].tombstones) <= fmt.NOTE_ENTRIES_MAX:
            taken.append(notes.popleft())
            entries += len(taken[-1].bindings) + len(taken[-1].tombstones)
        bindings = tuple(binding for append in taken for binding in append.bindings)
        tombstones = tuple(tombstone for append in taken for tombstone in append.tombstones)
        pages = fmt.note_pages_for(len(bindings), len(tombstones))
        header = fmt.RecordHeader(
            fmt.NOTE, pages, pages * PAGE_BYTES, 0, self._stamp(), 0, note_bindings=bindings, tombstones=tombstones
        )
        return Placed(header, taken, page_buffer(pages * PAGE_BYTES))

    def _plan_record(self, segment: ActiveSegment, placed: Placed, writes: list[Write]) -> None:
        segment.place(placed)
        offset, rest = placed.header.offset, placed.buffer
        joins = len(rest) <= JOINED_RECORD_BYTES_MAX
        while rest:
            last = writes[-1] if writes else None
            space = 0 if last is None else self.limits.write_bytes_max - last.nbytes
            if (
                last is None
                or not (joins and last.joins)
                or len(last.buffers) >= WRITE_BUFFERS_MAX
                or space < min(len(rest), PAGE_BYTES)
                or (space < len(rest) <= self.limits.write_bytes_max)
            ):
                last = Write(offset, 0, [], placed.first_ticket, joins)
                writes.append(last)
                space = self.limits.write_bytes_max
            piece, rest = rest[:space], rest[space:]
            last.ticket = min(last.ticket, placed.first_ticket)
            last.buffers.append(piece)
            last.nbytes += len(piece)
            offset += len(piece)

    async def _write(self, segment: ActiveSegment, write: Write) -> None:
        try:
            await segment.write(write)
        except OSError as exc:
            self._fail(segment, exc)
        else:
            statistics = self.statistics
            statistics.writes += 1
            statistics.written_bytes += write.nbytes
            bucket = 1 << (write.nbytes - 1).bit_length()
            statistics.write_sizes[bucket] = statistics.write_sizes.get(bucket, 0) + 1
            if segment is self._active:
                self._full = None  # an older segment's sync found no room; this one takes what comes
        finally:
            self._inflight_bytes -= write.nbytes
            self._inflight_freed.set()
            segment.leave()
            self._sync_wake.set()

    # -- syncing -------------------------------------------------------------------------------

    def _sync_in_s(self) -> float | None:
        """When the active segment is to be synced: seconds from now, ``None`` for not before it is woken."""
        segment = self._active
        first = None if segment is None else segment.first_unsettled_ticket
        if segment is None or not segment.unsynced_bytes or first is None:
            return None
        if segment.unsynced_bytes >= self.limits.sync_bytes:
            return 0.0
        wanted = self._pending.first_wanted
        if wanted is not None and first <= wanted:
            unwritten = segment.first_unwritten_ticket
            queued = self._pending.first_queued
            if (unwritten is None or unwritten > wanted) and (queued is None or queued.ticket > wanted):
                return 0.0
        since_s = segment.unsynced_since_s
        return None if since_s is None else since_s + SYNC_SHARE * self.limits.tail_seconds_max - self._now_s()

    async def _sync_loop(self) -> None:
        while True:
            await _until_due(self._sync_wake, self._sync_in_s)
            if self._active is not None:
                await self._sync(self._active)

    async def _sync(self, segment: ActiveSegment) -> None:
        """Make the written prefix durable and report it; a failure abandons the segment."""
        async with segment.sync_lock:
            if segment.failed is not None:
                return
            self.statistics.syncs += 1
            try:
                settled = await segment.sync()
            except OSError as exc:
                self._fail(segment, exc)
                return
        if settled:
            self._failures_in_a_row = 0
            self._pause_s = 0.0
            self._short_since_s = None
            try:
                await self._mark(segment)
            finally:
                self._settle(segment, settled)

    async def _mark(self, segment: ActiveSegment) -> None:
        """Say in the segment what is durable of it, if much is that no header says, and nothing is queued that will.

        Before the flushes are answered: what they promise is then known as promised to whoever comes after a kill.
        """
        unsaid_bytes = segment.synced - segment.announced
        if (
            segment is not self._active
            or (self._closing and self._seal_at_end)
            or unsaid_bytes < self.limits.mark_bytes
            or segment.placed > segment.synced
            or self._pending.first_queued is not None
            or not segment.fits(PAGE_BYTES, bindings=0, tombstones=0)
        ):
            return
        segment.enter()
        self._inflight_bytes += PAGE_BYTES
        write = segment.place_mark(self._stamp(), self._pending.settled_ticket)
        await asyncio.wait([self._tasks.create_task(self._write(segment, write))])

    def _settle(self, segment: ActiveSegment, settled: Sequence[Placed]) -> None:
        entry = segment.entry
        for placed in settled:
            if not placed.appends:
                continue  # a mark
            self.statistics.durable_records += 1
            self._pending.settle(placed.appends)
            record = placed.appends[0].record
            if record is not None:
                record.on_durable(Location(entry.number, placed.header.offset // PAGE_BYTES, record.header_pages))
        self._wake()

    async def _seal(self, segment: ActiveSegment) -> None:
        """End a segment that gets no more records."""
        await segment.idle.wait()
        await self._sync(segment)
        if segment.failed is not None:
            return
        if segment.synced == PAGE_BYTES:
            await self._discard(segment)
            return
        try:
            self.statistics.footer_bytes += await segment.seal()
            self.statistics.segments_sealed += 1
        except OSError:
            self.statistics.seal_failures += 1  # all of it is durable: the next adopter scans and seals it
        await self._close(segment)

    # -- failures ------------------------------------------------------------------------------

    def _fail(self, segment: ActiveSegment, exc: OSError) -> None:
        """The segment gets no further byte; what is not durable in it goes elsewhere."""
        if segment.failed is not None:
            return
        segment.failed = exc
        if self._active is segment:
            self._active = None
        self._tasks.create_task(self._rescue(segment))
        self._count_failure(exc)

    async def _rescue(self, segment: ActiveSegment) -> None:
        await segment.idle.wait()
        async with segment.sync_lock:
            orphans = segment.give_up()
        appends = [append for placed in orphans for append in placed.appends]
        self.statistics.replaced_records += len(appends)
        self._pending.push_back(appends)
        if segment.synced == PAGE_BYTES:  # else space is found in it, again and again, on a disk that has none
            await self._discard(segment)
        else:
            await self._close(segment)
        if self._broken is not None:
            self._give_up_queue()
        elif self._full is not None and not self.gate.may_evict:
            self._refuse_full()
        self._wake()

    def _count_failure(self, exc: OSError) -> None:
        if exc.errno in _NO_SPACE:
            self.statistics.no_space += 1
            self._full = exc
            if not self.gate.may_evict:
                self._refuse_full()
            return
        self.statistics.failures += 1
        now_s = self._now_s()
        if now_s < self._attempt_from_s:
            return  # begun before the pause: the same event as the failure that made it
        first_pause_s = FIRST_PAUSE_SHARE * self.limits.retry_seconds
        self._pause_s = min(max(2 * self._pause_s, first_pause_s), self.limits.retry_seconds)
        self._attempt_from_s = now_s + self._pause_s
        if exc.errno in _SHORTAGE:
            self._count_shortage(exc, now_s)
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.limits.failures_max and self._broken is None:
            self._broken = exc
            self._pending.refuse(self._broken_error)
            self._give_up_queue()

    def _count_shortage(self, exc: OSError, now_s: float) -> None:
        if self._short_since_s is None:
            self._short_since_s = now_s
        if now_s - self._short_since_s >= SHORTAGE_SECONDS_MAX:
            self._full = exc
            self._refuse_full()

    def _refuse_full(self) -> None:
        first = self._pending.first_queued
        if first is not None:
            self._pending.refuse(self._full_error, first.ticket)

    def _give_up_queue(self) -> None:
        """Tell the owners of what has no place; what is in other segments may still become durable."""
        queued = self._pending.take_queued()
        self._pending.settle(queued)
        for append in queued:
            if append.record is not None:
                append.record.on_failed(self._broken_error())

    def _full_error(self) -> TierFullError:
        detail = "" if self._full is None else f": {self._full.strerror}"
        if self._full is not None and self._full.errno in _SHORTAGE:
            return TierFullError(
                f"{self._claim.path} could not be written for {SHORTAGE_SECONDS_MAX:g} s{detail}; {self.backlog_bytes} "
                "bytes wait in memory until that ends: raise the limit or close what uses it up"
            )
        return TierFullError(
            f"{self._root.path} has no room{detail}; {self.backlog_bytes} bytes wait in memory until space is freed, "
            "everything already stored can be read"
        )

    def _broken_error(self) -> BrokenTierError:
        error = BrokenTierError(
            f"writing to {self._claim.path} failed {self._failures_in_a_row} times in a row, the last time with "
            f"{self._broken}: check the device; what is stored can be read, nothing more is written until reopening"
        )
        error.__cause__ = self._broken
        return error


def _placed_block(append: Append, digest_kind: str) -> Placed:
    record = append.record
    assert record is not None
    header = fmt.RecordHeader(
        fmt.BLOCK, record.header_pages, append.nbytes, 0, record.stamp, 0, digest_kind, record.digest,
        record.key_bytes, record.value_bytes, record.value_offset, record.chunk_crcs,
        bindings=record.bindings, meta=record.meta,
    )  # fmt: skip
    return Placed(header, [append], record.extent)


def _names_of(append: Append) -> int:
    return 0 if append.record is None else len(append.record.bindings)


def _capacity_for(nbytes: int, names: int) -> int:
    """Bytes of a segment that holds one record with so many names."""
    return PAGE_BYTES + nbytes + footer_bytes(1, names, 0)


def _closed_error() -> ClosedError:
    return ClosedError("the store is closing; what was not flushed before is not stored")


async def _until_due(wake: asyncio.Event, due_in_s: Callable[[], float | None]) -> None:
    """Sleep until ``due_in_s`` says 0 or less; asked again whenever ``wake`` is set or its time has come."""
    while True:
        wake.clear()
        delay_s = due_in_s()
        if delay_s is not None and delay_s <= DUE_SECONDS:
            return
        try:
            async with asyncio.timeout(delay_s):
                await wake.wait()
        except TimeoutError:
            continue
