"""Bytes: addresses, streaming copies, CRC-32C, prefault, notify.

Every call that takes time proportional to bytes releases the GIL and blocks its thread: callers on
an event loop run it in a worker thread. Buffers are borrowed for the length of the call; any
C-contiguous buffer will do, others raise ``BufferError``, ``TypeError`` or ``ValueError`` before a
byte moves.

Invariant: a cffi view of a caller's buffer is never bound to a name, it exists only as an argument of
a call. Bound, it would live on in the traceback of an exception; and when CPython's collector meets
a cycle of a memoryview and a view of it, it clears the memoryview first and then crashes (3.11).
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cascade_aio._native._library import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

_cast = ffi.cast
_from_buffer = ffi.from_buffer
_uintptr = ffi.typeof("uintptr_t")
_uint32_array = "uint32_t[]"
_uint64_array = "uint64_t[]"


def address_of(buffer: Buffer) -> int:
    """Address of the first byte. The caller keeps ``buffer`` alive and unmoved while it uses it."""
    return int(_cast(_uintptr, _from_buffer(buffer)))


def copy(dst: Buffer, src: Buffer) -> None:
    """Copy ``src`` into ``dst``, equally long and not overlapping, past the caches when it is large.

    Raises ``ValueError`` if the lengths differ, ``BufferError`` if ``dst`` is read-only.
    """
    nbytes = _common_length(dst, src)
    lib.cascade_copy(_from_buffer(dst, require_writable=True), _from_buffer(src), nbytes)


def copy_crc32c(dst: Buffer, src: Buffer, crc: int = 0) -> int:
    """``copy`` that also returns ``crc32c(src, crc)``; costs hardly more than the copy."""
    nbytes = _common_length(dst, src)
    return lib.cascade_copy_crc32c(_from_buffer(dst, require_writable=True), _from_buffer(src), nbytes, crc)


def crc32c(src: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of ``src``, continuing from ``crc`` as ``zlib.crc32`` does."""
    return lib.cascade_crc32c(_from_buffer(src), _length(src), crc)


def crc32c_chunks(src: Buffer, chunk_bytes: int) -> tuple[int, ...]:
    """CRC-32C of each ``chunk_bytes`` of ``src``, the last chunk shorter: one call without the GIL.

    Raises ``ValueError`` for a chunk of less than one byte.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be at least 1")
    nbytes = _length(src)
    count = -(-nbytes // chunk_bytes)
    if not count:
        return ()
    crcs = ffi.new(_uint32_array, count)
    lib.cascade_crc32c_chunks(_from_buffer(src), nbytes, chunk_bytes, crcs)
    return tuple(ffi.unpack(crcs, count))


def crc32c_ranges(payloads: Sequence[Buffer], chunk_bytes: int) -> list[tuple[int, ...]]:
    """``crc32c_chunks`` of each of ``payloads``: one call without the GIL for all of them."""
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be at least 1")
    lengths = [_length(payload) for payload in payloads]
    ranges = [
        number for payload, nbytes in zip(payloads, lengths, strict=True) for number in (address_of(payload), nbytes)
    ]
    counts = [-(-nbytes // chunk_bytes) for nbytes in lengths]
    crcs = ffi.new(_uint32_array, max(1, sum(counts)))
    lib.cascade_crc32c_ranges(ffi.new(_uint64_array, ranges), len(lengths), chunk_bytes, crcs)
    found = iter(ffi.unpack(crcs, sum(counts)))
    return [tuple(itertools.islice(found, count)) for count in counts]


def sha256_available() -> bool:
    """Whether ``ingest_sha256`` works here: OpenSSL's library was found."""
    return bool(lib.cascade_sha256_available())


def ingest_sha256(
    key: Buffer, value: Buffer, payload: Buffer, value_offset: int, chunk_bytes: int
) -> tuple[bytes, tuple[int, ...]]:
    """Copy the parts into ``payload``, zero the rest; SHA-256 of both, CRC-32C of each chunk. One call without the GIL.

    A part that is a view of its place in ``payload`` is not copied. Raises ``ValueError`` for parts that do
    not fit, ``OSError`` (``ENOSYS`` without OpenSSL).
    """
    payload_bytes, key_bytes, value_bytes = _length(payload), _length(key), _length(value)
    if chunk_bytes < 1 or not key_bytes <= value_offset <= payload_bytes - value_bytes:
        raise ValueError(
            f"key of {key_bytes} bytes, value of {value_bytes} at {value_offset} do not fit {payload_bytes} bytes"
        )
    count = -(-payload_bytes // chunk_bytes)
    crcs = ffi.new(_uint32_array, max(1, count))
    digest = bytearray(32)
    rc = lib.cascade_ingest_sha256(
        _from_buffer(payload, require_writable=True),
        payload_bytes,
        _from_buffer(key),
        key_bytes,
        _from_buffer(value),
        value_bytes,
        value_offset,
        chunk_bytes,
        crcs,
        _from_buffer(digest, require_writable=True),
    )
    if rc < 0:
        raise OSError(-rc, f"SHA-256 of {key_bytes + value_bytes} bytes failed: {os.strerror(-rc)}")
    return bytes(digest), tuple(ffi.unpack(crcs, count)) if count else ()


def map_shared(fd: int, nbytes: int, alignment: int, *, offset: int = 0, writable: bool = True) -> memoryview:
    """Map ``nbytes`` of a file from ``offset`` (whole pages), shared, at a multiple of ``alignment``, plus what
    ``offset`` is over one: so huge pages of the file are mapped as such.

    Unmapped with its last view. Raises ``OSError`` as ``mmap`` does, ``EINVAL`` for an alignment that is no
    power of two.
    """
    out = ffi.new("void **")
    rc = lib.cascade_map_shared(fd, offset, nbytes, alignment, writable, out)
    if rc < 0:
        raise OSError(-rc, f"cannot map {nbytes} bytes of shared memory: {os.strerror(-rc)}")
    owner = ffi.gc(out[0], lambda address: lib.cascade_unmap(address, nbytes))
    view = memoryview(ffi.buffer(owner, nbytes))
    return view if writable else view.toreadonly()


def collapse(memory: Buffer) -> None:
    """Move ``memory`` (whole huge pages, aligned) into huge pages, without changing a byte.

    Raises ``OSError``: ``EINVAL`` where kernel or mapping cannot, ``ENOMEM``, ``EAGAIN``, ``EBUSY`` not now.
    """
    nbytes = _length(memory)
    rc = lib.cascade_collapse(_from_buffer(memory, require_writable=True), nbytes)
    if rc < 0:
        raise OSError(-rc, f"cannot put {nbytes} bytes into huge pages: {os.strerror(-rc)}")


def prefault(memory: Buffer) -> None:
    """Make every page of writable, page-aligned ``memory`` present, without changing a byte.

    The caller is its only writer meanwhile. Raises ``OSError`` (``ENOMEM``, ``EFAULT``) if the
    memory behind it cannot be had, ``EINVAL`` if it is not page-aligned.
    """
    nbytes = _length(memory)
    rc = lib.cascade_prefault(_from_buffer(memory, require_writable=True), nbytes)
    if rc < 0:
        raise OSError(-rc, f"cannot prefault {nbytes} bytes: {os.strerror(-rc)}")


def map_in(memory: Buffer) -> None:
    """Map in every page of page-aligned ``memory``, shared, which others have made present. May be written afterwards.

    Raises ``OSError`` as ``prefault`` does, for a third of its price.
    """
    nbytes = _length(memory)
    rc = lib.cascade_map_in(_from_buffer(memory), nbytes)
    if rc < 0:
        raise OSError(-rc, f"cannot map in {nbytes} bytes: {os.strerror(-rc)}")


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


def trim_heap() -> None:
    """Give freed memory that the C library keeps back to the system. Milliseconds; releases the GIL."""
    lib.cascade_trim_heap()


def notify(event_fd: int) -> None:
    """Add 1 to an eventfd; what CUDA host functions call through ``notify_address()``."""
    lib.cascade_notify(_cast("void *", event_fd))


def notify_address() -> int:
    """Address of ``void cascade_notify(void *event_fd)``, callable from any thread without the GIL."""
    return int(_cast(_uintptr, ffi.addressof(lib, "cascade_notify")))


def uring_version() -> tuple[int, int]:
    """(major, minor) of the liburing that was linked in."""
    return divmod(lib.cascade_uring_version(), 100)


def _length(buffer: Buffer) -> int:
    return len(_from_buffer(buffer))


def _common_length(dst: Buffer, src: Buffer) -> int:
    nbytes = _length(src)
    if _length(dst) != nbytes:
        raise ValueError(f"dst has {_length(dst)} bytes, src has {nbytes}: they must be equally long")
    return nbytes
