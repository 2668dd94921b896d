"""Room in an arena (of the node, or of a device): extents for puts and loads, made by eviction, waited for in order.

What it is: a first-come-first-served queue in front of the allocator, loads before stores. The
decision whom to evict is the policy's; this module only asks for victims until the head of the
queue fits. Bounded: a request waits at most ``wait_s``, then ``TierFullError`` says what holds the
arena. A large request is never starved by small ones, because nobody overtakes within a class.

Reads ahead of need come last and may only take what their ``Claim`` allows: free memory, copies that
the policy would evict next *and* that nobody used since the claim was made, and what the claimant
itself has consumed. They are served only while nobody else waits, each as it fits.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from cascade_aio.abc.storage import Priority, Urgency
from cascade_aio.config import format_size
from cascade_aio.errors import BlockTooLargeError, TierFullError

_EVICTIONS_PER_STEP_MAX = 256
"""Evictions done in one loop turn (about 1 ms); a longer search goes on in the next turn."""


_E = TypeVar("_E")


class Extents(Protocol[_E]):
    """Memory to be handed out: ``ShmTier``, ``GpuTier``."""

    capacity_bytes: int

    def allocate(self, nbytes: int) -> _E | None: ...
    def free(self, extent: _E) -> None: ...


class Occupants(Protocol):
    """Who lives in it. ``on_room`` is called when room may have appeared."""

    on_room: Callable[[], None]

    def evict_one(self, *, unused_since: int | None = None) -> bool: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """What reads ahead may take: copies not used since ``mark`` (see ``Catalog.uses``), and what ``give`` evicts.

    ``give()`` evicts one copy that the claimant brought and has done with; ``False`` if there is none.
    """

    mark: int
    give: Callable[[], bool]


class _Request(Generic[_E]):
    __slots__ = ("ahead", "claim", "future", "nbytes")

    def __init__(self, nbytes: int, future: asyncio.Future[_E] | None, claim: Claim | None, *, ahead: bool) -> None:
        self.nbytes = nbytes
        self.future = future
        self.claim = claim
        self.ahead = ahead


class ArenaRoom(Generic[_E]):
    """Hands out extents. ``relieve`` is called when only held copies are left: write faster. ``place`` and ``setting``
    name the arena and what sets its size, for messages."""

    def __init__(
        self,
        extents: Extents[_E],
        occupants: Occupants,
        relieve: Callable[[], None],
        explain: Callable[[], str],
        *,
        place: str = "the arena",
        setting: str = "shm_bytes",
    ) -> None:
        self._extents = extents
        self._occupants = occupants
        self._relieve = relieve
        self._explain = explain
        self._place = place
        self._setting = setting
        self._loads: collections.deque[_Request[_E]] = collections.deque()
        self._stores: collections.deque[_Request[_E]] = collections.deque()
        self._ahead: collections.deque[_Request[_E]] = collections.deque()
        self.let_go: Callable[[], bool] = lambda: False
        """Gives up one copy that is only held because somebody will want it; ``False`` if there is none."""
        self._scheduled = False
        self._closed: BaseException | None = None
        self.waited = 0
        occupants.on_room = self.freed

    def check_size(self, nbytes: int) -> None:
        """Raises ``BlockTooLargeError`` for what no eviction can ever make fit."""
        capacity = self._extents.capacity_bytes
        if nbytes > capacity:
            raise BlockTooLargeError(
                f"a block that takes {format_size(nbytes)} of arena (header and padding included) does not fit in "
                f"{self._place} of {format_size(capacity)}; open the store with larger {self._setting}"
            )

    def reserve_now(self, nbytes: int, *, claim: Claim | None = None) -> _E | None:
        """An extent as ``reserve`` gives a demand, if there is room for it at once and nobody waits for any.

        With a ``claim``: as it gives a read ahead.
        """
        if self._closed is not None or self._loads or self._stores or self._ahead:
            return None
        extent, _ = self._try(_Request(nbytes, None, claim, ahead=claim is not None))
        return extent

    async def reserve(
        self,
        nbytes: int,
        *,
        demand: bool,
        wait_s: float,
        urgency: Urgency | None = None,
        claim: Claim | None = None,
    ) -> _E:
        """An extent of ``nbytes`` of the caller's own. ``demand`` requests are served before others.

        With an ``urgency`` below DEMAND it is a read ahead, bound by its ``claim``, until somebody needs
        it and the urgency rises; then it queues as a demand that has just come. A demand with a claim
        takes what the claim allows before what the policy gives.

        Does not suspend when there is room. Raises ``BlockTooLargeError``, or ``TierFullError`` after
        ``wait_s`` seconds. Cancellation gives up the place in the queue.
        """
        self.check_size(nbytes)
        if self._closed is not None:
            raise self._closed
        loop = asyncio.get_running_loop()
        ahead = urgency is not None and urgency.priority is not Priority.DEMAND
        assert claim is not None or not ahead, "a read ahead needs a claim"
        future: asyncio.Future[_E] = loop.create_future()
        request = _Request(nbytes, future, claim, ahead=ahead)
        queue = self._ahead if ahead else self._loads if demand else self._stores
        if not self._loads and (queue is self._loads or not self._stores) and not (ahead and self._ahead):
            extent, _ = self._try(request)
            if extent is not None:
                return extent
        queue.append(request)
        self.waited += 1
        self.freed()
        try:
            async with asyncio.timeout(wait_s) as limit:
                with self._following(request, urgency, limit, wait_s):
                    return await future
        except BaseException as error:
            self._withdraw(request)
            if isinstance(error, TimeoutError):
                raise TierFullError(
                    f"no room for {format_size(nbytes)} in {self._place} within {wait_s:g} s: {self._explain()}"
                ) from None
            raise

    @property
    def wanted(self) -> bool:
        """Whether a load or a store waits for room."""
        return bool(self._loads or self._stores)

    def freed(self) -> None:
        """Room may have appeared: serve the queue in the next loop turn. Cheap when nobody waits."""
        if not self._scheduled and (self._loads or self._stores or self._ahead):
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._serve)

    def close(self, error: BaseException) -> None:
        """Everybody who waits, and everybody who comes, gets ``error``."""
        self._closed = error
        for queue in (self._loads, self._stores, self._ahead):
            for request in queue:
                if request.future is not None and not request.future.done():
                    request.future.set_exception(error)

    @contextlib.contextmanager
    def _following(
        self, request: _Request[_E], urgency: Urgency | None, limit: asyncio.Timeout, wait_s: float
    ) -> Iterator[None]:
        """Within this scope a read ahead moves to the loads when somebody needs it; its patience begins anew."""

        def rise(priority: Priority) -> None:
            if priority is Priority.DEMAND and request in self._ahead:
                self._ahead.remove(request)
                request.ahead = False
                self._loads.append(request)
                limit.reschedule(asyncio.get_running_loop().time() + wait_s)
                self.freed()

        if urgency is None:
            yield
            return
        with urgency.watched(rise):
            yield

    def _withdraw(self, request: _Request[_E]) -> None:
        future = request.future
        assert future is not None
        if future.done() and not future.cancelled() and future.exception() is None:
            self._extents.free(future.result())  # granted in the very turn in which the caller gave up
        for queue in (self._loads, self._stores, self._ahead):
            if request in queue:
                queue.remove(request)
        self.freed()

    def _serve(self) -> None:
        self._scheduled = False
        for queue in (self._loads, self._stores):
            while queue:
                request = queue[0]
                assert request.future is not None
                if request.future.done():
                    queue.popleft()
                    continue
                extent, exhausted = self._try(request)
                if extent is None:
                    if exhausted:
                        self._relieve()
                    else:
                        self.freed()
                    return
                queue.popleft()
                request.future.set_result(extent)
        self._serve_ahead()

    def _serve_ahead(self) -> None:
        """Each as its own claim allows: one that is refused does not hold up another claimant."""
        for request in list(self._ahead):
            assert request.future is not None
            if not request.future.done():
                extent, exhausted = self._try(request)
                if extent is None:
                    if not exhausted:
                        self.freed()
                        return
                    continue
                request.future.set_result(extent)
            self._ahead.remove(request)

    def _try(self, request: _Request[_E]) -> tuple[_E | None, bool]:
        """(extent or None, whether nothing is left that the request may have evicted)."""
        extents = self._extents
        extent = extents.allocate(request.nbytes)
        evictions = 0
        while extent is None:
            if evictions == _EVICTIONS_PER_STEP_MAX:
                return None, False
            if not self._evict_for(request):
                return None, True
            evictions += 1
            extent = extents.allocate(request.nbytes)
        return extent, False

    def _evict_for(self, request: _Request[_E]) -> bool:
        claim, occupants = request.claim, self._occupants
        if claim is not None and (occupants.evict_one(unused_since=claim.mark) or claim.give()):
            return True
        if request.ahead:
            return False
        while not occupants.evict_one():
            if not self.let_go():
                return False
        return True
