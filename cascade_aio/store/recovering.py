"""What the root holds already: checkpoint and recovery at opening, news of other writers at ``refresh``.

A checkpoint of this writer directory makes opening a matter of loading columns; without one, or with
a damaged one, everything is found again in the segments.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import posixpath
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import numpy as np

from cascade_aio.core.index import BlockIndex, Columns, check_columns, select_columns
from cascade_aio.errors import CorruptionError, TierFullError
from cascade_aio.model import BLOCK_ID_BYTES
from cascade_aio.segments.checkpoint import (
    Checkpoint,
    CheckpointFailure,
    Cover,
    covers_of,
    read_checkpoint,
    write_checkpoint,
)
from cascade_aio.segments.facts import BindingFact, BlockFact, Fact, TombstoneFact, VanishedFact
from cascade_aio.segments.format import NO_PARENT
from cascade_aio.segments.layout import CHECKPOINT_FILE, Root, WriterClaim, largest_checkpoint
from cascade_aio.segments.recovery import Recovery
from cascade_aio.store.context import StoreContext
from cascade_aio.store.merging import PROVISIONAL
from cascade_aio.store.naming import Name

STEPS_PER_TURN = 32

TRIMMED_BLOCKS_MIN = 100_000
"""Opening more blocks than this leaves so much freed memory behind (80 bytes a block) that it is returned."""

_RIVAL = struct.Struct("<16s32s32sQ")
"""A claim to a name that another block has, in a checkpoint: block id, key, parent (zeros: none), stamp."""

logger = logging.getLogger("cascade_aio.store")


async def recover(context: StoreContext, root: Root, claim: WriterClaim | None) -> None:
    """Fill the catalog from the root. Own open segments of a crash are sealed on the way; without a claim
    nothing is changed."""
    storage, engine = context.platform.storage, context.platform.engine
    context.recovery = Recovery(storage, engine, root, context.disk.table, claim)
    if claim is None:
        path = await largest_checkpoint(storage, root)
    else:
        path = posixpath.join(claim.path, CHECKPOINT_FILE)
    found = None if path is None else await read_checkpoint(storage, engine, path, store=root.store)
    covers: Sequence[Cover] = ()
    if isinstance(found, Checkpoint):
        covers = await _load(context, found)
    elif isinstance(found, CheckpointFailure):
        logger.warning("checkpoint %s is not used, the segments are read instead: %s", found.path, found.reason)
    del found
    await take_in(context, context.recovery.recover_root(covers))
    if len(context.catalog.index) >= TRIMMED_BLOCKS_MIN:
        await engine.trim_heap()
    context.facts_since_checkpoint = context.facts_applied


async def refresh(context: StoreContext) -> int:
    """See ``Store.refresh``: apply what other writers added, deleted and removed; count new blocks."""
    async with context.refreshing:
        return await take_in(context, context.recovery.refresh_root())


async def take_in(context: StoreContext, facts: AsyncIterator[Fact]) -> int:
    """Apply ``facts`` as they come; returns how many blocks are new. The caller serialises."""
    fresh = 0
    refused: TierFullError | None = None
    wall_ns = context.platform.clock.wall_ns()
    async with contextlib.aclosing(facts) as stream:  # type: ignore[type-var]
        async for fact in stream:
            if isinstance(fact, BlockFact | BindingFact | TombstoneFact):
                context.disk.clock.observe(fact.stamp, wall_ns)
            elif isinstance(fact, VanishedFact):
                await in_steps(context.merger.vanished(fact.segment))
            try:
                fresh += context.merger.apply(fact)
            except TierFullError as error:  # the index: what is known stays known, the root stays usable
                context.facts_refused += 1
                if isinstance(fact, BlockFact | BindingFact):
                    context.disk.table[fact.location.segment].refused = True
                refused = error
            context.facts_applied += 1
    context.merger.names.settle()
    if refused is not None:
        logger.warning("%d facts of the root are not known to this store: %s", context.facts_refused, refused)
    return fresh


async def in_steps(work: Iterator[None]) -> None:
    """Do ``work``, tens of microseconds a step, with turns of the loop between; all of it, also when cancelled."""
    try:
        for count, _ in enumerate(work, 1):
            if not count % STEPS_PER_TURN:
                await asyncio.sleep(0)
    finally:
        for _ in work:
            continue


async def _load(context: StoreContext, checkpoint: Checkpoint) -> Sequence[Cover]:
    """Take the checkpoint's columns for the index; what it covers need not be read again."""
    catalog, table = context.catalog, context.disk.table
    columns = dict(checkpoint.columns)
    tombstone_ids = columns.pop("tombstone_id", np.zeros((0, BLOCK_ID_BYTES), np.uint8))
    tombstone_stamps = columns.pop("tombstone_stamp", np.zeros(0, np.uint64))
    rivals = columns.pop("rival", np.zeros((0, _RIVAL.size), np.uint8))
    try:
        check_columns(columns)
        if rivals.dtype != np.uint8 or rivals.ndim != 2 or rivals.shape[1] != _RIVAL.size:
            raise CorruptionError("the checkpoint's list of contested names is unusable")
        if len(columns["segment"]) and not 0 <= columns["segment"].max(initial=0) < len(checkpoint.covers):
            raise CorruptionError("the checkpoint names a segment that it does not list")
        index = await asyncio.to_thread(BlockIndex.from_columns, columns, capacity_max=context.config.index_blocks_max)
    except (CorruptionError, TierFullError) as error:
        logger.warning("a checkpoint of %s is not used, the segments are read instead: %s", table.root, error)
        return ()
    for cover in checkpoint.covers:  # in order: numbers in the columns are positions in this list
        table.add(
            cover.identity, own=cover.identity.writer in context.recovery.own_writers
        ).live_bytes = cover.live_bytes
    catalog.adopt_index(index)
    for block_id, stamp in zip(tombstone_ids, tombstone_stamps.tolist(), strict=True):
        context.merger.facts.bury(block_id.tobytes(), stamp)
    context.merger.names.remember(
        Name(block_id, key, None if parent == NO_PARENT else parent, stamp)
        for block_id, key, parent, stamp in _RIVAL.iter_unpack(rivals.tobytes())
    )
    newest = int(columns["stamp"].max(initial=0))
    context.disk.clock.observe(newest, context.platform.clock.wall_ns())
    return checkpoint.covers


async def save_checkpoint(context: StoreContext, root: Root, claim: WriterClaim) -> None:
    """At a clean end: what is known, for the next opening. A failure costs only time then."""
    if not context.disk.writer.complete:
        return  # names and deletions that are nowhere on disk would be taken for durable by the next session
    written = context.disk.writer.statistics
    if not written.records and not written.notes and context.facts_applied == context.facts_since_checkpoint == 0:
        return  # nothing was learnt that the checkpoint there does not say
    if any(
        entry.unreadable or entry.damaged or (entry.live_bytes and not entry.scanned_bytes)
        for entry in context.disk.table
    ):
        # It would leave out blocks of that segment (the last kind: recovery could not seal it, so it is read again),
        # and with them their names, which covered segments tell; and what was read wrongly once may be sound: the next
        # session asks the segments.
        return
    if context.facts_refused or context.index_doubtful:
        return  # it would say that what was refused need not be read again
    covers, positions = covers_of(context.disk.table)
    columns = await asyncio.to_thread(_columns_of, context, positions)
    if context.merger.hearsay or (columns["flags"] & PROVISIONAL).any():
        return  # another writer may never have made it durable: the next session asks the segments
    if context.merger.reads_older:
        return  # it has room for one record of a block: of these, two count
    try:
        await write_checkpoint(
            context.platform.storage,
            context.platform.engine,
            posixpath.join(claim.path, CHECKPOINT_FILE),
            store=root.store,
            columns=columns,
            covers=covers,
        )
    except OSError as error:
        logger.warning("no checkpoint was written in %s (opening will read the segments): %s", claim.path, error)


def _columns_of(context: StoreContext, positions: Mapping[int, int]) -> Columns:
    """Blocks that are on disk, with segments called by their position in the checkpoint; deletions, contested names.

    In a worker thread, at the end of a session: nothing changes any more.
    """
    columns = context.catalog.index.export_columns()
    segment = columns["segment"]
    new_number = np.full(int(segment.max(initial=-1)) + 2, -1, dtype=np.int32)  # the last is what -1 looks up
    for number, position in positions.items():
        if number < len(new_number) - 1:
            new_number[number] = position
    columns["segment"] = new_number[segment]
    columns = select_columns(columns, columns["segment"] >= 0)
    tombstones = context.merger.facts.tombstones()
    ids = np.frombuffer(b"".join(tombstones), dtype=np.uint8).reshape(-1, BLOCK_ID_BYTES)
    columns["tombstone_id"] = ids
    columns["tombstone_stamp"] = np.fromiter(tombstones.values(), dtype=np.uint64, count=len(tombstones))
    rivals = b"".join(
        _RIVAL.pack(name.block_id, name.key, name.parent or NO_PARENT, name.stamp)
        for name in context.merger.names.rivals()
    )
    columns["rival"] = np.frombuffer(rivals, dtype=np.uint8).reshape(-1, _RIVAL.size)
    return columns
