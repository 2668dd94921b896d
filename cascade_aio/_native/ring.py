"""``NativeRing``: one io_uring instance, as thin as Python allows.

Operations and completions cross in flat arrays, one C call for many. The ring knows no futures, no
buffers' owners and no limits: ``cascade_aio.io`` keeps every buffer and iovec array alive until the
completion of its request is reaped, and keeps what is in flight bounded.

Threads: ``submit``, ``reap`` and ``wait`` belong to one thread (the event loop's); the
``register_*`` methods may run in another at the same time, and a submission then waits for them in
the kernel.
"""

from __future__ import annotations

import enum
import errno
import os
import struct

from cascade_aio._native._library import ffi, lib
from cascade_aio.errors import ClosedError

REAP_BATCH = 256
"""Completions taken by one ``reap`` call."""

FIXED_BUFFER_BYTES_MAX = 1 << 30
"""The kernel pins no larger iovec as one fixed buffer."""

OP = struct.Struct("=QQQIiBBHI")
"""``struct cascade_op``: user_data, addr, offset, length, fd, opcode, flags, buffer_index, reserved (0)."""

COMPLETION = struct.Struct("=Qi4x")
"""``struct cascade_completion``: user_data, result (bytes or -errno); flags skipped."""


class OpCode(enum.IntEnum):
    """What one operation does; field use in ``c/cascade.h``."""

    NOP = 0
    READ = 1
    WRITE = 2
    READV = 3
    WRITEV = 4
    READ_FIXED = 5
    WRITE_FIXED = 6
    FDATASYNC = 7
    CANCEL = 8


class OpFlag(enum.IntFlag):
    """Bits of an operation's ``flags``."""

    FIXED_FILE = 1


class RingFeature(enum.IntFlag):
    """What the running kernel offers beyond the required operations."""

    REGISTER_SPARSE = 1
    EXT_ARG = 2
    NODROP = 4


class NativeRing:
    """An open ring. Methods raise ``OSError`` with the kernel's errno, ``ClosedError`` after ``close``."""

    def __init__(self, entries: int, event_fd: int) -> None:
        """Open a ring of ``entries`` submission slots (1 to 32768) whose completions raise ``event_fd``.

        ``ENOSYS``: no io_uring in this kernel; ``EPERM``/``EACCES``: forbidden by seccomp or sysctl;
        ``ENOMEM``: memlock limit; ``ENOTSUP``: a required operation is missing.
        """
        self._ring = None
        out = ffi.new("cascade_ring **")
        _check(lib.cascade_ring_open(entries, event_fd, out), "io_uring cannot be opened")
        self._ring = out[0]
        self._completions = bytearray(COMPLETION.size * REAP_BATCH)
        self._completions_view = memoryview(self._completions)
        self._completions_export = ffi.from_buffer(self._completions)  # keeps the address below valid
        self._completions_address = ffi.cast("struct cascade_completion *", self._completions_export)
        self.entries = entries
        self.features = RingFeature(lib.cascade_ring_features(self._ring))

    @property
    def closed(self) -> bool:
        return self._ring is None

    def submit(self, ops: bytearray, count: int, start: int = 0) -> int:
        """Submit ``count`` operations packed in ``ops`` from operation number ``start``, in one system call.

        Returns how many were taken: at most ``entries``; the rest is the caller's to submit again
        after reaping. ``ops`` may be reused at once. ``EINVAL`` for a malformed operation, then none is taken.
        """
        if start < 0 or count < 0 or (start + count) * OP.size > len(ops):
            raise ValueError(f"operations {start} to {start + count} do not fit {len(ops)} bytes")
        first = ffi.cast("struct cascade_op *", ffi.from_buffer(ops)) + start
        taken = lib.cascade_ring_submit(self._open_ring(), first, count)
        return taken if taken >= 0 else _check(taken, "io_uring refused a submission")

    def reap(self) -> list[tuple[int, int]]:
        """Up to ``REAP_BATCH`` completions as (user_data, result), without blocking; full batch: call again."""
        count = lib.cascade_ring_reap(self._open_ring(), self._completions_address, REAP_BATCH)
        return list(COMPLETION.iter_unpack(self._completions_view[: count * COMPLETION.size]))

    def wait(self, timeout_ms: int) -> bool:
        """Block this thread until a completion is there: for draining at shutdown only.

        ``False`` if the time passed or a signal arrived first; the caller looks at what is left and
        calls again.
        """
        rc = lib.cascade_ring_wait(self._open_ring(), timeout_ms)
        if rc in (-errno.ETIME, -errno.EINTR):
            return False
        _check(rc, "waiting for io_uring failed")
        return True

    def register_buffer_table(self, slots: int) -> None:
        """Make an empty table of ``slots`` fixed buffers."""
        _check(lib.cascade_ring_register_buffer_table(self._open_ring(), slots), f"no table of {slots} fixed buffers")

    def register_buffer(self, slot: int, address: int, nbytes: int) -> None:
        """Pin ``nbytes`` at ``address`` as fixed buffer ``slot``. Takes time proportional to the pages.

        The caller keeps the memory mapped until ``unregister_buffers`` or ``close``. ``ENOMEM``:
        memlock limit; ``ValueError`` above ``FIXED_BUFFER_BYTES_MAX``.
        """
        if not 0 < nbytes <= FIXED_BUFFER_BYTES_MAX:
            raise ValueError(f"a fixed buffer takes 1 to {FIXED_BUFFER_BYTES_MAX} bytes, not {nbytes}: register pieces")
        rc = lib.cascade_ring_register_buffer(self._open_ring(), slot, ffi.cast("void *", address), nbytes)
        _check(rc, f"cannot register {nbytes} bytes as fixed buffer {slot}")

    def unregister_buffers(self) -> None:
        """Drop the whole table; ``ENXIO`` if there is none. Requests in flight keep their memory pinned."""
        _check(lib.cascade_ring_unregister_buffers(self._open_ring()), "cannot unregister the fixed buffers")

    def register_file_table(self, slots: int) -> None:
        """Make an empty table of ``slots`` fixed files."""
        _check(lib.cascade_ring_register_file_table(self._open_ring(), slots), f"no table of {slots} fixed files")

    def register_file(self, slot: int, fd: int) -> None:
        """Put ``fd`` into ``slot`` of the table; -1 clears it."""
        _check(lib.cascade_ring_register_file(self._open_ring(), slot, fd), f"cannot register fd {fd} in slot {slot}")

    def close(self) -> None:
        """Free the ring; repeated calls do nothing. The caller has reaped every completion before."""
        ring, self._ring = self._ring, None
        if ring is not None:
            lib.cascade_ring_close(ring)

    def _open_ring(self) -> object:
        if self._ring is None:
            raise ClosedError("the ring was closed; open another one")
        return self._ring


def _check(rc: int, what: str) -> int:
    """``rc`` if it is a count. Raises ``OSError`` with its errno otherwise."""
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")
    return rc
