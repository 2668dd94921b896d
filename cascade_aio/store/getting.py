"""The read path: name → row → lease.

Hot: a dictionary look-up and a counter, never suspends. Cold: one load per block however many ask
(single flight), run as a task of the store, so that a caller who gives up leaves the kernel's
buffers in good hands; the load is cancelled when its last waiter has gone.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

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
from cascade_aio.store.fetching import Fetcher, FetchWaiter
from cascade_aio.store.loading import Loader, Waiter
from cascade_aio.store.room import Claim

_PREFIX_ARENA_SHARE_MAX = 0.9
"""One prefix may pin at most this share of the arena: a longer one ends there instead of waiting for itself."""


_Pending = tuple[int | PrefixKey, Block | Waiter | FetchWaiter]
"""A row and what is awaited of it, or a name that only other ranks know."""


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


class LookupAcrossRanks(PrefixLookup):
    """What this rank knows; awaited, also what the other ranks have."""

    __slots__ = ("_getter", "_keys")
    _getter: Getter
    _keys: tuple[PrefixKey, ...]

    @classmethod
    def of(cls, tiers: tuple[Tier, ...], getter: Getter, keys: Sequence[PrefixKey]) -> LookupAcrossRanks:
        lookup = cls(tiers)
        object.__setattr__(lookup, "_getter", getter)
        object.__setattr__(lookup, "_keys", tuple(keys))
        return lookup

    async def _full(self) -> PrefixLookup:
        return await self._getter.look_across_ranks(self._keys)


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
        devices = self._context.devices
        tiers: list[Tier] = []
        for key in keys:
            row = self.find_prefix(key)
            if row < 0:
                break
            if devices is not None and devices.holds(row):
                tiers.append(Tier.GPU)
            else:
                tiers.append(Tier.SHM if self._catalog.is_in_arena(row) else Tier.DISK)
        if self._context.sharing is not None:
            return LookupAcrossRanks.of(tuple(tiers), self, keys)
        return PrefixLookup(tuple(tiers))

    async def look_across_ranks(self, keys: Sequence[PrefixKey]) -> PrefixLookup:
        """``lookup``, and what other ranks have: one round trip per rank that keeps any of the names."""
        self._context.check()
        sharing = self._context.sharing
        assert sharing is not None, "asked of stores with a communicator"
        absent = [raw_prefix(key) for key in keys if not self._catalog.is_in_arena(self.find_prefix(key))]
        listed = await sharing.fetcher.sizes(absent) if absent else {}
        self._context.check()
        tiers: list[Tier] = []
        for key in keys:
            row = self.find_prefix(key)
            if self._catalog.is_in_arena(row):
                tiers.append(Tier.SHM)
            elif key in listed:
                tiers.append(Tier.REMOTE)
            elif row >= 0:
                tiers.append(Tier.DISK)
            else:
                break
        return PrefixLookup(tuple(tiers))

    def find_prefix(self, key: PrefixKey) -> int:
        return self._catalog.index.find_prefix(raw_prefix(key))

    async def load_prefix(self, keys: Sequence[PrefixKey]) -> list[Block]:
        """Leases on the longest cached prefix, read in parallel; it ends before the first block that fails."""
        context = self._context
        context.check()
        listed = await self._listed_elsewhere(keys)
        parts = self._cached_parts(keys, listed)
        for part in reversed(parts):  # the last block first: a prefix stays hotter than what follows it
            if isinstance(part, int):
                self._catalog.touch(part)
        context.counters.gets += len(parts)
        pending: list[_Pending] = []
        blocks: list[Block] = []
        try:
            for part in parts:
                pending.append((part, self._begin(part)))
            await self._collect(pending, blocks)
        except BaseException:
            for block in blocks:
                block.release()
            raise
        finally:
            for part, item in pending[len(blocks) :]:
                self._give_up(part, item)
        return blocks

    async def _listed_elsewhere(self, keys: Sequence[PrefixKey]) -> dict[bytes, int]:
        """Record bytes of those names that this store does not know and another rank has."""
        sharing = self._context.sharing
        unknown = [] if sharing is None else [raw_prefix(key) for key in keys if self.find_prefix(key) < 0]
        if sharing is None or not unknown:
            return {}
        listed = await sharing.fetcher.sizes(unknown)
        self._context.check()
        return listed

    async def is_elsewhere(self, name: BlockId | PrefixKey | str) -> bool:
        """Whether another rank has the block in its arena. A hint; never true without a communicator."""
        sharing = self._context.sharing
        return sharing is not None and bool(await sharing.fetcher.sizes([raw_name(name)]))

    def _begin(self, part: int | PrefixKey) -> Block | Waiter | FetchWaiter:
        context = self._context
        if not isinstance(part, int):
            assert context.sharing is not None, part
            return context.sharing.fetcher.join(part)
        copy = self._catalog.copies.get(part)
        return self.loader.join(part) if copy is None else context.desk.lend(copy, Tier.SHM)

    def _give_up(self, part: int | PrefixKey, item: Block | Waiter | FetchWaiter) -> None:
        if isinstance(item, Block):
            if not item.released:
                item.release()
        elif isinstance(part, int):
            self.loader.leave(part, cast(Waiter, item))
        elif self._context.sharing is not None:
            self._context.sharing.fetcher.leave(part, cast(FetchWaiter, item))

    async def _collect(self, pending: Sequence[_Pending], blocks: list[Block]) -> None:
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
                    if copy is None:  # the rank that had it has not any more
                        context.counters.misses += 1
                        return
                    blocks.append(self._lend_loaded(copy))
                    self._catalog.release(copy)
        except TimeoutError:
            context.counters.late_reads += 1
            for part, item in pending[len(blocks) :]:
                if isinstance(part, int) and not isinstance(item, Block):
                    self.loader.late(part)
        except ClosedError:
            raise
        except (BlockNotFoundError, CorruptionError, TierFullError, OSError):
            context.counters.misses += 1  # the load has counted and reported the cause

    def _cached_parts(self, keys: Sequence[PrefixKey], listed: Mapping[bytes, int]) -> list[int | PrefixKey]:
        """The longest prefix that fits: rows, and names of blocks that only other ranks have."""
        catalog = self._catalog
        budget = int(catalog.shm.capacity_bytes * _PREFIX_ARENA_SHARE_MAX)
        parts: list[int | PrefixKey] = []
        seen: set[int | PrefixKey] = set()
        for key in keys:
            row = self.find_prefix(key)
            part = row if row >= 0 else key
            if row < 0 and key not in listed:
                self._context.counters.misses += 1
                break
            if part not in seen:
                copy = catalog.copies.get(row)
                if row < 0:
                    budget -= listed[key]
                else:
                    budget -= catalog.stored_bytes(row) if copy is None else copy.extent.nbytes
                seen.add(part)
            if budget < 0 and parts:
                break
            parts.append(part)
        return parts


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
