"""The io_uring backend: requests of one loop turn in one system call, answers through one eventfd.

Cycle of a turn: ``TransferEngine`` launches requests, which are packed into one flat array; one C
call submits it; completions raise the eventfd, the loop's reader reaps them in batches and only then
wakes the tasks. The kernel owns a request's buffers until its completion is reaped, so the ring is
freed only after the last one; a ring that cannot be drained is leaked rather than freed.

Registered memory: ``register_memory`` pins memory piece by piece, and requests that lie in a piece
spare the kernel to look up and pin each page. Registered files are left out: they gained nothing that
could be measured (CPU per 4 KiB read at depth 32: 3.43 us plain, 3.42 us registered in /dev/shm; 5.3 and
5.5 us on a disk).

Must not know: what is read, and why.
"""

from __future__ import annotations

import asyncio
import bisect
import errno
import os
import struct
import time
import warnings
from collections.abc import Callable
from typing import Protocol

from cascade_aio._native import FIXED_BUFFER_BYTES_MAX, OP, REAP_BATCH, NativeRing, OpCode, address_of
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import ClosedError, ConfigError
from cascade_aio.io.engine import EngineLimits, TransferEngine
from cascade_aio.io.errors import registration_failure
from cascade_aio.io.transfer import PLAIN, Kind, Request
from cascade_aio.io.waiting import call_in_thread

REGISTERED_PIECE_BYTES = 32 << 20
"""Memory registered by one system call, see ``Ring.register_memory``."""

REGISTERED_PIECES_MAX = 8192
"""Slots of the table: 256 GiB in pieces of 32 MiB; larger memory gets larger pieces."""

SUBMIT_RETRY_S = 0.001
"""Pause before a submission that the kernel refused for want of memory (EAGAIN, EBUSY) is tried again."""

DRAIN_S_MAX = 30.0
"""How long a ring that was never closed is drained when it is collected, before it is leaked."""

_CANCEL_TOKEN = (1 << 64) - 1
_IOVEC = struct.Struct("=QQ")
_PLAIN_CODES = {Kind.READ: int(OpCode.READ), Kind.WRITE: int(OpCode.WRITE), Kind.SYNC: int(OpCode.FDATASYNC)}
_FIXED_CODES = {Kind.READ: int(OpCode.READ_FIXED), Kind.WRITE: int(OpCode.WRITE_FIXED)}
_VECTOR_CODES = {Kind.READ: int(OpCode.READV), Kind.WRITE: int(OpCode.WRITEV)}
_CANCEL_CODE = int(OpCode.CANCEL)
_REFUSED_FOR_NOW = (errno.EAGAIN, errno.EBUSY, errno.EINTR)


class KernelRing(Protocol):
    """What this module needs of ``_native.NativeRing``; tests put failing ones here."""

    def submit(self, ops: bytearray, count: int, start: int = 0) -> int: ...
    def reap(self) -> list[tuple[int, int]]: ...
    def wait(self, timeout_ms: int) -> bool: ...
    def register_buffer_table(self, slots: int) -> None: ...
    def register_buffer(self, slot: int, address: int, nbytes: int) -> None: ...
    def close(self) -> None: ...


RingFactory = Callable[[int, int], KernelRing]
"""Opens a ring of so many entries that raises the given eventfd; raises ``OSError``."""


class Ring(TransferEngine):
    """Made by ``Ring.open`` in the running loop; ``await aclose()`` drains and frees it."""

    backend = "uring"

    def __init__(self, native: KernelRing, event_fd: int, depth: int, limits: EngineLimits) -> None:
        super().__init__(limits)
        self._native = native
        self._event_fd = event_fd
        self._owner_pid = os.getpid()
        self._depth = depth
        # One cancellation per request in flight may be packed besides the requests themselves.
        self._ops = bytearray(OP.size * 2 * limits.requests_in_flight_max)
        self._ops_count = 0
        self._registration = asyncio.Lock()
        self._slots = 0
        self._starts: list[int] = []
        self._pieces: list[tuple[int, int]] = []  # (end address, slot), parallel to _starts
        self._registered: list[memoryview] = []  # keeps the mappings alive as long as the kernel has them
        self._registered_bytes = 0
        self._notes: list[str] = []
        self._counts |= dict.fromkeys(("submits", "reaps", "completions", "fixed_requests"), 0)
        self._loop.add_reader(event_fd, self._on_event)

    @classmethod
    def open(
        cls,
        *,
        depth: int | None = None,
        limits: EngineLimits | None = None,
        ring_factory: RingFactory | None = None,
    ) -> Ring:
        """A ring for the running loop. ``depth``: submission slots, by default enough for the limits.

        Raises ``OSError`` as the kernel does (ENOSYS, EPERM, ENOMEM, ENOTSUP): ``errors.ring_failure``
        tells it.
        """
        limits = limits or EngineLimits()
        depth = 2 * limits.requests_in_flight_max if depth is None else depth
        if depth < 1:
            raise ConfigError(f"depth={depth} must be at least 1")
        factory: RingFactory = NativeRing if ring_factory is None else ring_factory
        event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            native = factory(depth, event_fd)
        except BaseException:
            os.close(event_fd)
            raise
        return cls(native, event_fd, depth, limits)

    async def register_memory(self, memory: memoryview, piece_bytes: int = REGISTERED_PIECE_BYTES) -> int:
        """Pin ``memory`` (page-aligned, writable, present) in pieces; bytes registered.

        Never raises for a refusal of the kernel: what could not be registered is used as plain buffers
        and ``statistics()["notes"]`` says why. The memory stays exported until ``aclose``. Runs in a
        worker thread, but the kernel holds the ring's lock meanwhile, and a submission by the loop waits
        for it: 16, 32, 64, 128, 256 MiB of warm 4 KiB pages took 1.1, 1.2, 2.0, 3.2, 8.9 ms, hence the default.
        """
        if self._refuses():
            raise ClosedError("the I/O engine is closed; memory cannot be registered any more")
        address, nbytes = address_of(memory), memory.nbytes
        if address % PAGE_BYTES or not nbytes:
            raise ValueError(f"memory at {address:#x} of {nbytes} bytes is empty or not aligned to {PAGE_BYTES}")
        registered = 0
        async with self._registration:
            try:
                if not self._slots:
                    await call_in_thread(None, self._native.register_buffer_table, REGISTERED_PIECES_MAX)
                free = REGISTERED_PIECES_MAX - self._slots
                if not free:
                    self._notes.append(f"memory not registered: all {REGISTERED_PIECES_MAX} slots are taken")
                    return 0
                step = _piece_bytes(nbytes, piece_bytes, free)
                self._registered.append(memory)
                for start in range(0, min(nbytes, step * free), step):
                    if self._refuses():
                        break
                    size = min(step, nbytes - start)
                    slot = self._slots
                    self._slots += 1  # a slot whose registration was cancelled or refused is not used again
                    await call_in_thread(None, self._native.register_buffer, slot, address + start, size)
                    self._add_piece(address + start, size, slot)
                    registered += size
            except OSError as error:
                self._notes.append(
                    f"plain buffers for {nbytes - registered} of {nbytes} bytes: {registration_failure(error)}"
                )
        return registered

    def statistics(self) -> dict[str, object]:
        """As of every engine, and ``submits``, ``reaps``, fixed-buffer figures, ``ring_notes`` (reasons with cures)."""
        reaps = self._counts["reaps"]
        return {
            **super().statistics(),
            "depth": self._depth,
            "completions_per_reap": round(self._counts["completions"] / reaps, 2) if reaps else 0.0,
            "registered_bytes": self._registered_bytes,
            "ring_notes": list(self._notes),
        }

    # -- the device's side

    def _launch(self, request: Request) -> None:
        kind = request.transfer.kind
        pieces = request.addresses()
        slot = 0
        if len(pieces) > 1:
            vector = bytearray(_IOVEC.size * len(pieces))
            for index, (start, size) in enumerate(pieces):
                _IOVEC.pack_into(vector, index * _IOVEC.size, start, size)
            request.vector = vector
            address, length, opcode = address_of(vector), len(pieces), _VECTOR_CODES[kind]
        else:
            address, length = pieces[0] if pieces else (0, 0)
            opcode = _PLAIN_CODES[kind]
            if request.slot != PLAIN:
                slot, opcode = request.slot, _FIXED_CODES[kind]
                self._counts["fixed_requests"] += 1
        self._pack(request.token, address, request.offset, length, request.transfer.file.fd, opcode, slot)

    def _interrupt(self, request: Request) -> None:
        self._pack(_CANCEL_TOKEN, request.token, 0, 0, -1, _CANCEL_CODE, 0)

    def _pack(self, token: int, address: int, offset: int, length: int, fd: int, opcode: int, slot: int) -> None:
        end = self._ops_count * OP.size
        if end == len(self._ops):
            self._ops.extend(bytes(len(self._ops)))
        OP.pack_into(self._ops, end, token, address, offset, length, fd, opcode, 0, slot, 0)
        self._ops_count += 1

    def _push(self) -> None:
        if not self._ops_count:
            return
        self._counts["batches"] += 1
        start = 0
        while start < self._ops_count:
            try:
                taken = self._native.submit(self._ops, self._ops_count - start, start)
            except OSError as error:
                if error.errno not in _REFUSED_FOR_NOW:
                    self._refuse(start, error.errno or errno.EIO)
                    return
                taken = 0
            self._counts["submits"] += 1
            start += taken
            if not taken:
                self._ops[: (self._ops_count - start) * OP.size] = self._ops[
                    start * OP.size : self._ops_count * OP.size
                ]
                self._loop.call_later(SUBMIT_RETRY_S, self._schedule_flush)
                break
        self._ops_count -= start

    def _refuse(self, start: int, code: int) -> None:
        """The ring takes nothing any more: what it has not taken fails, each with the kernel's reason."""
        refused: list[tuple[int, int]] = []
        for index in range(start, self._ops_count):
            token = OP.unpack_from(self._ops, index * OP.size)[0]
            if token != _CANCEL_TOKEN:
                refused.append((token, -code))
        self._ops_count = 0
        self._complete(refused)

    def _on_event(self) -> None:
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:  # the completion it announced was reaped with an earlier one
            return
        self._reap()

    def _reap(self) -> None:
        answers: list[tuple[int, int]] = []
        while True:
            batch = self._native.reap()
            answers += batch
            if len(batch) < REAP_BATCH:
                break
        self._counts["reaps"] += 1
        self._counts["completions"] += len(answers)
        self._complete([answer for answer in answers if answer[0] != _CANCEL_TOKEN])
        if self._queues:
            self._flush()  # at once: what woke up may take milliseconds, and the device would have nothing to do

    async def _release(self) -> None:
        async with self._registration:
            self._loop.remove_reader(self._event_fd)
            # Unpinning gigabytes takes long.
            await call_in_thread(None, self._free)

    def _free(self) -> None:
        self._native.close()
        os.close(self._event_fd)
        self._event_fd = -1
        self._registered.clear()
        self._starts.clear()
        self._pieces.clear()

    def __del__(self) -> None:
        """For a loop torn down without ``aclose``: cancel, wait for the kernel, then free (or leak) the ring."""
        if self.__dict__.get("_event_fd", -1) < 0 or self._owner_pid != os.getpid() or self._abandoned:
            return  # a forked child shares the kernel's ring with its parent: it must not touch it
        warnings.warn(f"{self!r} was not closed: await aclose() in its loop", ResourceWarning, stacklevel=1)
        if self._drain_without_loop():
            self._free()

    def _drain_without_loop(self) -> bool:
        """Whether the kernel has given everything back."""
        unsubmitted = {OP.unpack_from(self._ops, index * OP.size)[0] for index in range(self._ops_count)}
        unsubmitted.update(request.token for request in self._again)
        waiting = self._in_flight.keys() - unsubmitted
        self._ops_count = 0
        for token in waiting:
            self._pack(_CANCEL_TOKEN, token, 0, 0, -1, _CANCEL_CODE, 0)
        if waiting:
            self._native.submit(self._ops, self._ops_count)
        end_s = time.monotonic() + DRAIN_S_MAX
        while waiting and time.monotonic() < end_s:
            waiting.difference_update(token for token, _ in self._native.reap())
            if waiting:
                self._native.wait(100)
        return not waiting

    # -- registered memory

    def _add_piece(self, address: int, nbytes: int, slot: int) -> None:
        at = bisect.bisect_right(self._starts, address)
        self._starts.insert(at, address)
        self._pieces.insert(at, (address + nbytes, slot))
        self._registered_bytes += nbytes
        self._locate = self._find_piece

    def _find_piece(self, address: int, nbytes: int) -> tuple[int, int]:
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            end, slot = self._pieces[at]
            if address < end:
                return slot, min(nbytes, end - address)
        return PLAIN, nbytes


def _piece_bytes(nbytes: int, wanted_bytes: int, free_slots: int) -> int:
    """Piece size: as wanted, larger where the slots would not do, aligned, within the kernel's bound."""
    needed = max(wanted_bytes, -(-nbytes // free_slots), PAGE_BYTES)
    return min(-(-needed // PAGE_BYTES) * PAGE_BYTES, FIXED_BUFFER_BYTES_MAX)
