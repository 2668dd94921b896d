"""The disk budget: which blocks leave the disk, and how their bytes come back.

Segments are append-only, so space returns only by removing whole files. When this writer's segments
near ``disk_bytes``, the coldest blocks (by the disk tier's eviction policy, children before parents)
are forgotten until enough finished segments are mostly dead; what is still live in them is written
again if the arena has it, else forgotten too; notes that still matter are written again; then, after
one flush for all that was written again, the files are unlinked. A crash at any point leaves the old
file or the new records, never neither. Without anything to write again there is no flush, so a disk
that is full can be emptied. Puts wait while the files are over the budget itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from cascade_aio.errors import BrokenTierError, TierFullError
from cascade_aio.segments.facts import BindingFact, TombstoneFact
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.context import StoreContext

logger = logging.getLogger("cascade_aio.store")

SPARE_SEGMENTS = 2
"""Free segments the budget keeps: one being filled, one created ahead of time."""

DEAD_SHARE_MIN = 0.75
"""A segment is taken once this share of it is dead (or nothing more can be evicted)."""

_STEP_BLOCKS = 128
"""Blocks evicted between two turns of the loop."""

RETRY_SECONDS = 1.0
"""Pause after a reclaim that could not finish (disk full or broken)."""


class SpaceKeeper:
    """Runs as a background task of a store with ``disk_bytes``; without one it does nothing."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._needed = asyncio.Event()
        self._budget = context.config.disk_bytes
        self.reclaimed_segments = 0
        self.reclaimed_bytes = 0
        self.evicted_blocks = 0
        self.rewritten_blocks = 0
        context.disk.over_budget = self.over_budget

    @property
    def used_bytes(self) -> int:
        """What this writer's segments take on disk, preallocation included."""
        return sum(self._size(entry) for entry in self._context.disk.table if entry.own)

    def _size(self, entry: SegmentEntry) -> int:
        segment_bytes = self._context.config.segment_bytes
        return entry.size_bytes if entry.sealed else max(entry.size_bytes, segment_bytes)

    def over_budget(self) -> bool:
        """Whether the budget itself is exceeded and there is a segment that can be removed."""
        return self._budget is not None and self.used_bytes > self._budget and self._emptiest(()) is not None

    def check(self) -> None:
        """The writer has grown: wake the keeper if the budget is near. Cheap."""
        if self._excess_bytes() > 0:
            self._needed.set()

    def _excess_bytes(self) -> int:
        """What is to be removed, so that the spare segments are free again; 0 or less for nothing."""
        if self._budget is None:
            return 0
        return self.used_bytes + SPARE_SEGMENTS * self._context.config.segment_bytes - self._budget

    async def run(self) -> None:
        """Reclaim whenever needed, until cancelled."""
        while True:
            await self._needed.wait()
            self._needed.clear()
            while self._excess_bytes() > 0:
                try:
                    if not await self._reclaim():
                        break
                except (OSError, TierFullError, BrokenTierError) as error:
                    logger.warning("space on %s could not be reclaimed now: %s", self._context.config.root, error)
                    await asyncio.sleep(RETRY_SECONDS)

    async def _reclaim(self) -> bool:
        """Remove as many segments as the budget asks for; ``False`` if there is none to remove."""
        rewritten: list[SegmentEntry] = []
        found = False
        excess_bytes = self._excess_bytes()
        while excess_bytes > 0 and (victim := await self._next_victim(rewritten)) is not None:
            found = True
            excess_bytes -= self._size(victim)
            count = self._rewrite_or_forget(victim)
            with contextlib.suppress(FileNotFoundError):  # somebody removed it by hand: nothing to rescue
                count += await self._rewrite_notes(victim)
            if count:
                rewritten.append(victim)
            else:
                await self._remove(victim)
        if rewritten:
            await self._context.disk.flush()
            for victim in rewritten:
                await self._remove(victim)
        return found

    async def _remove(self, victim: SegmentEntry) -> None:
        assert not self._context.catalog.index.rows_in_segment(victim.number).size, victim.name
        nbytes = self._size(victim)
        await self._context.disk.remove_segment(victim.number)
        self.reclaimed_segments += 1
        self.reclaimed_bytes += nbytes
        self._context.disk.space_freed()

    def _emptiest(self, taken: Sequence[SegmentEntry]) -> SegmentEntry | None:
        """The finished segment with the least in it."""
        candidates = [
            entry for entry in self._context.disk.table if entry.own and not entry.writing and entry not in taken
        ]
        return min(candidates, key=lambda entry: (entry.live_bytes, entry.number), default=None)

    async def _next_victim(self, taken: Sequence[SegmentEntry]) -> SegmentEntry | None:
        """Forget the coldest blocks until a segment is mostly dead."""
        policy = self._context.catalog.disk_policy
        assert policy is not None
        steps = 0
        while True:
            victim = self._emptiest(taken)
            if victim is None or victim.live_bytes <= (1 - DEAD_SHARE_MIN) * victim.record_bytes:
                return victim
            row = policy.victim()
            if row is None:
                return victim
            self.evicted_blocks += 1
            self._context.catalog.unplace(row)
            steps += 1
            if steps % _STEP_BLOCKS == 0:
                await asyncio.sleep(0)

    def _rewrite_or_forget(self, victim: SegmentEntry) -> int:
        """What is live in it leaves it; returns how many blocks are on their way to another segment.

        A disk without room takes none of them: then all are forgotten, and room appears.
        """
        catalog = self._context.catalog
        writable = not self._context.disk.writer.full
        before = self.rewritten_blocks
        for row in catalog.index.rows_in_segment(victim.number).tolist():
            copy = catalog.copies.get(row)
            catalog.unplace(row)
            if writable and copy is not None:
                self.rewritten_blocks += 1
                self._context.append_again(copy)
            else:
                self.evicted_blocks += 1
        return self.rewritten_blocks - before

    async def _rewrite_notes(self, victim: SegmentEntry) -> int:
        """Bindings of blocks that live elsewhere, and tombstones, outlive their segment; returns how many."""
        context = self._context
        index = context.catalog.index
        count = 0
        facts = context.recovery.facts_of(victim.number)
        async with contextlib.aclosing(facts):  # type: ignore[type-var]
            async for fact in facts:
                if isinstance(fact, TombstoneFact):
                    context.disk.append_tombstone(fact.block_id, fact.stamp)
                    count += 1
                elif isinstance(fact, BindingFact):
                    row = index.find(fact.block_id)
                    if row >= 0 and index.find_prefix(fact.key) == row:
                        context.disk.append_binding(fact.block_id, fact.key, fact.parent, fact.stamp)
                        count += 1
        return count

    def statistics(self) -> dict[str, object]:
        return {
            "budget_bytes": self._budget,
            "used_bytes": self.used_bytes,
            "reclaimed_segments": self.reclaimed_segments,
            "reclaimed_bytes": self.reclaimed_bytes,
            "evicted_blocks": self.evicted_blocks,
            "rewritten_blocks": self.rewritten_blocks,
        }
