"""``CascadeL2Adapter``: this store as an L2 adapter of LMCache's multi-process mode (interface of LMCache 0.5.6).

    lmcache server --l1-size-gb 20 --l2-adapter '{"type": "plugin",
      "module_path": "cascade_aio.integrations.lmcache", "class_name": "CascadeL2Adapter",
      "adapter_params": {"root": "/scratch/kv", "shm_bytes": "8GiB", "disk_bytes": "500GiB"}}'

Objects are stored as values under prefix keys made from LMCache's own object keys (model, rank, group, salt,
chunk hash). Every load is verified; a damaged, late or evicted object is a miss in the task's bitmap. A lookup
starts promoting its hits from disk, so that the load that follows finds them in memory. What is too much for
``disk_bytes`` is evicted by the store's policy, not by LMCache.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from cascade_aio.errors import BlockNotFoundError, CascadeError
from cascade_aio.integrations._opening import AnyStore, place_of
from cascade_aio.integrations._threaded import ThreadedStore
from cascade_aio.model import BlockMeta, PrefixKey, prefix_root

try:
    from lmcache.lmcache_native import Bitmap
    from lmcache.logging import init_logger
    from lmcache.v1.distributed.internal_api import L2StoreResult
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
except ImportError as error:
    raise ImportError(
        f"cascade_aio.integrations.lmcache needs LMCache 0.5.6 ({error}); see examples/lmcache/README.md"
    ) from error

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

logger = init_logger("cascade_aio")

T = TypeVar("T")

LAYOUT = "lmcache/object/1"
"""Name and version of what a value holds: the bytes of one memory object as LMCache lays it out."""

NAME_ROOT = prefix_root("lmcache")

STORES_AT_ONCE = 8
"""Objects being stored at a time, so that loads find room in the queues."""

_FAILURES = (CascadeError, OSError)


class CascadeL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """See the module's docstring. Calls may come from any thread; none but ``close`` blocks."""

    def __init__(self, params: dict[str, Any], l1_memory_desc: L1MemoryDesc | None = None) -> None:
        """``params``: ``root`` and the settings of ``open_store``, or ``service``, the socket of a node service.

        Raises ``ConfigError`` for wrong ones, and what opening raises. Blocks until the store is open.
        """
        place = place_of(params, who="adapter_params")
        super().__init__()
        self._lock = threading.Lock()
        self._task_id = 0
        self._stored: dict[int, L2StoreResult] = {}
        self._found: dict[int, Bitmap] = {}
        self._loaded: dict[int, Bitmap] = {}
        self._failures = {"store": 0, "load": 0}
        self._gate = asyncio.Semaphore(STORES_AT_ONCE)
        self._meta = BlockMeta(layout=LAYOUT)
        self._threaded = ThreadedStore(place)
        self._store_fd, self._lookup_fd, self._load_fd = (_event_fd() for _ in range(3))

    def get_store_event_fd(self) -> int:
        return self._store_fd

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookup_fd

    def get_load_event_fd(self) -> int:
        return self._load_fd

    # -- store

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Store ``objects`` under ``keys``; returns the task's id at once.

        The objects' memory is read until the task is among ``pop_completed_store_tasks``, which the store's event
        announces. It succeeds when all of them are on stable storage. A key that is known keeps its bytes.
        """
        rows = [_bytes_of(item) for item in objects]

        async def work(store: AnyStore) -> int:
            await _all([self._store_one(store, _name(key), row) for key, row in zip(keys, rows, strict=True)])
            await store.flush()
            return sum(row.nbytes for row in rows)

        def result_of(future: Future[int]) -> L2StoreResult:
            error = future.exception()
            if error is not None:
                self._note_failure("store", error)
                return L2StoreResult(False, 0)
            self._notify_keys_stored(keys, [row.nbytes for row in rows])
            return L2StoreResult(True, future.result())

        return self._submit(work, self._stored, self._store_fd, result_of)

    async def _store_one(self, store: AnyStore, name: PrefixKey, row: memoryview) -> None:
        async with self._gate:
            await store.put(b"", row, prefix=name, meta=self._meta)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            stored = dict(self._stored)
            self._stored.clear()
        return stored

    # -- lookup

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc] | None = None
    ) -> int:
        """Nothing is locked: an object that is evicted before it is loaded is a miss of the load."""
        names = [_name(key) for key in keys]

        async def work(store: AnyStore) -> list[bool]:
            found = list(await asyncio.gather(*map(store.contains, names)))
            if any(found):
                store.prefetch([name for name, there in zip(names, found, strict=True) if there], priority="high")
            return found

        return self._submit(work, self._found, self._lookup_fd, lambda future: self._bitmap(future, len(names)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._found.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing was locked."""

    # -- load

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        rows = [_bytes_of(item) for item in objects]

        async def work(store: AnyStore) -> list[bool]:
            pairs = zip(keys, rows, strict=True)
            return list(await asyncio.gather(*(self._load_one(store, _name(key), row) for key, row in pairs)))

        return self._submit(work, self._loaded, self._load_fd, lambda future: self._bitmap(future, len(rows)))

    async def _load_one(self, store: AnyStore, name: PrefixKey, row: memoryview) -> bool:
        try:
            await store.read_into(name, bytearray(), row)
        except _FAILURES as error:
            self._note_failure("load", error)
            return False
        return True

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._loaded.pop(task_id, None)

    # -- the rest

    def delete(self, keys: list[ObjectKey]) -> None:
        """Forget the objects; returns at once."""

        async def work(store: AnyStore) -> None:
            for key in keys:
                with contextlib.suppress(BlockNotFoundError):
                    await store.delete(_name(key))

        self._threaded.submit(work)

    def report_status(self) -> dict[str, Any]:
        """Blocks for one turn of the store's loop."""

        async def work(store: AnyStore) -> dict[str, Any]:
            return await store.statistics()

        statistics = self._threaded.submit(work).result()
        return {"is_healthy": not statistics.get("damage"), "failures": dict(self._failures), **statistics}

    def close(self) -> None:
        """Finish what was submitted, flush and close the store. Blocks; repeated calls do nothing."""
        self._threaded.close()
        for name in ("_store_fd", "_lookup_fd", "_load_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)

    def _submit(
        self,
        work: Callable[[AnyStore], Coroutine[Any, Any, T]],
        results: dict[int, Any],
        event_fd: int,
        result_of: Callable[[Future[T]], Any],
    ) -> int:
        with self._lock:
            self._task_id += 1
            task_id = self._task_id

        def done(future: Future[T]) -> None:
            result = result_of(future)
            with self._lock:
                results[task_id] = result
            os.eventfd_write(event_fd, 1)

        self._threaded.submit(work, done)
        return task_id

    def _bitmap(self, future: Future[list[bool]], size: int) -> Bitmap:
        bitmap = Bitmap(size)
        error = future.exception()
        if error is not None:
            self._note_failure("load", error)
            return bitmap
        for place, there in enumerate(future.result()):
            if there:
                bitmap.set(place)
        return bitmap

    def _note_failure(self, kind: str, error: BaseException) -> None:
        if isinstance(error, BlockNotFoundError):  # a miss like any other
            return
        self._failures[kind] += 1
        logger.warning("cascade_aio could not %s an object: %s", kind, error)


async def _all(coroutines: list[Coroutine[Any, Any, None]]) -> None:
    """Run all to their end, also when one fails: LMCache's memory is used until the task has ended."""
    for outcome in await asyncio.gather(*coroutines, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _name(key: ObjectKey) -> PrefixKey:
    hasher = hashlib.sha256(NAME_ROOT)
    for part in (key.model_name.encode(), str(key.kv_rank).encode(), str(key.object_group_id).encode()):
        hasher.update(len(part).to_bytes(4, "little") + part)
    salt = key.cache_salt.encode()
    hasher.update(len(salt).to_bytes(4, "little") + salt + bytes(key.chunk_hash))
    return PrefixKey(hasher.digest())


def _bytes_of(item: MemoryObj) -> memoryview:
    return memoryview(item.byte_array).cast("B")


def _event_fd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
