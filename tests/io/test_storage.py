"""The conformance suite over both backends and the fake, on a disk and in shared memory."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

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


async def test_an_open_that_meets_aclose_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    descriptors = len(os.listdir("/proc/self/fd"))
    storage = open_storage("threads")
    opening = asyncio.ensure_future(storage.open(str(tmp_path / "f")))
    await asyncio.sleep(0)
    await storage.aclose()
    file = await opening
    assert file.closed
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_file_system_without_direct_io_is_used_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_flags = fcntl.fcntl

    def refuse(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return set_flags(fd, command, flags)

    def no_fallocate(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "posix_fallocate", no_fallocate)
    storage = opened("auto")
    file = await storage.create(str(tmp_path / "f"), preallocate_bytes=10000)
    assert not file.direct
    assert not file.preallocated
    assert await storage.size(file) == 10000
    await storage.write(file, [memoryview(b"unaligned")], 5000)
    await storage.sync(file)
    found = bytearray(9)
    assert await storage.read(file, [memoryview(found)], 5000) == 9
    assert found == b"unaligned"
    statistics = storage.statistics()
    assert (statistics["direct"], statistics["buffered"], statistics["not_preallocated"]) == (0, 1, 1)
    assert "O_DIRECT" in str(statistics["notes"])
    assert "fallocate" in str(statistics["notes"])
    await storage.aclose()


async def test_a_creation_that_finds_no_space_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    storage = opened("auto")
    with pytest.raises(OSError, match="free space") as caught:
        await storage.create(str(tmp_path / "f"), preallocate_bytes=4096)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
    await storage.aclose()


async def test_what_is_written_is_private(tmp_path: Path) -> None:
    """Checkpoints name blocks and prompts as segments do."""
    storage = open_storage("threads")
    try:
        await storage.write_small(str(tmp_path / "small"), [b"names"])
        await (await storage.create(str(tmp_path / "large"))).close()
    finally:
        await storage.aclose()
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


async def test_a_failed_replacement_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = opened("auto")
    path = str(tmp_path / "small")
    await storage.write_small(path, [b"old"])

    def fail(source: str, destination: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="dmesg"):
        await storage.write_small(path, [b"new"])
    assert os.listdir(tmp_path) == ["small"]
    assert await storage.read_small(path) == b"old"
    await storage.aclose()


async def test_a_lock_where_there_are_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    storage = opened("auto")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="flock") as caught:
        await storage.try_lock(str(tmp_path / "lock"))
    assert caught.value.errno == errno.ENOSYS
    assert len(os.listdir("/proc/self/fd")) == descriptors
    await storage.aclose()


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
