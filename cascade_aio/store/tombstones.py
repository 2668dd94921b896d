"""Which deletions still matter: a tombstone may go when nothing older than it is left to come back.

The rule. A tombstone is needed while any segment of any writer holds a record or a name of its block
that is not newer. Nobody remembers where dead records lie, so it is found by looking: every segment of
the root is asked for what it says about the deleted blocks. The look proves nothing unless

* everything that this store appended before the deletion is durable, so that it is seen;
* the list of segments is the same before and after, so that nothing was on its way from one to another
  (compaction unlinks only after the new segment is complete), and what was unlinked is synced;
* all of it could be read;
* another writer, if there is one, has had ``OTHERS_SECONDS`` to write what it had before the deletion.
  What it writes later counts as put later.

Looking costs a footer per segment, so it is done when the deletions known have doubled since the last
look, and on request. A tombstone that is not needed is forgotten here; compaction then leaves it
behind. One whose block another writer has deleted too is kept: that writer's tombstone stays on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
from collections.abc import Callable, Mapping

from cascade_aio.errors import CorruptionError
from cascade_aio.segments.facts import BindingFact, BlockFact, TombstoneFact
from cascade_aio.segments.layout import list_segments
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.context import StoreContext

LOOK_TOMBSTONES_MIN = 4096
"""Fewer deletions are not worth a look: they take 24 bytes each on disk."""

OTHERS_SECONDS = 60.0
"""What another writer put before a deletion is on disk by then, or counts as put after it."""

STEP_FACTS = 256
"""Facts taken in between two turns of the loop: well below a millisecond."""


class TombstoneJudge:
    """Finds needless deletions of one store. Run by the space keeper, one look at a time."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._looked_at = 0
        self._settled_stamp = -1
        self._mark = (0, context.disk.clock.last)
        context.on_adopted = self.begin_anew
        self.looks = 0
        self.dropped = 0

    def is_needed(self, block_id: bytes, stamp: int) -> bool:
        """Whether a tombstone found in a segment still has to be kept."""
        return self._context.merger.facts.stamp_min(block_id) > stamp

    def begin_anew(self) -> None:
        """Deletions were learnt that may be older than what waits to be written."""
        self._settled_stamp = -1
        self._mark = (self._context.disk.writer.last_ticket, self._context.disk.clock.last)

    def settled_stamp(self) -> int:
        """Everything that was appended before this stamp was made is durable. To be asked now and then."""
        writer = self._context.disk.writer
        ticket, stamp = self._mark
        if writer.settled_ticket >= ticket:
            self._settled_stamp = stamp
            self._mark = (writer.last_ticket, self._context.disk.clock.last)
        return self._settled_stamp

    @property
    def is_due(self) -> bool:
        """Whether there are so many more deletions that it is time to look."""
        return len(self._context.merger.facts) >= max(LOOK_TOMBSTONES_MIN, 2 * self._looked_at)

    async def look(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Forget the deletions that nothing needs; how many. 0 if the look proved nothing, or ``stop()`` said so.

        Raises ``OSError`` if the root cannot be listed.
        """
        facts = self._context.merger.facts
        self._looked_at = len(facts)
        needless = await self.needless(facts.tombstones(), stop=stop)
        await self.forget(needless)
        self._looked_at = len(facts)
        return len(needless)

    async def needless(
        self,
        stamps: Mapping[bytes, int],
        *,
        beside: SegmentEntry | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[bytes, int]:
        """Which of these deletions nothing needs but what is in ``beside`` itself; none if the look proved nothing.

        Raises ``OSError`` if the root cannot be listed.
        """
        self.looks += 1
        candidates = await self._old_enough(stamps, self.settled_stamp(), await self._context.is_alone())
        before = await self._segments() if candidates else None
        if before is None:
            return {}
        for entry in self._context.disk.table:
            if entry is not beside and (not candidates or stop() or not await self._strike(entry, candidates)):
                return {}
        return {} if stop() or await self._segments() != before else candidates

    async def forget(self, needless: Mapping[bytes, int]) -> None:
        """Nothing is left that these deletions delete. One that is newer by now stays."""
        for count, (block_id, stamp) in enumerate(needless.items(), 1):
            if not count % STEP_FACTS:
                await asyncio.sleep(0)
            self._context.merger.facts.forget(block_id, stamp)
            self.dropped += 1

    async def _old_enough(self, stamps: Mapping[bytes, int], newest: int, alone: bool) -> dict[bytes, int]:
        """Those up to ``newest``; it is one of our clock's, so that whatever is put later is newer still."""
        context = self._context
        if not alone:
            newest = min(newest, context.platform.clock.wall_ns() - int(OTHERS_SECONDS * 1e9))
        found: dict[bytes, int] = {}
        for count, (block_id, stamp) in enumerate(stamps.items(), 1):
            if not count % STEP_FACTS:
                await asyncio.sleep(0)
            if stamp <= newest:
                found[block_id] = stamp
        return found

    async def _segments(self) -> set[tuple[str, int]] | None:
        """All segments that are there, ``None`` unless they are those that the table knows.

        Directories are synced first: what was unlinked in them does not come back.
        """
        storage, table = self._context.platform.storage, self._context.disk.table
        writers = posixpath.join(table.root, "writers")
        found: set[tuple[str, int]] = set()
        for directory in await storage.list_directory(writers):
            if directory.is_dir:
                path = posixpath.join(writers, directory.name)
                try:
                    await storage.sync_directory(path)
                    entries = await storage.list_directory(path)
                except FileNotFoundError:
                    return None
                found |= {(directory.name, sequence) for sequence, _ in list_segments(entries)}
        known = {(entry.identity.writer.hex(), entry.identity.sequence) for entry in table}
        return found if found == known else None

    async def _strike(self, entry: SegmentEntry, candidates: dict[bytes, int]) -> bool:
        """Strike out what this segment still needs; ``False`` if not all of it could be read."""
        if entry.unreadable:
            return False
        facts = self._context.recovery.facts_of(entry.number, search_bytes=0 if entry.writing else None)
        seen = 0
        try:
            async with contextlib.aclosing(facts):  # type: ignore[type-var]
                async for fact in facts:
                    seen += 1
                    if not seen % STEP_FACTS:
                        await asyncio.sleep(0)
                    if isinstance(fact, BlockFact | BindingFact):
                        if candidates.get(fact.block_id, -1) >= fact.stamp:
                            del candidates[fact.block_id]
                    elif isinstance(fact, TombstoneFact) and not entry.own:
                        candidates.pop(fact.block_id, None)
        except (OSError, CorruptionError):
            return False
        return True
