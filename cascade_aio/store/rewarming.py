"""A warm start: the blocks that a former owner of the arena left in it, taken over without a look at the disk.

At opening, after the root has been read, every slot of the directory is judged (``judge_slots`` is pure).
A sealed block that the root knows becomes *dormant*: it takes its room, may be evicted, and is verified by
its checksums when somebody asks for it (``rouse``); what is damaged is dropped and read from disk. A block
that never reached the disk is described by its own header pages; it is verified soon and written. What was
being filled, dropped or evicted is forgotten, except that no extent is touched which a living client of the
former owner has pinned: it is fenced off until the client lets go.

Nothing in the arena is believed: a slot counts only if its checksum is right, its extent lies inside and
overlaps no other, and, before a byte is handed out, header, digest, lengths and all chunks agree.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterable

from sortedcontainers import SortedDict

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.core.index import PART_BYTES_MAX
from cascade_aio.errors import ConfigError, CorruptionError, DigestConflictError, TierFullError
from cascade_aio.model import BLOCK_ID_BYTES
from cascade_aio.segments.format import (
    BLOCK,
    CHUNK_BYTES,
    HEADER_PAGES_MAX,
    PAYLOAD_BYTES_MAX,
    RecordHeader,
    decode_record_anywhere,
    payload_bytes_of,
    value_offset_of,
)
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.store.naming import Name
from cascade_aio.store.publishing import Publisher
from cascade_aio.tiers.directory import ArenaDirectory, DirectoryEntry, SlotState
from cascade_aio.tiers.shm import Extent

SLOTS_PER_STEP = 512
"""Slots judged or taken over in one loop turn: a few milliseconds, before anybody uses the store."""

logger = logging.getLogger("cascade_aio.store")


@dataclasses.dataclass(frozen=True, slots=True)
class Judgement:
    """Slots by what is to become of them; entries ascend by offset and do not overlap."""

    sealed: list[DirectoryEntry]
    fenced: list[DirectoryEntry]
    discarded: list[int]


def extent_bytes_of(entry: DirectoryEntry) -> int:
    """Bytes of the extent that an entry describes."""
    return entry.header_bytes + payload_bytes_of(entry.key_bytes, entry.value_bytes)


def judge_slots(
    slots: Iterable[tuple[int, SlotState | None, DirectoryEntry]], *, pinned: set[int], capacity_bytes: int
) -> Judgement:
    """What is to become of each slot: (number, state or ``None`` for unsound, entry). Pure.

    Of extents that overlap, those that clients have pinned go first, then the one that starts first.
    """
    judgement = Judgement([], [], [])
    candidates: list[tuple[bool, int, bool, DirectoryEntry]] = []
    for slot, state, entry in slots:
        wanted = state in (SlotState.SEALED, SlotState.DORMANT)
        if state is None or not (wanted or slot in pinned) or not _is_sound(entry, wanted, capacity_bytes):
            judgement.discarded.append(slot)
        else:
            candidates.append((slot not in pinned, entry.offset, wanted, entry._replace(slot=slot)))
    candidates.sort(key=lambda item: item[:2])
    taken = _Ranges()
    for _, offset, wanted, entry in candidates:
        if not taken.add(offset, offset + extent_bytes_of(entry)):
            judgement.discarded.append(entry.slot)
        else:
            (judgement.sealed if wanted else judgement.fenced).append(entry)
    for entries in (judgement.sealed, judgement.fenced):
        entries.sort(key=lambda entry: entry.offset)
    return judgement


def _is_sound(entry: DirectoryEntry, sealed: bool, capacity_bytes: int) -> bool:
    pages, rest = divmod(entry.header_bytes, PAGE_BYTES)
    if rest or pages > HEADER_PAGES_MAX or (sealed and not pages) or entry.offset % PAGE_BYTES:
        return False
    if sealed and (max(entry.key_bytes, entry.value_bytes) > PART_BYTES_MAX):
        return False
    payload_bytes = payload_bytes_of(entry.key_bytes, entry.value_bytes)
    nbytes = entry.header_bytes + payload_bytes
    return (
        payload_bytes <= PAYLOAD_BYTES_MAX
        and entry.value_offset == value_offset_of(entry.key_bytes)
        and 0 < nbytes <= capacity_bytes - entry.offset
    )


class _Ranges:
    """Ranges that do not overlap; neighbours are found by bisection."""

    def __init__(self) -> None:
        self._end_at: SortedDict[int, int] = SortedDict()

    def add(self, start: int, end: int) -> bool:
        """``False``: it overlaps one that was added before."""
        after = self._end_at.bisect_right(start)
        if after and self._end_at.peekitem(after - 1)[1] > start:
            return False
        if after < len(self._end_at) and self._end_at.peekitem(after)[0] < end:
            return False
        self._end_at[start] = end
        return True


async def rewarm(context: StoreContext, publisher: Publisher, directory: ArenaDirectory) -> list[Copy]:
    """Take over what is in the directory; the copies that ``write_unwritten`` has to see to, held for it.

    After recovery, before anything is allocated in the arena or ``Publisher.start``. Suspends, does no I/O; if
    it fails or is cancelled the arena is as it was, for the next attempt.
    """
    found: list[tuple[int, SlotState | None, DirectoryEntry]] = []
    for slot in reversed(range(directory.slots)):
        state, entry = directory.inspect(slot)
        if state is SlotState.FREE:
            directory.noted_free(slot)
        else:
            found.append((slot, state, entry))
        if slot % SLOTS_PER_STEP == 0:
            await asyncio.sleep(0)
    capacity_bytes = context.shm.capacity_bytes
    pinned = directory.former_pins()
    judgement = judge_slots(found, pinned=pinned, capacity_bytes=capacity_bytes)
    for slot in judgement.discarded:
        directory.discard(slot)
    entries = sorted([*judgement.sealed, *judgement.fenced], key=lambda entry: entry.offset)
    extents = context.shm.take_over([(entry.offset, extent_bytes_of(entry)) for entry in entries])
    extent_of = {entry.slot: extent for entry, extent in zip(entries, extents, strict=True)}
    report = context.rewarmed
    for entry in judgement.fenced:
        publisher.fence(entry.slot, context.shm, extent_of[entry.slot])
        report.fenced += 1
    # As if used in the order in which they were stored: who was used last nobody has written down.
    ordered = sorted(judgement.sealed, key=lambda entry: _stamp_of(context, entry))
    unwritten: list[Copy] = []
    for number, entry in enumerate(ordered):
        extent = extent_of[entry.slot]
        row = _row_of(context, entry, extent)
        if row < 0:
            report.dropped += 1
            if entry.slot in pinned:
                publisher.fence(entry.slot, context.shm, extent)
            else:
                directory.discard(entry.slot)
                context.shm.free(extent)
            continue
        _lay_by(context, publisher, entry, extent, row, unwritten)
        if number % SLOTS_PER_STEP == 0:
            await asyncio.sleep(0)
    report.unwritten = len(unwritten)
    return unwritten


def _lay_by(
    context: StoreContext, publisher: Publisher, entry: DirectoryEntry, extent: Extent, row: int, unwritten: list[Copy]
) -> None:
    copy = Copy(
        extent,
        header_bytes=entry.header_bytes,
        digest=entry.digest,
        key_bytes=entry.key_bytes,
        value_bytes=entry.value_bytes,
        value_offset=entry.value_offset,
        chunk_crcs=(),
        meta=b"",
    )
    copy.described = True
    catalog = context.catalog
    catalog.lay_by(copy, row)
    publisher.list_dormant(copy, entry.slot)
    if catalog.index.location(row) is None:
        catalog.hold(copy)  # the only copy: ``write_unwritten`` lets it go
        unwritten.append(copy)
    context.rewarmed.blocks += 1
    context.rewarmed.bytes += extent.nbytes


def _stamp_of(context: StoreContext, entry: DirectoryEntry) -> int:
    """Stamp of the block's record; of one that has none, newer than all."""
    index = context.catalog.index
    row = index.find(entry.digest[:BLOCK_ID_BYTES])
    return index.stamp(row) if row >= 0 else 1 << 64


def _row_of(context: StoreContext, entry: DirectoryEntry, extent: Extent) -> int:
    """The block's row, a new one if the root does not know it; -1 if it is of no use."""
    catalog, index = context.catalog, context.catalog.index
    try:
        row = catalog.row_of(entry.digest, entry.key_bytes, entry.value_bytes)
        if row >= 0:
            return -1 if catalog.is_in_arena(row) else row
        header = _header_of(entry, extent)
        is_live = context.merger.facts.is_live
        if header is None or not is_live(entry.digest[:BLOCK_ID_BYTES], header.stamp):
            return -1
        row = index.add(entry.digest, entry.key_bytes, entry.value_bytes)
        for name in header.bindings:
            if name.key != name.parent:
                catalog.names.claim(Name(entry.digest[:BLOCK_ID_BYTES], *name))
    except DigestConflictError:
        return -1
    except TierFullError as error:
        logger.warning("a block of the arena is not known to this store: %s", error)
        row = index.find(entry.digest[:BLOCK_ID_BYTES])  # it was the names that found no room
    return row


def _header_of(entry: DirectoryEntry, extent: Extent) -> RecordHeader | None:
    """The header that the extent carries, if it is sound and of this very block."""
    try:
        header = decode_record_anywhere(extent.memory[: entry.header_bytes], path=f"arena at {entry.offset}")
    except (CorruptionError, ConfigError):
        return None
    if header is None or header.kind != BLOCK or header.header_pages * PAGE_BYTES != entry.header_bytes:
        return None
    told = (header.digest, header.key_bytes, header.value_bytes, header.chunk_bytes)
    return header if told == (entry.digest, entry.key_bytes, entry.value_bytes, CHUNK_BYTES) else None


async def rouse(context: StoreContext, copy: Copy) -> None:
    """Verify a dormant copy, in worker threads: afterwards it is resident, or it is gone, and its row with it if
    the block is nowhere else. May be cancelled."""
    catalog = context.catalog
    row = copy.row
    catalog.hold(copy)
    try:
        entry = DirectoryEntry(
            0, copy.extent.offset, copy.key_bytes, copy.value_bytes, copy.value_offset, copy.slot, copy.header_bytes,
            False, copy.digest, b"",
        )  # fmt: skip
        header = _header_of(entry, copy.extent)
        found: tuple[int, ...] = ()
        if header is not None:
            found = await context.platform.engine.checksum(copy.extent.memory[copy.header_bytes :], CHUNK_BYTES)
        if catalog.dormant.get(row) is not copy:
            return  # deleted, or stored again meanwhile
        if header is not None and found == header.chunk_crcs:
            copy.chunk_crcs, copy.meta, copy.stamp = header.chunk_crcs, header.meta, header.stamp
            context.rewarmed.verified += 1
            catalog.awaken(copy)
        else:
            context.rewarmed.damaged += 1
            logger.warning("block %s in the arena is not what was sealed there: it is dropped", copy.block_id)
            catalog.reject(copy)
    finally:
        catalog.release(copy)


async def write_unwritten(context: StoreContext, copies: list[Copy]) -> None:
    """Verify and queue for the segment writer what was in the arena only, one after the other, and let it go.

    Cancelled, the rest stays as it was found, for the next owner.
    """
    catalog = context.catalog
    for copy in copies:
        try:
            if copy.row >= 0 and catalog.dormant.get(copy.row) is copy:
                await rouse(context, copy)
            if copy.row >= 0:
                context.append_unless_durable(copy)
        finally:
            catalog.release(copy)
