"""From a root to facts: which segments there are, which are news, and which are gone.

Streams what ``segment_recovery`` finds in each. Never fails because of one bad segment (that is a ``DamageFact``), and
never repairs a foreign file.

What it must not know: the index the facts end up in.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from cascade_aio.abc.storage import PAGE_BYTES, ByteEngine, Storage
from cascade_aio.errors import CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.checkpoint import Cover
from cascade_aio.segments.facts import DamageFact, Fact, LostFact, VanishedFact
from cascade_aio.segments.footer import SEALED_DAMAGE
from cascade_aio.segments.layout import Root, WriterClaim, list_segments, list_writers
from cascade_aio.segments.scan import (
    unreadable_reason,
)
from cascade_aio.segments.segment_recovery import RecoveryReport, SegmentRecovery
from cascade_aio.segments.table import SegmentEntry, SegmentTable

SEARCH_BYTES_FOREIGN = 256 << 20
"""How far behind a hole in another writer's open segment we look for more at opening."""

SEARCH_BYTES_REFRESH = 0
"""A refresh looks behind a hole only for what an earlier look has found there: its writer is about to fill it."""


GONE = "the file of the segment is gone and its writer did not remove it"
CUT = "the file of the segment is shorter than it was"
"""Why a ``LostFact`` is told."""

LISTINGS_MAX = 8
"""A look lists the root again so often at most while segments go that it has seen."""


class Recovery:
    """Reads a root into a ``SegmentTable`` and facts. Owned by one event loop; nothing runs in the background."""

    def __init__(
        self, storage: Storage, engine: ByteEngine, root: Root, table: SegmentTable, claim: WriterClaim | None
    ) -> None:
        self.report = RecoveryReport()
        self._storage = storage
        self._engine = engine
        self._root = root
        self._table = table
        self.own_writers = set() if claim is None else {claim.writer}
        """Writers whose directories are claimed: their segments are sealed, and not looked at by a refresh."""

    async def recover_root(self, covers: Sequence[Cover] = ()) -> AsyncIterator[Fact]:
        """All facts of the root that ``covers`` (of a checkpoint) do not speak for.

        Covered segments get their numbers first, in the order of ``covers``, so with an empty table
        the checkpoint's segment numbers are positions in ``covers``. Those that are gone yield
        ``VanishedFact`` at the end, own ones ``LostFact``: their writer would have removed the checkpoint first.
        """
        known: dict[fmt.SegmentIdentity, Cover] = {}
        for cover in covers:
            entry = self._table.add(cover.identity, own=self._is_own(cover.identity))
            entry.scanned_bytes, entry.record_bytes = cover.upto, cover.record_bytes
            known[cover.identity] = cover
        seen: set[fmt.SegmentIdentity] = set()
        async for fact in self._look(seen, lambda identity: True, known, SEARCH_BYTES_FOREIGN, listings_min=2):
            yield fact
        for identity in known.keys() - seen:
            vanished = self._table.find(identity)  # an own one: of others' it has been told
            if vanished is not None:
                if known[identity].upto > PAGE_BYTES:  # an empty one may have been removed
                    yield LostFact(vanished.number, vanished.path, vanished.name, 0, known[identity].upto, GONE)
                await self._table.forget(vanished.number)
                yield VanishedFact(vanished.number)

    async def adopt_writer(self, writer: bytes) -> AsyncIterator[Fact]:
        """Make the segments of a writer, whose directory was claimed just now, own ones: what is open is sealed.

        Yields what was not known of them, provisional records now as they turned out to be. Raises ``OSError`` if
        the directory cannot be listed; to be called again then, or after a cancellation.
        """
        found = await self._list_writer(writer)
        self.own_writers.add(writer)
        for identity, _ in found:
            self._table.add(identity, own=True)
        entries = [entry for entry in self._table if entry.identity.writer == writer]
        gone: list[SegmentEntry] = []
        unread = {entry for entry in entries if not entry.sealed or entry.unreadable}
        for entry in entries:
            entry.own = entry.writing = True  # not to be reclaimed before all of it is known
        try:
            for identity, size in found:
                entry = self._table.add(identity, own=True)
                if entry in unread:
                    async for fact in self._recover(identity, size, None, SEARCH_BYTES_FOREIGN, gone):
                        yield fact
                    unread.discard(entry)
            present = {identity for identity, _ in found}
            gone += [entry for entry in entries if entry.identity not in present]
            async for fact in self._tell_gone(gone):
                yield fact
        finally:
            for entry in entries:
                entry.writing = False
            for entry in unread:  # cut short: nothing is known of it, so that it looks as if nothing in it were needed
                entry.unreadable = True

    async def refresh_root(self) -> AsyncIterator[Fact]:
        """What other writers added or removed since the last look. Own segments are not looked at.

        What was not known to be durable then is told again.
        """

        def is_news(identity: fmt.SegmentIdentity) -> bool:
            entry = self._table.find(identity)
            return not self._is_own(identity) and (entry is None or not entry.sealed or entry.unreadable)

        async for fact in self._look(set(), is_news, {}, SEARCH_BYTES_REFRESH, listings_min=1):
            yield fact

    async def _look(
        self,
        seen: set[fmt.SegmentIdentity],
        wanted: Callable[[fmt.SegmentIdentity], bool],
        covers: Mapping[fmt.SegmentIdentity, Cover],
        search_bytes: int,
        *,
        listings_min: int,
    ) -> AsyncIterator[Fact]:
        """Facts of the segments that are listed and ``wanted``, added to ``seen``; then which of others' are gone.

        Whoever moves records unlinks the old segment only after the new one is sealed. So where something has gone,
        the next listing has what became of it, and that is read before the end of the old one is told: what is
        only moved is there all the time, with the names that we know. Directories are listed one after the other:
        what goes from a later to an earlier one meanwhile is in no listing, but in the next one.
        """
        gone: list[SegmentEntry] = []
        for listing in range(1, LISTINGS_MAX + 1):
            found, known_gone = await self._list(), len(gone)
            for identity, size in found:
                if identity not in seen and wanted(identity):
                    seen.add(identity)
                    async for fact in self._recover(identity, size, covers.get(identity), search_bytes, gone):
                        yield fact
            present = {identity for identity, _ in found}
            known = {entry.number for entry in gone}
            gone += [
                entry
                for entry in self._table
                if entry.identity not in present and not self._is_own(entry.identity) and entry.number not in known
            ]
            alone = all(self._is_own(identity) for identity in present)
            if len(gone) == known_gone and (alone or listing >= listings_min):
                break
        async for fact in self._tell_gone(gone):
            yield fact

    async def _tell_gone(self, entries: Sequence[SegmentEntry]) -> AsyncIterator[Fact]:
        for entry in entries:
            if self._table.get(entry.number) is entry:
                await self._table.forget(entry.number)
                yield VanishedFact(entry.number)

    async def facts_of(self, number: int, *, search_bytes: int | None = None) -> AsyncIterator[Fact]:
        """Everything a segment says, once more and from its start: before it is removed.

        Of damage only what its sealer knew is told. Raises ``OSError`` if not all of it can be read,
        ``CorruptionError`` if it is damaged otherwise: it is not to be removed then, because it may say more.
        ``search_bytes``: how far behind the end of what is known for more; of the segment being written, 0.
        """
        entry = dataclasses.replace(self._table[number], scanned_bytes=0, unreadable=False)
        recovery = SegmentRecovery(self._storage, self._engine, self._table, entry, self._root.store, RecoveryReport())
        async for fact in recovery.facts(adopt=False, search_bytes=search_bytes):
            if isinstance(fact, DamageFact):
                if fact.reason == SEALED_DAMAGE:
                    yield fact  # reported at every opening; nothing comes of it any more
                    continue
                if entry.unreadable:
                    raise OSError(errno.EIO, fact.reason, fact.path)
                raise CorruptionError(fact.reason, path=fact.path, segment=fact.segment, offset=fact.offset)
            yield fact
        if entry.unreadable:
            raise OSError(errno.EIO, "not all of the segment can be read", entry.path)

    def _is_own(self, identity: fmt.SegmentIdentity) -> bool:
        return identity.writer in self.own_writers

    async def _list(self) -> list[tuple[fmt.SegmentIdentity, int]]:
        found: list[tuple[fmt.SegmentIdentity, int]] = []
        for writer in await list_writers(self._storage, self._root):
            found += await self._list_writer(writer)
        return found

    async def _list_writer(self, writer: bytes) -> list[tuple[fmt.SegmentIdentity, int]]:
        try:
            entries = await self._storage.list_directory(f"{self._root.writers_path}/{writer.hex()}")
        except FileNotFoundError:
            return []
        return [(fmt.SegmentIdentity(writer, sequence), size) for sequence, size in list_segments(entries)]

    async def _recover(
        self,
        identity: fmt.SegmentIdentity,
        size: int,
        cover: Cover | None,
        search_bytes: int,
        gone: list[SegmentEntry],
    ) -> AsyncIterator[Fact]:
        """Facts of one segment. One whose file turns out to be gone is added to ``gone``."""
        own = self._is_own(identity)
        told = self._table.find(identity) is not None
        entry = self._table.add(identity, own=own)
        entry.unreadable = False
        self.report.segments += 1
        if cover is not None and cover.sealed and size == cover.upto:
            entry.sealed, entry.size_bytes = True, size
            self.report.covered += 1
            return
        if cover is not None and size < cover.upto:  # nobody cuts below what he knows to be durable
            yield LostFact(entry.number, entry.path, entry.name, size, cover.upto - size, CUT)
            yield VanishedFact(entry.number)  # what is left is found again
            entry.scanned_bytes = entry.record_bytes = 0
        recovery = SegmentRecovery(self._storage, self._engine, self._table, entry, self._root.store, self.report)
        try:
            async for fact in recovery.facts(adopt=own, search_bytes=None if own else search_bytes):
                if isinstance(fact, DamageFact):
                    self.report.damaged += 1
                yield fact
        except FileNotFoundError:
            gone.append(entry)
        except OSError as exc:
            recovery.note_unreadable(0)
            entry.size_bytes = max(entry.size_bytes, size)
            self.report.damaged += 1
            yield DamageFact(entry.path, entry.name, 0, size, unreadable_reason(exc), True)
        except BaseException:
            entry.sealed = False  # cancelled half-way: the next look starts over
            raise
        self.report.unreadable += entry.unreadable
        if recovery.removed:
            await self._table.forget(entry.number)
            if told:
                yield VanishedFact(entry.number)
