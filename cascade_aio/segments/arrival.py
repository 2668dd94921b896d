"""What has arrived of a record that is being read: verified chunks, awaited by range.

A chunk counts as arrived only when the record's header has been decoded and checked and the chunk's
CRC agreed with the header's table; the reader (``segments.reader``) says so, this module only keeps
the account. Belongs to one event loop. Must not know: where bytes lie, who waits, what is read next.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable

from cascade_aio.errors import BlockNotFoundError
from cascade_aio.segments.format import CHUNK_BYTES, RecordHeader


class Arrival:
    """Progress of one read. ``on_header`` is called once, when the header and the first chunks are verified."""

    def __init__(self, payload_bytes: int, on_header: Callable[[RecordHeader], None]) -> None:
        self._there = bytearray(-(-payload_bytes // CHUNK_BYTES))
        self._missing = len(self._there)
        self._header: RecordHeader | None = None
        self._on_header = on_header
        self._waiters: list[asyncio.Future[None]] = []
        self._failure: Exception | None = None
        self.wait_s: float | None = None
        """How long ``wait`` waits at most."""

    @property
    def complete(self) -> bool:
        """Every chunk is verified."""
        return self._header is not None and not self._missing

    def has(self, start: int, stop: int) -> bool:
        """Whether all of the payload's bytes from ``start`` up to ``stop`` are verified."""
        if self._header is None:
            return False
        first, end = start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)
        return start >= stop or self._there.find(0, first, end) < 0

    def verified(self, header: RecordHeader, first: int, count: int) -> None:
        """``count`` chunks from number ``first`` on agree with ``header``, which was checked itself."""
        for chunk in range(first, first + count):
            self._missing -= not self._there[chunk]
            self._there[chunk] = 1
        if self._header is None:
            self._header = header
            self._on_header(header)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing more will arrive: whoever waits for what is not there gets ``error``. Complete ones ignore it."""
        if not self.complete and self._failure is None:
            self._failure = error
            self._wake()

    async def wait(self, start: int, stop: int) -> None:
        """Return once the payload's bytes from ``start`` up to ``stop`` are verified.

        Raises what the read failed with, ``BlockNotFoundError`` after ``wait_s``. May be cancelled.
        """
        while not self.has(start, stop):
            if self._failure is not None:
                raise copy.copy(self._failure)  # each its own: a traceback keeps the frames of whoever it passed
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                async with asyncio.timeout(self.wait_s):
                    await waiter
            except TimeoutError:
                raise BlockNotFoundError(f"the rest of the block did not come within {self.wait_s:g} s") from None
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
