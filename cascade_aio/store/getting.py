"""The read path: name → row → lease.

Hot: a dictionary look-up and a counter, never suspends. Cold: one load per block however many ask
(single flight), run as a task of the store, so that a caller who gives up leaves the kernel's
buffers in good hands; the load is cancelled when its last waiter has gone.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

from cascade_aio.errors import (
    BlockNotFoundError,
    ClosedError,
    ConfigError,
    CorruptionError,
    TierFullError,
)
from cascade_aio.model import BLOCK_ID_BYTES, PREFIX_KEY_BYTES, BlockId, PrefixKey, Tier, is_prefix_key
from cascade_aio.store.block import Block
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.store.fetching import Fetcher
from cascade_aio.store.loading import Loader, Waiter
from cascade_aio.store.room import Claim

_PREFIX_ARENA_SHARE_MAX = 0.9
"""One prefix may pin at most this share of the arena: a longer one ends there instead of waiting for itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixLookup:
    """How much of a prompt is cached: ``tiers[i]`` is the fastest tier of the i-th leading block.

    ``await`` it for the full answer: on an embedded store this one, on a client also what only its service knows.
    """

    tiers: tuple[Tier, ...]

    def __await__(self) -> Generator[Any, None, PrefixLookup]:
        return self._full().__await__()

    async def _full(self) -> PrefixLookup:
        return self

    def __len__(self) -> int:
        return len(self.tiers)

    def __int__(self) -> int:
        return len(self.tiers)

    @property
    def blocks(self) -> int:
        return len(self.tiers)


class Getter:
    """Reads of one store."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._catalog = context.catalog
        self._hot = context.catalog.hot
        self.loader = Loader(context)

    @property
    def loading(self) -> int:
        """Loads in progress."""
        return len(self.loader)

    def is_loading(self, row: int) -> bool:
        return row in self.loader

    # -- names --------------------------------------------------------------------------------

    def find(self, name: BlockId | PrefixKey | str) -> int:
        """The row of a name, or -1. Raises ``ConfigError`` for what is no name."""
        raw = raw_name(name)
        index = self._catalog.index
        return index.find(raw) if len(raw) == BLOCK_ID_BYTES else index.find_prefix(raw)

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

    async def load(self, name: BlockId | PrefixKey | str, *, claim: Claim | None = None, early: bool = False) -> Block:
        """A lease, reading the block from disk if need be. See ``Store.get`` for the errors.

        ``early``: as soon as its first bytes are there. A ``claim`` says whose room to take first.
        """
        context = self._context
        context.check()
        context.counters.gets += 1
        if context.sharing is not None and self.find(name) < 0:
            block = await self._load_remote(context.sharing.fetcher, name, claim)
            if block is not None:
                return block
        row = self.resolve(name)
        self._catalog.touch(row)
        waiter = self.loader.join(row, claim=claim, early=early)
        try:
            async with asyncio.timeout(context.config.read_seconds_max):
                copy = await waiter
        except TimeoutError:
            self.loader.late(row)
            self.loader.leave(row, waiter)
            context.counters.late_reads += 1
            context.counters.misses += 1
            raise _not_found(
                name,
                f"its disk read took longer than read_seconds_max={context.config.read_seconds_max:g}; recompute it",
            ) from None
        except BaseException:
            self.loader.leave(row, waiter)
            raise
        try:
            return self._lend_loaded(copy)
        finally:
            self._catalog.release(copy)

    async def _load_remote(
        self, fetcher: Fetcher, name: BlockId | PrefixKey | str, claim: Claim | None
    ) -> Block | None:
        """A lease on a block that this store does not know, from another rank; ``None`` if none has it."""
        raw = raw_name(name)
        waiter = fetcher.join(raw, claim=claim)
        copy: Copy | None = None
        try:
            async with asyncio.timeout(self._context.config.read_seconds_max):
                copy = await waiter
        except TimeoutError:
            self._context.counters.late_reads += 1
        finally:
            if copy is None:
                fetcher.leave(raw, waiter)
        if copy is None:
            return None
        try:
            return self._lend_loaded(copy)
        finally:
            self._catalog.release(copy)

    def _lend_loaded(self, copy: Copy) -> Block:
        """A lease on what a load ended with: read from disk or from another rank, or found in the arena at opening
        and verified now."""
        counters = self._context.counters
        if copy.fetched:
            counters.remote_hits += 1
            return self._context.desk.lend(copy, Tier.REMOTE)
        if copy.rewarmed:
            counters.shm_hits += 1
            return self._context.desk.lend(copy, Tier.SHM)
        counters.disk_hits += 1
        return self._context.desk.lend(copy, Tier.DISK)

    def lookup(self, keys: Sequence[PrefixKey]) -> PrefixLookup:
        """How many leading keys are cached and where. No I/O, no lease: it may change at the next await."""
        self._context.check()
        tiers: list[Tier] = []
        for key in keys:
            row = self.find_prefix(key)
            if row < 0:
                break
            tiers.append(Tier.SHM if self._catalog.is_in_arena(row) else Tier.DISK)
        return PrefixLookup(tuple(tiers))

    def find_prefix(self, key: PrefixKey) -> int:
        return self._catalog.index.find_prefix(raw_prefix(key))

    async def load_prefix(self, keys: Sequence[PrefixKey]) -> list[Block]:
        """Leases on the longest cached prefix, read in parallel; it ends before the first block that fails."""
        context = self._context
        context.check()
        rows = self._cached_rows(keys)
        for row in reversed(rows):  # the last block first: a prefix stays hotter than what follows it
            self._catalog.touch(row)
        context.counters.gets += len(rows)
        pending: list[tuple[int, Block | Waiter]] = []
        blocks: list[Block] = []
        try:
            for row in rows:
                copy = self._catalog.copies.get(row)
                pending.append((row, self.loader.join(row) if copy is None else context.desk.lend(copy, Tier.SHM)))
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
                    self.loader.leave(row, item)
        return blocks

    async def _collect(self, pending: Sequence[tuple[int, Block | Waiter]], blocks: list[Block]) -> None:
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
                    blocks.append(self._lend_loaded(copy))
                    self._catalog.release(copy)
        except TimeoutError:
            context.counters.late_reads += 1
            for row, item in pending[len(blocks) :]:
                if not isinstance(item, Block):
                    self.loader.late(row)
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


def raw_name(name: BlockId | PrefixKey | str) -> bytes:
    """The 16 bytes of a block id or the 32 of a prefix key. Raises ``ConfigError`` for what names no block."""
    raw: object = BlockId.from_hex(name) if isinstance(name, str) else name
    if isinstance(raw, bytes) and len(raw) in (BLOCK_ID_BYTES, PREFIX_KEY_BYTES):
        return raw
    raise ConfigError(
        f"{name!r:.100} names no block; pass a BlockId, its {2 * BLOCK_ID_BYTES} hex digits, or a PrefixKey"
    )


def raw_prefix(key: PrefixKey) -> bytes:
    """The bytes of a prefix key. Raises ``ConfigError`` for anything else."""
    if not is_prefix_key(key):
        raise ConfigError(f"{key!r:.100} is no PrefixKey; make them with cascade_aio.prefix_keys(token_ids, ...)")
    return key


def _not_found(name: object, why: str) -> BlockNotFoundError:
    return BlockNotFoundError(f"block {name} is not cached: {why}")
