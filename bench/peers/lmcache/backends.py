"""LMCache's in-process storage: ``LocalDiskBackend`` and ``LocalCPUBackend``, driven as its cache engine drives them.

Memory objects come from ``LocalCPUBackend.allocate``; what is put is copied into one (the engine copies from the GPU
there), what is read from disk is handed out as LMCache made it, without another copy. A get from LocalCPUBackend is a
reference, which is what ``lease`` measures; for ``get`` its bytes are copied out. A put to disk is done when its
callback was called. The pool is touched before use. The default system changes nothing but places and sizes.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from bench.peers.lmcache.common import (  # first: it sets what LMCache reads while it is imported
    MODEL,
    NO_SYNC,
    THREADS_DEFAULT,
    WAIT_SECONDS_MAX,
    NewFiles,
    bytes_of,
    checked_version,
    module_file,
)

# isort: split
import numpy as np
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import local_cpu_backend, local_disk_backend

from bench.peers.protocol import BlockingPeer, CannotRunError, Description, Feature, Job, PeerError, Settings

GIB = 1 << 30
TOKENS = 256
"""Of one chunk, as LMCache has it by default."""
DIRECT_ALIGN_BYTES = 4096
ONLY_MEMORY = "LocalCPUBackend is memory of one process"


class _Pool:
    """LocalCPUBackend as the allocator of memory objects of one size."""

    def __init__(self, config: LMCacheEngineConfig, block_bytes: int) -> None:
        row_bytes = block_bytes // (2 * TOKENS)
        shape = (1, 2, TOKENS, 1, row_bytes // 2)  # layers, K and V, tokens, heads, float16 of each
        metadata = LMCacheMetadata(MODEL, 1, 1, 0, 0, torch.float16, shape)
        self.backend: Any = local_cpu_backend.LocalCPUBackend(config, metadata, dst_device="cpu")
        self._shape = torch.Size([2, 1, TOKENS, row_bytes])  # KV_2LTD, in bytes
        self._touch()

    def allocate(self) -> Any:
        """A memory object with one reference; evicts if it must. Raises ``PeerError`` instead of waiting for ever."""
        found = self.backend.allocate(self._shape, torch.uint8, MemoryFormat.KV_2LTD, busy_loop=False)
        if found is None:
            raise PeerError("LMCache's memory pool is exhausted")
        return found

    def filled(self, data: memoryview) -> Any:
        """A memory object with the bytes of ``data``."""
        found = self.allocate()
        np.copyto(bytes_of(found.byte_array), bytes_of(data))
        return found

    def close(self) -> None:
        """Give the memory back; nothing that came from it may be used any more."""
        self.backend.clear()
        self.backend.close()

    def _touch(self) -> None:
        """Write to all of the pool once, so that no page fault is measured."""
        held = []
        while (one := self._bare()) is not None:
            bytes_of(one.byte_array).fill(0)
            held.append(one)
        for one in held:
            one.ref_count_down()

    def _bare(self) -> Any:
        return self.backend.allocate(self._shape, torch.uint8, MemoryFormat.KV_2LTD, eviction=False)


def _key(name: str) -> CacheEngineKey:
    return CacheEngineKey(MODEL, 1, 0, int(name, 16), torch.uint8)


class DiskPeer(BlockingPeer):
    """Systems ``lmcache-disk`` (all defaults) and ``lmcache-disk-direct`` (O_DIRECT, a thread per operation)."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._direct = system == "lmcache-disk-direct"
        self._threads = THREADS_DEFAULT
        self._pool: _Pool | None = None
        self._disk: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._new: NewFiles | None = None

    def open(self, settings: Settings) -> None:
        checked_version()
        if settings.endpoint is not None:
            raise CannotRunError("LocalDiskBackend's index is in the memory of one process")
        self._threads = max(THREADS_DEFAULT, settings.in_flight_max) if self._direct else THREADS_DEFAULT
        folder = settings.folder / "local-disk"
        folder.mkdir(exist_ok=True)
        self._new = NewFiles(folder, settings.in_flight_max)
        extra: dict[str, Any] = {}
        if self._direct:
            extra = {
                "use_odirect": True,
                "local_cpu.pinned_align_bytes": DIRECT_ALIGN_BYTES,
                "disk_io_threads": self._threads,
            }
        # Staging only: what the caller holds of earlier gets, and what is on its way to the disk.
        staging_bytes = settings.target.nbytes + 2 * settings.in_flight_max * settings.block_bytes
        config = LMCacheEngineConfig.from_defaults(
            local_cpu=False,
            max_local_cpu_size=staging_bytes / GIB,
            local_disk=f"file://{folder}/",
            max_local_disk_size=(settings.blocks_max + 1) * settings.block_bytes / GIB,
            extra_config=extra,
        )
        self._pool = _Pool(config, settings.block_bytes)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lmcache-loop")
        self._thread.start()
        self._disk = local_disk_backend.LocalDiskBackend(
            config, self._loop, self._pool.backend, dst_device="cpu", metadata=self._pool.backend.metadata
        )
        if self._disk.use_odirect is not self._direct:
            raise PeerError("LocalDiskBackend did not take use_odirect")

    def describe(self) -> Description:
        lacks: dict[Feature, str] = {
            "lease": "what is read from disk is an object of its own already",
            "restart": "LocalDiskBackend's index is in memory only: after a restart it finds nothing",
            "clients": "LocalDiskBackend's index is in the memory of one process",
        }
        if self._direct:
            lacks["hot"] = "O_DIRECT keeps nothing in memory: every read is one of the disk"
            lacks["volatile"] = "O_DIRECT writes go to the disk; only synced ones are compared"
        tuned = (
            f"use_odirect, local_cpu.pinned_align_bytes {DIRECT_ALIGN_BYTES}, disk_io_threads {self._threads}"
            if self._direct
            else "LMCache's defaults"
        )
        return Description(
            version=checked_version(),
            module=module_file(local_disk_backend),
            tuning=f"{tuned}; local_cpu off, batched_submit_put_task, batched_get_blocking without a further copy",
            durability=NO_SYNC,
            medium="page cache",
            configuration={"use_odirect": self._direct, "disk_io_threads": self._threads},
            lacks=lacks,
        )

    def files(self) -> Sequence[pathlib.Path]:
        assert self._new is not None
        return self._new.all()

    def put(self, name: str, data: memoryview) -> None:
        self.put_many([Job(name, data)], 1)

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        assert self._pool is not None
        room, finished = threading.Semaphore(in_flight), threading.Semaphore(0)

        def done(_key: CacheEngineKey) -> None:
            room.release()
            finished.release()

        for job in jobs:
            self._wait(room)
            held = self._pool.filled(job.data)
            self._disk.batched_submit_put_task([_key(job.name)], [held], on_complete_callback=done)
            held.ref_count_down()
        for _ in jobs:
            self._wait(finished)

    def flush(self) -> None:
        assert self._new is not None
        self._new.sync()

    def get(self, name: str, into: memoryview) -> memoryview:
        return self._handed_out(name, self._disk.get_blocking(_key(name)))

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview]:
        # LMCache keeps at most disk_io_threads reads under way; a longer list only spares waiting for the slowest.
        step = len(jobs) if in_flight >= self._threads else in_flight
        found: list[memoryview] = []
        for start in range(0, len(jobs), step):
            some = jobs[start : start + step]
            objects = self._disk.batched_get_blocking([_key(job.name) for job in some])
            found += [self._handed_out(job.name, one) for job, one in zip(some, objects, strict=True)]
        return found

    def contains(self, name: str) -> bool:
        return bool(self._disk.contains(_key(name)))

    def delete(self, name: str) -> None:
        if not self._disk.remove(_key(name)):
            raise KeyError(name)

    def drop_caches(self) -> None:
        self.flush()  # puts are finished when they return; nothing else is in memory

    def close(self) -> None:
        if self._disk is not None:
            self._disk.close()
            self._disk = None
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _wait(self, semaphore: threading.Semaphore) -> None:
        if not semaphore.acquire(timeout=WAIT_SECONDS_MAX):
            raise PeerError(f"LocalDiskBackend did not finish a put within {WAIT_SECONDS_MAX:g} s and tells no error")

    def _handed_out(self, name: str, found: Any) -> memoryview:
        """The object's bytes, the caller's until ``close``; it goes back to the pool when they are dropped."""
        if found is None:
            raise KeyError(name)
        array = bytes_of(found.byte_array)
        weakref.finalize(array, found.ref_count_down)
        return memoryview(array)


class MemoryPeer(BlockingPeer):
    """System ``lmcache-cpu``: a memory tier in the process."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._pool: _Pool | None = None
        self._memory: Any = None

    def open(self, settings: Settings) -> None:
        checked_version()
        if settings.endpoint is not None:
            raise CannotRunError(ONLY_MEMORY)
        config = LMCacheEngineConfig.from_defaults(
            local_cpu=True, max_local_cpu_size=settings.memory_bytes / GIB, local_disk=None
        )
        self._pool = _Pool(config, settings.block_bytes)
        self._memory = self._pool.backend

    def describe(self) -> Description:
        nothing_below: tuple[Feature, ...] = ("durable", "cold", "restart", "clients", "overflow")
        lacks = dict.fromkeys(nothing_below, ONLY_MEMORY)
        return Description(
            version=checked_version(),
            module=module_file(local_cpu_backend),
            tuning="LMCache's defaults, pool touched before; get_blocking is a reference, get copies out with NumPy",
            medium="own memory",
            configuration={"local_cpu": True},
            lacks=lacks,
        )

    def put(self, name: str, data: memoryview) -> None:
        assert self._pool is not None
        held = self._pool.filled(data)
        self._memory.batched_submit_put_task([_key(name)], [held])
        held.ref_count_down()

    def flush(self) -> None:
        raise CannotRunError(ONLY_MEMORY)

    def get(self, name: str, into: memoryview) -> memoryview:
        with self._held(name) as found:
            np.copyto(bytes_of(into), bytes_of(found.byte_array))
        return into

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[Sequence[memoryview]]:
        with self._held(name) as found:
            yield [found.byte_array.cast("B")]

    def contains(self, name: str) -> bool:
        return bool(self._memory.contains(_key(name)))

    def delete(self, name: str) -> None:
        if not self._memory.remove(_key(name)):
            raise KeyError(name)

    def drop_caches(self) -> None:
        raise CannotRunError(ONLY_MEMORY)

    def close(self) -> None:
        self._memory = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[Any]:
        found = self._memory.get_blocking(_key(name))
        if found is None:
            raise KeyError(name)
        try:
            yield found
        finally:
            found.ref_count_down()
