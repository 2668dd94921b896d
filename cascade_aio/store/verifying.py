"""Reading everything: every record of every segment, checked against its own checksums."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import CorruptionError
from cascade_aio.segments.format import BLOCK, RecordHeader
from cascade_aio.segments.scan import Gap, verify_records
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.context import StoreContext

SEGMENTS_AT_ONCE = 4
"""Segments read side by side: each through one buffer of 8 MiB."""


@dataclasses.dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` read. ``damage`` lists every record that is not what was written."""

    blocks: int
    bytes: int
    damage: tuple[CorruptionError, ...]


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.blocks = 0
        self.bytes = 0
        self.damage: list[CorruptionError] = []
        self._done = 0
        self._total = total
        self._report = report

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._report is not None:
            self._report(min(self._done, self._total), self._total)


async def verify_root(context: StoreContext, on_progress: Callable[[int, int], None] | None) -> VerifyReport:
    """See ``Store.verify``. A segment that vanishes meanwhile is no damage."""
    await context.disk.flush()
    entries = list(context.disk.table)
    progress = _Progress(sum(entry.record_bytes for entry in entries), on_progress)
    gate = asyncio.Semaphore(SEGMENTS_AT_ONCE)
    async with asyncio.TaskGroup() as tasks:
        for entry in entries:
            tasks.create_task(_verify_segment(context, entry, progress, gate))
    seen = {(error.path, error.offset) for error in progress.damage}
    found_before = [error for error in context.damage if (error.path, error.offset) not in seen]
    known = sorted([*progress.damage, *found_before], key=lambda error: (error.path or "", error.offset or 0))
    return VerifyReport(progress.blocks, progress.bytes, tuple(known))


async def _verify_segment(
    context: StoreContext, entry: SegmentEntry, progress: _Progress, gate: asyncio.Semaphore
) -> None:
    storage, engine = context.platform.storage, context.platform.engine
    async with gate:
        try:
            async with context.disk.table.opened(entry.number) as file:
                records = verify_records(storage, engine, file, entry, end=entry.data_end)
                async with contextlib.aclosing(records):  # type: ignore[type-var]
                    async for item, error in records:
                        nbytes = item.nbytes if isinstance(item, Gap) else item.record_bytes
                        if error is not None:
                            progress.damage.append(error)
                            _distrust(context, entry, item.offset, item.offset + nbytes)
                        elif isinstance(item, RecordHeader) and item.kind == BLOCK:
                            progress.blocks += 1
                            progress.bytes += item.key_bytes + item.value_bytes
                        progress.advance(nbytes)
        except FileNotFoundError:
            return
        except OSError as error:
            reason = f"segment cannot be opened ({error.strerror})"
            progress.damage.append(CorruptionError(reason, path=entry.path, segment=entry.name))


def _distrust(context: StoreContext, entry: SegmentEntry, start: int, end: int) -> None:
    """Records that begin in this range are not what was written: nothing may rely on them any more.

    A block that the arena has as well is written again; another is forgotten, so that whoever has its
    bytes stores them anew instead of being told that they are there.
    """
    catalog = context.catalog
    for row in catalog.index.rows_in_segment(entry.number).tolist():
        location = catalog.index.location(row)
        if location is None or not start <= location[1] * PAGE_BYTES < end:
            continue
        copy = catalog.copies.get(row)
        if copy is not None and not context.config.read_only:
            context.append_again(copy)
        else:
            catalog.unplace(row)
