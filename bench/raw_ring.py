"""io_uring with nothing around it: a tight loop on the native ring, one file, one direction.

Straight on ``_native`` and not on the package's own ``Ring``, so that what that ring costs shows up
in every ratio. Blocks its thread while it runs. Memory must be page-aligned; it belongs to the
kernel until the call returns.
"""

from __future__ import annotations

import errno
import os
import pathlib
import time
from typing import Self

from bench.results import BenchError, CannotRunError

FIXED_PIECE_BYTES = 1 << 30
"""Memory is registered in pieces of this size; every request size divides it."""
WAIT_MS = 1000
SYNC_TOKEN = 1 << 32


class RawRing:
    """A ring that keeps ``depth`` requests in flight. Raises ``BenchError`` where there is no io_uring."""

    def __init__(self, depth: int) -> None:
        try:
            from cascade_aio._native import NativeRing
        except ImportError as error:
            raise CannotRunError(str(error)) from error
        self._depth = depth
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._ring = NativeRing(depth, self._event_fd)
        except OSError as error:
            os.close(self._event_fd)
            raise CannotRunError(f"io_uring is not available here: {error}; no raw limit") from error

    def close(self) -> None:
        """Free the ring; nothing is in flight between calls."""
        self._ring.close()
        os.close(self._event_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write_file(self, path: pathlib.Path, source: memoryview, request_bytes: int, *, registered: bool) -> float:
        """Seconds to write ``source`` to a fresh file preallocated to its size, fdatasync included."""
        fd = _open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(fd, 0, len(source))
            os.fsync(fd)
            address = self._register(source, registered)
            started = time.perf_counter()
            self._stream(fd, len(source), request_bytes, address, write=True, registered=registered)
            self._sync(fd)
            return time.perf_counter() - started
        finally:
            os.close(fd)

    def read_file(
        self, path: pathlib.Path, total_bytes: int, buffers: memoryview, request_bytes: int, *, registered: bool
    ) -> float:
        """Seconds to read ``total_bytes`` from the start of ``path`` into ``buffers``, used in turn.

        ``buffers`` has one request's room for each of the ring's ``depth``.
        """
        assert len(buffers) >= request_bytes * self._depth
        fd = _open_direct(path, os.O_RDONLY)
        try:
            address = self._register(buffers, registered)
            started = time.perf_counter()
            self._stream(fd, total_bytes, request_bytes, address, write=False, registered=registered)
            return time.perf_counter() - started
        finally:
            os.close(fd)

    def transfer(self, fd: int, memory: memoryview, offset: int, request_bytes: int, *, write: bool) -> None:
        """Move all of ``memory`` to or from ``fd`` at ``offset``. Raises ``BenchError`` for a short transfer."""
        address = self._register(memory, False)
        self._stream(
            fd, len(memory), request_bytes, address, write=write, registered=False, in_place=True, file_offset=offset
        )

    def sync(self, fd: int) -> None:
        """fdatasync of ``fd``, through the ring."""
        self._sync(fd)

    def _register(self, memory: memoryview, registered: bool) -> int:
        """Address of ``memory``, registered in pieces if asked for. Raises ``BenchError`` if refused."""
        from cascade_aio._native import address_of

        address = address_of(memory)
        if registered:
            try:
                pieces = -(-len(memory) // FIXED_PIECE_BYTES)
                self._ring.register_buffer_table(pieces)
                for piece in range(pieces):
                    start = piece * FIXED_PIECE_BYTES
                    self._ring.register_buffer(piece, address + start, min(FIXED_PIECE_BYTES, len(memory) - start))
            except OSError as error:
                raise CannotRunError(f"buffers cannot be registered: {error} (memlock limit?)") from error
        return address

    def _stream(
        self,
        fd: int,
        total: int,
        request_bytes: int,
        address: int,
        *,
        write: bool,
        registered: bool,
        in_place: bool = False,
        file_offset: int = 0,
    ) -> None:
        """Move ``total`` bytes of ``fd`` from ``file_offset`` on: from or to the same place in memory (writes, and
        reads that are ``in_place``), other reads into the buffer of their slot."""
        from cascade_aio._native import OP, OpCode

        plain, fixed = (OpCode.WRITE, OpCode.WRITE_FIXED) if write else (OpCode.READ, OpCode.READ_FIXED)
        opcode = fixed if registered else plain
        ops = bytearray(OP.size * self._depth)
        free = list(range(self._depth))  # for reads a slot is a buffer, so it is reused only when it is free
        lengths = [0] * self._depth
        offset, done = 0, 0
        while done < total:
            count = 0
            while free and offset < total:
                slot = free.pop()
                length = lengths[slot] = min(request_bytes, total - offset)
                place = offset if write or in_place else slot * request_bytes
                index = place // FIXED_PIECE_BYTES if registered else 0
                at = file_offset + offset
                OP.pack_into(ops, count * OP.size, slot, address + place, at, length, fd, opcode, 0, index, 0)
                offset += length
                count += 1
            taken = 0
            while taken < count:
                taken += self._ring.submit(ops, count - taken, taken)
            completions = self._ring.reap()
            while not completions:
                self._ring.wait(WAIT_MS)
                completions = self._ring.reap()
            free.extend(slot for slot, _ in completions)
            for slot, result in completions:
                if result != lengths[slot]:
                    self._drain(self._depth - len(free))
                    raise BenchError(f"raw {'write' if write else 'read'} gave {result} for {lengths[slot]} bytes")
                done += result

    def _sync(self, fd: int) -> None:
        from cascade_aio._native import OP, OpCode

        ops = bytearray(OP.size)
        OP.pack_into(ops, 0, SYNC_TOKEN, 0, 0, 0, fd, OpCode.FDATASYNC, 0, 0, 0)
        self._ring.submit(ops, 1)
        while not (completions := self._ring.reap()):
            self._ring.wait(WAIT_MS)
        if completions != [(SYNC_TOKEN, 0)]:
            raise BenchError(f"fdatasync failed: {os.strerror(-completions[0][1])}")

    def _drain(self, left: int) -> None:
        """Wait for what is still in flight before the memory may go."""
        while left > 0:
            self._ring.wait(WAIT_MS)
            left -= len(self._ring.reap())


def _open_direct(path: pathlib.Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise CannotRunError("the file system takes no O_DIRECT: measure on another one with --dir") from error
