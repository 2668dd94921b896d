"""Room in the arena: extents for puts and loads, made by eviction, waited for in order.

What it is: a first-come-first-served queue in front of the allocator, loads before stores. The
decision whom to evict is the policy's; this module only asks for victims until the head of the
queue fits. Bounded: a request waits at most ``wait_s``, then ``TierFullError`` says what holds the
arena. A large request is never starved by small ones, because nobody overtakes within a class.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable

from cascade_aio.config import format_size
from cascade_aio.errors import BlockTooLargeError, TierFullError
from cascade_aio.store.catalog import Catalog
from cascade_aio.tiers.shm import Extent

_EVICTIONS_PER_STEP_MAX = 256
"""Evictions done in one loop turn (about 1 ms); a longer search goes on in the next turn."""


class _Request:
    __slots__ = ("future", "nbytes")

    def __init__(self, nbytes: int, future: asyncio.Future[Extent]) -> None:
        self.nbytes = nbytes
        self.future = future


class ArenaRoom:
    """Hands out extents. ``relieve`` is called when only held copies are left: write faster."""

    def __init__(self, catalog: Catalog, relieve: Callable[[], None], explain: Callable[[], str]) -> None:
        self._catalog = catalog
        self._relieve = relieve
        self._explain = explain
        self._loads: collections.deque[_Request] = collections.deque()
        self._stores: collections.deque[_Request] = collections.deque()
        self._scheduled = False
        self._closed: BaseException | None = None
        self.waited = 0
        catalog.on_room = self.freed

    def check_size(self, nbytes: int) -> None:
        """Raises ``BlockTooLargeError`` for what no eviction can ever make fit."""
        capacity = self._catalog.shm.capacity_bytes
        if nbytes > capacity:
            raise BlockTooLargeError(
                f"a block that takes {format_size(nbytes)} of arena (header and padding included) does not fit in "
                f"the arena of {format_size(capacity)}; open the store with larger shm_bytes"
            )

    async def reserve(self, nbytes: int, *, demand: bool, wait_s: float) -> Extent:
        """An extent of ``nbytes`` of the caller's own. ``demand`` requests are served before others.

        Does not suspend when there is room. Raises ``BlockTooLargeError``, or ``TierFullError`` after
        ``wait_s`` seconds. Cancellation gives up the place in the queue.
        """
        self.check_size(nbytes)
        if self._closed is not None:
            raise self._closed
        if not self._loads and (demand or not self._stores):
            extent, _ = self._try(nbytes)
            if extent is not None:
                return extent
        request = _Request(nbytes, asyncio.get_running_loop().create_future())
        queue = self._loads if demand else self._stores
        queue.append(request)
        self.waited += 1
        self.freed()
        try:
            async with asyncio.timeout(wait_s):
                return await request.future
        except BaseException as error:
            self._withdraw(queue, request)
            if isinstance(error, TimeoutError):
                raise TierFullError(
                    f"no room for {format_size(nbytes)} in the arena within {wait_s:g} s: {self._explain()}"
                ) from None
            raise

    def freed(self) -> None:
        """Room may have appeared: serve the queue in the next loop turn. Cheap when nobody waits."""
        if not self._scheduled and (self._loads or self._stores):
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._serve)

    def close(self, error: BaseException) -> None:
        """Everybody who waits, and everybody who comes, gets ``error``."""
        self._closed = error
        for queue in (self._loads, self._stores):
            for request in queue:
                if not request.future.done():
                    request.future.set_exception(error)

    def _withdraw(self, queue: collections.deque[_Request], request: _Request) -> None:
        future = request.future
        if future.done() and not future.cancelled() and future.exception() is None:
            self._catalog.shm.free(future.result())  # granted in the very turn in which the caller gave up
        elif request in queue:
            queue.remove(request)
        self.freed()

    def _serve(self) -> None:
        self._scheduled = False
        for queue in (self._loads, self._stores):
            while queue:
                request = queue[0]
                if request.future.done():
                    queue.popleft()
                    continue
                extent, exhausted = self._try(request.nbytes)
                if extent is None:
                    if exhausted:
                        self._relieve()
                    else:
                        self.freed()
                    return
                queue.popleft()
                request.future.set_result(extent)

    def _try(self, nbytes: int) -> tuple[Extent | None, bool]:
        """(extent or None, whether nothing evictable is left)."""
        catalog = self._catalog
        extent = catalog.shm.allocate(nbytes)
        evictions = 0
        while extent is None:
            if evictions == _EVICTIONS_PER_STEP_MAX:
                return None, False
            if not catalog.evict_one():
                return None, True
            evictions += 1
            extent = catalog.shm.allocate(nbytes)
        return extent, False
