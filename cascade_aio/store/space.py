"""The disk budget: which blocks leave the disk, and how their bytes come back.

Segments are append-only, so space returns only by removing whole files. When this writer's segments
near ``disk_bytes``, the coldest blocks (by the disk tier's eviction policy, children before parents)
are forgotten until one sealed segment is mostly dead; what is still live in it is written again if
the arena has it, else forgotten too; notes that still matter are written again; then, after a flush,
the file is unlinked. A crash at any point leaves the old file or the new records, never neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

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

    @property
    def used_bytes(self) -> int:
        """What this writer's segments take on disk, preallocation included."""
        segment_bytes = self._context.config.segment_bytes
        return sum(
            entry.size_bytes if entry.sealed else max(entry.size_bytes, segment_bytes)
            for entry in self._context.disk.table
            if entry.own
        )

    def check(self) -> None:
        """The writer has grown: wake the keeper if the budget is near. Cheap."""
        if self._over():
            self._needed.set()

    def _over(self) -> bool:
        if self._budget is None:
            return False
        return self.used_bytes + SPARE_SEGMENTS * self._context.config.segment_bytes > self._budget

    async def run(self) -> None:
        """Reclaim whenever needed, until cancelled."""
        while True:
            await self._needed.wait()
            self._needed.clear()
            while self._over():
                try:
                    if not await self._reclaim_one():
                        break
                except (OSError, TierFullError, BrokenTierError) as error:
                    logger.warning("space on %s could not be reclaimed now: %s", self._context.config.root, error)
                    await asyncio.sleep(RETRY_SECONDS)

    async def _reclaim_one(self) -> bool:
        """Free one segment; False if there is none to free."""
        await self._evict_until_mostly_dead()
        victim = self._emptiest()
        if victim is None:
            return False
        self._rewrite_or_forget(victim)
        await self._rewrite_notes(victim)
        await self._context.disk.flush()
        if self._context.catalog.index.rows_in_segment(victim.number).size:
            return True  # something was placed there meanwhile (another writer's copy came first): look again
        nbytes = victim.size_bytes
        await self._context.disk.remove_segment(victim.number)
        self.reclaimed_segments += 1
        self.reclaimed_bytes += nbytes
        self._context.disk.space_freed()
        return True

    def _candidates(self) -> list[SegmentEntry]:
        return [entry for entry in self._context.disk.table if entry.own and entry.sealed]

    def _emptiest(self) -> SegmentEntry | None:
        return min(self._candidates(), key=lambda entry: (entry.live_bytes, entry.number), default=None)

    async def _evict_until_mostly_dead(self) -> None:
        policy = self._context.catalog.disk_policy
        assert policy is not None
        steps = 0
        while True:
            victim = self._emptiest()
            if victim is None or victim.live_bytes <= (1 - DEAD_SHARE_MIN) * victim.record_bytes:
                return
            row = policy.victim()
            if row is None:
                return
            self.evicted_blocks += 1
            self._context.catalog.unplace(row)
            steps += 1
            if steps % _STEP_BLOCKS == 0:
                await asyncio.sleep(0)

    def _rewrite_or_forget(self, victim: SegmentEntry) -> None:
        catalog = self._context.catalog
        for row in catalog.index.rows_in_segment(victim.number).tolist():
            copy = catalog.copies.get(row)
            catalog.unplace(row)
            if copy is not None and copy.row >= 0:
                self.rewritten_blocks += 1
                self._context.append_again(copy)
            else:
                self.evicted_blocks += 1

    async def _rewrite_notes(self, victim: SegmentEntry) -> None:
        """Bindings of blocks that live elsewhere, and tombstones, outlive their segment."""
        context = self._context
        index = context.catalog.index
        async with contextlib.aclosing(context.recovery.facts_of(victim.number)) as facts:  # type: ignore[type-var]
            async for fact in facts:
                if isinstance(fact, TombstoneFact):
                    context.disk.append_tombstone(fact.block_id, fact.stamp)
                elif isinstance(fact, BindingFact):
                    row = index.find(fact.block_id)
                    if row >= 0 and index.find_prefix(fact.key) == row:
                        context.append_binding(fact.block_id, fact.key, fact.parent)

    def statistics(self) -> dict[str, object]:
        return {
            "budget_bytes": self._budget,
            "used_bytes": self.used_bytes,
            "reclaimed_segments": self.reclaimed_segments,
            "reclaimed_bytes": self.reclaimed_bytes,
            "evicted_blocks": self.evicted_blocks,
            "rewritten_blocks": self.rewritten_blocks,
        }
