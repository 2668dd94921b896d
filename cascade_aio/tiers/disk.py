"""The disk tier: this store's segment writer, a reader of all segments, and the root they live in.

What it is: the seam between the catalog's blocks and the segments' bytes. It bounds what is not
durable yet, and turns what segments say into facts for whoever opened it. It decides nothing about what
is kept: that is the store's.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import posixpath
from collections.abc import Callable

from cascade_aio.abc.storage import Platform, Urgency
from cascade_aio.config import format_size
from cascade_aio.core.clock import HybridClock
from cascade_aio.errors import BrokenTierError, TierFullError, TierStalledError
from cascade_aio.segments.format import NoteBinding, RecordHeader, Tombstone
from cascade_aio.segments.layout import CHECKPOINT_FILE
from cascade_aio.segments.pending import PendingRecord
from cascade_aio.segments.reader import RecordRead, SegmentReader
from cascade_aio.segments.table import SegmentTable
from cascade_aio.segments.writer import SegmentWriter
from cascade_aio.tiers.reading import TurnReads
from cascade_aio.tiers.stalls import StallWatch


class DiskTier:
    """Records on disk. Owned by one event loop; ``writer.run`` is a task of the store."""

    def __init__(
        self,
        platform: Platform,
        table: SegmentTable,
        reader: SegmentReader,
        writer: SegmentWriter,
        clock: HybridClock,
        *,
        backlog_bytes_max: int,
        watch: StallWatch,
    ) -> None:
        self.table = table
        self.reader = reader
        self.writer = writer
        self._platform = platform
        self.clock = clock
        self._backlog_bytes_max = backlog_bytes_max
        self._backlog_waiters: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()
        self._backlog_closed: BaseException | None = None
        self.check_record: Callable[[int], None] = lambda nbytes: None
        """Raises ``BlockTooLargeError`` for a record of so many bytes that can never be written."""
        self._reads = TurnReads(reader)
        self._retracted: set[str] = set()
        self.watch = watch
        watch.on_change = self._stalled_or_not

    def stamp(self) -> int:
        """A stamp for a new record, later than all made or seen before."""
        return self.clock.next(self._platform.clock.wall_ns())

    # -- reading ------------------------------------------------------------------------------

    async def read(self, read: RecordRead, urgency: Urgency) -> RecordHeader:
        """Read one record into its extent and verify it; returns its header.

        Raises ``CorruptionError``, ``BlockNotFoundError`` (the segment has vanished), ``OSError``. When this
        returns or raises, also by cancellation, nobody touches the extent any more.
        """
        await self._reads.read(read, urgency)
        outcome = read.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None, read.location
        return outcome

    # -- writing ------------------------------------------------------------------------------

    def append_block(self, record: PendingRecord) -> None:
        """Queue a record; a broken writer refuses it through ``on_failed`` instead of raising."""
        try:
            self.writer.append(record)
        except BrokenTierError as error:
            record.on_failed(error)

    def append_binding(self, block_id: bytes, key: bytes, parent: bytes | None, stamp: int) -> None:
        """Queue a further name of a block that has a record. A broken writer keeps it in memory only."""
        self._append_note((NoteBinding(block_id, key, parent, stamp),), ())

    def append_tombstone(self, block_id: bytes, stamp: int) -> None:
        """Queue a deletion of everything of ``block_id`` up to ``stamp``."""
        self._append_note((), (Tombstone(block_id, stamp),))

    def _append_note(self, bindings: tuple[NoteBinding, ...], tombstones: tuple[Tombstone, ...]) -> None:
        if not self.writer.broken:  # flush tells that nothing is written any more
            self.writer.append_note(bindings, tombstones)

    async def flush(self) -> None:
        """Everything appended so far is durable when this returns; errors as ``SegmentWriter.flush``, and
        ``TierStalledError`` once the storage has not answered for the limit of its watch."""
        if self.watch.stalled and not self.writer.settled:
            raise self._stalled_error()
        await self.writer.flush()

    def _stalled_or_not(self) -> None:
        if self.watch.stalled:
            self.writer.refuse_flushes(self._stalled_error)
        self.backlog_changed()

    def _stalled_error(self) -> TierStalledError:
        return TierStalledError(
            f"the storage of {self.table.root} has not answered a write or sync for {self.watch.stalled_s:.1f} s: "
            f"{format_size(self.writer.backlog_bytes)} wait in memory and are written when it does; check the device "
            "or the file system's servers"
        )

    def expedite(self) -> None:
        """Somebody waits for arena room that only durable records can give."""
        if self.writer.backlog_bytes and not self.writer.broken:
            self.writer.expedite()

    # -- back-pressure ------------------------------------------------------------------------

    async def wait_backlog(self, nbytes: int, wait_s: float) -> None:
        """Return once ``nbytes`` more may be waiting for the disk. Does not suspend when they may now.

        A backlog of nothing admits a record of any size; a writer that is full or broken admits
        everything, because then the arena is the bound. Raises ``TierFullError`` after ``wait_s``.
        """
        if self._backlog_closed is not None:
            raise self._backlog_closed
        if not self._backlog_waiters and self._admits(nbytes):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (nbytes, future)
        self._backlog_waiters.append(waiter)
        self.expedite()
        try:
            async with asyncio.timeout(wait_s):
                await future
        except TimeoutError:
            raise TierFullError(
                f"the disk did not take {format_size(nbytes)} more within {wait_s:g} s: {self.describe_backlog()}; "
                "put more slowly, or raise tail_bytes_max or put_wait_seconds_max"
            ) from None
        finally:
            if waiter in self._backlog_waiters:
                self._backlog_waiters.remove(waiter)
            self.backlog_changed()

    def backlog_changed(self) -> None:
        """The backlog has shrunk: let waiting puts go on, in order."""
        while self._backlog_waiters:
            nbytes, future = self._backlog_waiters[0]
            if not future.done():
                if not self._admits(nbytes):
                    return
                future.set_result(None)
            self._backlog_waiters.popleft()

    def close_backlog(self, error: BaseException) -> None:
        """Everybody who waits, and everybody who comes, gets ``error``."""
        self._backlog_closed = error
        for _, future in self._backlog_waiters:
            if not future.done():
                future.set_exception(error)
        self._backlog_waiters.clear()

    def _admits(self, nbytes: int) -> bool:
        writer = self.writer
        if writer.full or writer.broken or self.watch.stalled:
            return True
        backlog = writer.backlog_bytes
        return not backlog or backlog + nbytes <= self._backlog_bytes_max

    def describe_backlog(self) -> str:
        """For messages: what waits for the disk, and why."""
        state = "broken" if self.writer.broken else "without room" if self.writer.full else "working"
        if self.watch.stalled:
            state = f"stuck: the storage has not answered for {self.watch.stalled_s:.1f} s"
        return f"{format_size(self.writer.backlog_bytes)} wait to be written (the writer is {state})"

    # -- room on disk -------------------------------------------------------------------------

    def space_freed(self) -> None:
        """Files were removed: a full writer tries again."""
        self.writer.space_freed()
        self.backlog_changed()

    async def remove_segment(self, number: int) -> None:
        """Unlink an own segment in which nothing live is left; open readers read on. Gone already: just as well."""
        entry = self.table[number]
        assert entry.own, entry.name
        assert not entry.writing, entry.name
        await self._retract_checkpoint(posixpath.dirname(entry.path))
        with contextlib.suppress(FileNotFoundError):
            await self._platform.storage.unlink(entry.path)
        await self.table.forget(number)

    async def _retract_checkpoint(self, directory: str) -> None:
        """Before the first removal: a checkpoint lists what must be there, and names that deletions have ended."""
        if directory in self._retracted:
            return
        with contextlib.suppress(FileNotFoundError):
            await self._platform.storage.unlink(posixpath.join(directory, CHECKPOINT_FILE))
            await self._platform.storage.sync_directory(directory)
        self._retracted.add(directory)

    def statistics(self) -> dict[str, object]:
        """Sizes and counts of the tier, JSON-ready."""
        writer = self.writer
        entries = list(self.table)
        return {
            "segments": len(entries),
            "own_segments": sum(entry.own for entry in entries),
            "live_bytes": sum(entry.live_bytes for entry in entries),
            "record_bytes": sum(entry.record_bytes for entry in entries),
            "backlog_bytes": writer.backlog_bytes,
            "backlog_bytes_max": self._backlog_bytes_max,
            "unsynced_bytes": writer.unsynced_bytes,
            "stalled": self.watch.stalled,
            "stalled_s": self.watch.stalled_s,
            "stalls": self.watch.stalls,
            "full": writer.full,
            "broken": writer.broken,
            "records_read": self.reader.records,
            "read_requests": self.reader.requests,
            "read_bytes": self.reader.read_bytes,
            "open_files": self.table.open_handles,
            "writer": dataclasses.asdict(writer.statistics),
        }
