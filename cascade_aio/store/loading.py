"""Loads: blocks on their way from disk into the arena, one reading per block however many want it.

A load runs as a task of the store, so that a caller who gives up leaves the kernel's buffers in good
hands. It goes on while anybody wants it: a waiter for the whole block, a waiter for its first bytes,
or a lease given out on what has arrived so far; with the last of them gone it is cancelled. It is as
urgent as the most urgent who ever joined: a read ahead that somebody comes to need is a demand from
that moment on, in the queue for room and in the queue of I/O.

The copy exists, in state *filling*, from the moment it has an extent. It enters the catalog when all
of it is verified; leases given before then see only what ``Copy.arrival`` says is there.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from copy import copy as copied

from cascade_aio.abc.storage import PAGE_BYTES, Priority, Urgency
from cascade_aio.errors import BlockNotFoundError, CascadeError, ClosedError, CorruptionError, InternalError
from cascade_aio.model import BlockId
from cascade_aio.segments.arrival import Arrival
from cascade_aio.segments.facts import Location
from cascade_aio.segments.format import RecordHeader, value_offset_of
from cascade_aio.segments.reader import RecordRead
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.store.recovering import refresh
from cascade_aio.store.rewarming import rouse
from cascade_aio.store.room import Claim
from cascade_aio.store.slowness import SlowDisk

logger = logging.getLogger("cascade_aio.store")

Waiter = asyncio.Future[Copy]
"""Of a copy, with one hold for the waiter, who ends it by ``Catalog.release`` or ``Loader.leave``."""


class _Load:
    """A block on its way from disk. ``early`` waiters want its first bytes, the others all of it."""

    __slots__ = ("block_id", "claim", "copy", "early", "layered", "task", "urgency", "waiters")

    def __init__(self, block_id: BlockId, urgency: Urgency, claim: Claim | None, *, layered: bool) -> None:
        self.block_id = block_id
        self.urgency = urgency
        self.claim = claim
        self.layered = layered
        self.waiters: set[Waiter] = set()
        self.early: set[Waiter] = set()
        self.copy: Copy | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def wanted(self) -> bool:
        if self.waiters or self.early:
            return True
        copy = self.copy
        return copy is not None and (copy.holds > 1 or (copy.arrival is not None and copy.arrival.complete))


class Loader:
    """All loads of one store, by row."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._catalog = context.catalog
        self._loads: dict[int, _Load] = {}
        self.slow = SlowDisk(context)
        context.catalog.on_forget = self._forget

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, row: int) -> bool:
        return row in self._loads

    def join(
        self,
        row: int,
        *,
        priority: Priority = Priority.DEMAND,
        claim: Claim | None = None,
        early: bool = False,
        layered: bool = False,
    ) -> Waiter:
        """Wait for the block in ``row``, starting its load if there is none.

        Below DEMAND a ``claim`` is needed (see ``ArenaRoom``). ``early``: the waiter is done when the first
        bytes are verified. ``layered``: a load that starts now reads the first bytes of both parts first.
        """
        load = self._loads.get(row)
        if self.slow.is_slow and not self._catalog.is_in_arena(row):
            return self._refuse(row)
        if load is None:
            load = self._start(row, Urgency(priority), claim, layered=layered or early)
        else:
            self._context.counters.single_flight_joins += 1
            load.urgency.rise(priority)
        waiter: Waiter = self._context.loop.create_future()
        if early and load.copy is not None and load.copy.arrival is not None and load.copy.arrival.has(0, 0):
            self._catalog.hold(load.copy)
            waiter.set_result(load.copy)
        else:
            (load.early if early else load.waiters).add(waiter)
        return waiter

    def _refuse(self, row: int) -> Waiter:
        self.slow.refused += 1
        waiter: Waiter = self._context.loop.create_future()
        why = f"its disk has not answered for {self.slow.slow_s:.1f} s; recompute it"
        waiter.set_exception(_not_found(self._catalog.index.block_id(row), why))
        return waiter

    def late(self, row: int) -> None:
        """Somebody has waited for ``row`` for too long. Not the disk's fault if it waits for room in the arena."""
        load = self._loads.get(row)
        location = self._catalog.index.location(row)
        if load is not None and load.copy is not None and load.task is not None and location is not None:
            self.slow.late(load.task, Location(*location))

    def hurry(self, row: int) -> None:
        """Somebody waits for ``row`` now."""
        load = self._loads.get(row)
        if load is not None:
            load.urgency.rise(Priority.DEMAND)

    def leave(self, row: int, waiter: Waiter) -> None:
        """The waiter gives up: undo its hold if it was granted; cancel the load if nobody else wants it."""
        if waiter.done() and not waiter.cancelled():
            if waiter.exception() is None:
                self._catalog.release(waiter.result())
            return
        load = self._loads.get(row)
        if load is not None and (waiter in load.waiters or waiter in load.early):
            load.waiters.discard(waiter)
            load.early.discard(waiter)
            self._stop_if_unwanted(row, load)
        waiter.cancel()

    def _stop_if_unwanted(self, row: int, load: _Load) -> None:
        if not load.wanted and load.task is not None and self._loads.get(row) is load:
            load.task.cancel()
            del self._loads[row]  # a newcomer starts afresh, the cancelled task drains by itself

    def _start(self, row: int, urgency: Urgency, claim: Claim | None, *, layered: bool) -> _Load:
        load = self._loads[row] = _Load(self._catalog.index.block_id(row), urgency, claim, layered=layered)
        load.task = self._context.tasks.spawn(self._run(row, load), name=f"cascade-load-{row}")
        return load

    async def _run(self, row: int, load: _Load) -> None:
        """The load itself: never raises but on cancellation; the outcome goes to the waiters."""
        try:
            copy = await self._bring(row, load)
        except asyncio.CancelledError:
            self._settle(row, load, ClosedError("the store was closed while the block was being read"))
            raise
        except (CascadeError, OSError) as error:
            self._settle(row, load, error)
        except BaseException as error:
            # Nobody foresaw this: the task scope makes it the store's failure, and nobody is left waiting.
            self._settle(row, load, InternalError(f"reading a block failed: {error!r}; please report this"))
            raise
        else:
            self._settle(row, load, copy)

    def _settle(self, row: int, load: _Load, outcome: Copy | Exception) -> None:
        if self._loads.get(row) is load:
            del self._loads[row]
        for waiter in (*load.waiters, *load.early):
            if waiter.done():
                continue
            if isinstance(outcome, Copy):
                self._catalog.hold(outcome)
                waiter.set_result(outcome)
            else:
                waiter.set_exception(copied(outcome))  # each its own: tracebacks keep frames, frames keep arrays

    async def _bring(self, row: int, load: _Load) -> Copy:
        """The block in the arena. Whatever a read ends with counts only if the block is still where it was read."""
        context, catalog = self._context, self._catalog
        ask_ranks = context.sharing is not None and context.sharing.fetcher.serves
        while True:
            present = self._present(row, load)
            if present is not None:
                return present
            dormant = catalog.dormant.get(row)
            if dormant is not None:
                await rouse(context, dormant)
                continue
            if ask_ranks and context.sharing is not None:
                ask_ranks = False
                await context.sharing.fetcher.bring(load.block_id, load.urgency, load.claim)
                continue
            location = catalog.index.location(row)
            assert location is not None, "a row without a copy in the arena has one on disk"
            extent = await context.room.reserve(
                catalog.record_bytes(row, location[2]),
                demand=True,
                wait_s=context.config.put_wait_seconds_max,
                urgency=load.urgency,
                claim=load.claim,
            )
            if self._loads.get(row) is not load:  # while it waited the row may have become another block's
                context.shm.free(extent)
                context.room.freed()
                continue
            key_bytes, value_bytes = catalog.index.lengths(row)
            copy = Copy(
                extent,
                header_bytes=location[2] * PAGE_BYTES,
                digest=catalog.index.digest(row),
                key_bytes=key_bytes,
                value_bytes=value_bytes,
                value_offset=value_offset_of(key_bytes),
                chunk_crcs=(),
                meta=b"",
            )
            try:
                present = await self._read(row, load, copy, Location(*location))
            except BaseException as error:
                _end(copy, error)
                raise
            finally:
                load.copy = None
                copy.loading = None
                catalog.release(copy)
            if present is not None:
                return present

    async def _read(self, row: int, load: _Load, copy: Copy, location: Location) -> Copy | None:
        """Read ``copy``, held once for this. The copy that counts in the end; ``None`` if the record was moved."""
        catalog = self._catalog
        catalog.hold(copy)
        load.copy = copy
        copy.loading = functools.partial(self._stop_if_unwanted, row, load)
        failure = await self._attempt(load, copy, location)
        if isinstance(failure, CorruptionError) and copy.holds == 1:  # nobody looks at it yet: once more
            failure = await self._attempt(load, copy, location)
        present = self._present(row, load)
        if present is None and failure is None:
            copy.arrival = None
            copy.described = True
            catalog.admit(copy, row)
            return copy
        if present is None and isinstance(failure, BlockNotFoundError) and await self._looked_again(location.segment):
            present = self._present(row, load)
        if present is None and failure is not None and catalog.index.location(row) == tuple(location):
            raise self._judge(row, location.segment, failure)
        _end(copy, _not_found(load.block_id, "its record was moved while it was being read; get it again"))
        return present

    async def _attempt(self, load: _Load, copy: Copy, location: Location) -> CascadeError | OSError | None:
        """Read ``copy`` from there once; what has failed, if anything."""
        copy.arrival = Arrival(copy.extent.nbytes - copy.header_bytes, functools.partial(self._first_bytes, load, copy))
        copy.arrival.wait_s = self._context.config.read_seconds_max
        read = RecordRead(
            location,
            copy.extent.nbytes,
            copy.extent.memory,
            copy.digest,
            copy.key_bytes,
            copy.value_bytes,
            arrival=copy.arrival,
            layered=load.layered,
        )
        try:
            await self._context.disk.read(read, load.urgency)
        except (CascadeError, OSError) as error:
            return error
        return None

    async def _looked_again(self, segment: int) -> bool:
        """Another writer has removed the segment: it may have moved the block to a newer one, which is news to us."""
        entry = self._catalog.segments.get(segment)
        if entry is None or entry.own:
            return False
        try:
            await refresh(self._context)
        except OSError as error:  # then it is a miss
            logger.warning("other writers of %s could not be looked at: %s", self._context.config.root, error)
            return False
        return True

    def _first_bytes(self, load: _Load, copy: Copy, header: RecordHeader) -> None:
        """The header is verified, and with it the first chunks."""
        copy.chunk_crcs = header.chunk_crcs
        copy.meta = header.meta
        early, load.early = load.early, set()
        for waiter in early:
            if not waiter.done():
                self._catalog.hold(copy)
                waiter.set_result(copy)

    def _present(self, row: int, load: _Load) -> Copy | None:
        """The copy if the block was stored again meanwhile. Raises ``BlockNotFoundError`` if it is gone: then
        the row may be another block's by now."""
        if self._loads.get(row) is not load:
            raise _not_found(load.block_id, "it was deleted or evicted before it was read")
        return self._catalog.copies.get(row)

    def _judge(self, row: int, segment: int, failure: CascadeError | OSError) -> CascadeError | OSError:
        """What a failed read says about the block: damaged and vanished ones are forgotten, others tried again.

        In a segment that another writer has open, a record may be seen before all of its bytes are
        there: that is a miss, not damage.
        """
        if isinstance(failure, CorruptionError):
            entry = self._catalog.segments.get(segment)
            if entry is not None and not entry.own and not entry.sealed:
                failure = _not_found(self._catalog.index.block_id(row), "its writer has not finished it; recompute it")
            else:
                self._context.report_damage(failure)
        elif isinstance(failure, OSError):
            self._context.counters.read_errors += 1
        if isinstance(failure, CorruptionError | BlockNotFoundError):
            self._catalog.unplace(row)
        return failure

    def _forget(self, row: int) -> None:
        """The row is being removed: a load of it must not come back as another block."""
        self._loads.pop(row, None)


def _end(copy: Copy, error: BaseException) -> None:
    """The reading of ``copy`` is over: those who have a lease on its first bytes are told why no more come."""
    if copy.arrival is not None:
        if not isinstance(error, Exception):
            error = ClosedError("the store was closed while the block was being read")
        copy.arrival.fail(error)


def _not_found(name: object, why: str) -> BlockNotFoundError:
    return BlockNotFoundError(f"block {name} is not cached: {why}")
