"""No system at all: the bare io_uring loop on one preallocated file, and the native copy between two memories.

``limit-disk`` moves a batch as one stream in requests of the size and depth that the suite found best (``options``),
fdatasync included in a flush; blocks that lie next to each other in memory and in the file are one piece.
``limit-memory`` copies blocks on all cores. Names are kept in a dict, nothing is hashed or verified.
"""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import bench.raw_ring
from bench.data import scratch_memory
from bench.peers.protocol import (
    BlockingPeer,
    CannotRunError,
    Description,
    Job,
    Settings,
    published_path,
)
from bench.raw_ring import RawRing
from bench.results import CannotRunError as NoRingError
from cascade_aio import _native

MIB = 1 << 20
FILE = "raw"
NO_INDEX = "names are in this process only"


class _Slots:
    """Which slot of equal size holds which name; lowest free slot first. Raises ``KeyError`` as peers must."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._taken: dict[str, int] = {}

    def take(self, name: str) -> int:
        slot = self._taken[name] = self._free.pop()
        return slot

    def find(self, name: str) -> int:
        return self._taken[name]

    def release(self, name: str) -> None:
        self._free.append(self._taken.pop(name))

    def __contains__(self, name: str) -> bool:
        return name in self._taken


class DiskPeer(BlockingPeer):
    """System ``limit-disk``."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._fd = -1
        self._lock = threading.Lock()
        self._rings: dict[bool, RawRing] = {}

    def open(self, settings: Settings) -> None:
        option = settings.options.get
        self._settings = settings
        self._requests = {
            True: int(option("write_request_bytes") or 8 * MIB),
            False: int(option("read_request_bytes") or 4 * MIB),
        }
        self._depths = {True: int(option("write_depth") or 16), False: int(option("read_depth") or 8)}
        self._path = settings.folder / FILE
        self._slots = _Slots(settings.blocks_max)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
            self._rings = {write: RawRing(self._depths[write]) for write in (True, False)}
        except OSError as error:
            raise CannotRunError(f"the file system takes no O_DIRECT: {error.strerror}") from error
        except NoRingError as error:
            raise CannotRunError(str(error)) from error
        os.posix_fallocate(self._fd, 0, settings.blocks_max * settings.block_bytes)
        os.fsync(self._fd)

    def describe(self) -> Description:
        no_memory = "O_DIRECT keeps nothing in memory"
        return Description(
            version=f"Linux {os.uname().release}",
            module=published_path(bench.raw_ring.__file__),
            tuning="io_uring, O_DIRECT, one stream, the request size and depth that were best on this device",
            durability="fdatasync of the preallocated file",
            medium="none",
            configuration={
                "write_request_bytes": self._requests[True],
                "write_depth": self._depths[True],
                "read_request_bytes": self._requests[False],
                "read_depth": self._depths[False],
            },
            lacks={
                "volatile": no_memory,
                "hot": no_memory,
                "lease": no_memory,
                "restart": NO_INDEX,
                "clients": NO_INDEX,
                "overflow": "no memory tier",
            },
        )

    def files(self) -> Sequence[pathlib.Path]:
        return [self._path]

    def put(self, name: str, data: memoryview) -> None:
        self.put_many([Job(name, data)], 1)

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        with self._lock:
            self._move([(self._slots.take(job.name), job) for job in jobs], write=True)

    def flush(self) -> None:
        with self._lock:
            self._rings[True].sync(self._fd)

    def get(self, name: str, into: memoryview) -> memoryview:
        self.get_many([Job(name, into)], 1)
        return into

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview]:
        with self._lock:
            self._move([(self._slots.find(job.name), job) for job in jobs], write=False)
        return [job.data for job in jobs]

    def contains(self, name: str) -> bool:
        return name in self._slots

    def delete(self, name: str) -> None:
        with self._lock:
            self._slots.release(name)

    def drop_caches(self) -> None:
        self.flush()

    def close(self) -> None:
        for ring in self._rings.values():
            ring.close()
        self._rings = {}
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _move(self, placed: Sequence[tuple[int, Job]], *, write: bool) -> None:
        memory = self._settings.source if write else self._settings.target
        for slot, start, length in self._runs(placed, memory):
            self._rings[write].transfer(
                self._fd,
                memory[start : start + length],
                slot * self._settings.block_bytes,
                self._requests[write],
                write=write,
            )

    def _runs(self, placed: Sequence[tuple[int, Job]], memory: memoryview) -> Iterator[tuple[int, int, int]]:
        """(first slot, offset in ``memory``, bytes) of blocks that are neighbours in both."""
        base, block_bytes = _native.address_of(memory), self._settings.block_bytes
        run: tuple[int, int, int] | None = None
        for slot, job in placed:
            start = _native.address_of(job.data) - base
            if run is not None and slot * block_bytes == run[0] * block_bytes + run[2] and start == run[1] + run[2]:
                run = (run[0], run[1], run[2] + block_bytes)
                continue
            if run is not None:
                yield run
            run = (slot, start, block_bytes)
        if run is not None:
            yield run


class MemoryPeer(BlockingPeer):
    """System ``limit-memory``."""

    def open(self, settings: Settings) -> None:
        self._block_bytes = settings.block_bytes
        self._memory = scratch_memory(settings.blocks_max * settings.block_bytes)
        self._slots = _Slots(settings.blocks_max)
        self._lock = threading.Lock()
        self._cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._cores)

    def describe(self) -> Description:
        no_disk = "memory only"
        return Description(
            version=f"Linux {os.uname().release}",
            module=published_path(_native.__file__),
            tuning=f"native {_native.copy_variant()} copy, one thread per core",
            medium="own memory",
            configuration={"threads": self._cores, "variant": _native.copy_variant()},
            lacks={
                "durable": no_disk,
                "cold": no_disk,
                "lease": "a lease has no bytes to move: it has no limit of this kind",
                "restart": no_disk,
                "clients": NO_INDEX,
                "overflow": no_disk,
            },
        )

    def put(self, name: str, data: memoryview) -> None:
        with self._lock:
            slot = self._slots.take(name)
        _native.copy(self._room(slot), data)

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        list(self._pool.map(lambda job: self.put(job.name, job.data), jobs))

    def flush(self) -> None:
        raise CannotRunError("memory only")

    def get(self, name: str, into: memoryview) -> memoryview:
        _native.copy(into, self._room(self._slots.find(name)))
        return into

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview]:
        return list(self._pool.map(lambda job: self.get(job.name, job.data), jobs))

    def contains(self, name: str) -> bool:
        return name in self._slots

    def delete(self, name: str) -> None:
        with self._lock:
            self._slots.release(name)

    def drop_caches(self) -> None:
        raise CannotRunError("memory only")

    def close(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.shutdown()

    def _room(self, slot: int) -> memoryview:
        return self._memory[slot * self._block_bytes : (slot + 1) * self._block_bytes]
