"""The write path: bytes → extent → digest → sealed copy → queue of the segment writer.

A put returns once the block is readable. Nothing is visible before ``_seal``, which runs in one turn
of the loop: a put that fails or is cancelled earlier leaves no trace but a freed extent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cascade_aio.abc.storage import PAGE_BYTES, Ingested
from cascade_aio.errors import ConfigError, LeaseError, TierFullError
from cascade_aio.model import META_BYTES_MAX, BlockId, BlockMeta, PrefixKey, as_bytes_view, is_prefix_key
from cascade_aio.segments.format import CHUNK_BYTES, header_pages_for, payload_bytes_of, value_offset_of
from cascade_aio.store.block import encode_meta
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.store.getting import Getter
from cascade_aio.store.merging import PROVISIONAL
from cascade_aio.store.naming import Name
from cascade_aio.tiers.shm import Extent

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """A block on its way in: everything known before its bytes are digested."""

    key_bytes: int
    value_bytes: int
    value_offset: int
    header_bytes: int
    payload_bytes: int
    prefix: PrefixKey | None
    parent: PrefixKey | None
    meta: bytes

    @property
    def record_bytes(self) -> int:
        return self.header_bytes + self.payload_bytes


def make_draft(
    key_bytes: int,
    value_bytes: int,
    prefix: PrefixKey | None,
    parent: PrefixKey | None,
    meta: BlockMeta | None,
) -> Draft:
    """Lay a block out. Raises ``ConfigError`` for names or metadata that cannot be stored."""
    for name, part in (("prefix", prefix), ("parent", parent)):
        if part is not None and not is_prefix_key(part):
            raise ConfigError(f"{name}={part!r:.100} is no PrefixKey; make them with cascade_aio.prefix_keys()")
    if parent is not None and prefix is None:
        raise ConfigError("parent was given without prefix; a parent belongs to a prefix key, pass both")
    if parent is not None and parent == prefix:
        raise ConfigError("parent and prefix are the same key; a block cannot be its own parent")
    if meta is not None and not isinstance(meta, BlockMeta):
        raise ConfigError(f"meta is a {type(meta).__name__}; pass a cascade_aio.BlockMeta")
    raw_meta = b"" if meta is None else encode_meta(meta)  # ConfigError for what cannot be read back
    if len(raw_meta) > META_BYTES_MAX:
        raise ConfigError(f"meta takes {len(raw_meta)} bytes encoded, at most {META_BYTES_MAX} are stored")
    payload_bytes = payload_bytes_of(key_bytes, value_bytes)
    pages = header_pages_for(payload_bytes, len(raw_meta), 0 if prefix is None else 1)
    return Draft(
        key_bytes,
        value_bytes,
        value_offset_of(key_bytes),
        pages * PAGE_BYTES,
        payload_bytes,
        prefix,
        parent,
        raw_meta,
    )


class Putter:
    """Writes of one store."""

    def __init__(self, context: StoreContext, getter: Getter) -> None:
        self._context = context
        self._catalog = context.catalog
        self._getter = getter
        self._putting: dict[PrefixKey, asyncio.Future[None]] = {}

    @property
    def in_progress(self) -> int:
        """Puts of prefix keys that others wait for."""
        return len(self._putting)

    def bound(self, prefix: PrefixKey | None) -> BlockId | None:
        """The block that ``prefix`` names already, if that can be promised: the next flush covers it.

        A block whose only record may vanish with another writer is written from its copy in the arena;
        without one there is no such block yet, and the caller's bytes are needed.
        """
        if prefix is None:
            return None
        row = self._getter.find_prefix(prefix)
        if row < 0:
            return None
        index = self._catalog.index
        if index.location(row) is None or index.flags(row) & PROVISIONAL:
            copy = self._catalog.copies.get(row)
            if copy is None:
                return None
            self._context.append_unless_durable(copy)
        names = self._catalog.names
        if prefix in names.doubtful:  # the block is there to stay, and its name may not be: we say it, too
            names.doubtful.discard(prefix)
            held = index.binding(prefix)
            assert held is not None, "it names the block"
            self._context.append_binding(index.block_id(row), prefix, held[1], held[2])
        self._context.counters.puts_bound += 1
        return self._catalog.index.block_id(row)

    async def put(
        self,
        key: Buffer,
        value: Buffer,
        prefix: PrefixKey | None,
        parent: PrefixKey | None,
        meta: BlockMeta | None,
    ) -> BlockId:
        """See ``Store.put``."""
        known = self.bound(prefix)
        if known is not None:
            return known
        key_view, value_view = as_bytes_view(key, "key"), as_bytes_view(value, "value")
        draft = self.draft(len(key_view), len(value_view), prefix, parent, meta)
        if prefix is None:
            return await self._put_bytes(draft, key_view, value_view)
        while (rival := self._putting.get(prefix)) is not None:
            await asyncio.wait((rival,))
            known = self.bound(prefix)
            if known is not None:
                return known
        mine = self._putting[prefix] = self._context.loop.create_future()
        try:
            return await self._put_bytes(draft, key_view, value_view)
        finally:
            del self._putting[prefix]
            mine.set_result(None)

    async def _put_bytes(self, draft: Draft, key: memoryview, value: memoryview) -> BlockId:
        context = self._context
        extent = await self.reserve_extent(draft)
        sealed = False
        try:
            ingested = await context.platform.engine.ingest(
                key,
                value,
                extent.memory[draft.header_bytes :],
                draft.value_offset,
                CHUNK_BYTES,
                context.config.digest,
            )
            context.check()
            block_id, sealed = self.seal(draft, extent, ingested)
            return block_id
        finally:
            if not sealed:
                context.shm.free(extent)
                context.room.freed()

    async def reserve_extent(self, draft: Draft) -> Extent:
        """Room for the record in the arena, after the segment writer has caught up enough."""
        context = self._context
        context.room.check_size(draft.record_bytes)
        context.disk.check_record(draft.record_bytes)
        wait_s = context.config.put_wait_seconds_max
        await context.disk.wait_backlog(draft.record_bytes, wait_s)
        return await context.room.reserve(draft.record_bytes, demand=False, wait_s=wait_s)

    def draft(
        self,
        key_bytes: int,
        value_bytes: int,
        prefix: PrefixKey | None,
        parent: PrefixKey | None,
        meta: BlockMeta | None,
    ) -> Draft:
        """Raises ``ConfigError``; see ``make_draft``."""
        return make_draft(key_bytes, value_bytes, prefix, parent, meta)

    def seal(self, draft: Draft, extent: Extent, ingested: Ingested) -> tuple[BlockId, bool]:
        """Make the block visible: (its id, whether ``extent`` is now the catalog's).

        Raises ``DigestConflictError`` and changes nothing if another block has this id.
        """
        context, catalog = self._context, self._catalog
        counters = context.counters
        row = catalog.row_of(ingested.digest, draft.key_bytes, draft.value_bytes)
        known = self.bound(draft.prefix)  # a reserve() of the same prefix may have come first
        if known is not None:
            return known, False
        counters.puts += 1
        counters.put_bytes += draft.key_bytes + draft.value_bytes
        copy = Copy(
            extent,
            header_bytes=draft.header_bytes,
            digest=ingested.digest,
            key_bytes=draft.key_bytes,
            value_bytes=draft.value_bytes,
            value_offset=draft.value_offset,
            chunk_crcs=ingested.chunk_crcs,
            meta=draft.meta,
        )
        if row >= 0:
            counters.puts_deduplicated += 1
            counters.deduplicated_bytes += draft.key_bytes + draft.value_bytes
            if draft.prefix is not None:
                stamp = context.new_stamp(copy.block_id)
                catalog.names.claim(Name(copy.block_id, draft.prefix, draft.parent, stamp))
            catalog.touch(row)
            resident = catalog.copies.get(row)
            if resident is None:
                catalog.admit(copy, row)  # it was on disk only: the bytes are here, keep them
            context.append_unless_durable(resident or copy)
            if draft.prefix is not None:  # after the record: a name waits for the record that was appended last
                context.append_binding(copy.block_id, draft.prefix, draft.parent, stamp)
            return self._named(draft, copy.block_id), resident is None
        row = catalog.index.add(ingested.digest, draft.key_bytes, draft.value_bytes)
        stamp = context.new_stamp(copy.block_id)
        if draft.prefix is not None:
            try:
                catalog.names.claim(Name(copy.block_id, draft.prefix, draft.parent, stamp))
            except TierFullError:
                catalog.index.remove(row)
                raise
        copy.stamp = stamp
        catalog.admit(copy, row)
        context.append(copy, () if draft.prefix is None else ((draft.prefix, draft.parent),), stamp)
        return self._named(draft, copy.block_id), True

    def _named(self, draft: Draft, block_id: BlockId) -> BlockId:
        """What the prefix names: the first writer's block, as long as it lasts; ours is there should it vanish."""
        row = -1 if draft.prefix is None else self._catalog.index.find_prefix(draft.prefix)
        return block_id if row < 0 else self._catalog.index.block_id(row)


class Slot:
    """A reserved block to be filled in place: ``key`` and ``value`` are writable arrays in the arena.

    After the scope has ended without an exception, ``block_id`` names the block. ``bound`` tells that
    the prefix key was bound already: then filling is not needed and what is filled is dropped.
    """

    __slots__ = ("_arrays", "_block_id", "bound")

    def __init__(self, key: npt.NDArray[np.uint8], value: npt.NDArray[np.uint8], bound: bool) -> None:
        self._arrays: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None = (key, value)
        self._block_id: BlockId | None = None
        self.bound = bound

    def _open(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        if self._arrays is None:
            raise LeaseError("this reservation has ended; its memory is not yours any more")
        return self._arrays

    @property
    def key(self) -> npt.NDArray[np.uint8]:
        """Writable uint8 array of shape (key_bytes,); fill all of it (its content is arbitrary before)."""
        return self._open()[0]

    @property
    def value(self) -> npt.NDArray[np.uint8]:
        """Writable uint8 array of shape (value_bytes,)."""
        return self._open()[1]

    def seal_as(self, block_id: BlockId) -> None:
        """For the store: the scope has ended cleanly."""
        self._block_id = block_id

    @property
    def block_id(self) -> BlockId:
        """The id of the sealed block. Raises ``LeaseError`` before the scope has ended cleanly."""
        if self._block_id is None:
            raise LeaseError("this reservation is not sealed; its block_id is known once its scope has ended cleanly")
        return self._block_id


class ReserveRequest:
    """``async with store.reserve(...) as slot``: a clean exit seals, an exception aborts."""

    def __init__(
        self,
        context: StoreContext,
        putter: Putter,
        key_bytes: int,
        value_bytes: int,
        prefix: PrefixKey | None,
        parent: PrefixKey | None,
        meta: BlockMeta | None,
    ) -> None:
        check_part_sizes(key_bytes, value_bytes)
        self._context = context
        self._putter = putter
        self._draft = putter.draft(key_bytes, value_bytes, prefix, parent, meta)
        self._known: BlockId | None = None
        self._extent: Extent | None = None
        self._slot: Slot | None = None

    async def __aenter__(self) -> Slot:
        self._context.check()
        if self._slot is not None:
            raise LeaseError("a reservation can be entered once; call reserve() again")
        draft = self._draft
        self._known = self._putter.bound(draft.prefix)
        extent = self._extent = await self._putter.reserve_extent(draft)
        payload = extent.memory[draft.header_bytes :]
        value_end = draft.value_offset + draft.value_bytes
        self._slot = Slot(
            np.frombuffer(payload[: draft.key_bytes], dtype=np.uint8),
            np.frombuffer(payload[draft.value_offset : value_end], dtype=np.uint8),
            self._known is not None,
        )
        return self._slot

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        slot, extent = self._slot, self._extent
        assert slot is not None, "entered"
        assert extent is not None, "entered"
        survivors = take_arrays(slot)
        try:
            if error is None:
                self._context.check()
                if survivors:
                    extent = self._extent = await self._move_away(extent, survivors)
                    survivors = []
                await self._finish(slot, extent)
        finally:
            if self._extent is not None:
                self._give_back(self._extent, survivors)

    async def _finish(self, slot: Slot, extent: Extent) -> None:
        context, draft = self._context, self._draft
        known = self._putter.bound(draft.prefix) or self._known  # told ``bound``, nobody had to fill it
        if known is not None:
            slot.seal_as(known)
            return
        ingested = await context.platform.engine.digest(
            extent.memory[draft.header_bytes :],
            draft.key_bytes,
            draft.value_offset,
            draft.value_bytes,
            CHUNK_BYTES,
            context.config.digest,
        )
        context.check()
        block_id, sealed = self._putter.seal(draft, extent, ingested)
        slot.seal_as(block_id)
        if sealed:
            self._extent = None

    async def _move_away(self, extent: Extent, survivors: list[weakref.ref[npt.NDArray[np.uint8]]]) -> Extent:
        """Writable arrays of the slot are still referenced: seal a copy that nobody can write to."""
        context = self._context
        context.counters.reserve_copies += 1
        fresh = await self._putter.reserve_extent(self._draft)
        start = self._draft.header_bytes
        try:
            await context.platform.engine.copy([(fresh.memory[start:], extent.memory[start:])])
        except BaseException:
            self._free(fresh)
            raise
        self._give_back(extent, survivors)
        return fresh

    def _give_back(self, extent: Extent, survivors: list[weakref.ref[npt.NDArray[np.uint8]]]) -> None:
        """Free the extent, once nobody can write to it any more."""
        once_dead(survivors, self._context.loop, functools.partial(self._free, extent))

    def _free(self, extent: Extent) -> None:
        self._context.shm.free(extent)
        self._context.room.freed()


def check_part_sizes(key_bytes: int, value_bytes: int) -> None:
    """Raises ``ConfigError`` for what is no number of bytes."""
    for name, nbytes in (("key_bytes", key_bytes), ("value_bytes", value_bytes)):
        if isinstance(nbytes, bool) or nbytes != int(nbytes) or nbytes < 0:
            raise ConfigError(f"{name}={nbytes!r} must be a number of bytes, 0 or more")


def once_dead(
    survivors: list[weakref.ref[npt.NDArray[np.uint8]]], loop: asyncio.AbstractEventLoop, then: Callable[[], None]
) -> None:
    """Call ``then`` once nobody refers to any of ``survivors``: now, or on ``loop`` if it is open by then."""
    arrays = [array for array in (reference() for reference in survivors) if array is not None]
    if not arrays:
        then()
        return
    left = len(arrays)

    def died() -> None:
        nonlocal left
        left -= 1
        if left == 0 and not loop.is_closed():
            loop.call_soon_threadsafe(then)

    for array in arrays:
        weakref.finalize(array, died).atexit = False


def take_arrays(slot: Slot) -> list[weakref.ref[npt.NDArray[np.uint8]]]:
    """End the slot's own references; what is returned is still referenced by somebody else."""
    references = [weakref.ref(array) for array in slot._open()]
    slot._arrays = None
    return [reference for reference in references if reference() is not None]
