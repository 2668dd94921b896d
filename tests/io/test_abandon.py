"""Storage that does not answer, given up: everybody is let go, and the memory stays the kernel's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cascade_aio.errors import ConfigError
from cascade_aio.io.daemon_threads import DaemonThreads
from cascade_aio.io.storage import PosixStorage, open_storage
from cascade_aio.testing.store import eventually


@pytest.fixture(params=["uring", "threads"])
async def storage(request: pytest.FixtureRequest) -> AsyncIterator[PosixStorage]:
    try:
        opened = open_storage(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    yield opened
    await opened.aclose()


class Pipe:
    """A file whose reads do not end before somebody writes: as storage that hangs."""

    direct = False

    def __init__(self) -> None:
        self.fd, self.other = os.pipe()
        self.path = "a pipe"

    def pread(self, fd: int, views: list[memoryview], offset: int) -> int:
        """``os.preadv`` of a pipe, for the backend that asks in threads."""
        return os.readv(fd, views)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.other)


async def test_a_read_that_hangs_is_let_go_and_its_memory_kept(
    storage: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipe()
    monkeypatch.setattr(os, "preadv", pipe.pread)
    memory = mmap.mmap(-1, 4096)
    reading = asyncio.ensure_future(storage.engine.read(pipe, [memoryview(memory)], 0))
    await eventually(lambda: storage.statistics()["requests_in_flight"] == 1)
    storage.abandon()
    with pytest.raises(OSError, match="does not answer") as raised:
        await reading
    assert isinstance(raised.value, TimeoutError)
    await storage.aclose()
    with pytest.raises(BufferError):
        memory.close()  # the engine holds on to it: the kernel may still write there
    os.write(pipe.other, b"late")
    await eventually(lambda: not storage.statistics()["requests_in_flight"])
    del raised, reading
    gc.collect()  # the error's traceback

    def can_be_closed() -> bool:
        """Once the engine, perhaps in a thread of its own, holds on to the memory no longer."""
        with contextlib.suppress(BufferError):
            memory.close()
        return memory.closed

    await eventually(can_be_closed)
    pipe.close()


async def test_calls_that_hang_are_let_go_and_later_ones_refused(storage: PosixStorage, tmp_path: Path) -> None:
    release = threading.Event()
    hanging = asyncio.ensure_future(storage._call(release.wait, operation="test", path="x"))
    await asyncio.sleep(0.05)
    storage.abandon()
    try:
        with pytest.raises(TimeoutError):
            await hanging
        with pytest.raises(TimeoutError):
            await storage.list_directory(str(tmp_path))
        await storage.aclose()
    finally:
        release.set()


def test_threads_are_daemons_run_side_by_side_and_end() -> None:
    threads = DaemonThreads(2, "test")
    barrier = threading.Barrier(2)
    futures = [threads.submit(barrier.wait, 60) for _ in range(4)]
    assert sorted(future.result(60) for future in futures) == [0, 0, 1, 1]
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(60)
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("test-")]
    assert len(workers) == 2
    assert all(thread.daemon for thread in workers)
    threads.shutdown()
    for thread in workers:
        thread.join(60)
        assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="shut down"):
        threads.submit(int)
