"""One simulated process's files: the disk in memory, with the simulated ring on its data path.

Reads, writes and syncs go through ``SimulatedEngine``; every other call takes a moment and may fail as ``Medium``
decides. ``die`` is the end of the process: nothing it does has any effect any more, its locks are free.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import posixpath
from collections.abc import Callable, Sequence
from typing import Protocol

from cascade_aio.abc.storage import File, Priority, Urgency
from cascade_aio.errors import ClosedError
from cascade_aio.io.engine import EngineLimits
from cascade_aio.testing.memory import MemoryDisk, MemoryFile, MemoryLock, MemoryStorage, _Inode
from cascade_aio.testing.simulation.device import Medium, SimulatedEngine

WRITE_SMALL_STEPS = 3
"""Moments at which a ``write_small`` can be cut short: temporary file made, filled, renamed."""


class Calls(Protocol):
    """Decides about calls that are not transfers."""

    def treat_call(self, name: str, path: str) -> tuple[float, int]:
        """(delay in seconds, errno or 0)."""
        ...


class SimulatedStorage(MemoryStorage):
    """See the module's docstring."""

    def __init__(
        self,
        disk: MemoryDisk,
        limits: EngineLimits,
        medium: Medium,
        calls: Calls,
        on_unlink: Callable[[str], None],
        number: int,
    ) -> None:
        super().__init__(disk)
        self.engine = SimulatedEngine(limits, medium)
        self._calls = calls
        self._on_unlink = on_unlink
        self._locks: list[MemoryLock] = []
        self._temporaries = 0
        self.killed = False
        self.number = number

    async def _event(self, name: str, path: str, offset: int = 0, nbytes: int = 0, *, after: bool = False) -> None:
        if self._closed and not after:
            raise ClosedError("the storage is closed; open the store again")
        self.events += 1
        code = 0
        if not after:
            delay_s, code = self._calls.treat_call(name, path)
            if delay_s:
                await asyncio.sleep(delay_s)
        if self.killed:
            await asyncio.get_running_loop().create_future()
        if code:
            raise OSError(code, os.strerror(code), path)

    def die(self, done_share: float) -> None:
        """The process ends here; see ``SimulatedEngine.kill``."""
        self.killed = True
        self.frozen.set()
        self._idle.set()
        self.engine.kill(done_share)
        for lock in self._locks:
            lock.release()
        self.open_files.clear()

    # -- transfers

    async def read(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority | Urgency = Priority.DEMAND,
        deadline_s: float | None = None,
    ) -> int:
        own = self._own(file)
        with own.in_use():
            return await self.engine.read(own, buffers, offset, priority=priority, deadline_s=deadline_s)

    async def write(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority = Priority.WRITE,
        deadline_s: float | None = None,
    ) -> None:
        own = self._own(file)
        if not own.writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), own.path)
        with own.in_use():
            await self.engine.write(own, buffers, offset, priority=priority, deadline_s=deadline_s)

    async def sync(self, file: File) -> None:
        own = self._own(file)
        with own.in_use():
            await self.engine.sync(own)

    def _own(self, file: File) -> MemoryFile:
        if self._closed:
            raise ClosedError("the storage is closed; open the store again")
        return super()._own(file)

    # -- calls

    async def unlink(self, path: str) -> None:
        await super().unlink(path)
        self._on_unlink(path)

    async def write_small(self, path: str, data: Sequence[bytes | memoryview]) -> None:
        """As on a real file system, in steps; cut short by the end of the process it leaves its temporary file."""
        path = posixpath.normpath(path)
        content = b"".join(data)
        directory, name = posixpath.split(path)
        self._temporaries += 1
        temporary = posixpath.join(directory, f".{name}.{self.number}.{self._temporaries}.tmp")
        async with self._operation("write_small", path, 0, len(content)):
            if directory not in self.disk.directories:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            self._check_room(path, len(content))
            inode = self.disk.files[temporary] = _Inode()
            step = 0
            try:
                for step in range(WRITE_SMALL_STEPS):
                    delay_s, _ = self._calls.treat_call("step", path)
                    await asyncio.sleep(delay_s)
                    if self.killed:
                        await asyncio.get_running_loop().create_future()
                    self._write_small_step(step, temporary, path, inode, content)
            except asyncio.CancelledError:
                if not self.killed:  # the thread that does it goes on to the end
                    for rest in range(step, WRITE_SMALL_STEPS):
                        self._write_small_step(rest, temporary, path, inode, content)
                raise

    def _write_small_step(self, step: int, temporary: str, path: str, inode: _Inode, content: bytes) -> None:
        disk = self.disk
        if step == 0:
            inode.write(0, content)
            inode.harden(*inode.snapshot())
        elif step == 1:
            disk.files[path] = disk.files.pop(temporary)
        else:
            disk.durable_files[path] = inode

    async def try_lock(self, path: str) -> MemoryLock | None:
        lock = await super().try_lock(path)
        if lock is not None:
            self._locks.append(lock)
        return lock

    def statistics(self) -> dict[str, object]:
        calls = super().statistics()
        in_progress = self._active + self.engine.transfers_in_progress
        return {**calls, **self.engine.statistics(), "in_progress": in_progress}

    async def aclose(self) -> None:
        with contextlib.suppress(ClosedError):
            await self.engine.aclose()
        await super().aclose()
