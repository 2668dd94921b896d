"""Files kept open for reading, never more of them than the process can afford.

What it is: a bounded cache of open files by number. The least recently used one that nobody reads is
closed for a newcomer; when all are being read, a newcomer waits for the first to become idle. Where
the rest of the process has used up the descriptors (EMFILE), the cache halves itself and tries
again: running short of descriptors makes a store slower, and must never look like damage.

Users hold one file at a time: a scope within another's could wait for itself.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import resource
from collections.abc import AsyncIterator

from cascade_aio.abc.storage import File, Storage

HANDLES_MAX = 256
"""Files kept open for reading at most."""

DESCRIPTORS_SHARE = 4
"""The cache takes one in so many of the descriptors that the process may have."""

_TOO_MANY = frozenset({errno.EMFILE, errno.ENFILE})


class _Handle:
    __slots__ = ("file", "readers")

    def __init__(self, file: asyncio.Task[File]) -> None:
        self.file = file
        self.readers = 0


class FileHandles:
    """Open files by number. Owned by one event loop."""

    def __init__(self, storage: Storage, *, handles_max: int | None = None) -> None:
        if handles_max is None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            affordable = HANDLES_MAX if soft == resource.RLIM_INFINITY else soft // DESCRIPTORS_SHARE
            handles_max = max(1, min(HANDLES_MAX, affordable))
        assert handles_max > 0, handles_max
        self._storage = storage
        self._handles_max = handles_max
        self._handles: collections.OrderedDict[int, _Handle] = collections.OrderedDict()
        self._gone: set[int] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()

    def __len__(self) -> int:
        return len(self._handles)

    @contextlib.asynccontextmanager
    async def opened(self, number: int, path: str) -> AsyncIterator[File]:
        """The file ``number``, at ``path``, open for the length of the scope. ``OSError`` as from ``open``."""
        while True:
            handle = await self._borrow(number, path)
            try:
                file = handle.file.result() if handle.file.done() else await asyncio.shield(handle.file)
            except OSError as error:
                await self._give_back(number, handle)
                if error.errno not in _TOO_MANY or not await self._halve():
                    raise
            except BaseException:
                await self._give_back(number, handle)
                raise
            else:
                break
        try:
            yield file
        finally:
            await self._give_back(number, handle)

    async def forget(self, number: int) -> None:
        """The file was removed: it is closed now, or once nobody reads it. Its number does not come back."""
        handle = self._handles.get(number)
        if handle is not None and handle.readers:
            self._gone.add(number)
        elif handle is not None:
            await self._drop(number)

    async def aclose(self) -> None:
        """Close every file. Readers must be gone."""
        while self._handles:
            await self._drop(next(iter(self._handles)))
        while self._closing:
            await asyncio.wait(list(self._closing))

    async def _borrow(self, number: int, path: str) -> _Handle:
        while (handle := self._handles.get(number)) is None:
            if len(self._handles) < self._handles_max:
                handle = self._handles[number] = _Handle(asyncio.ensure_future(self._storage.open(path)))
                break
            if not await self._drop_idle():
                self._idle.clear()
                await self._idle.wait()
        handle.readers += 1
        self._handles.move_to_end(number)
        return handle

    async def _give_back(self, number: int, handle: _Handle) -> None:
        handle.readers -= 1
        if handle.readers:
            return
        self._idle.set()
        failed = handle.file.done() and (handle.file.cancelled() or handle.file.exception() is not None)
        if self._handles.get(number) is handle and (failed or number in self._gone):
            self._gone.discard(number)
            await self._drop(number)

    async def _halve(self) -> bool:
        """Somebody else needs descriptors. False when there is nothing left to give."""
        if len(self._handles) < 2:
            return False
        self._handles_max = len(self._handles) // 2
        while len(self._handles) > self._handles_max and await self._drop_idle():
            continue
        return True

    async def _drop_idle(self) -> bool:
        """Close the file that nobody has read for longest. False if all are being read."""
        idle = next((number for number, handle in self._handles.items() if not handle.readers), None)
        if idle is None:
            return False
        await self._drop(idle)
        return True

    async def _drop(self, number: int) -> None:
        """Close a file. Cancelled, it is closed all the same, and ``aclose`` waits for that."""
        handle = self._handles.pop(number)
        self._idle.set()  # room, as good as an idle file
        closing = asyncio.ensure_future(_close(handle))
        self._closing.add(closing)
        closing.add_done_callback(self._closed)
        await asyncio.shield(closing)

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled():
            closing.exception()  # whoever was not cancelled is told


async def _close(handle: _Handle) -> None:
    await asyncio.wait((handle.file,))
    if not handle.file.cancelled() and handle.file.exception() is None:
        await handle.file.result().close()
