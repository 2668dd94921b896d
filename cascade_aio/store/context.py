"""What the parts of one open store share, and the scope that owns its background tasks.

Everything here belongs to one event loop; there are no locks because nobody else may touch it.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from copy import copy as copied
from typing import TYPE_CHECKING, Any, TypeVar

from cascade_aio.abc.storage import PAGE_BYTES, Platform
from cascade_aio.config import StoreConfig, format_size
from cascade_aio.core.lifecycle import CopyEvent, CopyState, advance
from cascade_aio.errors import CascadeError, ClosedError, ConfigError, CorruptionError, InternalError, TierStalledError
from cascade_aio.segments.facts import BlockFact, Location
from cascade_aio.segments.format import Binding, bindings_room
from cascade_aio.segments.pending import PendingRecord
from cascade_aio.segments.recovery import Recovery
from cascade_aio.store.catalog import Catalog, Copy
from cascade_aio.store.lending import LeaseDesk
from cascade_aio.store.merging import PROVISIONAL, CatalogMerger
from cascade_aio.store.publishing import Publisher, RewarmReport
from cascade_aio.store.room import ArenaRoom
from cascade_aio.tiers.disk import DiskTier
from cascade_aio.tiers.shm import Extent, ShmTier
from cascade_aio.tiers.stalls import in_progress

if TYPE_CHECKING:
    from cascade_aio.store.adopting import Adopter
    from cascade_aio.store.devices import Devices
    from cascade_aio.store.remoting import Sharing
    from cascade_aio.store.scrubbing import Scrubber

logger = logging.getLogger("cascade_aio.store")
damage_logger = logging.getLogger("cascade_aio.store.damage")
"""Of its own for who tells of damage otherwise: ``verify`` and ``repair`` name each damaged record in their report."""

_T = TypeVar("_T")

DAMAGE_KEPT_MAX = 1000
"""Newest damage reports kept for ``statistics``; the count goes on."""


@dataclasses.dataclass(slots=True)
class Counters:
    """Events since the store was opened. Blocks and calls unless the name says bytes."""

    gets: int = 0
    shm_hits: int = 0
    remote_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    late_reads: int = 0
    single_flight_joins: int = 0
    read_errors: int = 0
    damaged: int = 0
    puts: int = 0
    put_bytes: int = 0
    puts_bound: int = 0
    puts_deduplicated: int = 0
    deduplicated_bytes: int = 0
    reserve_copies: int = 0
    deletes: int = 0
    write_failures: int = 0


async def _unknown() -> bool:
    return False


class TaskScope:
    """Background tasks of one owner: all are cancelled and awaited when it closes.

    Not ``asyncio.TaskGroup``, because a store may be opened in one task and closed in another. A task
    that fails calls ``on_failure`` with its exception; nothing is only logged.
    """

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_failure = on_failure

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

    async def run(
        self,
        work: Coroutine[Any, Any, _T],
        ended: Callable[[], Exception],
        *,
        progress: Callable[[], object],
        patience_s: float,
        stuck: Callable[[], Exception],
    ) -> _T:
        """Run a caller's ``work`` to its end; raises ``ended()`` if this scope closes first.

        A cancelled caller cancels the work and waits for its end. Where ``progress()`` stays the same, and
        not ``None``, for ``patience_s``, the caller is let go with ``stuck()``, and the scope is left to wait.
        """
        outcome: list[_T | BaseException] = []

        async def record() -> None:
            try:
                outcome.append(await work)
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                outcome.append(error)  # the caller's, not the scope's

        task = self.spawn(record(), name="cascade-call")
        cancelled: asyncio.CancelledError | None = None
        before = progress()
        while not task.done():
            try:
                await asyncio.wait((task,), timeout=patience_s)
            except asyncio.CancelledError as error:
                cancelled = error
                task.cancel()
                continue
            if not task.done() and before is not None and progress() == before:
                task.cancel()
                raise cancelled or stuck()
            before = progress()
        work.close()  # a task that was cancelled before its first step has not begun it
        if cancelled is not None:
            raise cancelled
        if not outcome:
            raise ended()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    async def close(self) -> None:
        """Cancel all and wait for them, however often the caller is cancelled meanwhile."""
        cancelled: asyncio.CancelledError | None = None
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            try:
                await asyncio.wait(list(self._tasks))
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


@dataclasses.dataclass(slots=True, eq=False)
class StoreContext:
    """One open store: its world, its parts, its state."""

    config: StoreConfig
    platform: Platform
    loop: asyncio.AbstractEventLoop
    shm: ShmTier
    disk: DiskTier
    catalog: Catalog
    desk: LeaseDesk
    counters: Counters = dataclasses.field(default_factory=Counters)
    damage: collections.deque[CorruptionError] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=DAMAGE_KEPT_MAX)
    )
    closers: list[Callable[[], Awaitable[None]]] = dataclasses.field(default_factory=list)
    """What ``close_store`` runs after the background tasks have ended, first one first."""
    publisher: Publisher | None = None
    """Of a store that keeps its arena (``warm_restart``)."""
    sharing: Sharing | None = None
    """Of a store with a communicator."""
    devices: Devices | None = None
    """Of a store with ``gpu_bytes``."""
    rewarmed: RewarmReport = dataclasses.field(default_factory=RewarmReport)
    prefaulted: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    store_id: bytes = b""
    """Uuid of the root."""
    writer: bytes = b""
    """Id of the writer directory that this store appends to."""
    is_alone: Callable[[], Awaitable[bool]] = dataclasses.field(default=_unknown)
    """Whether no other writer can add to the root, so that what we know of it is all there is."""
    on_adopted: Callable[[], None] = lambda: None
    """Called when the segments of another writer are about to become own ones."""
    stripe: str = "plain files"
    """How the writer's directory is striped, as ``statistics`` tells it."""
    closed: bool = False
    failure: BaseException | None = None
    on_written: Callable[[], None] = lambda: None
    """Called when a record has become durable: the disk has grown."""
    room: ArenaRoom[Extent] = dataclasses.field(init=False)
    tasks: TaskScope = dataclasses.field(init=False)
    merger: CatalogMerger = dataclasses.field(init=False)
    recovery: Recovery = dataclasses.field(init=False)
    adopter: Adopter = dataclasses.field(init=False)
    scrubber: Scrubber | None = None
    index_doubtful: bool = False
    """The index is not to be kept in a checkpoint: the segments are to be read again."""
    facts_applied: int = 0
    facts_refused: int = 0
    """Facts of the root for which the index had no room."""
    facts_since_checkpoint: int = 0
    """Facts that recovery found beyond the checkpoint: with none and no writes, it need not be replaced."""
    refreshing: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.room = ArenaRoom(self.shm, self.catalog, self.disk.expedite, self.explain_arena)
        self.tasks = TaskScope(self.fail)
        self.merger = CatalogMerger(self.catalog, self.report_damage)

    async def while_open(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run ``work``, which reads files, unless the store is closed before its end: then ``ClosedError``."""
        root, patience_s = self.config.root, self.config.stall_seconds_max
        return await self.tasks.run(
            work,
            lambda: ClosedError(f"the store on {root} was closed during the call"),
            progress=functools.partial(in_progress, self.platform.storage),
            patience_s=patience_s,
            stuck=lambda: TierStalledError(
                f"the storage of {root} has not answered for {patience_s:g} s: check the device or the file system's "
                "servers; the call may be made again"
            ),
        )

    def check(self) -> None:
        """Every public call starts here: right loop, open, healthy."""
        if asyncio.get_running_loop() is not self.loop:
            raise CascadeError(
                f"the store on {self.config.root} was opened on another event loop; open one store per loop"
            )
        if self.closed:
            raise ClosedError(f"the store on {self.config.root} is closed; open it again")
        if self.failure is not None:
            raise InternalError(
                f"a background task of the store on {self.config.root} failed; close the store and open it again, "
                "and please report this"
            ) from self.failure

    def check_writable(self) -> None:
        """Every public call that changes the store starts here."""
        self.check()
        if self.config.read_only:
            raise ConfigError(
                f"the store on {self.config.root} was opened with read_only=True; open it without to change anything"
            )

    def fail(self, error: BaseException) -> None:
        """A background task died of something nobody foresaw: refuse everything from now on."""
        if self.failure is None:
            logger.error("a background task of the store on %s failed", self.config.root, exc_info=error)
            self.failure = error
            self.prefaulted.set()  # whoever waits looks again
            self.room.close(InternalError(f"a background task of the store on {self.config.root} failed: {error!r}"))

    def new_stamp(self, block_id: bytes) -> int:
        """For a record or binding: newer than any deletion of the block, even if the wall clock was set back since."""
        return max(self.disk.stamp(), self.merger.facts.stamp_min(block_id))

    def append(self, copy: Copy, bindings: Sequence[tuple[bytes, bytes | None]], stamp: int | None = None) -> None:
        """Queue a sealed copy for the segment writer, with its names. It is held until its record is durable."""
        stamp = self.new_stamp(copy.block_id) if stamp is None else stamp
        self._append(copy, tuple(Binding(key, parent, stamp) for key, parent in bindings), stamp)

    def _append(self, copy: Copy, bindings: tuple[Binding, ...], stamp: int) -> None:
        self.catalog.hold(copy)
        copy.state = advance(copy.state, CopyEvent.COPY)
        copy.stamp = stamp

        def durable(location: Location) -> None:
            if copy.row >= 0:
                nbytes = copy.extent.nbytes
                self.merger.apply(
                    BlockFact(location, nbytes, copy.digest, copy.key_bytes, copy.value_bytes, stamp, provisional=False)
                )
            self._written(copy)

        def failed(error: BaseException) -> None:
            self.counters.write_failures += 1
            if self.config.may_lose_unflushed or copy.row < 0 or self.closed:
                self._written(copy)
            else:
                copy.stranded = True

        self.disk.append_block(
            PendingRecord(
                extent=copy.extent.memory,
                header_pages=copy.header_bytes // PAGE_BYTES,
                stamp=stamp,
                digest=copy.digest,
                key_bytes=copy.key_bytes,
                value_bytes=copy.value_bytes,
                value_offset=copy.value_offset,
                chunk_crcs=copy.chunk_crcs,
                meta=copy.meta,
                bindings=bindings,
                on_durable=durable,
                on_failed=failed,
            )
        )
        if self.room.wanted:  # somebody waits for what only a sync of this record sets free
            self.disk.expedite()

    def append_unless_durable(self, copy: Copy) -> None:
        """Known content was put again: what ``flush`` promises for it takes a record that is known to be durable."""
        index = self.catalog.index
        if index.location(copy.row) is None or index.flags(copy.row) & PROVISIONAL:
            self.append_again(copy)

    def append_again(self, copy: Copy) -> None:
        """Write a copy once more: its record is about to be removed, or in doubt. Nothing for one being written.

        Record and names keep their stamps, so that no deletion between is undone and the name that was first stays so.
        """
        if copy.state is not CopyState.SEALED:
            return
        index = self.catalog.index
        bindings = [Binding(*name) for name in index.bindings_newer_than(copy.row, -1)]
        room = bindings_room(copy.header_bytes // PAGE_BYTES, len(copy.chunk_crcs), len(copy.meta))
        stamp = index.stamp(copy.row) or self.new_stamp(copy.block_id)
        self._append(copy, tuple(bindings[:room]), stamp)
        for key, parent, bound in bindings[room:]:
            self.append_binding(copy.block_id, key, parent, bound)

    def append_binding(self, block_id: bytes, key: bytes, parent: bytes | None, stamp: int | None = None) -> None:
        """Queue a further name of a block that has a record, or will have."""
        self.disk.append_binding(block_id, key, parent, self.new_stamp(block_id) if stamp is None else stamp)

    def _written(self, copy: Copy) -> None:
        """The segment writer needs the extent no more."""
        if copy.state is CopyState.COPYING:
            copy.state = advance(copy.state, CopyEvent.COPIED)
        self.catalog.release(copy)
        self.disk.backlog_changed()
        self.on_written()

    def report_damage(self, error: CorruptionError) -> None:
        """Count and keep ``error``; its segment, if it is ours, stays until ``repair`` has set the record aside."""
        self.counters.damaged += 1
        for entry in self.disk.table:
            if entry.path == error.path:
                entry.damaged = True
        self.damage.append(copied(error))  # not the one that is raised: its traceback would pin what readers hold
        damage_logger.warning("%s: %s", "not readable now" if error.unreadable else "damaged record", error)

    def explain_arena(self) -> str:
        """Who holds the arena, for the message of a ``TierFullError``, and what to do about it."""
        cure = "release leases sooner or open the store with larger shm_bytes"
        if self.disk.watch.stalled:
            cure = f"the storage of {self.config.root} does not answer: check the device or the file system's servers"
        elif self.disk.writer.full:
            segment = format_size(self.config.segment_bytes)
            cure = (
                f"the file system of {self.config.root} is full: free space there (a new segment takes {segment} at "
                "once: segment_bytes), or set disk_bytes below its size"
            )
        elif self.disk.writer.broken:
            cure = f"the disk of {self.config.root} takes no writes: check it and open the store again"
        return (
            f"{self.desk.describe()}, {self.disk.describe_backlog()}, "
            f"{self.shm.capacity_bytes - self.shm.ready_bytes} bytes are still being prepared, largest free extent "
            f"{self.shm.largest_free_bytes} bytes of {self.shm.capacity_bytes}; {cure}"
        )
