"""A worker's half of ``CascadeConnector``: moves bytes between its KV cache in host memory and a node service's arena.

Invariants: a block of the KV cache is read until its request is reported as saved and written until it is reported as
loaded; a block that could not be loaded is reported by its number. Decides nothing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import group_kernel_blocks

from cascade_aio.errors import CascadeError, ConfigError
from cascade_aio.integrations._opening import AnyStore, Place
from cascade_aio.integrations._threaded import ThreadedStore
from cascade_aio.integrations._vllm_plan import LAYOUT, Move, Plan, name_of
from cascade_aio.model import BlockMeta, PrefixKey

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.cascade_aio")

STORES_AT_ONCE = 8
"""Blocks that one worker saves at a time: loads, which requests wait for, always find room in the queues."""

_FAILURES = (CascadeError, OSError)


class Worker:
    """Moves one worker's bytes. The worker's thread calls; bytes move in threads of the store and of its loop."""

    def __init__(self, rank: int, kv_cache_config: KVCacheConfig, place: Place) -> None:
        self._rank = rank
        self._group = kv_cache_config.kv_cache_groups[0]
        self._num_blocks = kv_cache_config.num_blocks
        self._pages: list[npt.NDArray[np.uint8]] = []
        self._meta = BlockMeta(layout=LAYOUT)
        self._gate = asyncio.Semaphore(STORES_AT_ONCE)
        self._loads: dict[str, Future[set[int]]] = {}
        self._saves: dict[str, list[Future[None]]] = {}
        self._ended: set[str] = set()
        self._failed: set[int] = set()
        self._threaded = ThreadedStore(place)

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Each layer's KV as [blocks, page bytes]. Raises ``ConfigError`` for a device."""
        seen = set()
        spec = self._group.kv_cache_spec
        for layer in self._group.layer_names:
            blocks = group_kernel_blocks(kv_caches[layer], self._num_blocks)
            if blocks.device.type != "cpu":
                raise ConfigError(
                    f"layer {layer} has its KV cache on {blocks.device}; CascadeConnector serves caches in host "
                    "memory: use CascadeTier with a GPU"
                )
            if blocks.data_ptr() in seen:  # layers that share one cache
                continue
            seen.add(blocks.data_ptr())
            size = blocks.element_size()
            page = getattr(spec, "kv_cache_specs", {}).get(layer, spec).page_size_bytes
            shape, strides = (self._num_blocks, page), (blocks.stride(0) * size, 1)
            pages = torch.empty(0, dtype=torch.uint8)
            pages.set_(blocks.untyped_storage(), blocks.storage_offset() * size, shape, strides)
            self._pages.append(pages.numpy())

    # -- loads

    def begin_loads(self, plan: Plan) -> None:
        for move in plan.loads:
            root = plan.roots[self._rank]
            self._loads[move.request] = self._threaded.submit(functools.partial(self._load, root=root, move=move))

    async def _load(self, store: AnyStore, root: bytes, move: Move) -> set[int]:
        """Fill the blocks; which of them could not be."""
        pairs = zip(move.block_ids, move.hashes, strict=True)
        failed = await asyncio.gather(*(self._load_one(store, name_of(root, each), block) for block, each in pairs))
        return {block_id for block_id, bad in zip(move.block_ids, failed, strict=True) if bad}

    async def _load_one(self, store: AnyStore, name: PrefixKey, block_id: int) -> bool:
        try:
            async with store.get(name) as block:
                await asyncio.to_thread(self._scatter, block.value, block_id)
        except _FAILURES as error:
            logger.warning("cascade_aio could not load a block: %s", error)
            return True
        return False

    def _scatter(self, value: npt.NDArray[np.uint8], block_id: int) -> None:
        """Raises ``ConfigError`` for a block of another size."""
        if value.nbytes != self._block_bytes:
            raise ConfigError(f"a stored block has {value.nbytes} bytes, one of the KV cache {self._block_bytes}")
        start = 0
        for pages in self._pages:
            page = pages[block_id]
            page[:] = value[start : start + page.nbytes]
            start += page.nbytes

    @property
    def _block_bytes(self) -> int:
        return sum(pages.shape[1] for pages in self._pages)

    # -- saves

    def begin_saves(self, plan: Plan) -> None:
        for move in plan.saves:
            root = plan.roots[self._rank]
            future = self._threaded.submit(functools.partial(self._save, root=root, move=move))
            self._saves.setdefault(move.request, []).append(future)

    async def _save(self, store: AnyStore, root: bytes, move: Move) -> None:
        names = [name_of(root, each) for each in move.hashes]
        above = None if move.above is None else name_of(root, move.above)
        parents = [above, *names[:-1]]
        await asyncio.gather(*(self._save_one(store, *one) for one in zip(names, parents, move.block_ids, strict=True)))

    async def _save_one(self, store: AnyStore, name: PrefixKey, parent: PrefixKey | None, block_id: int) -> None:
        try:
            async with self._gate:
                if await store.contains(name):
                    return
                nbytes = self._block_bytes
                async with store.reserve(
                    key_bytes=0, value_bytes=nbytes, prefix=name, parent=parent, meta=self._meta
                ) as slot:
                    await asyncio.to_thread(self._gather, slot.value, block_id)
        except _FAILURES as error:
            logger.warning("cascade_aio could not store a block: %s", error)

    def _gather(self, value: npt.NDArray[np.uint8], block_id: int) -> None:
        start = 0
        for pages in self._pages:
            page = pages[block_id]
            value[start : start + page.nbytes] = page
            start += page.nbytes

    def finish_saves(self) -> None:
        """Blocks until no save reads the KV cache: its blocks are about to be given to others."""
        wait([future for futures in self._saves.values() for future in futures])

    # -- what has ended

    def finished(self, ended: Iterable[str]) -> tuple[set[str] | None, set[str] | None]:
        """(Requests whose saves are done, of those that have ended; requests whose loads are done.)"""
        self._ended.update(request for request in ended if request in self._saves)
        saved = {request for request in self._ended if all(future.done() for future in self._saves[request])}
        for request in saved:
            self._raise_defects(self._saves.pop(request))
        self._ended -= saved
        loaded = {request for request, future in self._loads.items() if future.done()}
        for request in loaded:
            self._failed |= self._loads.pop(request).result()
        return saved or None, loaded or None

    @staticmethod
    def _raise_defects(futures: list[Future[None]]) -> None:
        for future in futures:
            future.result()

    def take_failed(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def close(self) -> None:
        self._threaded.close()
