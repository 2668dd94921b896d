"""A ``Storage`` that ends its process at an exact call: before, during, after or in the middle of it.

The production code knows nothing of it: it stands between a store and the real storage, in a process that
is there to be killed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from cascade_aio.abc.storage import PAGE_BYTES, File, FileEntry, Lock, Priority, Storage, Urgency

PHASES = ("before", "during", "after", "torn")
"""When a dying call ends the process; ``torn`` writes some pages of a write and not the others."""

PAGES_TORN_MAX = 4096
"""A torn write is done page by page, at most so many."""

T = TypeVar("T")


class DyingStorage:
    """A ``Storage`` that kills its process at the ``die_at``-th call that changes something."""

    def __init__(self, inner: Storage, *, die_at: int = 0, phase: str = "before", seed: int = 0) -> None:
        assert phase in PHASES, phase
        self._inner = inner
        self._die_at = die_at
        self._phase = phase
        self._rng = random.Random(seed)
        self._calls = 0

    async def _change(self, call: Callable[[], Awaitable[T]], torn: Callable[[], Awaitable[None]] | None = None) -> T:
        self._calls += 1
        if self._calls != self._die_at:
            return await call()
        if self._phase == "torn" and torn is not None:
            await torn()
        elif self._phase == "during":
            running = asyncio.ensure_future(call())
            for _ in range(3):  # to the engine, and from there to the kernel
                await asyncio.sleep(0)
            _die()
            return await running
        elif self._phase == "after":
            await call()
        _die()
        raise AssertionError("this process has killed itself")

    async def _tear(self, file: File, buffers: Sequence[memoryview], offset: int) -> None:
        """Half of the pages reach the file, in any order."""
        pages: list[tuple[int, memoryview]] = []
        for buffer in buffers:
            for start in range(0, len(buffer), PAGE_BYTES):
                pages.append((offset, buffer[start : start + PAGE_BYTES]))
                offset += PAGE_BYTES
        chosen = self._rng.sample(pages, len(pages) // 2)[:PAGES_TORN_MAX]
        await asyncio.gather(*(self._inner.write(file, [page], at) for at, page in chosen))

    async def create(self, path: str, *, preallocate_bytes: int = 0) -> File:
        return await self._change(lambda: self._inner.create(path, preallocate_bytes=preallocate_bytes))

    async def write(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority = Priority.WRITE,
        deadline_s: float | None = None,
    ) -> None:
        await self._change(
            lambda: self._inner.write(file, buffers, offset, priority=priority, deadline_s=deadline_s),
            lambda: self._tear(file, buffers, offset),
        )

    async def sync(self, file: File) -> None:
        await self._change(lambda: self._inner.sync(file))

    async def truncate(self, file: File, size_bytes: int) -> None:
        await self._change(lambda: self._inner.truncate(file, size_bytes))

    async def make_directory(self, path: str) -> None:
        await self._change(lambda: self._inner.make_directory(path))

    async def sync_directory(self, path: str) -> None:
        await self._change(lambda: self._inner.sync_directory(path))

    async def unlink(self, path: str) -> None:
        await self._change(lambda: self._inner.unlink(path))

    async def write_small(self, path: str, data: Sequence[bytes | memoryview]) -> None:
        await self._change(lambda: self._inner.write_small(path, data))

    async def try_lock(self, path: str) -> Lock | None:
        return await self._change(lambda: self._inner.try_lock(path))

    # -- what changes nothing

    async def open(self, path: str, *, writable: bool = False) -> File:
        return await self._inner.open(path, writable=writable)

    async def read(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority | Urgency = Priority.DEMAND,
        deadline_s: float | None = None,
    ) -> int:
        return await self._inner.read(file, buffers, offset, priority=priority, deadline_s=deadline_s)

    async def size(self, file: File) -> int:
        return await self._inner.size(file)

    async def list_directory(self, path: str) -> list[FileEntry]:
        return await self._inner.list_directory(path)

    async def read_small(self, path: str) -> bytes:
        return await self._inner.read_small(path)

    async def free_bytes(self, path: str) -> int:
        return await self._inner.free_bytes(path)

    async def register_memory(self, memory: memoryview) -> None:
        await self._inner.register_memory(memory)

    def statistics(self) -> dict[str, object]:
        return self._inner.statistics()

    def abandon(self) -> None:
        self._inner.abandon()

    async def aclose(self) -> None:
        await self._inner.aclose()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
