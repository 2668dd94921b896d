"""The arena: one shared-memory file per node that holds every warm block.

What it is: a file in ``/dev/shm`` (or any tmpfs), really allocated, mapped once, locked by its
owner for as long as it lives. It hands out bytes and knows nothing of blocks; extents are the
business of ``ShmTier``.

Invariants: memory is reserved at open, so a full tmpfs is an error here and never a SIGBUS later;
exactly one process owns an arena (advisory lock on the file itself, so the lock dies with its
owner); the mapping outlives ``close`` for as long as anybody still holds a view into it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import gc
import mmap
import os
import stat
from typing import Protocol

from cascade_aio._native import map_shared
from cascade_aio.config import format_size
from cascade_aio.errors import BrokenTierError, ConfigError, TierFullError
from cascade_aio.io.waiting import call_in_thread, call_with_undo
from cascade_aio.tiers.directory import ArenaDirectory, DirectoryUnusableError, remove_files
from cascade_aio.tiers.directory_format import DIRECTORY_SUFFIX, DirectoryIdentity

NO_ARENA = "there was no arena"
"""Why an arena that is kept starts empty the first time."""
MAPPING_ALIGNMENT = 2 << 20
"""A huge page of x86-64 and of aarch64 with 4 KiB pages."""

_OPEN_ATTEMPTS_MAX = 8
"""How often the race against an owner that unlinks its file while closing is run again."""

_FALLOCATE_STEP_BYTES = 256 << 20
"""Memory is reserved in steps of this size, so that a cancelled open stops soon."""


class Arena(Protocol):
    """Memory for extents. ``memory`` is writable and page-aligned and keeps the mapping alive."""

    @property
    def memory(self) -> memoryview: ...

    @property
    def description(self) -> str: ...

    def close(self) -> None:
        """Give the memory back once nobody views it any more. Does not block; repeated calls do nothing."""
        ...


class PrivateArena:
    """Anonymous memory of this process: for commands that look at a root for a moment, plug-ins, tests."""

    def __init__(self, nbytes: int) -> None:
        """Raises ``TierFullError`` where the kernel does not grant ``nbytes``."""
        try:
            self._memory = memoryview(mmap.mmap(-1, nbytes))
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise TierFullError(
                f"an arena of {format_size(nbytes)} in private memory is more than this machine or its limits grant "
                "(free -h, ulimit -v, vm.overcommit_memory); open the store with smaller shm_bytes"
            ) from error

    @property
    def memory(self) -> memoryview:
        return self._memory

    @property
    def description(self) -> str:
        return "private memory"

    def close(self) -> None:
        """See ``Arena.close``."""
        self._memory = memoryview(b"")


@dataclasses.dataclass(slots=True)
class SharedArena:
    """An owned arena file. Create with ``open_arena``."""

    path: str
    nbytes: int
    _fd: int
    _memory: memoryview
    directory: ArenaDirectory | None = None
    """Of an arena that may be kept: belongs to it."""
    keep: bool = False
    """Leave the files to the next owner at close."""
    _owner_pid: int = dataclasses.field(default_factory=os.getpid)

    @property
    def memory(self) -> memoryview:
        return self._memory

    @property
    def description(self) -> str:
        return self.path

    def close(self) -> None:
        """See ``Arena.close``. The file goes, too, unless the arena is kept for the next owner."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self._memory = memoryview(b"")
        if self.directory is not None:
            self.directory.close()
        if self.keep and self.directory is not None:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a mapping that lives on would keep the lock, too
            os.close(fd)
            return
        # Unlink before the lock goes with the descriptor: nobody can lock a name that is gone. Not another
        # store's file of the same name, and not from a forked child, whose parent goes on.
        if self._owner_pid == os.getpid() and _is_at(fd, self.path):
            if self.directory is not None:
                remove_files(self.path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        os.close(fd)

    def reopen_fd(self, *, writable: bool) -> int:
        """A new descriptor of the file, for another process; the caller closes it."""
        mode = os.O_RDWR if writable else os.O_RDONLY
        return os.open(f"/proc/self/fd/{self._fd}", mode | os.O_CLOEXEC)


async def open_kept_arena(path: str, identity: DirectoryIdentity) -> tuple[SharedArena, str | None]:
    """The arena ``path`` with its ``directory``, as a former owner left them, or new and empty; and why it is
    empty, ``None`` if it is not.

    An arena that was taken over has ``keep`` set; of a new one its owner sets it when it has got so far. Of several
    who open it at once, one gets it. Errors, blocking and cancellation as ``open_arena``.
    """

    def undo(taken: SharedArena | str) -> None:
        if not isinstance(taken, str):
            taken.close()

    taken = await call_with_undo(None, lambda: _take_over(path, identity), undo)
    if not isinstance(taken, str):
        return taken, None
    arena = await open_arena(path, identity.arena_bytes)
    try:
        arena.directory = ArenaDirectory.create(path + DIRECTORY_SUFFIX, identity)
    except BaseException:
        arena.close()
        raise
    return arena, taken


def remove_arena(path: str) -> None:
    """Remove an arena that nobody owns, with its directory and pin tables; nothing if there is none.

    Raises ``ConfigError`` if it is in use. Blocks as ``unlink`` of so much memory does.
    """
    _remove_stale(path)


async def open_arena(path: str, nbytes: int) -> SharedArena:
    """Create the arena file ``path`` of ``nbytes`` and map it; one that a crash left behind is removed.

    Raises ``ConfigError`` if another process or another store of this process owns it, or the
    directory does not exist; ``TierFullError`` if the memory is not there. Reserves memory in a
    worker thread (about 0.25 s per GiB); a cancelled call leaves no file behind.
    """
    return await _mapped(_lock_file(path), path, nbytes)


async def open_unnamed_arena(directory: str, nbytes: int) -> SharedArena:
    """An arena in the tmpfs ``directory`` that never has a name: however its process ends, nothing is left.

    No other process finds it, and any number may be open at once. Errors, blocking and cancellation as ``open_arena``.
    """
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"shm_dir={directory!r} takes no arena ({error.strerror}); point it at a tmpfs such as /dev/shm"
        ) from error
    return await _mapped(fd, os.path.join(directory, f"(arena without a name of process {os.getpid()})"), nbytes)


async def _mapped(fd: int, path: str, nbytes: int) -> SharedArena:
    """The arena of ``nbytes`` in the empty file ``fd``; takes the descriptor."""
    arena: SharedArena | None = None
    try:
        _check_room(path, fd, nbytes)
        os.ftruncate(fd, nbytes)
        for start in range(0, nbytes, _FALLOCATE_STEP_BYTES):
            step = min(_FALLOCATE_STEP_BYTES, nbytes - start)
            await call_in_thread(None, os.posix_fallocate, fd, start, step)
        # Aligned, because a page of memory can only be part of a huge page at the same place in it.
        arena = SharedArena(path, nbytes, fd, map_shared(fd, nbytes, MAPPING_ALIGNMENT))
        return arena
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise TierFullError(
                f"shared memory for the arena {path} ran out while reserving {format_size(nbytes)}; "
                "open the store with smaller shm_bytes or enlarge /dev/shm "
                "(mount -o remount,size=... /dev/shm)"
            ) from error
        raise
    finally:
        if arena is None:
            if _is_at(fd, path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            os.close(fd)


def check_shm_dir(directory: str) -> None:
    """Raises ``ConfigError`` where no arena can be."""
    if not os.path.isdir(directory):
        raise ConfigError(f"shm_dir={directory!r} is not a directory; point it at a tmpfs such as /dev/shm")


def _lock_file(path: str) -> int:
    """A new, empty, locked file at ``path``; what a crashed owner left there is removed, never used again:
    a process that still maps it must not see our bytes."""
    check_shm_dir(os.path.dirname(path))
    for _ in range(_OPEN_ATTEMPTS_MAX):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            _remove_stale(path)
            continue
        if _lock(fd) and _is_at(fd, path):
            return fd
        os.close(fd)  # somebody took it for stale before it was locked
    raise BrokenTierError(f"the arena {path} keeps being replaced by another process; choose another arena='name'")


def _take_over(path: str, identity: DirectoryIdentity) -> SharedArena | str:
    """Arena and directory of a former owner, or why there is nothing to take over; what is useless stays for
    ``open_arena`` to remove. Raises ``ConfigError`` for what is in use or is none."""
    fd = _lock_stale(path)
    if fd is None:
        return NO_ARENA
    arena: SharedArena | None = None
    try:
        found = os.fstat(fd)
        if found.st_size != identity.arena_bytes:
            return f"the arena has {format_size(found.st_size)}, {format_size(identity.arena_bytes)} are configured"
        if found.st_blocks * 512 < identity.arena_bytes:
            return "the arena was never completely allocated"
        try:
            directory = ArenaDirectory.take_over(path + DIRECTORY_SUFFIX, identity)
        except DirectoryUnusableError as error:
            return str(error)
        try:
            memory = map_shared(fd, identity.arena_bytes, MAPPING_ALIGNMENT)
        except BaseException:
            directory.close()
            raise
        arena = SharedArena(path, identity.arena_bytes, fd, memory, directory, keep=True)
        return arena
    finally:
        if arena is None:
            os.close(fd)


def _remove_stale(path: str) -> None:
    """Unlink an arena that nobody owns. Raises ``ConfigError`` for one that is in use or is none."""
    fd = _lock_stale(path)
    if fd is None:
        return
    try:
        remove_files(path)
        os.unlink(path)
    finally:
        os.close(fd)


def _lock_stale(path: str) -> int | None:
    """A locked descriptor of an arena that nobody owns; ``None`` if there is none (any more).

    Raises ``ConfigError`` for one that is in use or is none.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be used as an arena ({error.strerror}); remove it or choose another arena='name'"
        ) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise ConfigError(f"{path} is no arena but something else; remove it or choose another arena='name'")
        if found.st_uid != os.geteuid():
            raise ConfigError(f"the arena {path} belongs to user {found.st_uid}; choose another arena='name'")
        if not _lock(fd):
            raise ConfigError(
                f"the arena {path} is in use by another open store; close that one, or give this one its "
                "own with arena='name' (several stores may share a root, each with an arena of its own)"
            )
        if _is_at(fd, path):
            locked, fd = fd, -1
            return locked
        return None
    finally:
        if fd >= 0:
            os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    """Whether ``path`` still names this open file."""
    mine = os.fstat(fd)
    try:
        current = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (current.st_dev, current.st_ino)


def _check_room(path: str, fd: int, nbytes: int) -> None:
    """A clear message before the memory of the whole node is eaten up to find out."""
    free = _room(fd)
    if free is not None and free < nbytes:
        gc.collect()  # the arena of a store that was closed here goes when Python has looked at its cycles
        free = _room(fd)
    if free is not None and free < nbytes:
        raise TierFullError(
            f"the arena {path} needs {format_size(nbytes)} of shared memory and {format_size(free)} are free; "
            "open the store with smaller shm_bytes, free memory in /dev/shm, or enlarge it "
            "(mount -o remount,size=... /dev/shm)"
        )


def _room(fd: int) -> int | None:
    """Bytes that the file may take in its file system; ``None`` where that does not tell."""
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize + os.fstat(fd).st_blocks * 512 if status.f_blocks else None
