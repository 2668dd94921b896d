"""Bytes: addresses, streaming copies, CRC-32C, prefault, notify.

Every call that takes time proportional to bytes releases the GIL and blocks its thread: callers on
an event loop run it in a worker thread. Buffers are borrowed for the length of the call; any
C-contiguous buffer will do, others raise ``BufferError`` (or cffi's ``TypeError``) before a byte moves.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from cascade_aio._native._library import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cascade_aio._native._cascade import CData

_cast = ffi.cast
_from_buffer = ffi.from_buffer
_uintptr = ffi.typeof("uintptr_t")


def address_of(buffer: Buffer) -> int:
    """Address of the first byte. The caller keeps ``buffer`` alive and unmoved while it uses it."""
    return int(_cast(_uintptr, _from_buffer(buffer)))


def copy(dst: Buffer, src: Buffer) -> None:
    """Copy ``src`` into ``dst``, equally long and not overlapping, past the caches when it is large.

    Raises ``ValueError`` if the lengths differ, ``BufferError`` if ``dst`` is read-only.
    """
    to, source = _pair(dst, src)
    lib.cascade_copy(to, source, len(source))


def copy_crc32c(dst: Buffer, src: Buffer, crc: int = 0) -> int:
    """``copy`` that also returns ``crc32c(src, crc)``; costs hardly more than the copy."""
    to, source = _pair(dst, src)
    return lib.cascade_copy_crc32c(to, source, len(source), crc)


def crc32c(src: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of ``src``, continuing from ``crc`` as ``zlib.crc32`` does."""
    source = _from_buffer(src)
    return lib.cascade_crc32c(source, len(source), crc)


def prefault(memory: Buffer) -> None:
    """Make every page of writable, page-aligned ``memory`` present, without changing a byte.

    The caller is its only writer meanwhile. Raises ``OSError`` (``ENOMEM``, ``EFAULT``) if the
    memory behind it cannot be had, ``EINVAL`` if it is not page-aligned.
    """
    view = _from_buffer(memory, require_writable=True)
    rc = lib.cascade_prefault(view, len(view))
    if rc < 0:
        raise OSError(-rc, f"cannot prefault {len(view)} bytes: {os.strerror(-rc)}")


def copy_variant() -> str:
    """How ``copy`` moves large blocks on this CPU: "avx512", "avx2", "sse2" or "memcpy"."""
    return ffi.string(lib.cascade_copy_variant()).decode()


def select_copy(name: str) -> None:
    """Choose the variant for the whole process: for tests and benchmarks.

    Raises ``ValueError`` for an unknown name, ``OSError`` (``ENOTSUP``) for one this CPU lacks.
    """
    rc = lib.cascade_copy_select(name.encode())
    if rc < 0:
        if rc == -errno.EINVAL:
            raise ValueError(f"copy variant {name!r} is unknown; use avx512, avx2, sse2 or memcpy")
        raise OSError(-rc, f"this CPU cannot run copy variant {name!r}")


def notify(event_fd: int) -> None:
    """Add 1 to an eventfd; what CUDA host functions call through ``notify_address()``."""
    lib.cascade_notify(_cast("void *", event_fd))


def notify_address() -> int:
    """Address of ``void cascade_notify(void *event_fd)``, callable from any thread without the GIL."""
    return int(_cast(_uintptr, ffi.addressof(lib, "cascade_notify")))


def uring_version() -> tuple[int, int]:
    """(major, minor) of the liburing that was linked in."""
    return divmod(lib.cascade_uring_version(), 100)


def _pair(dst: Buffer, src: Buffer) -> tuple[CData, CData]:
    to = _from_buffer(dst, require_writable=True)
    source = _from_buffer(src)
    if len(to) != len(source):
        raise ValueError(f"dst has {len(to)} bytes, src has {len(source)}: they must be equally long")
    return to, source
