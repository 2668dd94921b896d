"""Space on disk: when segments are compacted, what is evicted, and who may create new ones.

Segments are append-only, so space returns only by removing whole files (``Compactor``). Three causes:

* *dead bytes*: what deletions, evictions and duplicates leave behind is compacted in the background,
  at ``compaction_bandwidth`` and in the lowest class of I/O, once it is worth it (``core.compaction``);
* *the budget*: files of this writer, preallocation included, never take more than ``disk_bytes``. Every
  new segment is asked for here (``SpaceGate``); one segment's worth is kept for compaction itself. Near
  the budget the coldest blocks are forgotten, by the disk tier's eviction policy and children before
  parents, until a segment is worth compacting; ahead of need at leisure, without pause and only from
  segments that are mostly dead when the writer waits;
* *a full disk*: with ``when_full="evict"`` it is met in the same way, else told to whoever flushes.

Where nothing can be copied (compaction is off, the disk has no room for the copy) what is still live in
a victim is evicted with it; its deletions are never given up while they matter. A root that was opened
over its budget comes down to it before anything is added. A writer that is broken reclaims nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from cascade_aio.config import format_size
from cascade_aio.core.compaction import (
    CHEAP_LIVE_SHARE,
    DEAD_SHARE_MAX,
    SegmentUse,
    choose_group,
    choose_victims,
    dead_share,
    is_due,
    is_worth_rewriting,
)
from cascade_aio.errors import BlockTooLargeError, CascadeError, TierFullError
from cascade_aio.segments.copying import Pace
from cascade_aio.segments.layout import Root, WriterClaim
from cascade_aio.segments.writer import DUE_SECONDS
from cascade_aio.store.compacting import STEP_BLOCKS, Compactor
from cascade_aio.store.context import StoreContext
from cascade_aio.store.tombstones import STEP_FACTS, TombstoneJudge

logger = logging.getLogger("cascade_aio.store")

POLL_SECONDS = 1.0
"""How often an idle keeper looks for dead bytes: nobody tells when a segment is sealed or a block dies."""

NEARLY_DUE_POLLS = 4
"""So many times as often when there are nearly enough dead bytes."""

NEARLY_DUE_SHARE = 0.8
"""Of the share of dead bytes at which compaction begins."""

RETRY_SECONDS = 5.0
"""Pause after compaction at leisure has failed."""

BURST_SECONDS = 0.1
"""Compaction may run ahead of its bandwidth by so much: one step is not cut in pieces."""

STEPS_PER_SEGMENT = 16
"""So much of a segment is evicted before another look whether that is enough."""

DROP_LOOKS_MAX = 8
"""Without room for a copy so many of the emptiest segments are looked at."""

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclasses.dataclass(frozen=True, slots=True)
class CompactionReport:
    """What one ``compact`` did. Bytes are of files; ``kept_aside``: segments left because of damage."""

    segments_before: int
    segments_after: int
    bytes_before: int
    bytes_after: int
    copied_blocks: int
    copied_bytes: int
    dropped_tombstones: int
    kept_aside: int

    @property
    def freed_bytes(self) -> int:
        return max(0, self.bytes_before - self.bytes_after)


@dataclasses.dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who needs a segment of ``nbytes``; ``removed``: segments removed when it began to wait."""

    nbytes: int
    disk_full: bool
    removed: int
    future: asyncio.Future[bool]


class SpaceKeeper:
    """A background task of every store, and the gate of its segment writer."""

    def __init__(self, context: StoreContext, root: Root, claim: WriterClaim) -> None:
        config = context.config
        self._context = context
        self._budget = config.disk_bytes
        self._bandwidth = config.compaction_bandwidth
        self._segment_bytes = config.segment_bytes
        self._judge = TombstoneJudge(context)
        self._compactor = Compactor(context, root, claim, self._judge)
        self._turn = asyncio.Lock()
        self._needed = asyncio.Event()
        self._hurry = asyncio.Event()  # somebody waits for space
        self._asked = asyncio.Event()  # or for the turn
        self._waiters: list[_Waiter] = []
        self._callers = 0  # who wait for their turn
        self._leisure_from_s = 0.0
        self._nearly_due = False
        self._ended = False
        self.may_evict = config.when_full == "evict"
        self.evicted_blocks = 0
        self.evicted_names = 0
        context.disk.writer.gate = self
        context.disk.check_record = self.check_record

    # -- the gate ----------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """What this writer's segments take on disk, preallocation included."""
        return sum(entry.allocated_bytes for entry in self._context.disk.table if entry.own)

    def admits(self, nbytes: int) -> bool:
        """Whether a segment of ``nbytes`` may be created now. Wakes the keeper if another one would not be."""
        if self._budget is not None and self._excess_bytes() + nbytes > 0:
            self._needed.set()
        return self._fits(nbytes)

    def _fits(self, nbytes: int) -> bool:
        return self._budget is None or self._excess_bytes() + nbytes <= self._segment_bytes

    async def make_room(self, nbytes: int, *, disk_full: bool) -> bool:
        """See ``SpaceGate``."""
        if self._ended or self._context.disk.writer.broken or (disk_full and not self.may_evict):
            return False
        removed = self._compactor.counters.removed_segments
        waiter = _Waiter(nbytes, disk_full, removed, self._context.loop.create_future())
        self._waiters.append(waiter)
        self._hurry.set()
        self._asked.set()
        self._needed.set()
        try:
            return await waiter.future
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            self._calm_down()

    def _calm_down(self) -> None:
        if not self._waiters:
            self._hurry.clear()
            if not self._callers:
                self._asked.clear()

    def ended(self) -> None:
        """See ``SpaceGate``."""
        self._needed.set()

    def check_record(self, nbytes: int) -> None:
        """Raises ``BlockTooLargeError`` for a record that can never be written within the budget."""
        limit = self._context.disk.writer.capacity_for(nbytes) + self._segment_bytes
        if self._budget is not None and limit > self._budget:
            raise BlockTooLargeError(
                f"a block that takes {format_size(nbytes)} on disk does not fit disk_bytes={format_size(self._budget)} "
                f"beside the {format_size(self._segment_bytes)} that compaction needs; open the store with more"
            )

    def _excess_bytes(self) -> int:
        """What is to be removed, so that the next segment can be created at once; 0 or less for nothing."""
        if self._budget is None:
            return 0
        output = self._compactor.output
        others = self.used_bytes - (0 if output is None else output.allocated_bytes)
        return others + 2 * self._segment_bytes - self._budget  # the next one, and one for compaction

    def _serve(self) -> None:
        """Answer those who have got what they waited for."""
        removed = self._compactor.counters.removed_segments
        for waiter in self._waiters:
            served = removed > waiter.removed if waiter.disk_full else self._fits(waiter.nbytes)
            if served and not waiter.future.done():
                waiter.future.set_result(True)

    @staticmethod
    def _refuse(waiters: Iterable[_Waiter]) -> None:
        """Nothing more can be done for these."""
        for waiter in waiters:
            if not waiter.future.done():
                waiter.future.set_result(False)

    # -- the background ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Reclaim whenever needed, until cancelled."""
        try:
            while True:
                await self._wait()
                asking: list[_Waiter] = []
                progress = True
                while progress:
                    asking = list(self._waiters)
                    progress = await self._stepped()
                    self._serve()
                if not self._context.disk.writer.ending:  # else there is more to look at in a moment
                    self._refuse(asking)
        finally:
            self._ended = True  # also of something nobody foresaw: who asks later is not left waiting
            self._refuse(self._waiters)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(POLL_SECONDS / (NEARLY_DUE_POLLS if self._nearly_due else 1)):
                await self._needed.wait()
        except TimeoutError:
            return
        finally:
            self._needed.clear()

    async def _stepped(self) -> bool:
        """One step; ``False`` if there is none to do, or it failed."""
        try:
            async with self._turn:
                return await self._step()
        except (OSError, CascadeError) as error:
            logger.warning("space on %s could not be reclaimed now: %s", self._context.config.root, error)
            self._leisure_from_s = self._context.loop.time() + RETRY_SECONDS
            return False

    async def _step(self) -> bool:
        if self._context.disk.writer.broken:
            return False
        self._judge.settled_stamp()
        waiting = [waiter for waiter in self._waiters if not waiter.future.done()]
        if waiting or self._excess_bytes() > 0:
            return await self._reclaim(hurry=bool(waiting))
        if not self._bandwidth or self._context.closed or self._context.loop.time() < self._leisure_from_s:
            return False
        uses = self._uses()
        self._nearly_due = dead_share(uses) > NEARLY_DUE_SHARE * DEAD_SHARE_MAX
        if is_due(uses, self._segment_bytes):
            return await self._round(uses, self._pacer(self._bandwidth))
        if self._judge.is_due and await self._judge.look(stop=self._asked.is_set):
            self._compactor.forget_needless()
        return False

    def _uses(self) -> list[SegmentUse]:
        """Segments that may be compacted now."""
        now = self._context.disk.clock.last
        return [
            SegmentUse(
                entry.number,
                entry.record_bytes if entry.sealed else entry.allocated_bytes,
                entry.live_bytes + entry.kept_bytes,
                max(0, now - entry.newest_stamp) / 1e9,
            )
            for entry in self._context.disk.table
            if self._compactor.may_go(entry)
        ]

    async def _round(self, uses: Sequence[SegmentUse], pace: Pace) -> bool:
        """Compact the best of ``uses``; whether anything has changed. Raises ``OSError``."""
        numbers = choose_victims(
            uses,
            output_bytes_max=self._segment_bytes,
            need_bytes=self._segment_bytes // 2,
            segment_bytes=self._segment_bytes,
        )
        victims = [self._context.disk.table[number] for number in numbers]
        if not victims:
            return False
        removed = await self._compactor.compact(victims, self._segment_bytes, pace)
        return removed > 0 or not all(self._compactor.may_go(victim) for victim in victims)

    def _pacer(self, bandwidth: int | None, moved: Callable[[int], None] | None = None) -> Pace:
        """Keeps to ``bandwidth`` (bytes per second, ``None``: as it comes), unless somebody waits for the space, or,
        in the background (without ``moved``), for the turn."""
        loop, hurry = self._context.loop, self._asked if moved is None else self._hurry
        paid_until_s = 0.0

        async def pace(nbytes: int) -> None:
            """See ``Pace``."""
            nonlocal paid_until_s
            if moved is not None:
                moved(nbytes)
            if not bandwidth or hurry.is_set():
                await asyncio.sleep(0)
                return
            paid_until_s = max(paid_until_s, loop.time() - BURST_SECONDS) + nbytes / bandwidth
            delay_s = paid_until_s - loop.time()
            if delay_s <= DUE_SECONDS:
                await asyncio.sleep(0)
                return
            try:
                async with asyncio.timeout(delay_s):
                    await hurry.wait()
            except TimeoutError:
                return

        return pace

    # -- the budget, and a full disk -----------------------------------------------------------------

    async def _reclaim(self, *, hurry: bool) -> bool:
        """Make some room; ``False`` if there is none to be made."""
        uses = await self._worthwhile(cheap_only=hurry or not self._bandwidth)
        if not self._bandwidth and uses:  # nothing is copied but what must not be lost
            emptiest = min(uses, key=_fullness).number
            await self._evict(emptiest)
            uses = [use for use in self._uses() if use.number == emptiest]
        try:
            return await self._round(uses, self._pacer(None if hurry else self._bandwidth))
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            return await self._drop(uses)

    async def _worthwhile(self, *, cheap_only: bool) -> list[SegmentUse]:
        """Forget the coldest blocks until some segments are worth compacting, or nothing can be forgotten."""
        catalog = self._context.catalog
        policy = catalog.disk_policy
        while True:
            uses = self._uses()
            if not uses:
                return uses
            cheap = [use for use in uses if use.live_bytes <= CHEAP_LIVE_SHARE * use.size_bytes]
            if cheap:
                return cheap
            if not cheap_only and dead_share(uses) > DEAD_SHARE_MAX:
                return uses
            budget = self._segment_bytes // STEPS_PER_SEGMENT
            for _ in range(STEP_BLOCKS):
                row = None if policy is None else policy.victim()
                if row is None:
                    return self._uses()
                budget -= catalog.stored_bytes(row)
                self.evicted_blocks += 1
                catalog.unplace(row)
                if budget <= 0:
                    break
            await asyncio.sleep(0)

    async def _drop(self, uses: Sequence[SegmentUse]) -> bool:
        """Remove one of the emptiest segments with all that is live in it, for want of room to copy anything.

        Its deletions must be of no use to any other segment.
        """
        index, facts = self._context.catalog.index, self._context.merger.facts
        for use in sorted(uses, key=_fullness)[:DROP_LOOKS_MAX]:
            entry = self._context.disk.table.get(use.number)
            if entry is None:
                continue  # what found no room was the sync after its removal
            notes = await self._compactor.read_notes(entry)
            if notes is None:
                continue
            needed = {
                block_id: facts.stamp_min(block_id) - 1
                for block_id, stamp in notes.tombstones.items()
                if self._judge.is_needed(block_id, stamp)
            }
            if needed and await self._judge.needless(needed, beside=entry) != needed:
                continue
            for count, fact in enumerate(notes.bindings, 1):
                if not count % STEP_FACTS:
                    await asyncio.sleep(0)
                row = index.find(fact.block_id)
                if row >= 0 and index.find_prefix(fact.key) == row:
                    index.unbind(fact.key)
                    self._context.catalog.names.freed([fact.key])
                    self.evicted_names += not index.is_in_segment(row, entry.number)
            await self._evict(entry.number)
            if await self._compactor.remove([entry]):
                await self._judge.forget(needed)
                return True
        return False

    async def _evict(self, segment: int) -> None:
        """Forget what is on disk in this segment only."""
        catalog = self._context.catalog
        for count, row in enumerate(catalog.index.rows_in_segment(segment).tolist(), 1):
            if not count % STEP_BLOCKS:
                await asyncio.sleep(0)
            if catalog.index.is_in_segment(row, segment):
                self.evicted_blocks += 1
                catalog.unplace(row)

    # -- on demand -----------------------------------------------------------------------------------

    async def compact(
        self, on_progress: Callable[[int, int], None] | None = None, *, bandwidth: int | None = None
    ) -> CompactionReport:
        """See ``Store.compact``."""
        context = self._context
        with contextlib.suppress(TierFullError):  # then space is what is needed most
            await context.disk.flush()
        await context.disk.writer.rotate()
        counters = self._compactor.counters
        before = [entry for entry in context.disk.table if entry.own]
        bytes_before = sum(entry.allocated_bytes for entry in before)
        copied = counters.copied_blocks, counters.copied_bytes
        dropped = await self._look_at_deletions()
        await self._compact_all(on_progress, bandwidth)
        dropped += await self._look_at_deletions()  # of what was removed just now
        after = [entry for entry in context.disk.table if entry.own]
        return CompactionReport(
            segments_before=len(before),
            segments_after=len(after),
            bytes_before=bytes_before,
            bytes_after=sum(entry.allocated_bytes for entry in after),
            copied_blocks=counters.copied_blocks - copied[0],
            copied_bytes=counters.copied_bytes - copied[1],
            dropped_tombstones=dropped,
            kept_aside=sum(entry.damaged or entry.unreadable for entry in after),
        )

    @contextlib.asynccontextmanager
    async def _next_turn(self) -> AsyncIterator[None]:
        """The turn, soon: what is done at leisure in the background goes on without pauses, or is given up."""
        self._callers += 1
        self._asked.set()
        try:
            await self._turn.acquire()
        finally:
            self._callers -= 1
            self._calm_down()
        try:
            yield
        finally:
            self._turn.release()

    async def _look_at_deletions(self) -> int:
        async with self._next_turn():
            for _ in range(2):  # the first closes an older mark
                self._judge.settled_stamp()
            dropped = await self._judge.look() if len(self._context.merger.facts) else 0
            self._compactor.forget_needless()
            return dropped

    async def _compact_all(self, on_progress: Callable[[int, int], None] | None, bandwidth: int | None) -> None:
        """Every segment there is now once, in groups that fill a new one. What is copied meanwhile is left alone."""
        table = self._context.disk.table
        uses = self._uses()
        todo = {use.number for use in uses}
        total = sum(use.size_bytes for use in uses)
        done = moved = 0

        def add(nbytes: int) -> None:
            nonlocal moved
            moved += nbytes
            if on_progress is not None:
                on_progress(min(done + moved, total), total)

        while group := choose_group([use for use in self._uses() if use.number in todo], self._segment_bytes):
            async with self._next_turn():
                todo.difference_update(use.number for use in group)
                victims = [entry for use in group if (entry := table.get(use.number)) is not None]
                if is_worth_rewriting(group, self._segment_bytes):
                    try:
                        await self._compactor.compact(victims, self._segment_bytes, self._pacer(bandwidth, add))
                    except OSError as error:
                        if error.errno not in _NO_SPACE:
                            raise
                        raise TierFullError(
                            f"{self._context.config.root} has no room for a copy of what is live; nothing is lost: "
                            f"free up to {format_size(self._segment_bytes)} there, or set disk_bytes, and compact again"
                        ) from error
            done, moved = done + sum(use.size_bytes for use in group), 0
            add(0)

    def statistics(self) -> dict[str, object]:
        """Sizes, counts and write amplification, JSON-ready."""
        context = self._context
        own = [entry for entry in context.disk.table if entry.own]
        counters, writer, put = self._compactor.counters, context.disk.writer.statistics, context.counters
        fresh = put.put_bytes - put.deduplicated_bytes
        written = writer.written_bytes + writer.footer_bytes + counters.written_bytes
        return {
            "budget_bytes": self._budget,
            "used_bytes": sum(entry.allocated_bytes for entry in own),
            "dead_bytes": sum(entry.record_bytes - entry.live_bytes for entry in own),
            "kept_aside_bytes": sum(entry.allocated_bytes for entry in own if entry.damaged),
            "unreadable_bytes": sum(entry.allocated_bytes for entry in own if entry.unreadable),
            "write_amplification": round(written / fresh, 3) if fresh else None,
            "reclaimed_segments": counters.removed_segments,
            "reclaimed_bytes": counters.removed_bytes,
            "evicted_blocks": self.evicted_blocks,
            "evicted_names": self.evicted_names,  # of blocks that stay
            "rewritten_blocks": counters.copied_blocks,
            "rewritten_tombstones": counters.rewritten_tombstones,
            "dropped_tombstones": self._judge.dropped,
            "compaction": dataclasses.asdict(counters),
        }


def _fullness(use: SegmentUse) -> tuple[int, int]:
    return use.live_bytes, use.number
