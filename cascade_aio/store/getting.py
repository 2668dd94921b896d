"""The read path: name → row → lease.

Hot: a dictionary look-up and a counter, never suspends. Cold: one load per block however many ask
(single flight), run as a task of the store, so that a caller who gives up leaves the kernel's
buffers in good hands; the load is cancelled when its last waiter has gone.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import (
    BlockNotFoundError,
    CascadeError,
    ClosedError,
    ConfigError,
    CorruptionError,
    InternalError,
    TierFullError,
)
from cascade_aio.model import BLOCK_ID_BYTES, PREFIX_KEY_BYTES, BlockId, PrefixKey, Tier, is_prefix_key
from cascade_aio.segments.facts import Location
from cascade_aio.segments.format import RecordHeader
from cascade_aio.segments.reader import RecordRead
from cascade_aio.store.block import Block
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.tiers.shm import Extent

_PREFIX_ARENA_SHARE_MAX = 0.9
"""One prefix may pin at most this share of the arena: a longer one ends there instead of waiting for itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixLookup:
    """How much of a prompt is cached: ``tiers[i]`` is the fastest tier of the i-th leading block."""

    tiers: tuple[Tier, ...]

    def __len__(self) -> int:
        return len(self.tiers)

    def __int__(self) -> int:
        return len(self.tiers)

    @property
    def blocks(self) -> int:
        return len(self.tiers)


class _Load:
    """A block on its way from disk. ``waiters`` get the copy with one hold each."""

    __slots__ = ("block_id", "task", "waiters")

    def __init__(self, block_id: BlockId) -> None:
        self.block_id = block_id
        self.waiters: set[asyncio.Future[Copy]] = set()
        self.task: asyncio.Task[None] | None = None


class Getter:
    """Reads of one store."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._catalog = context.catalog
        self._hot = context.catalog.hot
        self._loads: dict[int, _Load] = {}
        context.catalog.on_forget = self._forget

    @property
    def loading(self) -> int:
        """Loads in progress."""
        return len(self._loads)

    def is_loading(self, row: int) -> bool:
        return row in self._loads

    # -- names --------------------------------------------------------------------------------

    def find(self, name: BlockId | PrefixKey | str) -> int:
        """The row of a name, or -1. Raises ``ConfigError`` for what is no name."""
        if isinstance(name, str):
            name = BlockId.from_hex(name)
        if isinstance(name, bytes):
            if len(name) == BLOCK_ID_BYTES:
                return self._catalog.index.find(name)
            if len(name) == PREFIX_KEY_BYTES:
                return self._catalog.index.find_prefix(name)
        raise ConfigError(
            f"{name!r:.100} names no block; pass a BlockId, its {2 * BLOCK_ID_BYTES} hex digits, or a PrefixKey"
        )

    def resolve(self, name: BlockId | PrefixKey | str) -> int:
        """The row of a name. Raises ``BlockNotFoundError`` for an unknown one."""
        row = self.find(name)
        if row < 0:
            self._context.counters.misses += 1
            raise _not_found(name, "no tier holds it; recompute it, or refresh() if another process stored it just now")
        return row

    # -- leases -------------------------------------------------------------------------------

    def try_hot(self, name: BlockId | PrefixKey | str) -> Block | None:
        """A lease on a copy in the arena, or ``None`` when it takes I/O or is unknown. Never suspends."""
        context = self._context
        context.check()
        try:
            copy = self._hot.get(name)  # type: ignore[arg-type]
        except TypeError:  # unhashable: no name, as ``find`` will say
            copy = None
        if copy is None:
            row = self.find(name)
            copy = self._catalog.copies.get(row)
            if copy is None:
                return None
        counters = context.counters
        counters.gets += 1
        counters.shm_hits += 1
        self._catalog.touch(copy.row)
        return context.desk.lend(copy, Tier.SHM)

    async def load(self, name: BlockId | PrefixKey | str) -> Block:
        """A lease, reading the block from disk if need be. See ``Store.get`` for the errors."""
        context = self._context
        context.check()
        context.counters.gets += 1
        row = self.resolve(name)
        self._catalog.touch(row)
        waiter = self._join(row)
        try:
            async with asyncio.timeout(context.config.read_seconds_max):
                copy = await waiter
        except TimeoutError:
            self._leave(row, waiter)
            context.counters.late_reads += 1
            context.counters.misses += 1
            raise _not_found(
                name,
                f"its disk read took longer than read_seconds_max={context.config.read_seconds_max:g}; recompute it",
            ) from None
        except BaseException:
            self._leave(row, waiter)
            raise
        context.counters.disk_hits += 1
        try:
            return context.desk.lend(copy, Tier.DISK)
        finally:
            self._catalog.release(copy)

    def lookup(self, keys: Sequence[PrefixKey]) -> PrefixLookup:
        """How many leading keys are cached and where. No I/O, no lease: it may change at the next await."""
        self._context.check()
        tiers: list[Tier] = []
        for key in keys:
            row = self.find_prefix(key)
            if row < 0:
                break
            tiers.append(Tier.SHM if row in self._catalog.copies else Tier.DISK)
        return PrefixLookup(tuple(tiers))

    def find_prefix(self, key: PrefixKey) -> int:
        if not is_prefix_key(key):
            raise ConfigError(f"{key!r:.100} is no PrefixKey; make them with cascade_aio.prefix_keys(token_ids, ...)")
        return self._catalog.index.find_prefix(key)

    async def load_prefix(self, keys: Sequence[PrefixKey]) -> list[Block]:
        """Leases on the longest cached prefix, read in parallel; it ends before the first block that fails."""
        context = self._context
        context.check()
        rows = self._cached_rows(keys)
        for row in reversed(rows):  # the last block first: a prefix stays hotter than what follows it
            self._catalog.touch(row)
        context.counters.gets += len(rows)
        pending: list[tuple[int, Block | asyncio.Future[Copy]]] = []
        blocks: list[Block] = []
        try:
            for row in rows:
                copy = self._catalog.copies.get(row)
                pending.append((row, self._join(row) if copy is None else context.desk.lend(copy, Tier.SHM)))
            await self._collect(pending, blocks)
        except BaseException:
            for block in blocks:
                block.release()
            raise
        finally:
            for row, item in pending[len(blocks) :]:
                if isinstance(item, Block):
                    if not item.released:
                        item.release()
                else:
                    self._leave(row, item)
        return blocks

    async def _collect(self, pending: Sequence[tuple[int, Block | asyncio.Future[Copy]]], blocks: list[Block]) -> None:
        """Move what arrives, in order, from ``pending`` to ``blocks``; stop at the first that does not."""
        context = self._context
        try:
            async with asyncio.timeout(context.config.read_seconds_max):
                for _, item in pending:
                    if isinstance(item, Block):
                        context.counters.shm_hits += 1
                        blocks.append(item)
                        continue
                    copy = await item
                    context.counters.disk_hits += 1
                    blocks.append(context.desk.lend(copy, Tier.DISK))
                    self._catalog.release(copy)
        except TimeoutError:
            context.counters.late_reads += 1
        except ClosedError:
            raise
        except (BlockNotFoundError, CorruptionError, TierFullError, OSError):
            context.counters.misses += 1  # the load has counted and reported the cause

    def _cached_rows(self, keys: Sequence[PrefixKey]) -> list[int]:
        catalog = self._catalog
        budget = int(catalog.shm.capacity_bytes * _PREFIX_ARENA_SHARE_MAX)
        rows: list[int] = []
        seen: set[int] = set()
        for key in keys:
            row = self.find_prefix(key)
            if row < 0:
                self._context.counters.misses += 1
                break
            if row not in seen:
                copy = catalog.copies.get(row)
                budget -= catalog.stored_bytes(row) if copy is None else copy.extent.nbytes
                seen.add(row)
            if budget < 0 and rows:
                break
            rows.append(row)
        return rows

    # -- loads --------------------------------------------------------------------------------

    def prefetch(self, row: int) -> bool:
        """Start loading ``row`` into the arena if it is only on disk; nobody waits for it. False if nothing to do."""
        if row in self._catalog.copies or row in self._loads:
            return False
        self._start(row)
        return True

    def _join(self, row: int) -> asyncio.Future[Copy]:
        """A future of the copy with one hold for the caller, who ends it by release or ``_leave``."""
        load = self._loads.get(row)
        if load is None:
            load = self._start(row)
        else:
            self._context.counters.single_flight_joins += 1
        waiter: asyncio.Future[Copy] = self._context.loop.create_future()
        load.waiters.add(waiter)
        return waiter

    def _leave(self, row: int, waiter: asyncio.Future[Copy]) -> None:
        """The waiter gives up: undo its hold if it was granted; cancel the load if it was the last."""
        if waiter.done() and not waiter.cancelled():
            if waiter.exception() is None:
                self._catalog.release(waiter.result())
            return
        load = self._loads.get(row)
        if load is not None and waiter in load.waiters:
            load.waiters.discard(waiter)
            if not load.waiters and load.task is not None:
                load.task.cancel()
                del self._loads[row]  # a newcomer starts afresh, the cancelled task drains by itself
        waiter.cancel()

    def _start(self, row: int) -> _Load:
        load = self._loads[row] = _Load(self._catalog.index.block_id(row))
        load.task = self._context.tasks.spawn(self._run(row, load), name=f"cascade-load-{row}")
        return load

    async def _run(self, row: int, load: _Load) -> None:
        """The load itself: never raises but on cancellation; the outcome goes to the waiters."""
        try:
            copy = await self._bring(row, load)
        except asyncio.CancelledError:
            self._settle(row, load, ClosedError("the store was closed while the block was being read"))
            raise
        except (CascadeError, OSError) as error:
            self._settle(row, load, error)
        except BaseException as error:
            # Nobody foresaw this: the task scope makes it the store's failure, and nobody is left waiting.
            self._settle(row, load, InternalError(f"reading a block failed: {error!r}; please report this"))
            raise
        else:
            self._settle(row, load, copy)

    def _settle(self, row: int, load: _Load, outcome: Copy | Exception) -> None:
        if self._loads.get(row) is load:
            del self._loads[row]
        for waiter in load.waiters:
            if waiter.done():
                continue
            if isinstance(outcome, Copy):
                self._catalog.hold(outcome)
                waiter.set_result(outcome)
            else:
                waiter.set_exception(outcome)

    async def _bring(self, row: int, load: _Load) -> Copy:
        """The block in the arena. Whatever a read ends with counts only if the block is still where it was read."""
        context, catalog = self._context, self._catalog
        while True:
            present = self._present(row, load)
            if present is not None:
                return present
            location = catalog.index.location(row)
            assert location is not None, "a row without a copy in the arena has one on disk"
            digest = catalog.index.digest(row)
            nbytes = catalog.record_bytes(row, location[2])
            read = RecordRead(Location(*location), nbytes, memoryview(b""), digest, *catalog.index.lengths(row))
            extent = await context.room.reserve(nbytes, demand=True, wait_s=context.config.put_wait_seconds_max)
            kept = False
            try:
                failure: CascadeError | OSError | None = None
                read.extent = extent.memory
                try:
                    header = await context.disk.read(read)
                except (CascadeError, OSError) as error:
                    failure = error
                present = self._present(row, load)
                if present is not None:
                    return present
                if failure is None:
                    copy = _copy_of(header, read, extent)
                    catalog.admit(copy, row)
                    kept = True
                    return copy
                if catalog.index.location(row) == location:
                    raise self._judge(row, location[0], failure)
            finally:
                if not kept:
                    context.shm.free(extent)
                    context.room.freed()

    def _present(self, row: int, load: _Load) -> Copy | None:
        """The copy if the block was stored again meanwhile. Raises ``BlockNotFoundError`` if it is gone: then
        the row may be another block's by now."""
        if self._loads.get(row) is not load:
            raise _not_found(load.block_id, "it was deleted or evicted before it was read")
        return self._catalog.copies.get(row)

    def _judge(self, row: int, segment: int, failure: CascadeError | OSError) -> CascadeError | OSError:
        """What a failed read says about the block: damaged and vanished ones are forgotten, others tried again.

        In a segment that another writer has open, a record may be seen before all of its bytes are
        there: that is a miss, not damage.
        """
        if isinstance(failure, CorruptionError):
            entry = self._catalog.segments.get(segment)
            if entry is not None and not entry.own and not entry.sealed:
                failure = _not_found(self._catalog.index.block_id(row), "its writer has not finished it; recompute it")
            else:
                self._context.report_damage(failure)
        elif isinstance(failure, OSError):
            self._context.counters.read_errors += 1
        if isinstance(failure, CorruptionError | BlockNotFoundError):
            self._catalog.unplace(row)
        return failure

    def _forget(self, row: int) -> None:
        """The row is being removed: a load of it must not come back as another block."""
        self._loads.pop(row, None)


def _copy_of(header: RecordHeader, read: RecordRead, extent: Extent) -> Copy:
    return Copy(
        extent,
        header_bytes=read.location.header_pages * PAGE_BYTES,
        digest=read.digest,
        key_bytes=read.key_bytes,
        value_bytes=read.value_bytes,
        value_offset=header.value_offset,
        chunk_crcs=header.chunk_crcs,
        meta=header.meta,
    )


def _not_found(name: object, why: str) -> BlockNotFoundError:
    return BlockNotFoundError(f"block {name} is not cached: {why}")
