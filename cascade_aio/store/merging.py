"""From what segments say to what the catalog knows: the one place where facts become state.

Used by recovery, by ``refresh`` and for what this store writes and deletes itself. Facts come in any order and
from any number of writers; ``FactMerger`` (segments) holds the rule, this module acts on it.

Invariant: in whatever order, a block is there if a record of it that was told is newer than its tombstones, and it is
read from such a record: the others are dead, and their space is reclaimed. So what gives way to an older record is
remembered: a tombstone between the two may be told last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.core.lifecycle import CopyState
from cascade_aio.errors import CorruptionError, DigestConflictError
from cascade_aio.segments.facts import (
    BindingFact,
    BlockFact,
    DamageFact,
    Fact,
    FactMerger,
    Location,
    LostFact,
    TombstoneFact,
    VanishedFact,
)
from cascade_aio.store.catalog import Catalog
from cascade_aio.store.naming import Name

NEWER_MAX = 100_000
"""Blocks of which a newer record of another writer is remembered; beyond, that one is read instead of the own one."""

STANDBYS_MAX = 10_000
"""Blocks of which a second record is remembered, those told last; beyond, a deletion between the two makes the block a
miss until the next look."""


@dataclasses.dataclass(frozen=True, slots=True)
class LostSegment:
    """A segment file that is gone, or shorter than it was, without its writer's doing.

    ``offset``: what is missing begins there; ``blocks``: how many blocks had their record in it.
    """

    path: str
    segment: str
    offset: int
    nbytes: int
    blocks: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Newer:
    """A durable record of another writer that is newer than the own one, of ``own_stamp``, that is read."""

    own_stamp: int
    fact: BlockFact


LOST_KEPT_MAX = 1000
"""Lost segments that are remembered by name; the damage count goes on."""

PROVISIONAL = 2
"""Flag of a row whose newest record is another writer's and not known to be durable."""


class CatalogMerger:
    """Applies facts to a catalog. Synchronous; microseconds per fact."""

    def __init__(self, catalog: Catalog, report_damage: Callable[[CorruptionError], None]) -> None:
        self._catalog = catalog
        self._report_damage = report_damage
        self._standbys: dict[bytes, BlockFact] = {}
        """By block: the newest record that is not known to be durable and gave way to another, until it is."""
        self._newer: dict[bytes, _Newer] = {}
        """By block that is read from an own record: the newest of another writer. The stamp in the index is its."""
        self.facts = FactMerger()
        self.names = catalog.names
        self.names.is_live = self.facts.is_live
        self.conflicts = 0
        self.hearsay = False
        """Whether a name or a deletion was taken in that is another writer's and was not known to be durable."""
        self.lost: list[LostSegment] = []

    def apply(self, fact: Fact) -> int:
        """Take one fact in; returns how many blocks are new (0 or 1)."""
        if isinstance(fact, BlockFact):
            return self._block(fact)
        if isinstance(fact, BindingFact):
            self.hearsay |= fact.provisional
            name = Name(fact.block_id, fact.key, fact.parent, fact.stamp)
            self.names.claim(name, provisional=fact.provisional)
        elif isinstance(fact, TombstoneFact):
            self.hearsay |= fact.provisional
            self.bury(fact.block_id, fact.stamp)
        elif isinstance(fact, VanishedFact):
            for _ in self.vanished(fact.segment):
                continue
        elif isinstance(fact, LostFact):
            self._lose(fact)
        elif isinstance(fact, DamageFact):
            self._report_damage(
                CorruptionError(
                    fact.reason, path=fact.path, segment=fact.segment, offset=fact.offset, unreadable=fact.unreadable
                )
            )
        return 0

    def bury(self, block_id: bytes, stamp: int) -> None:
        """A tombstone: whatever is known of the block and not newer goes."""
        if not self.facts.bury(block_id, stamp):
            return
        catalog = self._catalog
        row = catalog.index.find(block_id)
        if row < 0:
            return
        if catalog.newest_stamp(row) <= stamp:
            newer = catalog.index.bindings_newer_than(row, stamp)
            self._newer.pop(block_id, None)
            catalog.drop_row(row)
            for name in newer:  # they speak of a record that is still to be read, or of the one that stands by
                self.names.claim(Name(block_id, *name))
            standby = self._standbys.pop(block_id, None)
            if standby is not None and catalog.segments.get(standby.location.segment) is not None:
                self._block(standby)
        else:  # put again since: but its names of before stay deleted
            contested = self.names.contested(row)
            catalog.index.unbind_until(row, stamp)
            self.names.freed(contested)
            copy = catalog.copies.get(row)
            if copy is not None and copy.state is CopyState.COPYING and copy.stamp <= stamp:
                catalog.reject(copy)  # deleted on its way to the disk: who puts the block again has to write it again
            self._leave_dead_record(row, block_id, stamp)

    def _leave_dead_record(self, row: int, block_id: bytes, stamp: int) -> None:
        """The block has outlived a deletion: if the record that is read has not, another one is."""
        catalog = self._catalog
        newer = self._newer.get(block_id)
        if newer is None:
            if catalog.index.location(row) is not None and catalog.index.stamp(row) <= stamp:
                catalog.unplace(row)  # it is in the arena, on its way to the disk again
        elif newer.own_stamp <= stamp:
            del self._newer[block_id]
            if newer.fact.stamp > stamp and catalog.segments.get(newer.fact.location.segment) is not None:
                catalog.place(row, newer.fact.location, newer.fact.stamp)
            else:
                catalog.unplace(row)

    def delete(self, row: int, stamp: int) -> int:
        """This store deletes a block with all of its names. The stamp of the deletion: ``stamp``, or that of the
        newest record known, if the wall clock was set back or another writer's is ahead."""
        catalog = self._catalog
        block_id = catalog.index.block_id(row)
        standby = self._standbys.pop(block_id, None)
        self._newer.pop(block_id, None)
        stamp = max(stamp, catalog.newest_stamp(row), 0 if standby is None else standby.stamp)
        catalog.drop_row(row)
        self.facts.bury(block_id, stamp)
        return stamp

    def _block(self, fact: BlockFact) -> int:
        catalog = self._catalog
        if not self.facts.is_live(fact.block_id, fact.stamp):
            return 0
        try:
            row = catalog.row_of(fact.digest, fact.key_bytes, fact.value_bytes)
        except DigestConflictError:
            self.conflicts += 1  # another writer's block of the same id: the one known first stays
            return 0
        fresh = row < 0
        if fresh:
            row = catalog.index.add(fact.digest, fact.key_bytes, fact.value_bytes)
        index = catalog.index
        before = index.location(row)
        sure = before is not None and not index.flags(row) & PROVISIONAL
        stamp = max(fact.stamp, index.stamp(row)) if sure else fact.stamp
        if not fact.provisional and (standby := self._standbys.get(fact.block_id)) and standby.stamp <= stamp:
            del self._standbys[fact.block_id]
        if self._takes_place(row, fact):
            if before is not None and not sure and index.stamp(row) > stamp:
                self._stand_by(fact._replace(location=Location(*before), stamp=index.stamp(row), provisional=True))
            newer = self._newer.pop(fact.block_id, None)
            if before is not None and sure and stamp > fact.stamp:  # an own record; the newer one is another writer's
                other = fact._replace(location=Location(*before), stamp=stamp) if newer is None else newer.fact
                self._newer[fact.block_id] = _Newer(fact.stamp, other)
            catalog.place(row, fact.location, stamp)
            index.set_flags(row, PROVISIONAL if fact.provisional else 0)
        elif fact.provisional:
            self._stand_by(fact)
        elif sure:
            self._note_newer(row, fact)
        self.names.appeared(fact.block_id)
        return int(fresh)

    def _note_newer(self, row: int, fact: BlockFact) -> None:
        """A durable record of another writer that does not take the place of the own one."""
        catalog = self._catalog
        known = self._newer.get(fact.block_id)
        if fact.stamp < (catalog.index.stamp(row) + 1 if known is None else known.fact.stamp):
            return
        if known is None and len(self._newer) >= NEWER_MAX:
            catalog.place(row, fact.location, fact.stamp)
            return
        own_stamp = catalog.index.stamp(row) if known is None else known.own_stamp
        self._newer[fact.block_id] = _Newer(own_stamp, fact)
        catalog.note_stamp(row, fact.stamp)

    @property
    def reads_older(self) -> int:
        """Blocks of which a newer record is known than the own one that is read."""
        return len(self._newer)

    def adopted(self, segments: Collection[int]) -> Iterator[None]:
        """These segments have become own ones: what is newer in them is read from now on, what stood by in them came
        to nothing. In steps, one for each block that is looked at."""
        catalog = self._catalog
        for block_id, newer in list(self._newer.items()):
            location = newer.fact.location
            if location.segment in segments and self._newer.get(block_id) is newer:
                del self._newer[block_id]
                row = catalog.index.find(block_id)
                if row >= 0 and catalog.segments.get(location.segment) is not None:
                    catalog.place(row, location, newer.fact.stamp)
            yield
        for block_id, standby in list(self._standbys.items()):
            if standby.location.segment in segments:
                self._standbys.pop(block_id, None)
            yield

    def _stand_by(self, fact: BlockFact) -> None:
        known = self._standbys.pop(fact.block_id, None)
        if len(self._standbys) >= STANDBYS_MAX:
            del self._standbys[next(iter(self._standbys))]
        self._standbys[fact.block_id] = fact if known is None or known.stamp <= fact.stamp else known

    def _takes_place(self, row: int, fact: BlockFact) -> bool:
        """Whether the record of ``fact`` is the one to be read from now on.

        A record that may yet vanish with its writer never takes the place of a durable one, which would be
        reclaimed, and always gives way to one. Nor does another writer's take the place of an own one, whatever
        their stamps: two writers who each held the other's for the one that counts would both reclaim theirs. Of
        equal stamps the one told last: compaction copies a record with its stamp and then removes the old one.
        """
        catalog, index = self._catalog, self._catalog.index
        location = index.location(row)
        if location is None:
            return True
        provisional = bool(index.flags(row) & PROVISIONAL)
        if provisional is not fact.provisional:
            return provisional
        theirs, ours = catalog.is_own(fact.location.segment), catalog.is_own(location[0])
        if theirs is not ours:
            return theirs
        newer = self._newer.get(fact.block_id)
        return fact.stamp >= (index.stamp(row) if newer is None else newer.own_stamp)

    def vanished(self, segment: int) -> Iterator[None]:
        """A segment is gone, and what was in it. In steps, one for each block."""
        catalog = self._catalog
        for row in catalog.index.rows_in_segment(segment).tolist():
            if catalog.index.is_in_segment(row, segment):
                catalog.unplace(row)
            yield

    def _lose(self, fact: LostFact) -> None:
        index = self._catalog.index
        blocks = 0
        for row in index.rows_in_segment(fact.segment).tolist():
            location = index.location(row)
            assert location is not None, row
            blocks += location[1] * PAGE_BYTES + self._catalog.stored_bytes(row) > fact.offset
        if len(self.lost) < LOST_KEPT_MAX:
            self.lost.append(LostSegment(fact.path, fact.name, fact.offset, fact.nbytes, blocks, fact.reason))
        self._report_damage(
            CorruptionError(
                f"{fact.reason}: {blocks} blocks are lost", path=fact.path, segment=fact.name, offset=fact.offset
            )
        )
