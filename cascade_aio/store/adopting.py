"""Segments of writers that died: whose they become, and when.

A store claims the directories of other writers that are provably dead (``segments.hosts``), recovers what they left
open, and from then on treats their segments as its own: they count in its disk budget and are reclaimed by it. The
lock of the directory decides who adopts; it is held until the store closes, or nothing is left in the directory,
which then is free for a newcomer. Every step may be cut short: the next adopter does it again.

What it must not know: what is done with the space.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import posixpath
from collections.abc import Collection, Mapping, Sequence

from cascade_aio.abc.storage import Clock
from cascade_aio.errors import CascadeError
from cascade_aio.segments.hosts import Host
from cascade_aio.segments.layout import CHECKPOINT_FILE, Root, WriterClaim, claim_dead, is_abandoned, list_writers
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.compacting import STEP_BLOCKS
from cascade_aio.store.context import StoreContext
from cascade_aio.store.merging import PROVISIONAL
from cascade_aio.store.recovering import in_steps, take_in

logger = logging.getLogger("cascade_aio.store")


@dataclasses.dataclass(frozen=True, slots=True)
class AdoptionReport:
    """What one ``adopt`` did. Writers by the name of their directory (32 hex digits).

    ``left``: directories with segments that were not adopted, and why.
    """

    writers: tuple[str, ...]
    segments: int
    bytes: int
    left: Mapping[str, str]


class Adopter:
    """Claims of dead writers' directories, beside the one that the store writes in. Owned by one event loop."""

    def __init__(self, context: StoreContext, root: Root, host: Host, clock: Clock) -> None:
        self._context = context
        self._root = root
        self._host = host
        self._clock = clock
        self._claims: dict[bytes, WriterClaim] = {}
        self._left: dict[str, str] = {}
        self._adopted_segments = 0
        self._adopted_bytes = 0
        self._adopting = asyncio.Lock()
        context.is_alone = self.is_alone

    async def run(self, pause_s: float) -> None:
        """Look for dead writers every ``pause_s`` until cancelled."""
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self.adopt()
            except (OSError, CascadeError) as error:  # also a segment of a format that only a later version reads
                logger.warning("the writers of %s could not be looked through: %s", self._root.path, error)

    async def adopt(self, *, closed_too: bool = False, vouched_for: Collection[bytes] = ()) -> AdoptionReport:
        """See ``Store.adopt``. Raises ``OSError``."""
        async with self._adopting:
            before = self._adopted_segments, self._adopted_bytes
            self._let_go_of_empty()
            found = await claim_dead(
                self._context.platform.storage,
                self._root,
                self._host,
                self._clock,
                except_for=self._context.recovery.own_writers | self._claims.keys(),
                closed_too=closed_too,
                vouched_for=vouched_for,
            )
            self._say_what_is_left(found.left)
            self._claims.update((claim.writer, claim) for claim in found.claims)
            adopted = []
            for claim in [claim for claim in self._claims.values() if not claim.recovered]:
                await self._take_over(claim)
                adopted.append(claim.writer.hex())
            return AdoptionReport(
                tuple(adopted), self._adopted_segments - before[0], self._adopted_bytes - before[1], dict(self._left)
            )

    async def _take_over(self, claim: WriterClaim) -> None:
        """Recover what is in a claimed directory. Interrupted, it is begun again by the next look."""
        context = self._context
        context.on_adopted()
        async with context.refreshing:
            await take_in(context, context.recovery.adopt_writer(claim.writer))
        entries = [entry for entry in context.disk.table if entry.identity.writer == claim.writer]
        await self._take_stock(entries)
        storage = context.platform.storage
        with contextlib.suppress(FileNotFoundError):  # it speaks for an index that is not kept up any more
            await storage.unlink(posixpath.join(claim.path, CHECKPOINT_FILE))
        await storage.sync_directory(claim.path)
        claim.recovered = True
        self._adopted_segments += len(entries)
        self._adopted_bytes += sum(entry.size_bytes for entry in entries)
        logger.info("adopted %d segments of the dead writer %s", len(entries), claim.path)
        context.on_written()  # the disk has grown

    async def _take_stock(self, entries: Sequence[SegmentEntry]) -> None:
        """What is in these segments is ours from now on. In steps; whatever changes meanwhile is looked at as it is."""
        whole = {entry.number for entry in entries if entry.sealed and not entry.unreadable}
        found = self._context.merger.adopted(whole)
        for entry in entries:
            entry.writing = True  # not to be reclaimed before it is known what is read from it
        try:
            await in_steps(found)
            for entry in entries:
                await self._own_rows(entry, whole=entry.number in whole)
        finally:
            for entry in entries:
                entry.writing = False

    async def _own_rows(self, entry: SegmentEntry, *, whole: bool) -> None:
        catalog, index = self._context.catalog, self._context.catalog.index
        for count, row in enumerate(index.rows_in_segment(entry.number).tolist(), 1):
            if not count % STEP_BLOCKS:
                await asyncio.sleep(0)
            if not index.is_in_segment(row, entry.number):
                continue  # gone since
            if whole and index.flags(row) & PROVISIONAL:
                # What was seen while it was being written and is not told as durable now has come to nothing.
                catalog.unplace(row)
            else:
                catalog.own_row(row)

    def _let_go_of_empty(self) -> None:
        """A directory of which nothing is left is of use to a newcomer."""
        used = {entry.identity.writer for entry in self._context.disk.table}
        for writer in self._claims.keys() - used:
            self._context.recovery.own_writers.discard(writer)
            self._claims.pop(writer).release()

    def _say_what_is_left(self, left: Mapping[bytes, str]) -> None:
        said = self._left
        self._left = {writer.hex(): why for writer, why in left.items()}
        for writer, why in self._left.items():
            if said.get(writer) != why:
                logger.info("segments of writer %s in %s are not adopted: %s", writer, self._root.path, why)

    async def is_alone(self) -> bool:
        """Whether every other writer directory is adopted, or empty and its writer dead. Raises ``OSError``."""
        storage = self._context.platform.storage
        for writer in await list_writers(storage, self._root):
            if writer not in self._context.recovery.own_writers and not await is_abandoned(
                storage, self._root, writer, self._host
            ):
                return False
        return True

    def release(self) -> None:
        """Give all claims back: others may adopt what is here."""
        while self._claims:
            self._claims.popitem()[1].release()

    def statistics(self) -> dict[str, object]:
        return {
            "adopted_writers": len(self._claims),
            "adopted_segments": self._adopted_segments,
            "adopted_bytes": self._adopted_bytes,
            "not_adopted": dict(self._left),
        }
