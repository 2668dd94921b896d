"""Dropping files from the page cache, and checking that they are gone.

``posix_fadvise(DONTNEED)`` is a wish; ``mincore`` on a mapping of the file is the proof. Both block
for as long as the kernel needs to walk the pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable

MAPPED_BYTES_MAX = 1 << 30
"""Files are looked at in windows of this size."""


def drop_cache(paths: Iterable[str]) -> None:
    """Ask the kernel to drop each file's pages; dirty ones are written first, else they would stay."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_bytes(paths: Iterable[str]) -> int:
    """How many bytes of the files are in the page cache now (mincore(2)), whole pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            for start in range(0, size, MAPPED_BYTES_MAX):
                total += _resident_pages(libc, fd, start, min(MAPPED_BYTES_MAX, size - start)) * mmap.PAGESIZE
        finally:
            os.close(fd)
    return total


def _resident_pages(libc: ctypes.CDLL, fd: int, start: int, nbytes: int) -> int:
    address = libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    if address in (None, ctypes.c_void_p(-1).value):
        raise _last_error("mmap")
    try:
        pages = (ctypes.c_ubyte * (-(-nbytes // mmap.PAGESIZE)))()
        if libc.mincore(address, nbytes, pages) != 0:
            raise _last_error("mincore")
        return sum(page & 1 for page in bytes(pages))
    finally:
        libc.munmap(address, nbytes)


def _last_error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")
