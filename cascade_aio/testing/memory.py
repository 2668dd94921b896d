"""An in-memory world for tests: files that forget what was not synced, and fail when told to.

``MemoryDisk`` is the medium: sparse files in 4 KiB pages, each page with its content now and its
content on stable storage, and directories whose entries are durable only after ``sync_directory``.
``MemoryStorage`` is one process's ``Storage`` on it; several may share a disk. ``crash`` yields the
disk as a power loss would leave it. The model is as unkind as POSIX allows:

* a sync makes durable what was *completed* when it was called, and only that;
* a failed sync loses what it covered: a later sync of the same file does not bring it back;
* unsynced pages, file names and sizes survive or not, page by page, by the seed; torn within a page.

Damage of the medium itself (``rot``, ``lie``) lies over the bytes that ought to be there, which are kept
(``pristine``): so a test can tell what was hit.

What it must not know: anything about segments or the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import errno
import inspect
import os
import posixpath
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import crc32c

from cascade_aio.abc.storage import PAGE_BYTES, Clock, File, FileEntry, Ingested, Platform, Priority, Urgency
from cascade_aio.errors import ClosedError
from cascade_aio.model import new_hasher
from cascade_aio.testing.clock import ManualClock

SECTOR_BYTES = 512
"""A page is torn at sector boundaries: what disks promise to write whole."""

_ZERO_PAGE = bytes(PAGE_BYTES)


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One call about to act (``after`` False) or about to return (``after`` True)."""

    index: int
    name: str
    path: str
    offset: int = 0
    nbytes: int = 0
    after: bool = False


FaultHook = Callable[[Operation], BaseException | Awaitable[object] | None]
"""Returns an exception to raise, or an awaitable that delays (and may raise), or ``None``."""


class _Inode:
    """A file's pages. ``dirty`` are completed writes no sync has covered; ``lost`` fell to a failed sync;
    ``pristine`` is what ought to be in pages that the medium has damaged."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.size = 0
        self.allocated_bytes = 0
        self.durable: dict[int, bytes] = {}
        self.durable_size = 0
        self.dirty: set[int] = set()
        self.lost: set[int] = set()
        self.pristine: dict[int, bytes] = {}

    def read(self, offset: int, nbytes: int) -> bytes:
        nbytes = max(0, min(nbytes, self.size - offset))
        first, last = offset // PAGE_BYTES, -(-(offset + nbytes) // PAGE_BYTES)
        joined = b"".join(self.pages.get(page, _ZERO_PAGE) for page in range(first, last))
        start = offset - first * PAGE_BYTES
        return joined[start : start + nbytes]

    def write(self, offset: int, data: bytes) -> None:
        position = 0
        while position < len(data):
            page, start = divmod(offset + position, PAGE_BYTES)
            piece = data[position : position + PAGE_BYTES - start]
            if len(piece) < PAGE_BYTES:
                old = self.pages.get(page, _ZERO_PAGE)
                content = old[:start] + piece + old[start + len(piece) :]
            else:
                content = piece
            self.pages[page] = content
            self.dirty.add(page)
            self.lost.discard(page)
            if self.pristine:
                self.pristine.pop(page, None)
            position += len(piece)
        self.size = max(self.size, offset + len(data))
        self.allocated_bytes = max(self.allocated_bytes, self.size)

    def rot(self, offset: int, data: bytes) -> None:
        """The medium holds ``data`` there now, also on stable storage. What lies behind the end is cut off."""
        data = data[: max(0, self.size - offset)]
        if not data:
            return
        size, kept = self.size, dict(self.pristine)
        before = {page: kept.get(page, self.pages.get(page, _ZERO_PAGE)) for page in _pages(offset, len(data))}
        dirty = self.dirty.intersection(before)
        self.write(offset, data)
        self.size = size
        self.durable.update({page: self.pages[page] for page in before})
        self.dirty.difference_update(before)
        self.dirty |= dirty
        self.pristine = {**kept, **before}

    def lie(self, offset: int, data: bytes) -> None:
        """A write that was acknowledged and never reached the medium. Whole pages."""
        assert offset % PAGE_BYTES == len(data) % PAGE_BYTES == 0, "pages only"
        for start in range(0, len(data), PAGE_BYTES):
            self.pristine[(offset + start) // PAGE_BYTES] = data[start : start + PAGE_BYTES]
        self.size = max(self.size, offset + len(data))
        self.allocated_bytes = max(self.allocated_bytes, self.size)

    def intact(self) -> bytes:
        """All bytes as they ought to be."""
        pages = {**self.pages, **self.pristine}
        count = -(-self.size // PAGE_BYTES)
        return b"".join(pages.get(page, _ZERO_PAGE) for page in range(count))[: self.size]

    def truncate(self, nbytes: int) -> None:
        if nbytes < self.size:
            last, rest = divmod(nbytes, PAGE_BYTES)
            for page in [page for page in self.pages if page >= last + (rest > 0)]:
                del self.pages[page]
                self.dirty.discard(page)
            self.pristine = {page: content for page, content in self.pristine.items() if page < last + (rest > 0)}
            if rest and last in self.pages:
                self.pages[last] = self.pages[last][:rest] + bytes(PAGE_BYTES - rest)
        self.size = nbytes
        self.allocated_bytes = nbytes

    def snapshot(self) -> tuple[dict[int, bytes], int]:
        covered = {page: self.pages[page] for page in self.dirty if page in self.pages}
        return covered, self.size

    def harden(self, covered: dict[int, bytes], size: int) -> None:
        self.durable.update(covered)
        for page, content in covered.items():
            if self.pages.get(page) is content:
                self.dirty.discard(page)
        limit = -(-size // PAGE_BYTES)
        for page in [page for page in self.durable if page >= limit]:
            del self.durable[page]
        self.durable_size = size

    def lose(self, covered: dict[int, bytes]) -> None:
        for page, content in covered.items():
            if self.pages.get(page) is content:
                self.dirty.discard(page)
                self.lost.add(page)

    def survivor(self, rng: random.Random | None, torn_bytes: int = SECTOR_BYTES) -> _Inode:
        """The file after a power loss; a page is torn at multiples of ``torn_bytes``."""
        after = _Inode()
        after.pages = dict(self.durable)
        after.size = self.durable_size
        if rng is not None:
            if rng.random() < 0.5:
                after.size = self.size
            keep = rng.random()
            for page in sorted(self.dirty | self.lost):
                if page not in self.pages or rng.random() >= keep:
                    continue
                new, old = self.pages[page], after.pages.get(page, _ZERO_PAGE)
                if torn_bytes < PAGE_BYTES and rng.random() < 0.2:
                    cut = torn_bytes * rng.randrange(1, PAGE_BYTES // torn_bytes)
                    new = new[:cut] + old[cut:] if rng.random() < 0.5 else old[:cut] + new[cut:]
                after.pages[page] = new
            limit = -(-after.size // PAGE_BYTES)
            after.pages = {page: content for page, content in after.pages.items() if page < limit}
        limit = -(-after.size // PAGE_BYTES)
        after.pristine = {page: content for page, content in self.pristine.items() if page < limit}
        after.durable = dict(after.pages)
        after.durable_size = after.allocated_bytes = after.size
        return after

    def become(self, other: _Inode) -> None:
        """Hold what ``other`` holds: those who have the file open see it."""
        for name in ("pages", "size", "allocated_bytes", "durable", "durable_size", "dirty", "lost", "pristine"):
            setattr(self, name, getattr(other, name))


class MemoryDisk:
    """Files, directories and locks; ``capacity_bytes`` bounds what may be allocated."""

    def __init__(self, *, capacity_bytes: int = 1 << 50, locks: bool = True) -> None:
        self.capacity_bytes = capacity_bytes
        self.supports_locks = locks
        self.files: dict[str, _Inode] = {}
        self.durable_files: dict[str, _Inode] = {}
        self.directories: set[str] = {"/"}
        self.durable_directories: set[str] = {"/"}
        self.locked: set[str] = set()

    @property
    def allocated_bytes(self) -> int:
        return sum(inode.allocated_bytes for inode in self.files.values())

    def inode(self, path: str) -> _Inode:
        inode = self.files.get(posixpath.normpath(path))
        if inode is None:
            code = errno.EISDIR if posixpath.normpath(path) in self.directories else errno.ENOENT
            raise _os_error(code, path)
        return inode

    def content(self, path: str) -> bytes:
        """All bytes of a file as a reader sees them now."""
        inode = self.inode(path)
        return inode.read(0, inode.size)

    def poke(self, path: str, offset: int, data: bytes) -> None:
        """Change stored bytes behind everybody's back (also on stable storage): bit rot."""
        inode = self.inode(path)
        assert offset + len(data) <= inode.size, "rot does not grow files"
        size = inode.size
        inode.write(offset, data)
        inode.harden({page: inode.pages[page] for page in _pages(offset, len(data))}, size)

    def flip_bit(self, path: str, bit: int) -> None:
        byte = self.inode(path).read(bit // 8, 1)[0]
        self.poke(path, bit // 8, bytes([byte ^ (1 << (bit % 8))]))

    def kill(self) -> MemoryDisk:
        """The disk as the next process finds it after ``kill -9`` of all others: all is there, no lock is held."""
        after = copy.deepcopy(self)
        after.locked.clear()
        return after

    def crash(self, seed: int | None = None, *, torn_bytes: int = SECTOR_BYTES) -> MemoryDisk:
        """The disk after a power loss; this one is left as it is.

        Without a seed exactly the synced survives. With one, what was not synced survives in part:
        names, sizes, pages, pieces of ``torn_bytes`` of pages.
        """
        rng = None if seed is None else random.Random(seed)
        after = MemoryDisk(capacity_bytes=self.capacity_bytes, locks=self.supports_locks)
        after.directories = set(self.durable_directories)
        if rng is not None:
            after.directories |= {path for path in sorted(self.directories) if rng.random() < 0.5}
        for path, inode in sorted(self._names_after(rng, lambda path: True).items()):
            if _reachable(path, after.directories):
                after.files[path] = inode.survivor(rng, torn_bytes)
        after.directories = {path for path in after.directories if _reachable(path, after.directories)}
        after.durable_files = dict(after.files)
        after.durable_directories = set(after.directories)
        return after

    def crash_directory(self, path: str, seed: int, *, torn_bytes: int = SECTOR_BYTES) -> None:
        """The node that wrote the files in ``path`` lost power: what it had not synced is gone in part, in place."""
        rng = random.Random(seed)
        names = self._names_after(rng, lambda name: posixpath.dirname(name) == path)
        for name in [name for name in self.files if posixpath.dirname(name) == path]:
            del self.files[name]
            self.durable_files.pop(name, None)
        for name, inode in sorted(names.items()):
            inode.become(inode.survivor(rng, torn_bytes))
            self.files[name] = self.durable_files[name] = inode

    def _names_after(self, rng: random.Random | None, chosen: Callable[[str], bool]) -> dict[str, _Inode]:
        """Files by the names that survive, of those ``chosen``."""
        names = {path: inode for path, inode in self.durable_files.items() if chosen(path)}
        if rng is not None:
            for path in sorted(path for path in self.files.keys() | self.durable_files.keys() if chosen(path)):
                if self.files.get(path) is not self.durable_files.get(path) and rng.random() < 0.5:
                    if path in self.files:
                        names[path] = self.files[path]
                    else:
                        del names[path]
        return names


class MemoryFile:
    """An open file of a ``MemoryStorage``; it stays readable after its name is unlinked."""

    def __init__(self, storage: MemoryStorage, path: str, inode: _Inode, *, writable: bool, direct: bool) -> None:
        self.inode = inode
        self.writable = writable
        self.closed = False
        self._storage = storage
        self._path = path
        self._direct = direct
        self._users = 0
        self._idle = asyncio.Event()
        storage.open_files.add(self)

    @property
    def path(self) -> str:
        return self._path

    @property
    def direct(self) -> bool:
        return self._direct

    @property
    def fd(self) -> int:
        """None: for engines that ask for one."""
        return -1

    @property
    def disk(self) -> MemoryDisk:
        return self._storage.disk

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A request on it is under way: ``close`` waits for its end."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def close(self) -> None:
        self.closed = True
        while self._users:
            self._idle.clear()
            await self._idle.wait()
        self._storage.open_files.discard(self)


class MemoryLock:
    def __init__(self, disk: MemoryDisk, path: str) -> None:
        self._disk: MemoryDisk | None = disk
        self.path = path
        disk.locked.add(path)

    @property
    def held(self) -> bool:
        return self._disk is not None

    def release(self) -> None:
        """Repeated calls do nothing: another process may hold it by then."""
        disk, self._disk = self._disk, None
        if disk is not None:
            disk.locked.discard(self.path)


class MemoryStorage:
    """One process's ``Storage`` on a ``MemoryDisk``.

    ``hooks`` see every operation before it acts and after it acted and may raise or delay.
    ``freeze_at = n`` makes the n-th such event and all later ones wait for ever: the process as it
    was at a power loss; ``frozen`` is set then. ``direct`` enforces the alignment rules.
    """

    def __init__(self, disk: MemoryDisk | None = None, *, direct: bool = True) -> None:
        self.disk = MemoryDisk() if disk is None else disk
        self.direct = direct
        self.hooks: list[FaultHook] = []
        self.freeze_at: int | None = None
        self.frozen = asyncio.Event()
        self.events = 0
        self.counts: dict[str, int] = {}
        self.write_sizes: list[int] = []
        self.open_files: set[MemoryFile] = set()
        self._closed = False
        self._active = 0  # operations between their two events
        self._stalls: Callable[[Operation], bool] | None = None
        self._stuck: set[asyncio.Future[None]] = set()
        self._abandoned = False
        self._idle = asyncio.Event()

    def crash(self, seed: int | None = None) -> MemoryStorage:
        """A new process on the disk that a power loss now would leave."""
        return MemoryStorage(self.disk.crash(seed), direct=self.direct)

    def kill(self) -> MemoryStorage:
        """A new process on the disk as it is now; this one's calls go on, on a disk nobody sees any more."""
        after = MemoryStorage(self.disk.kill(), direct=self.direct)
        self.freeze_at = None
        return after

    async def _event(self, name: str, path: str, offset: int = 0, nbytes: int = 0, *, after: bool = False) -> None:
        if self._closed and not after:
            raise ClosedError("the storage is closed; open the store again")
        operation = Operation(self.events, name, path, offset, nbytes, after)
        self.events += 1
        if self.freeze_at is not None and operation.index >= self.freeze_at:
            self.frozen.set()
            self._idle.set()
            await asyncio.get_running_loop().create_future()
        if self._abandoned and not after:
            raise _os_error(errno.ETIMEDOUT, path)
        if self._stalls is not None and not after and self._stalls(operation):
            await self._hang(path)
        for hook in list(self.hooks):
            verdict = hook(operation)
            if isinstance(verdict, BaseException):
                raise verdict
            if inspect.isawaitable(verdict):
                await verdict

    # -- storage that hangs

    def stall(self, which: Callable[[Operation], bool] = lambda operation: True) -> None:
        """From now on operations that ``which`` picks do not end, not even cancelled, until ``resume``."""
        self._stalls = which

    def resume(self) -> None:
        """The storage answers again: what is stuck goes on."""
        self._stalls = None
        for future in self._stuck:
            if not future.done():
                future.set_result(None)

    @property
    def stuck(self) -> int:
        """Operations that hang."""
        return len(self._stuck)

    def abandon(self) -> None:
        """As the protocol says: what is stuck raises now."""
        self._abandoned = True
        for future in self._stuck:
            if not future.done():
                future.set_exception(_os_error(errno.ETIMEDOUT, ""))

    async def _hang(self, path: str) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stuck.add(future)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:  # the kernel has the buffers
                cancelled = error
        self._stuck.discard(future)
        failure = future.exception()
        if cancelled is not None:
            raise cancelled
        if failure is not None:
            raise failure

    @contextlib.asynccontextmanager
    async def _operation(self, name: str, path: str, offset: int = 0, nbytes: int = 0) -> AsyncIterator[None]:
        self.counts[name] = self.counts.get(name, 0) + 1
        self._active += 1
        try:
            await self._event(name, path, offset, nbytes)
            await asyncio.sleep(0)
            yield
            await self._event(name, path, offset, nbytes, after=True)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    def _own(self, file: File) -> MemoryFile:
        assert isinstance(file, MemoryFile), file
        if file.closed:
            raise _os_error(errno.EBADF, file.path)
        return file

    def _check_room(self, path: str, nbytes: int) -> None:
        if self.disk.allocated_bytes + nbytes > self.disk.capacity_bytes:
            raise _os_error(errno.ENOSPC, path)

    # -- files ----------------------------------------------------------------------------------

    async def open(self, path: str, *, writable: bool = False) -> MemoryFile:
        async with self._operation("open", path):
            inode = self.disk.inode(path)
        return MemoryFile(self, path, inode, writable=writable, direct=self.direct)

    async def create(self, path: str, *, preallocate_bytes: int = 0) -> MemoryFile:
        path = posixpath.normpath(path)
        async with self._operation("create", path, 0, preallocate_bytes):
            if posixpath.dirname(path) not in self.disk.directories:
                raise _os_error(errno.ENOENT, path)
            if path in self.disk.files or path in self.disk.directories:
                raise _os_error(errno.EEXIST, path)
            self._check_room(path, preallocate_bytes)
            inode = _Inode()
            inode.size = inode.allocated_bytes = preallocate_bytes
            self.disk.files[path] = inode
        return MemoryFile(self, path, inode, writable=True, direct=self.direct)

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
        self._check_alignment(own, buffers, offset)
        total = sum(len(buffer) for buffer in buffers)
        async with asyncio.timeout(deadline_s), self._operation("read", own.path, offset, total):
            data = own.inode.read(offset, total)
            position = 0
            for buffer in buffers:
                piece = data[position : position + len(buffer)]
                buffer[: len(piece)] = piece
                position += len(piece)
        return len(data)

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
            raise _os_error(errno.EBADF, own.path)
        self._check_alignment(own, buffers, offset)
        total = sum(len(buffer) for buffer in buffers)
        async with asyncio.timeout(deadline_s), self._operation("write", own.path, offset, total):
            growth = offset + total - own.inode.allocated_bytes
            if growth > 0:
                self._check_room(own.path, growth)
            own.inode.write(offset, b"".join(buffers))
            self.write_sizes.append(total)

    def _check_alignment(self, file: MemoryFile, buffers: Sequence[memoryview], offset: int) -> None:
        if file.direct and (offset % PAGE_BYTES or any(len(buffer) % PAGE_BYTES for buffer in buffers)):
            raise _os_error(errno.EINVAL, file.path)

    async def sync(self, file: File) -> None:
        own = self._own(file)
        covered, size = own.inode.snapshot()
        try:
            async with self._operation("sync", own.path):
                own.inode.harden(covered, size)
        except OSError:
            own.inode.lose(covered)
            raise

    async def truncate(self, file: File, size_bytes: int) -> None:
        own = self._own(file)
        async with self._operation("truncate", own.path, size_bytes):
            own.inode.truncate(size_bytes)

    async def size(self, file: File) -> int:
        return self._own(file).inode.size

    # -- directories and small files -----------------------------------------------------------

    async def list_directory(self, path: str) -> list[FileEntry]:
        path = posixpath.normpath(path)
        async with self._operation("list_directory", path):
            if path not in self.disk.directories:
                raise _os_error(errno.ENOTDIR if path in self.disk.files else errno.ENOENT, path)
            entries = [
                FileEntry(posixpath.basename(name), inode.size, False)
                for name, inode in self.disk.files.items()
                if posixpath.dirname(name) == path
            ]
            entries += [
                FileEntry(posixpath.basename(name), 0, True)
                for name in self.disk.directories
                if name != "/" and posixpath.dirname(name) == path
            ]
        return sorted(entries, key=lambda entry: entry.name)

    async def make_directory(self, path: str) -> None:
        path = posixpath.normpath(path)
        async with self._operation("make_directory", path):
            while path not in self.disk.directories:
                if path in self.disk.files:
                    raise _os_error(errno.EEXIST, path)
                self.disk.directories.add(path)
                path = posixpath.dirname(path)
            if path in self.disk.files:
                raise _os_error(errno.ENOTDIR, path)

    async def sync_directory(self, path: str) -> None:
        path = posixpath.normpath(path)
        async with self._operation("sync_directory", path):
            if path not in self.disk.directories:
                raise _os_error(errno.ENOENT, path)
            disk = self.disk
            for name in [name for name in disk.durable_files if posixpath.dirname(name) == path]:
                del disk.durable_files[name]
            disk.durable_files.update(
                {name: inode for name, inode in disk.files.items() if posixpath.dirname(name) == path}
            )
            disk.durable_directories |= {name for name in disk.directories if posixpath.dirname(name) == path}

    async def unlink(self, path: str) -> None:
        path = posixpath.normpath(path)
        async with self._operation("unlink", path):
            self.disk.inode(path)
            del self.disk.files[path]

    async def read_small(self, path: str) -> bytes:
        async with self._operation("read_small", path):
            return self.disk.content(path)

    async def write_small(self, path: str, data: Sequence[bytes | memoryview]) -> None:
        path = posixpath.normpath(path)
        content = b"".join(data)
        async with self._operation("write_small", path, 0, len(content)):
            if posixpath.dirname(path) not in self.disk.directories:
                raise _os_error(errno.ENOENT, path)
            self._check_room(path, len(content))
            inode = _Inode()
            inode.write(0, content)
            inode.harden(*inode.snapshot())
            self.disk.files[path] = inode
            self.disk.durable_files[path] = inode

    async def free_bytes(self, path: str) -> int:
        return max(0, self.disk.capacity_bytes - self.disk.allocated_bytes)

    async def try_lock(self, path: str) -> MemoryLock | None:
        path = posixpath.normpath(path)
        async with self._operation("try_lock", path):
            if not self.disk.supports_locks:
                raise _os_error(errno.EOPNOTSUPP, path)
            if posixpath.dirname(path) not in self.disk.directories:
                raise _os_error(errno.ENOENT, path)
            if path in self.disk.locked:
                return None
            self.disk.files.setdefault(path, _Inode())
            return MemoryLock(self.disk, path)

    # -- the rest of the protocol ---------------------------------------------------------------

    async def register_memory(self, memory: memoryview) -> None:
        """Nothing to do: bytes are copied by Python."""

    def statistics(self) -> dict[str, object]:
        return {"backend": "memory", "operations": dict(self.counts), "in_progress": self._active}

    async def aclose(self) -> None:
        """Waits for operations in progress, as the protocol says; a frozen process has none that ends."""
        self._closed = True
        while self._active and not self.frozen.is_set():
            self._idle.clear()
            await self._idle.wait()


class MemoryEngine:
    """``ByteEngine`` that works inline: for small test blocks only. ``hashed_bytes`` counts its work."""

    def __init__(self) -> None:
        self.hashed_bytes = 0

    async def ingest(
        self,
        key: memoryview,
        value: memoryview,
        payload: memoryview,
        value_offset: int,
        chunk_bytes: int,
        digest: str,
    ) -> Ingested:
        end = value_offset + len(value)
        payload[: len(key)] = key
        payload[len(key) : value_offset] = bytes(value_offset - len(key))
        payload[value_offset:end] = value
        payload[end:] = bytes(len(payload) - end)
        hasher = new_hasher(digest)
        hasher.update(key)
        hasher.update(value)
        self.hashed_bytes += len(key) + len(value)
        return Ingested(hasher.digest(), await self.checksum(payload, chunk_bytes))

    async def digest(
        self, payload: memoryview, key_bytes: int, value_offset: int, value_bytes: int, chunk_bytes: int, digest: str
    ) -> Ingested:
        key, value = bytes(payload[:key_bytes]), bytes(payload[value_offset : value_offset + value_bytes])
        return await self.ingest(memoryview(key), memoryview(value), payload, value_offset, chunk_bytes, digest)

    async def checksum(self, payload: memoryview, chunk_bytes: int) -> tuple[int, ...]:
        await asyncio.sleep(0)
        return tuple(
            crc32c.crc32c(payload[start : start + chunk_bytes]) for start in range(0, len(payload), chunk_bytes)
        )

    async def checksums(self, payloads: Sequence[memoryview], chunk_bytes: int) -> list[tuple[int, ...]]:
        return [await self.checksum(payload, chunk_bytes) for payload in payloads]

    async def copy(self, pairs: Sequence[tuple[memoryview, memoryview]]) -> None:
        await asyncio.sleep(0)
        for destination, source in pairs:
            destination[:] = source

    async def prefault(self, memory: memoryview, *, huge: bool = True) -> int:
        await asyncio.sleep(0)
        return 0

    async def trim_heap(self) -> None:
        """Nothing to give back."""

    async def aclose(self) -> None:
        """Nothing to stop."""


def memory_platform(storage: MemoryStorage | None = None, clock: Clock | None = None) -> Platform:
    """A whole world in memory."""
    return Platform(storage or MemoryStorage(), MemoryEngine(), clock or ManualClock())


def _os_error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)


def _pages(offset: int, nbytes: int) -> range:
    return range(offset // PAGE_BYTES, -(-(offset + nbytes) // PAGE_BYTES))


def _reachable(path: str, directories: set[str]) -> bool:
    while path != "/":
        path = posixpath.dirname(path)
        if path not in directories:
            return False
    return True
