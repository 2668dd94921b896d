"""The place of a service: its listening socket, owned by proof, and who is at the other end.

Invariants: at most one living process owns a socket path (a lock on ``PATH.lock`` that dies with its
owner); a socket found there is removed only with that lock in hand; the socket is never open to others
than it should be, not even for a moment, because it is born with its mode.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import fcntl
import os
import socket
import stat
import struct

from cascade_aio.daemon.settings import check_socket_path
from cascade_aio.errors import ConfigError

BACKLOG = 1024
"""Connections that wait to be accepted."""

_SO_PEERGROUPS = 59
_GROUPS_BYTES_MAX = 1 << 18  # 65536 groups, the kernel's limit
_LOCK_ATTEMPTS_MAX = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """Who connected, as the kernel says. ``pid`` is 0 for a process of another pid namespace."""

    pid: int
    uid: int
    gids: frozenset[int]

    def may_enter(self, group: int | None) -> bool:
        """Whether this is our own user, or a member of the group that was let in."""
        return self.uid == os.geteuid() or (group is not None and group in self.gids)


def peer_of(connection: socket.socket) -> Peer:
    """The other end of a Unix socket. Raises ``OSError``."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    groups = array.array("I")
    with contextlib.suppress(OSError):  # before Linux 4.13 the primary group has to do
        groups.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES_MAX))
    return Peer(pid, uid, frozenset({gid, *groups}))


class OwnedSocket:
    """A listening, non-blocking socket at ``path``; ``close`` removes it."""

    def __init__(self, path: str, *, group: int | None = None) -> None:
        """Raises ``ConfigError`` if the path is too long, in use by a living service or something else."""
        check_socket_path(path)
        self.path = os.path.abspath(path)
        check_socket_path(self.path)
        self._lock_fd = _lock(self.path)
        try:
            _remove_stale(self.path)
            self.listener = _listen(self.path, group)
        except BaseException:
            _unlock(self.path, self._lock_fd)
            raise

    def stop_listening(self) -> None:
        """Nobody is let in any more; the path stays ours."""
        self.listener.close()

    def close(self) -> None:
        """Stop listening and let the next service have the path. Repeated calls do nothing."""
        if self._lock_fd < 0:
            return
        self.listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        fd, self._lock_fd = self._lock_fd, -1
        _unlock(self.path, fd)


def _lock(path: str) -> int:
    lock_path = path + ".lock"
    for _ in range(_LOCK_ATTEMPTS_MAX):
        try:
            fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(
                f"socket={path!r}: its lock {lock_path} cannot be opened ({error.strerror}); choose a directory of "
                "this node that you may write to"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(
                f"another service listens at {path}; stop that one, or give this one its own with --socket"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            found, mine = os.stat(lock_path, follow_symlinks=False), os.fstat(fd)
            if (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino):
                return fd
        os.close(fd)  # its owner removed it while we waited for the lock
    raise ConfigError(f"socket={path!r}: its lock {lock_path} keeps being replaced; choose another path")


def _unlock(path: str, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path + ".lock")
    os.close(fd)


def _remove_stale(path: str) -> None:
    """What a dead service left at ``path``: we hold the lock, so nobody listens there."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"socket={path!r} is something else than a socket; remove it or choose another path")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"socket={path!r} belongs to user {found.st_uid}; choose another path")
    os.unlink(path)


def _listen(path: str, group: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # the mode its name is born with
        try:
            listener.bind(path)
            if group is not None:
                os.chown(path, -1, group)
                os.chmod(path, 0o660)
        except OSError as error:
            raise ConfigError(
                f"socket={path!r} cannot be made ({error.strerror}); choose a directory of this node that you may "
                "write to, and a group that you are a member of"
            ) from error
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
