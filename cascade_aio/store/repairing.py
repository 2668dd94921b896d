"""Repair of a root: what is damaged is set aside and written out of the way, what is derived is made anew.

Afterwards ``verify`` finds nothing but what had to be left. Order, so that a crash or Ctrl-C at any point leaves a
root that another repair goes on with: copy the damaged bytes to ``<root>/quarantine`` (synced, then a sidecar that
says what they are), write again elsewhere what the footer knows of the notes in them (flushed), put empty notes in
their place, seal the segment again; last, rebuild the index from the segments and write a checkpoint of it.

Only directories that this process has claimed are changed; what a live writer owns, or cannot be read, is left and
named. Nothing is deleted but a segment file of another store, after its copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import posixpath
from collections.abc import Callable, Collection
from typing import Any

from cascade_aio._version import __version__
from cascade_aio.abc.storage import PAGE_BYTES, Platform, Priority
from cascade_aio.config import StoreConfig, make_config
from cascade_aio.errors import CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.active import seal_file
from cascade_aio.segments.buffers import page_buffer
from cascade_aio.segments.facts import BindingFact, Fact, TombstoneFact
from cascade_aio.segments.footer import FooterTables, record_facts
from cascade_aio.segments.layout import CHECKPOINT_FILE
from cascade_aio.segments.scan import Gap, scan_records, unreadable_reason
from cascade_aio.segments.segment_recovery import empty_notes
from cascade_aio.segments.table import SegmentEntry
from cascade_aio.store.context import StoreContext
from cascade_aio.store.merging import LostSegment
from cascade_aio.store.opening import open_with
from cascade_aio.store.verifying import Examination, Verifier, VerifyReport
from cascade_aio.tiers.arena import PrivateArena

QUARANTINE = "quarantine"
COPY_BYTES = 8 << 20
"""Copied at once into quarantine."""

NAMES_MAX = 100
"""Copies of different bytes of one place that are kept side by side."""

MakePlatform = Callable[[], Platform | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Quarantined:
    """Damaged bytes that were set aside: ``copy`` is their file, beside it ``<copy>.json``."""

    copy: str
    path: str
    offset: int
    nbytes: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class LostBlock:
    """A block no sound record of which is left. Id and names (prefix keys) as hex."""

    block_id: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RepairReport:
    """What ``repair_root`` found and did. ``left``: what it could not repair, and why; ``remaining``: what
    ``verify`` says of the repaired parts now."""

    before: VerifyReport
    quarantined: tuple[Quarantined, ...]
    lost_blocks: tuple[LostBlock, ...]
    lost_segments: tuple[LostSegment, ...]
    resealed: tuple[str, ...]
    left: tuple[str, ...]
    remaining: VerifyReport

    @property
    def clean(self) -> bool:
        return not self.left and self.remaining.clean


async def repair_root(
    root: str | os.PathLike[str] | StoreConfig,
    *,
    vouched_for: Collection[bytes] = (),
    on_progress: Callable[[int, int], None] | None = None,
    make_platform: MakePlatform = lambda: None,
    **settings: Any,
) -> RepairReport:
    """Verify a root and repair what is found. ``settings`` as for ``open_store``; ``shm_bytes`` is private memory.

    ``vouched_for``: ids of writers that the caller knows to be dead, whatever can be proven. ``on_progress(bytes_done,
    bytes_total)`` of the verification, which reads everything. May be cancelled and run again. Raises
    ``ConfigError`` (no root), ``TierFullError``, ``BrokenTierError``, ``OSError``.
    """
    config = root if isinstance(root, StoreConfig) else make_config(root, **settings)
    # Nothing else changes the root meanwhile: compaction would remove a damaged segment before it is set aside.
    config = dataclasses.replace(
        config,
        arena=None,
        adopt_seconds=None,
        disk_bytes=None,
        when_full="refuse",
        compaction_bandwidth=0,
        scrub_bandwidth=None,
    )
    looking = dataclasses.replace(config, read_only=True)

    store = await open_with(looking, platform=make_platform(), arena=PrivateArena(config.shm_bytes))
    try:
        verifier = Verifier(store._context, on_progress)
        await verifier.run()
        before, suspects = verifier.report(), verifier.suspects
        config = dataclasses.replace(config, digest=store._context.config.digest)
    finally:
        await store.aclose()
    if before.clean:
        return RepairReport(before, (), (), (), (), (), before)

    store = await open_with(config, platform=make_platform(), arena=PrivateArena(config.shm_bytes))
    try:
        context = store._context
        context.index_doubtful = True  # no checkpoint of it: it is built anew below
        adopted = await context.adopter.adopt(closed_too=True, vouched_for=vouched_for)
        repair = _Repair(context, dict(adopted.left))
        paths = _paths_of(before)
        again = Verifier(context, None, only=paths)
        await again.run()
        suspects |= again.suspects
        for found in again.examinations:
            await repair.segment(found)
        await repair.checkpoints()
    finally:
        await store.aclose()

    store = await open_with(config, platform=make_platform(), arena=PrivateArena(config.shm_bytes))
    await store.aclose()  # found again from the segments alone, and a checkpoint of that

    store = await open_with(looking, platform=make_platform(), arena=PrivateArena(config.shm_bytes))
    try:
        last = Verifier(store._context, None, only=paths)
        await last.run()
        index = store._context.catalog.index
        lost = [
            LostBlock(block_id.hex(), tuple(name.hex() for name in names))
            for block_id, names in sorted(suspects.items())
            if index.find(block_id) < 0
        ]
        return RepairReport(
            before,
            tuple(repair.quarantined),
            tuple(lost),
            before.lost,
            tuple(repair.resealed),
            tuple(repair.left),
            last.report(),
        )
    finally:
        await store.aclose()


def _paths_of(report: VerifyReport) -> set[str]:
    """The files in which something was found."""
    errors = [*report.damage, *report.unreadable]
    return {
        *(error.path for error in errors if error.path is not None),
        *(one.path for one in report.lost),
        *(one.path for one in report.inconsistent),
    }


class _Repair:
    """Repairs one segment after another through a store that is open for it alone."""

    def __init__(self, context: StoreContext, left_writers: dict[str, str]) -> None:
        self.quarantined: list[Quarantined] = []
        self.resealed: list[str] = []
        self.left: list[str] = []
        self._context = context
        self._storage = context.platform.storage
        self._left_writers = left_writers
        self._directory = posixpath.join(context.disk.table.root, QUARANTINE)

    async def segment(self, found: Examination) -> None:
        """Set aside and replace what is wrong in a segment. What fails is left, and said."""
        entry = found.entry
        for error in found.unreadable:
            self.left.append(f"{error}: not touched, it may be sound; check the device and try again")
        if not found.wrong and not found.inconsistent:
            return
        if not entry.own:
            writer = entry.identity.writer.hex()
            why = self._left_writers.get(writer, "it was closed or taken by another process just now")
            self.left.append(f"{entry.path} is not ours to repair: {why}")
            return
        if found.unreadable:
            return
        try:
            if found.alien:
                await self._set_aside(entry, 0, entry.size_bytes, found.wrong[0][2], None)
                await self._storage.unlink(entry.path)
                return
            for offset, nbytes, error, header in found.wrong:
                await self._set_aside(entry, offset, nbytes, error, header)
            if any(offset == 0 for offset, _, _, _ in found.wrong):
                await self._restore_header(entry)
            await self._save_notes(found)
            await self._fill(found)
        except OSError as error:
            self.left.append(f"{entry.path}: {unreadable_reason(error)} during the repair; run it again")

    async def checkpoints(self) -> None:
        """Remove those of our directories: the index is found again from the segments."""
        for writer in self._context.recovery.own_writers:
            directory = posixpath.join(self._context.disk.table.root, "writers", writer.hex())
            with contextlib.suppress(FileNotFoundError):
                await self._storage.unlink(posixpath.join(directory, CHECKPOINT_FILE))
                await self._storage.sync_directory(directory)

    # -- setting aside ------------------------------------------------------------------------

    async def _set_aside(
        self, entry: SegmentEntry, offset: int, nbytes: int, error: CorruptionError, header: fmt.RecordHeader | None
    ) -> None:
        """Copy a range into quarantine, unless an earlier repair has done so. Raises ``OSError``."""
        nbytes = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        await self._storage.make_directory(self._directory)
        await self._storage.sync_directory(self._context.disk.table.root)
        stem = f"{entry.identity.writer.hex()}-{entry.identity.sequence:010d}-{offset}"
        description = {
            "version": fmt.FORMAT_VERSION,
            "segment": posixpath.relpath(entry.path, self._context.disk.table.root),
            "offset": offset,
            "bytes": nbytes,
            "reason": str(error),
            "block": None if header is None or header.kind != fmt.BLOCK else header.digest[:16].hex(),
            "key_bytes": None if header is None else header.key_bytes,
            "value_bytes": None if header is None else header.value_bytes,
            "found_ns": self._context.platform.clock.wall_ns(),
            "by": f"cascade_aio {__version__}",
        }
        present = {one.name for one in await self._storage.list_directory(self._directory)}
        for name in (stem, *(f"{stem}-{number}" for number in range(1, NAMES_MAX))):
            copy = posixpath.join(self._directory, f"{name}.bin")
            if f"{name}.bin.json" not in present:
                if f"{name}.bin" in present:
                    await self._storage.unlink(copy)  # a copy that was cut short
                await self._copy(entry.path, offset, nbytes, copy)
                text = json.dumps(description, indent=2).encode() + b"\n"
                await self._storage.write_small(f"{copy}.json", [text])
                self.quarantined.append(Quarantined(copy, entry.path, offset, nbytes, str(error)))
                return
        raise OSError(f"{self._directory} holds {NAMES_MAX} copies of {stem} already; move them away")

    async def _copy(self, path: str, offset: int, nbytes: int, target: str) -> None:
        source = await self._storage.open(path)
        try:
            copy = await self._storage.create(target)
            try:
                buffer = page_buffer(min(COPY_BYTES, nbytes))
                done = 0
                while done < nbytes:
                    piece = buffer[: min(len(buffer), nbytes - done)]
                    count = await self._storage.read(source, [piece], offset + done, priority=Priority.BACKGROUND)
                    count -= count % PAGE_BYTES
                    if not count:
                        break
                    await self._storage.write(copy, [piece[:count]], done)
                    done += count
                await self._storage.sync(copy)
            finally:
                await copy.close()
        finally:
            await source.close()
        await self._storage.sync_directory(self._directory)

    # -- putting right ------------------------------------------------------------------------

    async def _restore_header(self, entry: SegmentEntry) -> None:
        """Page 0 says nothing that is not known otherwise, but for its stamp and the preallocated size."""
        context = self._context
        page = page_buffer(PAGE_BYTES)
        header = fmt.SegmentHeader(context.store_id, entry.identity, context.config.digest, entry.size_bytes, 0)
        fmt.encode_segment_header(page, header)
        file = await self._storage.open(entry.path, writable=True)
        try:
            await self._storage.write(file, [page], 0)
            await self._storage.sync(file)
        finally:
            await file.close()

    async def _save_notes(self, found: Examination) -> None:
        """Write again what is known of names and deletions in the damaged ranges."""
        ranges = [(offset, offset + nbytes) for offset, nbytes, _, _ in found.wrong if offset]
        if not ranges:
            return
        saved = False
        try:
            async for fact in self._context.recovery.facts_of(found.entry.number):
                place = fact.location.page * PAGE_BYTES if isinstance(fact, BindingFact | TombstoneFact) else 0
                if any(start <= place < end for start, end in ranges):
                    saved |= self._save(fact)
        except CorruptionError:  # the footer is damaged as well: what sound headers say is left
            for offset, _, _, header in found.wrong:
                if header is not None:
                    for fact in record_facts(header, found.entry.number, provisional=False):
                        saved |= self._save(fact)
                elif 0 < offset < found.entry.data_end:
                    self.left.append(
                        f"{found.entry.path}: the footer is damaged, too; deletions noted in the damaged record at "
                        f"offset {offset} cannot be restored: blocks that were deleted may come back"
                    )
        if saved:
            await self._context.disk.flush()

    def _save(self, fact: Fact) -> bool:
        """Whether it is a name or a deletion."""
        if isinstance(fact, BindingFact):
            self._context.disk.append_binding(fact.block_id, fact.key, fact.parent, fact.stamp)
        elif isinstance(fact, TombstoneFact):
            self._context.disk.append_tombstone(fact.block_id, fact.stamp)
        else:
            return False
        return True

    async def _fill(self, found: Examination) -> None:
        """Empty notes in place of what is wrong, then a footer that says so."""
        entry, storage = found.entry, self._storage
        file = await storage.open(entry.path, writable=True)
        try:
            for offset, nbytes, _, _ in found.wrong:
                if not offset:
                    continue
                for note in empty_notes(offset, offset + nbytes):
                    pages = page_buffer(note.record_bytes)
                    fmt.encode_record(pages, note, entry.identity)
                    await storage.write(file, [pages], note.offset)
            await storage.sync(file)
            tables = FooterTables()
            async for item in scan_records(storage, file, entry, start=PAGE_BYTES, end=entry.data_end):
                if isinstance(item, Gap):
                    self.left.append(f"{entry.path} at offset {item.offset}: {item.reason}; run the repair again")
                    return
                tables.add(item)
            await seal_file(storage, file, entry, tables, entry.data_end)
            self.resealed.append(entry.path)
        finally:
            await file.close()
