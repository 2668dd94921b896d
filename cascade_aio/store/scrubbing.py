"""The scrubber: reads all own segments again and again, slowly, to find what rots while nobody asks for it.

In the class of I/O below all others and within ``scrub_bandwidth``. A damaged record is reported once; its block is
written again where the arena has it, and forgotten where not, so that whoever has its bytes stores them anew. Goes
segment by segment in their order, and keeps its place in ``scrub.json`` of the writer's directory: a restart goes on.

What could not be read is counted and left: the next round tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import posixpath

import msgspec

from cascade_aio.abc.storage import Priority
from cascade_aio.errors import CorruptionError
from cascade_aio.segments.format import BLOCK, RecordHeader
from cascade_aio.segments.scan import Gap, verify_records
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.context import DAMAGE_KEPT_MAX, StoreContext
from cascade_aio.store.verifying import distrust

SCRUB_FILE = "scrub.json"

SAVE_SECONDS = 60.0
"""The place is written down at most so often."""

ROUND_SECONDS_MIN = 60.0
"""A small root is not read over and over: a round begins so long after the one before, at the earliest."""

BURST_SECONDS = 1.0
"""What a pause has saved up is not made good for more than this."""

logger = logging.getLogger("cascade_aio.store")


class _Place(msgspec.Struct):
    """The last segment that was read to its end, and how many rounds were finished."""

    writer: str = ""
    sequence: int = 0
    rounds: int = 0


class Scrubber:
    """A background task of a store with ``scrub_bandwidth``. Owned by one event loop."""

    def __init__(self, context: StoreContext, directory: str) -> None:
        self._context = context
        self._path = posixpath.join(directory, SCRUB_FILE)
        self._bandwidth = context.config.scrub_bandwidth
        self._place = _Place()
        self._saved_s = 0.0
        self._paid_until_s = 0.0
        self._reported: set[tuple[str, int]] = set()
        self._counts = dict.fromkeys(("records", "bytes", "damaged", "rewritten", "unreadable"), 0)

    async def run(self) -> None:
        """Go round until cancelled."""
        loop = self._context.loop
        await self._load()
        self._saved_s = loop.time()
        while True:
            begun_s = loop.time()
            for entry in self._rest_of_round():
                await self._scrub(entry)
                self._place.writer, self._place.sequence = entry.identity.writer.hex(), entry.identity.sequence
                if loop.time() - self._saved_s >= SAVE_SECONDS:
                    await self._save()
            self._place = _Place(rounds=self._place.rounds + 1)
            await self._save()
            await asyncio.sleep(max(0.0, begun_s + ROUND_SECONDS_MIN - loop.time()))

    def _rest_of_round(self) -> list[SegmentEntry]:
        """Finished own segments behind the place, in order."""
        behind = (self._place.writer, self._place.sequence)
        entries = {
            (entry.identity.writer.hex(), entry.identity.sequence): entry
            for entry in self._context.disk.table
            if entry.own and entry.sealed and not entry.writing
        }
        return [entry for key, entry in sorted(entries.items()) if key > behind]

    async def _scrub(self, entry: SegmentEntry) -> None:
        context = self._context
        table, platform = context.disk.table, context.platform
        if table.get(entry.number) is not entry:
            return  # reclaimed meanwhile
        try:
            async with table.opened(entry.number) as file:
                records = verify_records(
                    platform.storage, platform.engine, file, entry, end=entry.data_end, priority=Priority.IDLE
                )
                async with contextlib.aclosing(records):  # type: ignore[type-var]
                    async for item, error in records:
                        nbytes = item.nbytes if isinstance(item, Gap) else item.record_bytes
                        if error is not None and error.unreadable:
                            self._counts["unreadable"] += 1
                        elif error is not None and table.get(entry.number) is entry:
                            self._counts["rewritten"] += distrust(context, entry, item.offset, item.offset + nbytes)
                            self._report(entry, item.offset, error)
                        elif isinstance(item, RecordHeader) and item.kind == BLOCK:
                            self._counts["records"] += 1
                        self._counts["bytes"] += nbytes
                        await self._pace(nbytes)
        except OSError as error:
            if table.get(entry.number) is entry:
                self._counts["unreadable"] += 1
                logger.warning("segment %s could not be scrubbed now: %s", entry.path, error)

    def _report(self, entry: SegmentEntry, offset: int, error: CorruptionError) -> None:
        known = (entry.path, offset)
        if known in self._reported:
            return
        self._counts["damaged"] += 1
        if len(self._reported) < DAMAGE_KEPT_MAX:
            self._reported.add(known)
        self._context.report_damage(error)

    async def _pace(self, nbytes: int) -> None:
        """Sleep until the bandwidth allows for what was read."""
        assert self._bandwidth is not None, "a scrubber has a bandwidth"
        now_s = self._context.loop.time()
        self._paid_until_s = max(self._paid_until_s, now_s - BURST_SECONDS) + nbytes / self._bandwidth
        await asyncio.sleep(max(0.0, self._paid_until_s - now_s))

    # -- the place ----------------------------------------------------------------------------

    async def _load(self) -> None:
        try:
            raw = await self._context.platform.storage.read_small(self._path)
            self._place = msgspec.json.decode(raw, type=_Place)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("the scrubber begins anew, %s cannot be used: %s", self._path, error)

    async def _save(self) -> None:
        self._saved_s = self._context.loop.time()
        try:
            await self._context.platform.storage.write_small(self._path, [msgspec.json.encode(self._place)])
        except OSError as error:  # costs a part of a round after a restart
            logger.warning("the scrubber cannot keep its place in %s: %s", self._path, error)

    def statistics(self) -> dict[str, object]:
        return {
            "bandwidth": self._bandwidth,
            **self._counts,
            "rounds": self._place.rounds,
            "segment": f"{self._place.writer}/{self._place.sequence:010d}" if self._place.writer else None,
        }
