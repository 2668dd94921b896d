"""Open files and locks of the POSIX storage, and the system calls that make them.

Functions here block and run in worker threads; ``DirectFile`` itself belongs to the loop. O_DIRECT is
set after opening (``F_SETFL``): with ``O_CREAT | O_DIRECT`` a file system that refuses direct I/O
leaves a new file behind and says EINVAL all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Executor

from cascade_aio.errors import ClosedError
from cascade_aio.io.errors import explained
from cascade_aio.io.waiting import call_in_thread

FILE_MODE = 0o600
"""KV bytes are other people's prompts: nobody but the owner reads them."""

_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class DirectFile:
    """An open file with a count of its users, so that ``close`` waits for requests in flight.

    ``direct`` is false where the file system refused O_DIRECT: then requests go through the page cache
    and need no alignment. ``preallocated`` is false where space could not be reserved.
    """

    __slots__ = (
        "_closing",
        "_ended",
        "_executor",
        "_idle",
        "_on_close",
        "_users",
        "closed",
        "direct",
        "fd",
        "path",
        "preallocated",
    )

    def __init__(
        self,
        fd: int,
        path: str,
        *,
        direct: bool,
        preallocated: bool,
        executor: Executor,
        on_close: Callable[[DirectFile], None],
    ) -> None:
        self.fd = fd
        self.path = path
        self.direct = direct
        self.preallocated = preallocated
        self.closed = False
        self._executor = executor
        self._on_close = on_close
        self._users = 0
        self._closing = False
        self._idle = asyncio.Event()
        self._ended = asyncio.Event()

    def acquire(self) -> None:
        """One more request uses the descriptor. Raises ``ClosedError`` once ``close`` was called."""
        if self._closing:
            raise ClosedError(f"{self.path} was closed; open it again")
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            self._idle.set()

    async def close(self) -> None:
        """Wait for requests in flight, then close, also when cancelled meanwhile. May be repeated."""
        if self._closing:
            await self._ended.wait()
            return
        self._closing = True
        cancelled: asyncio.CancelledError | None = None
        while self._users:
            self._idle.clear()
            try:
                await self._idle.wait()
            except asyncio.CancelledError as error:
                cancelled = error
        try:
            # close() may block for long on network file systems, which write back there.
            await call_in_thread(self._executor, _close, self.fd, self.path)
        finally:
            self.closed = True
            self._on_close(self)
            self._ended.set()
        if cancelled is not None:
            raise cancelled


class FileLock:
    """An exclusive ``flock`` on an open file description that no child process inherits over exec."""

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd

    def release(self) -> None:
        """Give the lock up by closing the descriptor. May be repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_existing(path: str, writable: bool) -> tuple[int, bool]:
    """Descriptor of an existing file and whether it is direct."""
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    fd = _opened(path, flags, "open")
    return fd, _closed_on_error(fd, path, lambda: _set_direct(fd))


def create_new(path: str, preallocate_bytes: int) -> tuple[int, bool, bool]:
    """Descriptor of a new file, whether it is direct, whether its space is reserved. Leaves no file on failure."""
    fd = _opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, "creation")

    def prepare() -> tuple[bool, bool]:
        direct = _set_direct(fd)
        return direct, _reserve(fd, preallocate_bytes)

    try:
        direct, preallocated = prepare()
    except BaseException as error:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise explained(error, f"creation with {preallocate_bytes} bytes", path) from error
        raise
    return fd, direct, preallocated


def remove_created(created: tuple[int, bool, bool], path: str) -> None:
    """Take back what ``create_new`` made, for a caller that was cancelled."""
    os.close(created[0])
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def lock_file(path: str) -> FileLock | None:
    """``flock(LOCK_EX | LOCK_NB)`` on ``path``, created if missing; ``None`` if it is held."""
    fd = _opened(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, "creation of the lock file")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError as error:
        os.close(fd)
        raise explained(error, "flock", path) from error
    return FileLock(fd, path)


def _opened(path: str, flags: int, operation: str) -> int:
    try:
        return os.open(path, flags, FILE_MODE)
    except OSError as error:
        raise explained(error, operation, path) from error


def _closed_on_error(fd: int, path: str, step: Callable[[], bool]) -> bool:
    try:
        return step()
    except OSError as error:
        os.close(fd)
        raise explained(error, "open", path) from error


def _close(fd: int, path: str) -> None:
    try:
        os.close(fd)
    except OSError as error:
        raise explained(error, "close", path) from error


def _set_direct(fd: int) -> bool:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _reserve(fd: int, nbytes: int) -> bool:
    """Allocate ``nbytes``; without fallocate only the size is set, and a full disk shows up at writing."""
    if not nbytes:
        return True
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, nbytes)
        return False
    return True
