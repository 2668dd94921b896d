"""One transfer between buffers and a file, and the requests it is cut into. No system call here.

A ``Transfer`` is what a caller awaits, whatever its size. It is cut lazily into ``Request`` objects
of bounded size, each of which the device answers once. Several buffers of one transfer
are joined into vectored requests.

Invariants: spans, views and vectors stay referenced until the transfer is finished; ``in_flight``
counts requests cut and not yet ended; a stopped transfer is cut no further; ``finished`` is set only
with ``in_flight == 0``. Knows neither rings nor threads.
"""

from __future__ import annotations

import asyncio
import enum
import errno
from collections.abc import Sequence
from typing import Protocol

from cascade_aio._native import address_of
from cascade_aio.abc.storage import PAGE_BYTES, Priority
from cascade_aio.io.waiting import Completion

IOVECS_MAX = 64
"""Spans joined into one vectored request: the kernel takes 1024; past 64 nothing is gained."""

FIXED_ALONE_BYTES = 256 << 10
"""A span of registered memory from this size on is a request of its own (vectors cannot be registered)."""

RESTARTS_MAX = 16
"""Times one request is given to the device again without any progress (EINTR, EAGAIN, empty writes)."""

PLAIN = -1
"""Slot of memory that is not registered."""


class Kind(enum.IntEnum):
    READ = 0
    WRITE = 1
    SYNC = 2


_NAMES = {Kind.READ: "read", Kind.WRITE: "write", Kind.SYNC: "fdatasync"}


class OpenFile(Protocol):
    """What an engine needs of a file. ``direct``: the page cache is bypassed and PAGE_BYTES rules hold."""

    @property
    def fd(self) -> int: ...

    @property
    def path(self) -> str: ...

    @property
    def direct(self) -> bool: ...


class Locator(Protocol):
    """Where memory is registered: ``(slot, n)``, the first ``n <= nbytes`` bytes lying in that slot."""

    def __call__(self, address: int, nbytes: int) -> tuple[int, int]: ...


class Span:
    """One buffer: its ``view`` in bytes, ``address`` and size."""

    __slots__ = ("address", "nbytes", "view")

    def __init__(self, view: memoryview, address: int) -> None:
        self.view = view
        self.address = address
        self.nbytes = view.nbytes


class Request:
    """One question to the device; ``token`` names it there. ``pieces``: (span index, start, bytes)."""

    __slots__ = (
        "interrupted",
        "nbytes",
        "offset",
        "pieces",
        "priority",
        "restarts",
        "slot",
        "token",
        "transfer",
        "vector",
    )

    def __init__(
        self, transfer: Transfer, token: int, offset: int, nbytes: int, pieces: list[tuple[int, int, int]], slot: int
    ) -> None:
        self.transfer = transfer
        self.priority = transfer.priority  # of now: the transfer may become more urgent, what is in flight is not
        self.token = token
        self.offset = offset
        self.nbytes = nbytes
        self.pieces = pieces
        self.slot = slot
        self.restarts = 0
        self.interrupted = False
        self.vector: bytearray | None = None  # the iovec array of a vectored request, alive until it ends

    @property
    def submit_bytes(self) -> int:
        """Weight of handing it to the device: registered pages need no pinning (measured in ``EngineLimits``)."""
        return self.nbytes if self.slot == PLAIN else self.nbytes // 4

    def advance(self, nbytes: int) -> None:
        """Forget the first ``nbytes``, which were transferred; the rest is asked again."""
        self.offset += nbytes
        self.nbytes -= nbytes
        rest: list[tuple[int, int, int]] = []
        for index, start, size in self.pieces:
            done = min(size, nbytes)
            nbytes -= done
            if done < size:
                rest.append((index, start + done, size - done))
        self.pieces = rest

    def addresses(self) -> list[tuple[int, int]]:
        spans = self.transfer.spans
        return [(spans[index].address + start, size) for index, start, size in self.pieces]

    def views(self) -> list[memoryview]:
        spans = self.transfer.spans
        return [spans[index].view[start : start + size] for index, start, size in self.pieces]


class Transfer(Completion):
    """A read, write or sync that one task awaits. Made by ``TransferEngine``; loop thread only."""

    __slots__ = (
        "_index",
        "_start",
        "cut_bytes",
        "deadline",
        "end_bytes",
        "failure",
        "file",
        "in_flight",
        "kind",
        "nbytes",
        "offset",
        "priority",
        "requests",
        "spans",
        "stopped",
        "timed_out",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        kind: Kind,
        file: OpenFile,
        spans: list[Span],
        offset: int,
        priority: Priority,
    ) -> None:
        super().__init__(loop)
        self.kind = kind
        self.file = file
        self.spans = spans
        self.offset = offset
        self.priority = priority
        self.nbytes = spans[0].nbytes if len(spans) == 1 else sum(span.nbytes for span in spans)
        self.cut_bytes = 0
        self.end_bytes = self.nbytes  # lowered when a read meets the end of the file
        self.in_flight = 0
        self.requests: set[Request] = set()
        self.stopped = False
        self.timed_out = False
        self.failure: OSError | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self._index = 0
        self._start = 0

    def has_more(self) -> bool:
        """Whether requests remain to be cut. A sync is one request without bytes."""
        if self.stopped:
            return False
        if self.kind is Kind.SYNC:
            return self._index == 0
        return self.cut_bytes < self.end_bytes

    def next_bytes_max(self, request_bytes_max: int) -> int:
        return min(request_bytes_max, self.nbytes - self.cut_bytes)

    def cut(self, token: int, request_bytes_max: int, iovecs_max: int, locate: Locator | None) -> Request:
        """The next request: as many bytes as fit, within one registered piece or joined from several spans."""
        if self.kind is Kind.SYNC:
            self._index = 1
            return self._started(Request(self, token, 0, 0, [], PLAIN))
        if locate is None and len(self.spans) == 1:  # the usual case, and the one with many small requests
            start = self.cut_bytes
            nbytes = min(self.nbytes - start, request_bytes_max)
            self.cut_bytes = self._start = start + nbytes
            self._index = self.cut_bytes // self.nbytes  # memory may be registered before the next cut
            return self._started(Request(self, token, self.offset + start, nbytes, [(0, start, nbytes)], PLAIN))
        room = request_bytes_max
        pieces: list[tuple[int, int, int]] = []
        request_slot = PLAIN
        while room and self._index < len(self.spans) and len(pieces) < iovecs_max:
            span = self.spans[self._index]
            nbytes = min(span.nbytes - self._start, room)
            if locate is not None:
                slot, within = locate(span.address + self._start, nbytes)
                last = self._index + 1 == len(self.spans)
                if slot != PLAIN and (within >= FIXED_ALONE_BYTES or (last and not pieces)):
                    if pieces:
                        break
                    nbytes, room, request_slot = within, within, slot
            pieces.append((self._index, self._start, nbytes))
            room -= nbytes
            self._start += nbytes
            if self._start == span.nbytes:
                self._index += 1
                self._start = 0
        nbytes = sum(size for _, _, size in pieces)
        request = Request(self, token, self.offset + self.cut_bytes, nbytes, pieces, request_slot)
        self.cut_bytes += nbytes
        return self._started(request)

    def _started(self, request: Request) -> Request:
        self.in_flight += 1
        self.requests.add(request)
        return request

    def ended(self, request: Request) -> bool:
        """``request`` is over; returns whether the whole transfer is."""
        self.in_flight -= 1
        self.requests.discard(request)
        return self.in_flight == 0 and not self.has_more()

    def meet_end_of_file(self, offset: int) -> None:
        self.end_bytes = min(self.end_bytes, max(0, offset - self.offset))

    def finish(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        self.spans = []  # drop the caller's memory even if the task that waits runs much later
        super().finish()

    def abandon(self, failure: OSError) -> None:
        """Let the waiter go with ``failure``; whoever calls this keeps ``spans``, which the device still has."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        self.stopped = True
        self.failure = failure
        super().finish()

    def describe(self) -> str:
        if self.kind is Kind.SYNC:
            return "fdatasync"
        return f"{_NAMES[self.kind]} of {self.nbytes} bytes at offset {self.offset}"

    def outcome(self) -> int:
        """Bytes transferred. Raises what went wrong. Call after ``wait`` returned."""
        if self.failure is not None:
            raise self.failure
        if self.timed_out:
            raise TimeoutError(f"{self.describe()} passed its deadline: {self.file.path}")
        return self.end_bytes


def gather(file: OpenFile, kind: Kind, buffers: Sequence[memoryview], offset: int) -> list[Span]:
    """The buffers as spans, in order, empty ones left out.

    Buffers are C-contiguous and, for a read, writable: else ``ValueError`` or ``TypeError``. On a direct
    file a buffer or offset off the alignment is ``OSError`` (EINVAL) here, before the kernel sees it.
    """
    if offset < 0:
        raise ValueError(f"offset {offset} of {file.path} is negative")
    spans: list[Span] = []
    for buffer in buffers:
        view = buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")
        if not view.nbytes:
            continue
        if kind is Kind.READ and view.readonly:
            raise ValueError(f"a buffer to read {file.path} into is read-only")
        span = Span(view, address_of(view))
        if file.direct and (span.address | span.nbytes) % PAGE_BYTES:
            raise _misaligned(file, f"a buffer of {span.nbytes} bytes at address {span.address:#x}")
        spans.append(span)
    if file.direct and offset % PAGE_BYTES:
        raise _misaligned(file, f"offset {offset}")
    return spans


def _misaligned(file: OpenFile, what: str) -> OSError:
    return OSError(
        errno.EINVAL,
        f"{what} is not a multiple of {PAGE_BYTES}; the file is open for direct I/O, which takes aligned offsets, "
        "lengths and addresses only",
        file.path,
    )
