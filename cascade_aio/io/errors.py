"""Kernel errors with their likely cause and cure: one table, one place.

Every ``OSError`` of ``io`` is made here, so that a message always says what was attempted, on which
file, and what to do about it. The errno is never changed: callers decide by it.
"""

from __future__ import annotations

import errno
import os

_CURES: dict[int, str] = {
    errno.EINVAL: (
        "the file system refused the request's alignment; direct I/O takes offsets, lengths and addresses that are "
        "multiples of 4096 bytes (a device with larger sectors needs a file system that hides them)"
    ),
    errno.EIO: "the device or its network failed; look at dmesg, and treat what the file holds as suspect",
    errno.ENOSPC: "the file system is full; free space or lower the disk budget (disk_bytes)",
    errno.EDQUOT: "the disk quota is used up; free space, raise the quota or lower the disk budget (disk_bytes)",
    errno.EROFS: "the file system is read-only, often after an error: look at dmesg, then remount it writable",
    errno.ESTALE: "the file vanished on the server (network file system): reopen the store",
    errno.ENOMEM: (
        "the kernel could not pin the buffers; free memory, or raise the locked-memory limit (ulimit -l, "
        "LimitMEMLOCK= of a systemd unit)"
    ),
    errno.EFBIG: "the file would exceed the file system's or the process's limit (ulimit -f)",
    errno.EMFILE: "the process has too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "the system has too many open files; raise fs.file-max",
    errno.EACCES: "permission is missing; check owner and mode of the file and of its directories",
    errno.EPERM: "the system forbids it; check owner, immutable attributes and the container's security profile",
    errno.EOPNOTSUPP: "the file system does not support this call; use another one for this directory",
    errno.EFAULT: "a buffer's memory is gone; it was unmapped or truncated while the request ran",
    errno.ECANCELED: "something outside cancelled the request; try again",
}

_RING_CURES: dict[int, str] = {
    errno.ENOSYS: "this kernel has no io_uring (Linux >= 5.11 has what is needed); upgrade it",
    errno.EPERM: (
        "io_uring is forbidden here: set `sysctl kernel.io_uring_disabled=0` (1 allows root only), or let the "
        "container's seccomp profile allow io_uring_setup, io_uring_enter and io_uring_register"
    ),
    errno.EACCES: "io_uring is forbidden by a security module; allow it for this process",
    errno.ENOMEM: "the ring exceeds the locked-memory limit; raise it (ulimit -l, LimitMEMLOCK= of a systemd unit)",
    errno.ENOTSUP: "this kernel's io_uring misses operations that are needed; upgrade to Linux >= 5.11",
    errno.EMFILE: "the process has too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "the system has too many open files; raise fs.file-max",
    errno.EINVAL: "this kernel's io_uring does not know the ring's options; upgrade to Linux >= 5.11",
}

_REGISTER_CURES: dict[int, str] = {
    errno.ENOMEM: "the locked-memory limit is too low; raise it (ulimit -l, LimitMEMLOCK= of a systemd unit)",
    errno.EPERM: "pinning memory is forbidden here; raise the locked-memory limit (ulimit -l)",
    errno.EINVAL: "this kernel has no sparse buffer tables; upgrade to Linux >= 5.19",
    errno.EOPNOTSUPP: "this kind of memory cannot be pinned; use anonymous or /dev/shm memory",
    errno.ENOTSUP: "this kind of memory cannot be pinned; use anonymous or /dev/shm memory",
    errno.EFAULT: "the memory is not mapped; reserve it before it is registered",
}


def os_error(code: int, operation: str, path: str | None) -> OSError:
    """An ``OSError`` (of the subclass that fits ``code``) that names operation, file, cause and cure."""
    cure = _CURES.get(code)
    text = f"{os.strerror(code)}: {operation} failed" + (f"; {cure}" if cure else "")
    return OSError(code, text, path)


def explained(error: OSError, operation: str, path: str) -> OSError:
    """``error`` of a system call, told again with operation, file, cause and cure; same errno."""
    return os_error(error.errno or errno.EIO, operation, path)


def abandoned(operation: str, path: str | None) -> OSError:
    """The storage was given up while the operation was in progress, or before it was asked for."""
    return OSError(errno.ETIMEDOUT, f"{operation} was given up: the storage does not answer", path)


def ring_failure(error: OSError) -> str:
    """Why io_uring cannot be used, with the cure: one sentence for messages and statistics."""
    return _told(error, _RING_CURES, "see dmesg and the kernel's documentation of io_uring_setup(2)")


def registration_failure(error: OSError) -> str:
    """Why memory could not be registered with the ring, with the cure."""
    return _told(error, _REGISTER_CURES, "plain buffers are used instead")


def _told(error: OSError, cures: dict[int, str], otherwise: str) -> str:
    code = error.errno or 0
    name = errno.errorcode.get(code, str(code))
    return f"{name}, {os.strerror(code)}: {cures.get(code, otherwise)}"
