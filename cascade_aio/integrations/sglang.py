"""``CascadeHiCache``: this store as the storage (L3) of SGLang's hierarchical cache (interface of SGLang 0.5.23).

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
      '{"backend_name": "cascade_aio", "module_path": "cascade_aio.integrations.sglang",
        "class_name": "CascadeHiCache", "interface_v1": 1, "root": "/scratch/kv", "shm_bytes": "8GiB"}'

SGLang calls from threads of its own that may block; each call is one round through the store, all pages at once. A
page is one block. Its bytes go between SGLang's host pool and the arena without a tensor in between: with two buffers
a page (page-first layouts: keys, values) they are the block's key and value, with any other number the block's value
is those buffers one after the other. Every load is verified; what is damaged, late or evicted is a page not loaded.

Names are made of SGLang's page hash in a namespace of model, page geometry, layout, rank and SGLang's version. MLA
pages are equal on all ranks of a tensor-parallel group: one rank writes them, all read them. Ranks are processes, so
several of them want a node service (``service``) or find each other's pages through the root, seconds later.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cascade_aio.errors import BlockNotFoundError, CascadeError, ClosedError, ConfigError
from cascade_aio.integrations._opening import AnyStore, place_of
from cascade_aio.integrations._threaded import ThreadedStore
from cascade_aio.model import BlockMeta, Namespace, PrefixKey, as_bytes_view, prefix_root

try:
    import sglang
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorage,
        PoolHitPolicy,
        PoolName,
        PoolTransferResult,
    )
except ImportError as error:
    raise ImportError(
        f"cascade_aio.integrations.sglang needs SGLang 0.5.23 ({error}); see examples/sglang/README.md"
    ) from error

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo, PoolTransfer
    from sglang.srt.mem_cache.pool_host import HostKVCache

logger = logging.getLogger("cascade_aio.sglang")

T = TypeVar("T")

LAYOUT = "sglang/page/1"
"""Name and version of what a block holds, as the module's docstring states it."""

STORES_AT_ONCE = 8
"""Pages being stored at a time, so that loads find room in the queues."""

REFRESH_SECONDS_MIN = 1.0
"""A prefix that ends early is a reason to look for other writers' blocks at most so often."""

_OWN_SETTINGS = ("backend_name", "module_path", "class_name", "interface_v1", "salt", "revision")
_FAILURES = (CascadeError, OSError)
_KV = "kv"


class CascadeHiCache(HiCacheStorage):  # type: ignore[misc]
    """See the module's docstring. Every call blocks until it is done; calls may come from any thread."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        """Settings are ``storage_config.extra_config``: ``root`` and the settings of ``open_store``, or ``service``,
        the socket of a node service; ``salt`` separates tenants, ``revision`` names the model's revision.

        Raises ``ConfigError`` for settings that are wrong, and what opening raises.
        """
        given = dict(storage_config.extra_config or {})
        own = {name: given.pop(name) for name in _OWN_SETTINGS if name in given}
        place = place_of(given, who="extra_config", own=_OWN_SETTINGS)
        for name in ("salt", "revision"):
            if not isinstance(own.get(name, ""), str):
                raise ConfigError(f"extra_config: {name}={own[name]!r} must be a text")
        self._config = storage_config
        self._own = own
        self._pages = bool(own.get("interface_v1"))
        self._writes = bool(storage_config.is_storage_writer)
        self._roots: dict[str, bytes] = {}
        self._meta = BlockMeta(layout=LAYOUT)
        self._gate = asyncio.Semaphore(STORES_AT_ONCE)
        self._refreshed_s = 0.0
        self._failures = {"load": 0, "store": 0, "lookup": 0}
        self._refreshes = not place.is_shared
        self._threaded = ThreadedStore(place)

    # -- pools

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(_KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: PoolName | str) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(str(host_pool_name), host_pool)

    def _register(self, name: str, pool: HostKVCache) -> None:
        self._roots[name] = prefix_root(self._namespace_of(name, pool))

    def _namespace_of(self, name: str, pool: HostKVCache) -> Namespace:
        """Everything that SGLang tells its storage and that changes the bytes of a page."""
        config = self._config
        geometry = {field: str(getattr(pool, field, None)) for field in _GEOMETRY}
        form = "buffers" if self._pages or name != _KV else "flat"
        # Shards of a replicated pool are equal on all ranks; recurrent state is always split over them.
        replicated = config.is_mla_model and name != PoolName.MAMBA.value
        tensor = (config.dcp_rank, config.dcp_size) if replicated else (config.tp_rank, config.tp_size)
        stage = (config.pp_rank, config.pp_size, config.attn_cp_rank, config.attn_cp_size)
        return Namespace(
            model=config.model_name or "",
            revision=f"{self._own.get('revision', '')}:sglang {sglang.__version__}",
            dtype=str(getattr(pool, "dtype", "")),
            layout=f"{LAYOUT}:{form}:{name}:{geometry}",
            rank=":".join(map(str, (replicated, config.should_split_heads, config.tp_lcm_size, *tensor, *stage))),
            salt=self._own.get("salt", ""),
        )

    def _names(self, keys: Sequence[str], pool: str = _KV) -> list[PrefixKey]:
        root = self._roots.get(pool)
        if root is None:
            raise ConfigError(
                f"SGLang has registered no host pool {pool!r} with this storage; there are {[*self._roots]}"
            )
        return [PrefixKey(hashlib.sha256(root + key.encode()).digest()) for key in keys]

    # -- lookups

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """Leading pages that are stored: one lookup. They are promoted from disk from now on."""
        return self._prefix(self._names(keys))

    def _prefix(self, names: list[PrefixKey]) -> int:
        async def work(store: AnyStore) -> int:
            found = len(await store.lookup(names))
            if found < len(names) and await self._refreshed(store):
                found = len(await store.lookup(names))
            if found:
                store.prefetch(names[:found], priority="high")
            return found

        return self._run(work, "lookup", 0)

    async def _refreshed(self, store: AnyStore) -> bool:
        """Learn of other ranks' pages, not too often; a service does that by itself."""
        now_s = time.monotonic()
        if not self._refreshes or now_s - self._refreshed_s < REFRESH_SECONDS_MIN:
            return False
        self._refreshed_s = now_s
        return await store.refresh() > 0

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """As ``batch_exists``, and which lengths of that prefix all other pools can restore."""
        pages = self.batch_exists(keys, extra_info)
        hits: dict[str, int] = {PoolName.KV: pages} if pages else {}
        restorable = set(range(1, pages + 1))
        for transfer in pool_transfers or ():
            if not restorable:
                break
            stored = self._stored(self._names(keys[:pages], str(transfer.name)))
            lengths = _lengths(transfer, stored)
            if lengths:
                hits[transfer.name] = max(lengths)
            restorable &= lengths
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def _stored(self, names: list[PrefixKey]) -> list[bool]:
        async def work(store: AnyStore) -> list[bool]:
            return list(await asyncio.gather(*map(store.contains, names)))

        return self._run(work, "lookup", [False] * len(names))

    # -- pages of the host pools

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Load pages into the host pool; which of them are there. A page that is not may be overwritten in part."""
        return self._load(self._names(keys), _page_buffers(self.mem_pool_host, keys, host_indices))

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store pages of the host pool; which of them are stored, durably."""
        if not self._writes:
            return [True] * len(keys)
        parents = (extra_info.prefix_keys if extra_info is not None else None) or []
        parent = self._names(parents[-1:])
        return self._save(self._names(keys), _page_buffers(self.mem_pool_host, keys, host_indices), parent)

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {transfer.name: self._transfer(transfer, self._load) for transfer in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """SGLang says which rank writes which pool (it asks only those)."""
        return {transfer.name: self._transfer(transfer, self._save) for transfer in transfers}

    def _transfer(
        self, transfer: PoolTransfer, act: Callable[[list[PrefixKey], list[list[memoryview]]], list[bool]]
    ) -> list[bool]:
        keys = transfer.keys or []
        pool = self.registered_pools[transfer.name]
        indices = transfer.host_indices
        expected = len(keys) * (getattr(pool, "page_size", 1) or 1)
        if indices is None or indices.numel() != expected:
            found = 0 if indices is None else indices.numel()
            logger.error("pool %s: %d pages need %d indices, there are %d", transfer.name, len(keys), expected, found)
            return [False] * len(keys)
        return act(self._names(keys, str(transfer.name)), _page_buffers(pool, keys, indices)) if keys else []

    def _load(self, names: list[PrefixKey], pages: list[list[memoryview]]) -> list[bool]:
        async def one(store: AnyStore, name: PrefixKey, buffers: list[memoryview]) -> bool:
            try:
                await _read(store, name, buffers)
            except _FAILURES as error:
                self._note("load", error)
                return False
            return True

        async def work(store: AnyStore) -> list[bool]:
            return list(await asyncio.gather(*(one(store, *page) for page in zip(names, pages, strict=True))))

        return self._run(work, "load", [False] * len(names))

    def _save(
        self, names: list[PrefixKey], pages: list[list[memoryview]], parent: list[PrefixKey] | None = None
    ) -> list[bool]:
        parents: list[PrefixKey | None] = [parent[0] if parent else None, *names[:-1]]

        async def one(store: AnyStore, name: PrefixKey, above: PrefixKey | None, buffers: list[memoryview]) -> bool:
            try:
                async with self._gate:
                    await _write(store, name, above, buffers, self._meta)
            except _FAILURES as error:
                self._note("store", error)
                return False
            return True

        async def work(store: AnyStore) -> list[bool]:
            stored = await asyncio.gather(*(one(store, *page) for page in zip(names, parents, pages, strict=True)))
            await store.flush()
            return list(stored)

        return self._run(work, "store", [False] * len(names))

    # -- single pages as tensors

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: list[torch.Tensor] | None = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Fill one contiguous tensor per page; ``None`` in place of those that are not there."""
        if target_locations is None or len(target_locations) != len(keys):
            raise ConfigError(f"{len(keys)} pages need as many tensors to be loaded into (target_locations)")
        loaded = self._load(self._names(keys), [[_bytes_of(tensor)] for tensor in target_locations])
        return [tensor if there else None for tensor, there in zip(target_locations, loaded, strict=True)]

    def set(
        self, key: str, value: torch.Tensor | None = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        return self.batch_set([key], None if value is None else [value])

    def batch_set(
        self,
        keys: list[str],
        values: list[torch.Tensor] | None = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store one page per tensor, durably; whether all are."""
        if values is None or len(values) != len(keys):
            raise ConfigError(f"{len(keys)} pages need as many tensors (values)")
        if not self._writes:
            return True
        return all(self._save(self._names(keys), [[_bytes_of(value.contiguous())] for value in values]))

    # -- the rest

    def clear(self) -> bool:
        """Forgets nothing: a root may be shared. Says so; remove the root, or change ``salt``, for a fresh start."""
        logger.warning("cascade_aio keeps its pages: remove the root, or choose another salt, to start without them")
        return False

    def get_stats(self) -> Any:
        """SGLang's own counters do all that it asks for; see ``statistics``."""
        return None

    def statistics(self) -> dict[str, Any]:
        """The store's statistics and what failed here."""

        async def work(store: AnyStore) -> dict[str, Any]:
            return await store.statistics()

        return {**self._threaded.submit(work).result(), "failures": dict(self._failures)}

    def close(self) -> None:
        """Finish what was begun, flush and close the store. Repeated calls do nothing."""
        self._threaded.close()

    def _run(self, work: Callable[[AnyStore], Coroutine[Any, Any, T]], kind: str, failed: T) -> T:
        """What ``work`` returns; ``failed`` where the store could not, or is closed."""

        async def guarded(store: AnyStore) -> T:
            try:
                return await work(store)
            except _FAILURES as error:
                self._note(kind, error)
                return failed

        try:
            return self._threaded.submit(guarded).result()
        except ClosedError:  # SGLang's threads may outlive what they were given
            return failed

    def _note(self, kind: str, error: BaseException) -> None:
        if isinstance(error, BlockNotFoundError):  # a miss like any other
            return
        self._failures[kind] += 1
        logger.warning("cascade_aio could not %s a page: %s", kind, error)


_GEOMETRY = (
    "layout",
    "page_size",
    "dcp_size",
    "layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_cache_dim",
    "size_per_token",
    "storage_format_tag",
)
"""What a host pool says of its pages; a pool that has no such thing says ``None``."""


def _lengths(transfer: PoolTransfer, stored: list[bool]) -> set[int]:
    """Prefix lengths that a pool can restore, of whose pages ``stored`` tells which are there."""
    if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
        return set(range(1, (stored.index(False) if False in stored else len(stored)) + 1))
    if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
        window = max(1, len(transfer.keys or ()))
        return {length for length in range(1, len(stored) + 1) if all(stored[max(0, length - window) : length])}
    raise ConfigError(f"pool {transfer.name}: CascadeHiCache has no hit policy {transfer.hit_policy}")


def _page_buffers(pool: HostKVCache, keys: Sequence[str], indices: torch.Tensor) -> list[list[memoryview]]:
    """The memory of each page, as the pool says where it lies. Valid as long as the pool."""
    pointers, sizes = pool.get_page_buffer_meta(indices)
    count, rest = divmod(len(pointers), len(keys))
    if rest or not count or len(sizes) != len(pointers):
        raise ConfigError(
            f"the host pool describes {len(pointers)} buffers and {len(sizes)} sizes for {len(keys)} pages"
        )
    views = [
        memoryview((ctypes.c_ubyte * size).from_address(pointer)).cast("B")
        for pointer, size in zip(pointers, sizes, strict=True)
    ]
    return [views[start : start + count] for start in range(0, len(views), count)]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ConfigError(f"a page of {tuple(tensor.shape)} must be a contiguous tensor in host memory")
    count = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * count).from_address(tensor.data_ptr())).cast("B")


async def _read(store: AnyStore, name: PrefixKey, buffers: list[memoryview]) -> None:
    """Raises as ``store.get``, and ``ConfigError`` for a block of another size."""
    if len(buffers) <= 2:
        await store.read_into(name, *_parts(buffers))
        return
    async with store.get(name) as block:
        value = as_bytes_view(block.value, "value")
        if value.nbytes != sum(map(len, buffers)):
            raise ConfigError(f"block {block.block_id} has {value.nbytes} bytes, the page has {sum(map(len, buffers))}")
        await asyncio.to_thread(_copy, _slices(value, buffers), buffers)


async def _write(
    store: AnyStore, name: PrefixKey, parent: PrefixKey | None, buffers: list[memoryview], meta: BlockMeta
) -> None:
    """Raises as ``store.put``."""
    if len(buffers) <= 2:
        await store.put(*_parts(buffers), prefix=name, parent=parent, meta=meta)
        return
    if await store.contains(name):
        return
    nbytes = sum(map(len, buffers))
    async with store.reserve(key_bytes=0, value_bytes=nbytes, prefix=name, parent=parent, meta=meta) as slot:
        await asyncio.to_thread(_copy, buffers, _slices(as_bytes_view(slot.value, "value"), buffers))


def _parts(buffers: list[memoryview]) -> tuple[memoryview | bytearray, memoryview]:
    return (buffers[0], buffers[1]) if len(buffers) == 2 else (bytearray(), buffers[0])


def _slices(whole: memoryview, like: list[memoryview]) -> list[memoryview]:
    """``whole`` cut into pieces as long as those of ``like``."""
    pieces, start = [], 0
    for piece in like:
        pieces.append(whole[start : start + len(piece)])
        start += len(piece)
    return pieces


def _copy(sources: list[memoryview], targets: list[memoryview]) -> None:
    """By NumPy, which releases the GIL."""
    for source, target in zip(sources, targets, strict=True):
        np.frombuffer(target, np.uint8)[:] = np.frombuffer(source, np.uint8)
