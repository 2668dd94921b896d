"""One round of compaction: what is needed of some segments goes into a new one, then they go.

Live records are copied with all of their names (``segments.copying``), names of blocks that live
elsewhere and deletions that still matter (``TombstoneJudge``) follow as notes. The new segment is
sealed, that is durable, before the index names it, and the index names it before anything is unlinked.
So a crash at any point leaves the old files or the new one, never neither, and readers find one or the
other. What changes meanwhile is decided when the round ends: a block that was deleted, evicted or
written again stays where the index has it.

A damaged record is reported and stays in its file, which is marked and kept aside for ``repair``. A
segment that could not be read is left alone for ``UNREADABLE_SECONDS``.

What it must not know: which segments are worth it, and why.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import posixpath
from collections.abc import Iterator, Mapping, Sequence

from cascade_aio.errors import CorruptionError
from cascade_aio.model import BLOCK_ID_BYTES
from cascade_aio.segments import format as fmt
from cascade_aio.segments.active import DISCARD_SECONDS_MAX
from cascade_aio.segments.copying import Item, Pace, SegmentCopy, capacity_for
from cascade_aio.segments.facts import BindingFact, DamageFact, Location, TombstoneFact
from cascade_aio.segments.layout import Root, WriterClaim
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.context import StoreContext
from cascade_aio.store.tombstones import STEP_FACTS, TombstoneJudge

logger = logging.getLogger("cascade_aio.store")

UNREADABLE_SECONDS = 60.0
"""A segment whose notes or records could not be read is not looked at again for so long."""

STEP_BLOCKS = 64
"""Blocks looked at between two turns of the loop, some 10 µs each."""


STEP_ITEMS = 256
"""Records whose reads are planned at once, some 2 µs each."""


@dataclasses.dataclass(slots=True)
class Notes:
    """What segments say beside their blocks: names, also those in block records, and the newest tombstones."""

    bindings: list[BindingFact] = dataclasses.field(default_factory=list)
    tombstones: dict[bytes, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class CompactionCounters:
    """Since opening. ``written_bytes``: of new segments, headers and footers included."""

    rounds: int = 0
    failed_rounds: int = 0
    removed_segments: int = 0
    removed_bytes: int = 0
    copied_blocks: int = 0
    copied_bytes: int = 0
    written_bytes: int = 0
    rewritten_tombstones: int = 0
    rewritten_names: int = 0
    damaged_records: int = 0


class Compactor:
    """Compacts segments of one store. Owned by the space keeper, which runs one round at a time."""

    def __init__(self, context: StoreContext, root: Root, claim: WriterClaim, judge: TombstoneJudge) -> None:
        self._context = context
        self._root = root
        self._claim = claim
        self._judge = judge
        self._homes: dict[bytes, tuple[int, int]] = {}  # of a tombstone written here: stamp, segment number
        self._set_aside_until_s: dict[int, float] = {}
        self.output: SegmentEntry | None = None
        self.counters = CompactionCounters()

    def may_go(self, entry: SegmentEntry) -> bool:
        """Whether a segment can be compacted or removed, as far as is known."""
        if not entry.own or entry.writing or entry.unreadable or entry.damaged or entry.refused:
            return False
        until_s = self._set_aside_until_s.get(entry.number)
        return until_s is None or until_s <= self._context.loop.time()

    async def compact(self, victims: Sequence[SegmentEntry], capacity_max: int, pace: Pace) -> int:
        """Move what is needed of ``victims`` into one new segment of at most ``capacity_max`` and remove them.

        Those that do not fit, or could not be read, stay. Returns how many were removed. Raises ``OSError``
        (no new segment could be written: nothing has changed). May be cancelled at any point.
        """
        self.counters.rounds += 1
        try:
            chosen, items, names, tombstones = await self._plan(victims, capacity_max)
            if items or names or tombstones:
                await self._move(items, names, tombstones, pace)
        except OSError:
            self.counters.failed_rounds += 1
            raise
        return await self.remove([entry for entry in chosen if self.may_go(entry)])

    async def remove(self, entries: Sequence[SegmentEntry]) -> int:
        """Unlink segments in which nothing is needed any more, for good; those with a live block stay."""
        context = self._context
        removed = 0
        directories: set[str] = set()
        try:
            for entry in entries:
                if context.catalog.index.rows_in_segment(entry.number).size:
                    continue
                nbytes = entry.allocated_bytes
                directories.add(posixpath.dirname(entry.path))
                await context.disk.remove_segment(entry.number)
                self._set_aside_until_s.pop(entry.number, None)
                removed += 1
                self.counters.removed_segments += 1
                self.counters.removed_bytes += nbytes
        finally:
            if removed:
                context.disk.space_freed()
        for directory in directories:
            await context.platform.storage.sync_directory(directory)
        return removed

    # -- what is needed --------------------------------------------------------------------------

    async def read_notes(self, victim: SegmentEntry) -> Notes | None:
        """Its notes, none if somebody removed the file by hand; ``None`` if they cannot be read: it is set aside."""
        notes = Notes()
        facts = self._context.recovery.facts_of(victim.number)
        seen = 0
        try:
            with contextlib.suppress(FileNotFoundError):
                async with contextlib.aclosing(facts):  # type: ignore[type-var]
                    async for fact in facts:
                        seen += 1
                        if not seen % STEP_FACTS:
                            await asyncio.sleep(0)
                        if isinstance(fact, TombstoneFact):
                            notes.tombstones[fact.block_id] = max(fact.stamp, notes.tombstones.get(fact.block_id, 0))
                        elif isinstance(fact, BindingFact):
                            notes.bindings.append(fact)
                        elif isinstance(fact, DamageFact):
                            victim.damaged = True
        except (OSError, CorruptionError) as error:
            self._set_aside(victim, error)
            return None
        return None if victim.damaged else notes

    def _set_aside(self, victim: SegmentEntry, error: Exception) -> None:
        self._set_aside_until_s[victim.number] = self._context.loop.time() + UNREADABLE_SECONDS
        logger.warning("segment %s cannot be compacted for now: %s", victim.path, error)

    async def _plan(
        self, victims: Sequence[SegmentEntry], capacity_max: int
    ) -> tuple[list[SegmentEntry], list[Item], list[fmt.NoteBinding], dict[bytes, int]]:
        """Which victims go, and what of them has to be kept: records, names, tombstones."""
        chosen: list[SegmentEntry] = []
        items: list[Item] = []
        names: dict[tuple[bytes, bytes], fmt.NoteBinding] = {}
        tombstones: dict[bytes, int] = {}
        for victim in victims:
            notes = await self.read_notes(victim)
            if notes is None:
                continue
            more = await self._items(victim)
            more_names = await self._names(notes.bindings, more)
            counts = len(names) + len(more_names), len(tombstones) + len(notes.tombstones)
            if capacity_for([*items, *more], *counts) > capacity_max:
                if not chosen:
                    self._set_aside(victim, CorruptionError("what is needed of it fills more than a segment"))
                continue
            chosen.append(victim)
            items += more
            names |= more_names
            for block_id, stamp in notes.tombstones.items():
                tombstones[block_id] = max(stamp, tombstones.get(block_id, 0))
        return chosen, items, list(names.values()), await self._tombstones(tombstones, chosen)

    async def _items(self, victim: SegmentEntry) -> list[Item]:
        catalog = self._context.catalog
        index = catalog.index
        items: list[Item] = []
        for count, row in enumerate(index.rows_in_segment(victim.number).tolist()):
            if count and not count % STEP_BLOCKS:
                await asyncio.sleep(0)
            if not index.is_in_segment(row, victim.number):
                continue  # gone since
            location = index.location(row)
            assert location is not None, row
            names = tuple(fmt.Binding(*name) for name in index.bindings_newer_than(row, -1))
            nbytes = catalog.record_bytes(row, location[2])
            items.append(Item(Location(*location), nbytes, index.digest(row), *index.lengths(row), names))
        return items

    async def _names(
        self, bindings: Sequence[BindingFact], items: Sequence[Item]
    ) -> dict[tuple[bytes, bytes], fmt.NoteBinding]:
        """Names that no record of ``items`` brings along: of blocks that live elsewhere, or may live where nobody could
        look; and those that name another block, as long as that lasts."""
        index, live = self._context.catalog.index, self._context.merger.facts.is_live
        moved = {item.digest[:BLOCK_ID_BYTES] for item in items}
        blind = any(entry.unreadable or entry.refused for entry in self._context.disk.table)
        kept: dict[tuple[bytes, bytes], fmt.NoteBinding] = {}
        for count, fact in enumerate(bindings):
            if count and not count % STEP_FACTS:
                await asyncio.sleep(0)
            row = index.find(fact.block_id)
            if (not blind) if row < 0 else (fact.block_id in moved and index.find_prefix(fact.key) == row):
                continue
            if live(fact.block_id, fact.stamp):
                kept[fact.block_id, fact.key] = fmt.NoteBinding(fact.block_id, fact.key, fact.parent, fact.stamp)
        return kept

    async def _tombstones(self, found: Mapping[bytes, int], victims: Sequence[SegmentEntry]) -> dict[bytes, int]:
        """Deletions that still matter and are in no other segment of ours, as the newest known of their block."""
        table, facts = self._context.disk.table, self._context.merger.facts
        going = {entry.number for entry in victims}
        kept: dict[bytes, int] = {}
        for count, (block_id, stamp) in enumerate(found.items()):
            if count and not count % STEP_FACTS:
                await asyncio.sleep(0)
            if not self._judge.is_needed(block_id, stamp):
                continue
            at, home = self._homes.get(block_id, (-1, -1))
            if at < stamp or home in going or table.get(home) is None:
                kept[block_id] = facts.stamp_min(block_id) - 1
        return kept

    # -- the new segment -------------------------------------------------------------------------

    async def _move(
        self, items: list[Item], names: list[fmt.NoteBinding], tombstones: dict[bytes, int], pace: Pace
    ) -> None:
        copy = await self._create(capacity_for(items, len(names), len(tombstones)))
        try:
            for some in _by_segment(items):
                await copy.copy(some, pace)
            deletions = [fmt.Tombstone(block_id, stamp) for block_id, stamp in tombstones.items()]
            await copy.note(names, deletions, self._context.disk.stamp)
            if copy.records:
                await copy.seal()
            else:  # every record turned out to be damaged
                await self._discard(copy)
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):  # else it stays as if it could not be removed
                async with asyncio.timeout(DISCARD_SECONDS_MAX):
                    await self._discard(copy)
            raise
        except BaseException:
            await self._discard(copy)
            raise
        finally:
            self.output = None
            self.counters.written_bytes += copy.written_bytes
        for block_id, stamp in tombstones.items():
            self._homes[block_id] = (stamp, copy.entry.number)
        self.counters.rewritten_names += len(names)
        self.counters.rewritten_tombstones += len(tombstones)
        await self._commit(items)

    async def _create(self, capacity_bytes: int) -> SegmentCopy:
        context = self._context
        storage, table = context.platform.storage, context.disk.table
        identity = fmt.SegmentIdentity(self._claim.writer, await self._claim.take_sequence(storage))
        entry = self.output = table.add(identity, own=True)
        entry.writing = True
        entry.capacity_bytes = capacity_bytes
        try:
            return await SegmentCopy.create(
                storage, context.platform.engine, table, self._root, self._claim, context.disk.stamp(), entry
            )
        except BaseException:
            self.output = None
            await table.forget(entry.number)
            raise

    async def _discard(self, copy: SegmentCopy) -> None:
        try:
            await copy.discard()
        except OSError as error:  # it stays an unsealed segment of copies: the next round or opening removes it
            logger.warning("%s could not be removed: %s", copy.entry.path, error)
        else:
            await self._context.disk.table.forget(copy.entry.number)

    async def _commit(self, items: Sequence[Item]) -> None:
        """The copies are durable: the index names them from now on."""
        catalog = self._context.catalog
        index = catalog.index
        for count, item in enumerate(items):
            if count and not count % STEP_BLOCKS:
                await asyncio.sleep(0)
            row = index.find(item.digest[:BLOCK_ID_BYTES])
            if row < 0 or index.location(row) != tuple(item.location):
                continue  # deleted, evicted or written again meanwhile
            if isinstance(item.outcome, Location):
                catalog.place(row, item.outcome, index.stamp(row))
                self.counters.copied_blocks += 1
                self.counters.copied_bytes += item.record_bytes
            else:
                self._fail(row, item)

    def _fail(self, row: int, item: Item) -> None:
        """A record could not be copied: its segment stays."""
        context, error = self._context, item.outcome
        assert isinstance(error, Exception), item
        entry = context.disk.table.get(item.location.segment)
        if isinstance(error, CorruptionError):
            if entry is not None:
                entry.damaged = True
            self.counters.damaged_records += 1
            context.report_damage(error)
        elif not isinstance(error, FileNotFoundError):  # else somebody removed the file by hand
            if entry is not None:
                self._set_aside(entry, error)
            return
        copy = context.catalog.copies.get(row)
        if copy is not None and not context.closed:
            context.append_again(copy)
        else:
            context.catalog.unplace(row)

    def forget_needless(self) -> None:
        """Deletions were found needless: where they are is of no interest any more."""
        facts = self._context.merger.facts
        self._homes = {block_id: home for block_id, home in self._homes.items() if facts.stamp_min(block_id)}


def _by_segment(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Neighbours of one segment together, at most ``STEP_ITEMS``."""
    grouped: dict[int, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.location.segment, []).append(item)
    for some in grouped.values():
        some.sort(key=lambda item: item.location.page)
        for start in range(0, len(some), STEP_ITEMS):
            yield some[start : start + STEP_ITEMS]
