"""The conformance suite over both backends and the fake, on a disk and in shared memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest

from cascade_aio.abc.storage import Storage
from cascade_aio.errors import ConfigError
from cascade_aio.io.engine import EngineLimits
from cascade_aio.io.storage import PosixStorage, open_storage
from cascade_aio.testing.memory import MemoryStorage
from cascade_aio.testing.storage import StorageConformance

SHARED_MEMORY = "/dev/shm"

SMALL_LIMITS = EngineLimits(
    request_bytes_max=64 << 10, requests_in_flight_max=4, bytes_in_flight_max=256 << 10, turn_bytes_max=128 << 10
)
"""Everything is cut, queued and refilled many times."""


def opened(io_backend: str, limits: EngineLimits | None = None) -> PosixStorage:
    try:
        return open_storage(io_backend, limits=limits)
    except ConfigError as error:
        pytest.skip(str(error))


class _OnFiles(StorageConformance):
    IO_BACKEND = "uring"
    LIMITS: EngineLimits | None = None

    @pytest.fixture
    def root(self, tmp_path: os.PathLike[str]) -> str:
        return str(tmp_path)

    @pytest.fixture
    async def storage(self) -> AsyncIterator[Storage]:
        descriptors = len(os.listdir("/proc/self/fd"))
        storage = opened(self.IO_BACKEND, self.LIMITS)
        yield storage
        await storage.aclose()
        statistics = storage.statistics()
        assert statistics["requests_in_flight"] == statistics["bytes_in_flight"] == statistics["open_files"] == 0
        assert len(os.listdir("/proc/self/fd")) == descriptors


class TestRing(_OnFiles):
    pass


class TestRingWithSmallLimits(_OnFiles):
    LIMITS = SMALL_LIMITS


class TestThreads(_OnFiles):
    IO_BACKEND = "threads"


class TestThreadsWithSmallLimits(_OnFiles):
    IO_BACKEND = "threads"
    LIMITS = SMALL_LIMITS


class TestRingInSharedMemory(_OnFiles):
    @pytest.fixture
    def root(self, tmp_path: os.PathLike[str]) -> Iterator[str]:
        if not os.path.isdir(SHARED_MEMORY):
            pytest.skip(f"{SHARED_MEMORY} is missing")
        path = tempfile.mkdtemp(prefix="cascade-test-", dir=SHARED_MEMORY)
        yield path
        shutil.rmtree(path)


class TestMemory(StorageConformance):
    @pytest.fixture
    async def storage(self) -> AsyncIterator[Storage]:
        storage = MemoryStorage()
        await storage.make_directory("/root")
        yield storage
        await storage.aclose()

    @pytest.fixture
    def root(self) -> str:
        return "/root"
