"""``PosixStorage``: ``abc.Storage`` on real files, over either engine.

Reads, writes and syncs go to the engine (ring or threads); every other system call runs in a few
worker threads of its own, none on the loop. Small files are read and written there in one piece
rather than through aiofiles, because a cancelled aiofiles call leaves its thread running with the
file: here it is awaited, so that a cancelled ``write_small`` has either replaced the file or left it
as it was.

Invariants: a cancelled call has ended in its thread before it raises, and what it had opened is
closed again; errors are ``OSError`` with errno, path and cure. Must not know segments or blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from cascade_aio.abc.storage import File, FileEntry, Lock, Priority, Urgency
from cascade_aio.errors import ClosedError
from cascade_aio.io.daemon_threads import DaemonThreads
from cascade_aio.io.engine import EngineLimits, TransferEngine
from cascade_aio.io.errors import explained
from cascade_aio.io.files import FILE_MODE, DirectFile, FileLock, create_new, lock_file, open_existing, remove_created
from cascade_aio.io.ring import Ring, RingFactory
from cascade_aio.io.select import open_engine
from cascade_aio.io.waiting import call_with_undo

CALL_THREADS = 4
"""Threads for opening, listing, syncing directories: slow calls, seldom many at once."""

SMALL_FILE_BYTES_MAX = 1 << 30
"""``read_small`` refuses more: what it reads is held twice in memory for a moment."""

T = TypeVar("T")


class PosixStorage:
    """Files of a POSIX file system. Made by ``open_storage``; one event loop owns it."""

    def __init__(self, engine: TransferEngine, *, notes: Sequence[str] = ()) -> None:
        self._engine = engine
        self._notes = tuple(notes)
        self._executor = DaemonThreads(CALL_THREADS, "cascade-files")
        self._files: set[DirectFile] = set()
        self._temporary = itertools.count()
        self._closed = False
        self._calls = 0  # in worker threads now
        self._calls_made = 0
        self._idle = asyncio.Event()
        self._opened = {"direct": 0, "buffered": 0, "not_preallocated": 0}

    @property
    def engine(self) -> TransferEngine:
        return self._engine

    # -- open files and their bytes

    async def open(self, path: str, *, writable: bool = False) -> DirectFile:
        """Open an existing file, O_DIRECT where the file system takes it (``File.direct`` tells)."""
        fd, direct = await self._call_with_undo(
            functools.partial(open_existing, path, writable), lambda opened: os.close(opened[0])
        )
        return self._adopt(fd, path, direct=direct, preallocated=True)

    async def create(self, path: str, *, preallocate_bytes: int = 0) -> DirectFile:
        """Create a new file with really allocated space; failure or cancellation leaves no file behind."""
        fd, direct, preallocated = await self._call_with_undo(
            functools.partial(create_new, path, preallocate_bytes), functools.partial(remove_created, path=path)
        )
        return self._adopt(fd, path, direct=direct, preallocated=preallocated)

    async def read(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority | Urgency = Priority.DEMAND,
        deadline_s: float | None = None,
    ) -> int:
        """See ``abc.Storage``. On a direct file, misaligned buffers are ``OSError`` (EINVAL) at once."""
        own = self._own(file)
        own.acquire()
        try:
            return await self._engine.read(own, buffers, offset, priority=priority, deadline_s=deadline_s)
        finally:
            own.release()

    async def write(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority = Priority.WRITE,
        deadline_s: float | None = None,
    ) -> None:
        """See ``abc.Storage``. On a direct file, misaligned buffers are ``OSError`` (EINVAL) at once."""
        own = self._own(file)
        own.acquire()
        try:
            await self._engine.write(own, buffers, offset, priority=priority, deadline_s=deadline_s)
        finally:
            own.release()

    async def sync(self, file: File) -> None:
        """fdatasync, direct or not: also a direct write may sit in the device's own cache."""
        own = self._own(file)
        own.acquire()
        try:
            await self._engine.sync(own)
        finally:
            own.release()

    async def truncate(self, file: File, size_bytes: int) -> None:
        await self._on_file(file, "ftruncate", lambda fd: os.ftruncate(fd, size_bytes))

    async def size(self, file: File) -> int:
        return await self._on_file(file, "fstat", lambda fd: os.fstat(fd).st_size)

    async def register_memory(self, memory: memoryview) -> None:
        """Map ``memory`` into the ring for good, until ``aclose``; refusals are told by ``statistics``."""
        self._check_open()
        if isinstance(self._engine, Ring):
            await self._engine.register_memory(memory)

    # -- names

    async def list_directory(self, path: str) -> list[FileEntry]:
        return await self._call(_list_directory, path, operation="listing", path=path)

    async def make_directory(self, path: str) -> None:
        await self._call(os.makedirs, path, exist_ok=True, operation="mkdir", path=path)

    async def sync_directory(self, path: str) -> None:
        await self._call(_sync_directory, path, operation="fsync of the directory", path=path)

    async def unlink(self, path: str) -> None:
        await self._call(os.unlink, path, operation="unlink", path=path)

    async def read_small(self, path: str) -> bytes:
        """A whole file of at most ``SMALL_FILE_BYTES_MAX`` (else EFBIG)."""
        return await self._call(_read_small, path, operation="read", path=path)

    async def write_small(self, path: str, data: Sequence[bytes | memoryview]) -> None:
        """Replace ``path`` atomically and durably. A crash may leave ``.<name>.<pid>.<n>.tmp`` beside it."""
        directory, name = os.path.split(path)
        temporary = os.path.join(directory, f".{name}.{os.getpid()}.{next(self._temporary)}.tmp")
        await self._call(_write_small, path, temporary, data, operation="write", path=path)

    async def free_bytes(self, path: str) -> int:
        """Bytes that an unprivileged process may still allocate on the file system of ``path``."""
        return await self._call(_free_bytes, path, operation="statvfs", path=path)

    async def try_lock(self, path: str) -> Lock | None:
        """``flock`` on ``path``; ``None`` if held. ENOSYS, EOPNOTSUPP where the file system has no locks."""
        return await self._call_with_undo(functools.partial(lock_file, path), _release_lock)

    # -- the whole

    def statistics(self) -> dict[str, object]:
        """The engine's, and how files were opened: ``direct``, ``buffered`` (O_DIRECT refused),
        ``not_preallocated`` (no fallocate); ``in_progress``: calls and transfers that have not ended.
        ``notes`` are reasons with cures."""
        notes = list(self._notes)
        if self._opened["buffered"]:
            notes.append("buffered: a file system refused O_DIRECT; bytes pass the page cache, syncs use fdatasync")
        if self._opened["not_preallocated"]:
            notes.append("not preallocated: a file system has no fallocate; a full disk shows up only when written")
        engine = self._engine.statistics()
        return {
            **engine,
            **self._opened,
            "calls": self._calls_made,
            "in_progress": self._calls + self._engine.transfers_in_progress,
            "open_files": len(self._files),
            "notes": notes,
        }

    def abandon(self) -> None:
        """See ``abc.Storage``. A call that ends after all may leave a descriptor open, or an empty segment behind."""
        self._engine.abandon()
        self._executor.abandon()

    async def aclose(self) -> None:
        """Wait for what is in flight, close all files, the engine and the threads. May be repeated."""
        if self._closed:
            return
        self._closed = True
        cancelled: asyncio.CancelledError | None = None
        failed: OSError | None = None  # a file's close: the others are closed all the same
        # Each step ends its work before it raises. Calls come before files: an open may still add one.
        while (step := self._next_closing()) is not None:
            try:
                await step()
            except asyncio.CancelledError as error:
                cancelled = error
            except OSError as error:
                failed = error
        self._executor.shutdown(wait=False)
        if failed is not None:
            raise failed
        if cancelled is not None:
            raise cancelled

    def _next_closing(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        if not self._engine.closed:
            return self._engine.aclose
        if self._calls:
            return self._calls_ended
        return next((file.close for file in self._files), None)

    async def _calls_ended(self) -> None:
        self._idle.clear()
        await self._idle.wait()

    def _adopt(self, fd: int, path: str, *, direct: bool, preallocated: bool) -> DirectFile:
        file = DirectFile(
            fd,
            path,
            direct=direct,
            preallocated=preallocated,
            executor=self._executor,
            on_close=self._files.discard,
        )
        self._files.add(file)
        self._opened["direct" if direct else "buffered"] += 1
        self._opened["not_preallocated"] += not preallocated
        return file

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the storage is closed; open the store again")

    def _own(self, file: File) -> DirectFile:
        self._check_open()
        if not isinstance(file, DirectFile):
            raise TypeError(f"{file.path} was opened by another storage ({type(file).__name__})")
        return file

    async def _on_file(self, file: File, operation: str, function: Callable[[int], T]) -> T:
        own = self._own(file)
        own.acquire()
        try:
            return await self._call(function, own.fd, operation=operation, path=own.path)
        finally:
            own.release()

    async def _call(self, function: Callable[..., T], *args: object, operation: str, path: str, **kwargs: object) -> T:
        try:
            return await self._call_with_undo(functools.partial(function, *args, **kwargs), None)
        except OSError as error:
            raise explained(error, operation, path) from error

    async def _call_with_undo(self, function: Callable[[], T], undo: Callable[[T], None] | None) -> T:
        """``undo`` for calls that hand out a descriptor, which a cancelled caller never sees."""
        self._check_open()
        self._calls += 1
        self._calls_made += 1
        try:
            return await call_with_undo(self._executor, function, undo)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()


def open_storage(
    io_backend: str = "auto",
    *,
    limits: EngineLimits | None = None,
    ring_factory: RingFactory | None = None,
) -> PosixStorage:
    """A ``PosixStorage`` for the running loop.

    ``io_backend``: "uring", "threads", or "auto", which takes the ring if the kernel lets it and says in
    ``statistics()["notes"]`` why not and what would help. Raises ``ConfigError`` for an unknown name,
    and for "uring" where there is no ring. ``ring_factory`` opens the kernel's ring: for tests.
    """
    engine, notes = open_engine(io_backend, limits=limits, ring_factory=ring_factory)
    return PosixStorage(engine, notes=notes)


def _release_lock(lock: FileLock | None) -> None:
    if lock is not None:
        lock.release()


def _list_directory(path: str) -> list[FileEntry]:
    entries: list[FileEntry] = []
    with os.scandir(path) as found:
        for entry in found:
            is_dir = entry.is_dir()
            try:
                size_bytes = 0 if is_dir else entry.stat().st_size
            except FileNotFoundError:  # unlinked by another process meanwhile
                continue
            entries.append(FileEntry(entry.name, size_bytes, is_dir))
    return sorted(entries, key=lambda entry: entry.name)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_small(path: str) -> bytes:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > SMALL_FILE_BYTES_MAX:
            raise OSError(errno.EFBIG, f"read_small takes at most {SMALL_FILE_BYTES_MAX} bytes", path)
        return file.read()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)


def _write_small(path: str, temporary: str, data: Sequence[bytes | memoryview]) -> None:
    try:
        with open(temporary, "xb", opener=_open_private) as file:
            for piece in data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(os.path.dirname(path) or ".")


def _free_bytes(path: str) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
