"""What a segment says beside its blocks, and what of it must outlive the segment.

Names of blocks that live elsewhere are written again. A tombstone is needed as long as some segment may
hold an older record or name of its block. Which ones those are nobody remembers, so this is decided by
order: once everything that was appended before a deletion is durable, what it deletes lies in segments
that exist by then (its *horizon*). Until the last of them is gone the tombstone is carried along, once
per block, as the newest known of the block; then it is dropped. Deletions reach across writers, and of
other writers nothing is known for sure: beside another writer's directory nothing is dropped.

What it must not know: which segments go, and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
from collections.abc import Iterable

from cascade_aio.segments.facts import BindingFact, BlockFact, TombstoneFact
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.context import StoreContext


@dataclasses.dataclass(slots=True)
class Notes:
    """Of one segment: its names, also those in block records, and the newest tombstone of each block."""

    bindings: list[BindingFact] = dataclasses.field(default_factory=list)
    tombstones: dict[bytes, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class _Carried:
    """A tombstone that was written again, to a segment numbered ``floor`` or higher. ``horizon``: the highest
    sequence number among the segments that may hold what it deletes, ``None`` for not known yet."""

    stamp: int
    floor: int
    horizon: int | None


class NoteCarrier:
    """Carries notes out of segments that are about to be removed. Owned by the space keeper."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._carried: dict[bytes, _Carried] = {}
        self._opened_stamp = context.disk.settled_stamp = context.disk.clock.last
        self._opened_sequence = self._last_sequence()
        self._unsynced_directories: set[str] = set()
        context.on_adopted = self.adopted
        self.rewritten = 0
        self.dropped = 0

    def _own(self) -> Iterable[SegmentEntry]:
        return (entry for entry in self._context.disk.table if entry.own)

    def _age(self, entry: SegmentEntry) -> int:
        """The place of an own segment in the order of creation. An adopted one comes before all that we created."""
        return entry.identity.sequence if entry.identity.writer == self._context.writer else -1

    def _last_sequence(self) -> int:
        return max((self._age(entry) for entry in self._own()), default=-1)

    def adopted(self) -> None:
        """Deletions were learnt that may be older than what was written since opening: the order begins anew."""
        self._opened_stamp = self._context.disk.settled_stamp = -1

    async def read(self, victim: SegmentEntry) -> Notes:
        """Its notes; none if somebody removed the file by hand. Raises ``OSError`` or ``CorruptionError`` if
        they cannot be read."""
        notes = Notes()
        facts = self._context.recovery.facts_of(victim.number)
        with contextlib.suppress(FileNotFoundError):
            async with contextlib.aclosing(facts):  # type: ignore[type-var]
                async for fact in facts:
                    if isinstance(fact, TombstoneFact):
                        notes.tombstones[fact.block_id] = max(fact.stamp, notes.tombstones.get(fact.block_id, 0))
                    elif isinstance(fact, BindingFact):
                        notes.bindings.append(fact)
        return notes

    def removed(self, entry: SegmentEntry) -> None:
        """The segment was unlinked; whether a loss of power brings it back is not known before a sync."""
        self._unsynced_directories.add(posixpath.dirname(entry.path))

    async def may_drop(self) -> bool:
        """Whether tombstones may be dropped at all: no other writer, and what is removed stays removed.

        Raises ``OSError``.
        """
        if not await self._context.is_alone():
            return False
        for directory in list(self._unsynced_directories):
            await self._context.platform.storage.sync_directory(directory)
            self._unsynced_directories.discard(directory)
        return True

    def carry(self, victim: SegmentEntry, notes: Notes, rewritten: set[bytes], *, may_drop: bool) -> bool:
        """Write again what is still needed; whether the victim has to wait for a flush.

        ``rewritten`` are the blocks whose record, with all names, is being written again.
        """
        waits = self._carry_names(notes, rewritten)
        sequence = self._age(victim)
        for block_id, stamp in notes.tombstones.items():
            carried = self._carried.get(block_id)
            if carried is not None and carried.stamp >= stamp and sequence < carried.floor:
                waits = True  # it is in a younger segment, or on its way there
            elif may_drop and self._expired(block_id, stamp, victim):
                self._drop(block_id, stamp)
            else:
                self._carry_tombstone(block_id, stamp)
                waits = True
        return waits

    def _carry_names(self, notes: Notes, rewritten: set[bytes]) -> bool:
        context = self._context
        index, live = context.catalog.index, context.merger.facts.is_live
        told: set[tuple[bytes, bytes]] = set()
        for fact in notes.bindings:
            row = index.find(fact.block_id)
            if row < 0 or index.find_prefix(fact.key) != row or not live(fact.block_id, fact.stamp):
                continue
            name = (fact.block_id, fact.key)
            if fact.block_id not in rewritten and name not in told:
                told.add(name)
                context.disk.append_binding(fact.block_id, fact.key, fact.parent, fact.stamp)
        return bool(told)

    def _carry_tombstone(self, block_id: bytes, stamp: int) -> None:
        context = self._context
        stamp = max(stamp, context.merger.facts.stamp_min(block_id) - 1)
        horizon = self._horizon(block_id, stamp)
        if horizon is None and stamp <= context.disk.settled_stamp:
            horizon = self._last_sequence()
        floor = min((self._age(entry) for entry in self._own() if entry.writing), default=self._last_sequence() + 1)
        self._carried[block_id] = _Carried(stamp, floor, horizon)
        self.rewritten += 1
        context.disk.append_tombstone(block_id, stamp)

    def _horizon(self, block_id: bytes, stamp: int) -> int | None:
        carried = self._carried.get(block_id)
        if carried is not None and carried.stamp == stamp and carried.horizon is not None:
            return carried.horizon
        return self._opened_sequence if stamp <= self._opened_stamp else None

    def _expired(self, block_id: bytes, stamp: int, victim: SegmentEntry) -> bool:
        """Every segment that may hold what it deletes is gone, but for the victim."""
        horizon = self._horizon(block_id, stamp)
        return horizon is not None and all(entry is victim or self._age(entry) > horizon for entry in self._own())

    def _drop(self, block_id: bytes, stamp: int) -> None:
        self.dropped += 1
        self._context.merger.facts.forget(block_id, stamp)
        carried = self._carried.get(block_id)
        if carried is not None and carried.stamp <= stamp:
            del self._carried[block_id]

    # -- a disk without room: nothing can be carried -------------------------------------------

    async def first_disposable(self, candidates: Iterable[SegmentEntry]) -> tuple[SegmentEntry, Notes] | None:
        """The first candidate that can go with nothing written, names of blocks elsewhere being forgotten.

        Looks into every own segment for what the tombstones delete. Raises ``OSError``, ``CorruptionError``.
        """
        settled = self._context.disk.settled_stamp
        found = [(entry, await self.read(entry)) for entry in candidates]
        for entry, notes in found:
            if not notes.tombstones:
                return entry, notes
        if not await self.may_drop():
            return None
        found = [item for item in found if all(stamp <= settled for stamp in item[1].tombstones.values())]
        for other in list(self._own()):
            if not found:
                return None
            found = await self._not_needed_by(other, found)
        return found[0] if found else None

    async def _not_needed_by(
        self, other: SegmentEntry, found: list[tuple[SegmentEntry, Notes]]
    ) -> list[tuple[SegmentEntry, Notes]]:
        """Those whose tombstones delete nothing in ``other``."""
        if getattr(other, "unreadable", False):
            return [item for item in found if item[0] is other]
        needed: set[int] = set()
        facts = self._context.recovery.facts_of(other.number)
        with contextlib.suppress(FileNotFoundError):
            async with contextlib.aclosing(facts):  # type: ignore[type-var]
                async for fact in facts:
                    if isinstance(fact, BlockFact | BindingFact):
                        needed.update(
                            entry.number
                            for entry, notes in found
                            if entry is not other and notes.tombstones.get(fact.block_id, -1) >= fact.stamp
                        )
        return [item for item in found if item[0].number not in needed]

    def give_up(self, notes: Notes) -> None:
        """Forget what a disposable segment said: its tombstones delete nothing, its names go."""
        index, facts = self._context.catalog.index, self._context.merger.facts
        for fact in notes.bindings:
            row = index.find(fact.block_id)
            if row >= 0 and index.find_prefix(fact.key) == row:
                index.unbind(fact.key)
        for block_id, stamp in notes.tombstones.items():
            facts.forget(block_id, stamp)
            self._carried.pop(block_id, None)  # written again, if it matters again
