"""The disk budget: which blocks leave the disk, and how their bytes come back.

Segments are append-only, so space returns only by removing whole files. When this writer's segments
near ``disk_bytes``, the coldest blocks (by the disk tier's eviction policy, children before parents)
are forgotten until enough finished segments are mostly dead; what is still live in them is written
again if the arena has it, else forgotten too; notes that still matter are carried on (``NoteCarrier``).

A segment from which something was written again is *leaving*: it is unlinked only after a flush that
covers what was written, however many attempts that takes, and is emptied only once. So a crash at any
point leaves the old file or the new records, never neither. On a disk without room only segments go
from which nothing has to be written. A writer that is broken reclaims nothing, and a segment whose
notes cannot be read stays. Puts wait while the files are over the budget itself.
"""

from __future__ import annotations

import asyncio
import heapq
import logging

from cascade_aio.core.lifecycle import CopyState
from cascade_aio.errors import BrokenTierError, CorruptionError, TierFullError
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.context import StoreContext
from cascade_aio.store.notes import NoteCarrier, Notes

logger = logging.getLogger("cascade_aio.store")

SPARE_SEGMENTS = 2
"""Free segments the budget keeps: one being filled, one created ahead of time."""

DEAD_SHARE_MIN = 0.75
"""A segment is taken once this share of it is dead (or nothing more can be evicted)."""

_STEP_BLOCKS = 128
"""Blocks evicted between two turns of the loop."""

RETRY_SECONDS = 1.0
"""Pause after a reclaim that could not finish (disk full, nothing to remove yet)."""

UNREADABLE_SECONDS = 60.0
"""A segment whose notes could not be read is not looked at again for so long."""

_DISPOSABLE_LOOKS = 4
"""On a full disk so many of the emptiest segments are looked at, and so many of the oldest."""


class SpaceKeeper:
    """Runs as a background task of a store with ``disk_bytes``; without one it does nothing."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._needed = asyncio.Event()
        self._budget = context.config.disk_bytes
        self._notes = NoteCarrier(context)
        self._leaving: dict[int, SegmentEntry] = {}
        self._unreadable_until_s: dict[int, float] = {}
        self.reclaimed_segments = 0
        self.reclaimed_bytes = 0
        self.evicted_blocks = 0
        self.rewritten_blocks = 0
        context.disk.over_budget = self._holds_back

    @property
    def used_bytes(self) -> int:
        """What this writer's segments take on disk, preallocation included."""
        return sum(self._size(entry) for entry in self._context.disk.table if entry.own)

    def _size(self, entry: SegmentEntry) -> int:
        segment_bytes = self._context.config.segment_bytes
        return entry.size_bytes if entry.sealed else max(entry.size_bytes, segment_bytes)

    def over_budget(self) -> bool:
        """Whether the budget itself is exceeded and there is a segment that can be removed."""
        if self._budget is None or self.used_bytes <= self._budget:
            return False
        return bool(self._leaving or self._candidates())

    def _holds_back(self) -> bool:
        """Whether puts wait for space; whoever asks wakes the keeper: a segment may have ended since it looked."""
        over = self.over_budget()
        if over:
            self._needed.set()
        return over

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
            await self._wait()
            while self._excess_bytes() > 0 or self._leaving:
                try:
                    if not await self._reclaim():
                        break
                except (OSError, TierFullError, BrokenTierError, CorruptionError) as error:
                    logger.warning("space on %s could not be reclaimed now: %s", self._context.config.root, error)
                    await asyncio.sleep(RETRY_SECONDS)

    async def _wait(self) -> None:
        """Until there may be something to do: told so, or, while there is too much on disk, after a pause.

        Segments become removable when they are sealed, of which nobody tells.
        """
        pause_s = RETRY_SECONDS if self._excess_bytes() > 0 and not self._context.disk.writer.broken else None
        try:
            async with asyncio.timeout(pause_s):
                await self._needed.wait()
        except TimeoutError:
            return
        finally:
            self._needed.clear()

    async def _reclaim(self) -> bool:
        """Remove as many segments as the budget asks for; ``False`` if there is none to remove now."""
        writer = self._context.disk.writer
        if writer.broken:
            return False
        if writer.full:
            return await self._reclaim_on_full_disk()
        found = bool(self._leaving)
        while self._excess_after_leaving() > 0 and (victim := await self._next_victim()) is not None:
            found = await self._empty(victim) or found
        if self._leaving:
            await self._remove_leaving()
        return found

    def _excess_after_leaving(self) -> int:
        return self._excess_bytes() - sum(self._size(entry) for entry in self._leaving.values())

    async def _empty(self, victim: SegmentEntry) -> bool:
        """Take out of ``victim`` what is still needed, and remove it, now or after a flush; ``False`` if it stays."""
        try:
            notes = await self._notes.read(victim)
            may_drop = bool(notes.tombstones) and await self._notes.may_drop()
        except (OSError, CorruptionError) as error:
            self._set_aside(victim, error)
            return False
        # From here to the end of the block no await: what is decided is still true when it is done.
        rewritten, waits = self._rewrite_or_forget(victim)
        waits = self._notes.carry(victim, notes, rewritten, may_drop=may_drop) or waits
        if waits:
            self._leaving[victim.number] = victim
        else:
            await self._remove(victim)
        return True

    def _set_aside(self, victim: SegmentEntry, error: Exception) -> None:
        until_s = self._context.loop.time() + UNREADABLE_SECONDS
        self._unreadable_until_s[victim.number] = until_s
        logger.warning("segment %s cannot be removed for now, its notes are unreadable: %s", victim.name, error)

    async def _remove_leaving(self) -> None:
        """Unlink what was emptied, once what was written again is durable. Raises what flush raises."""
        leaving = list(self._leaving.values())
        await self._context.disk.flush()
        for victim in leaving:
            await self._remove(victim)

    async def _reclaim_on_full_disk(self) -> bool:
        """Nothing can be written: remove one segment that needs nothing written. ``False`` if there is none."""
        if self._excess_bytes() <= 0:
            raise TierFullError(f"{len(self._leaving)} segments wait until what was in them is written again")
        candidates = self._candidates()
        emptiest = heapq.nsmallest(_DISPOSABLE_LOOKS, candidates, key=_fullness)
        oldest = heapq.nsmallest(_DISPOSABLE_LOOKS, candidates, key=lambda entry: entry.identity.sequence)
        disposable = await self._notes.first_disposable(dict.fromkeys([*emptiest, *oldest]))
        if disposable is None:
            raise TierFullError("every segment holds deletions or names to be kept, for which there is no room")
        victim, notes = disposable
        self._forget_all(victim, notes)
        await self._remove(victim)
        return True

    def _forget_all(self, victim: SegmentEntry, notes: Notes) -> None:
        catalog = self._context.catalog
        for row in catalog.index.rows_in_segment(victim.number).tolist():
            catalog.unplace(row)
            self.evicted_blocks += 1
        self._notes.give_up(notes)

    async def _remove(self, victim: SegmentEntry) -> None:
        assert not self._context.catalog.index.rows_in_segment(victim.number).size, victim.name
        nbytes = self._size(victim)
        self._notes.removed(victim)
        await self._context.disk.remove_segment(victim.number)
        self._leaving.pop(victim.number, None)
        self._unreadable_until_s.pop(victim.number, None)
        self.reclaimed_segments += 1
        self.reclaimed_bytes += nbytes
        self._context.disk.space_freed()

    def _candidates(self) -> list[SegmentEntry]:
        """Finished segments of this writer that are not leaving and whose notes can be read, as far as is known."""
        now_s = self._context.loop.time()
        return [
            entry
            for entry in self._context.disk.table
            if entry.own
            and not entry.writing
            and not getattr(entry, "unreadable", False)
            and entry.number not in self._leaving
            and self._unreadable_until_s.get(entry.number, now_s) <= now_s
        ]

    async def _next_victim(self) -> SegmentEntry | None:
        """Forget the coldest blocks until a segment is mostly dead."""
        policy = self._context.catalog.disk_policy
        assert policy is not None
        steps = 0
        while True:
            victim = min(self._candidates(), key=_fullness, default=None)
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

    def _rewrite_or_forget(self, victim: SegmentEntry) -> tuple[set[bytes], bool]:
        """What is live in it leaves it: (the blocks written again, with all of their names; whether any is on
        its way to another segment)."""
        catalog = self._context.catalog
        rewritten: set[bytes] = set()
        waits = False
        for row in catalog.index.rows_in_segment(victim.number).tolist():
            copy = catalog.copies.get(row)
            catalog.unplace(row)
            if copy is None:
                self.evicted_blocks += 1
                continue
            waits = True
            if copy.state is CopyState.SEALED:  # else it is being written as it is
                self.rewritten_blocks += 1
                rewritten.add(copy.block_id)
                self._context.append_again(copy)
        return rewritten, waits

    def statistics(self) -> dict[str, object]:
        return {
            "budget_bytes": self._budget,
            "used_bytes": self.used_bytes,
            "reclaimed_segments": self.reclaimed_segments,
            "reclaimed_bytes": self.reclaimed_bytes,
            "evicted_blocks": self.evicted_blocks,
            "rewritten_blocks": self.rewritten_blocks,
            "rewritten_tombstones": self._notes.rewritten,
            "dropped_tombstones": self._notes.dropped,
        }


def _fullness(entry: SegmentEntry) -> tuple[int, int]:
    return entry.live_bytes, entry.number
