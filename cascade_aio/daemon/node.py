"""What all connections of one service share: its store, news of other writers, prefixes that are being put.

Loop thread only. Must not know connections.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import heapq
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cascade_aio.daemon.lag import Histogram
from cascade_aio.daemon.settings import ServiceConfig
from cascade_aio.errors import CascadeError
from cascade_aio.model import PrefixKey
from cascade_aio.store import BlockInfo, PrefetchProgress, Store
from cascade_aio.store.store import list_blocks

if TYPE_CHECKING:
    from cascade_aio.daemon.session import Session

logger = logging.getLogger("cascade_aio.service")

MISS_REFRESH_SECONDS_MIN = 0.05
"""Misses look for news of other writers at most this often: a look costs some directory listings."""
ANNOUNCED_AT_ONCE_MAX = 4
"""Announced prompts promoted side by side: enough to keep a disk busy, few enough to keep their order."""
ERRORS_KEPT_MAX = 100
RIVAL_SECONDS_MAX = 5.0
"""How long a put waits for another client that puts the same prefix, before it goes on by itself."""


@dataclasses.dataclass(slots=True)
class ServiceCounters:
    """Events since the service started."""

    connections: int = 0
    refused: int = 0
    protocol_errors: int = 0
    requests: int = 0
    failed_requests: int = 0
    refreshes: int = 0
    announced_late: int = 0
    """Announced prompts whose time was over before their promotion could begin."""
    shared_lookups: int = 0
    shared_hits: int = 0


class Node:
    """See the module's text. ``generation`` names this run of the service."""

    def __init__(self, store: Store, config: ServiceConfig) -> None:
        self.store = store
        self.config = config
        self.counters = ServiceCounters()
        self.lag = Histogram()
        """Lateness of the loop, where somebody measures it."""
        self.generation = secrets.token_hex(8)
        self.started_at = time.time()
        self.on_statistics: Callable[[], dict[str, Any]] = dict
        """What the service adds to ``statistics``."""
        self.on_settled: Callable[[Session, int], None] = lambda session, number: None
        """A client says that nothing of an earlier session of it is in use any more."""
        self.errors: collections.deque[str] = collections.deque(maxlen=ERRORS_KEPT_MAX)
        """Newest last: what went wrong in the service itself, with its time."""
        self._loop = asyncio.get_running_loop()
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_s = self._loop.time()
        self._announced: list[tuple[float, int, asyncio.Future[None]]] = []
        self._announcements = itertools.count()
        self._promoting = 0
        self._latency: dict[str, Histogram] = {}
        self._putting: dict[PrefixKey, asyncio.Future[None]] = {}

    @property
    def verifies(self) -> bool:
        return self.config.verify_seals

    @property
    def failure(self) -> str | None:
        """What the store died of, if it did: it refuses everything from then on."""
        failure = self.store.parts.context.failure
        return None if failure is None else repr(failure)

    def note_error(self, text: str) -> None:
        self.errors.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}")

    def close(self) -> None:
        """Look for news no more."""
        if self._refreshing is not None:
            self._refreshing.cancel()

    # -- news of other writers ------------------------------------------------------------------

    @property
    def refresh_is_due(self) -> bool:
        """Whether a miss may look for news now."""
        if not self.config.refresh_seconds:
            return False
        return self._refreshing is not None or self._loop.time() - self._refreshed_s >= MISS_REFRESH_SECONDS_MIN

    async def refresh_on_miss(self) -> None:
        """Look for news, one look for all who ask meanwhile; does nothing if that was done just now."""
        if self.refresh_is_due:
            await self.refresh()

    async def refresh(self) -> None:
        """A failing look is logged: who asked goes on with what is known."""
        if self._refreshing is None:
            self._refreshing = self._loop.create_task(self._refresh(), name="cascade-service-refresh")
        await asyncio.wait((self._refreshing,))

    async def _refresh(self) -> None:
        try:
            await self.store.refresh()
            self.counters.refreshes += 1
        except (CascadeError, OSError) as error:
            logger.warning("news of other writers of %s cannot be read: %s", self._root, error)
        finally:
            self._refreshed_s = self._loop.time()
            self._refreshing = None

    async def refresh_for_ever(self) -> None:
        """Every ``refresh_seconds``."""
        while self.config.refresh_seconds:
            await asyncio.sleep(self.config.refresh_seconds)
            await self.refresh()

    # -- puts of one prefix ---------------------------------------------------------------------

    async def enter_prefix(self, prefix: PrefixKey) -> Callable[[], None]:
        """Wait for others who put ``prefix``, then be the one who does; call what is returned at the end.

        A client that is stuck in the middle of its put delays others for ``RIVAL_SECONDS_MAX`` at most.
        """
        deadline_s = self._loop.time() + RIVAL_SECONDS_MAX
        while (rival := self._putting.get(prefix)) is not None and self._loop.time() < deadline_s:
            await asyncio.wait((rival,), timeout=deadline_s - self._loop.time())
        mine: asyncio.Future[None] = self._loop.create_future()
        self._putting[prefix] = mine

        def leave() -> None:
            if self._putting.get(prefix) is mine:
                del self._putting[prefix]
            if not mine.done():
                mine.set_result(None)

        return leave

    # -- announced prompts -----------------------------------------------------------------------

    async def announce(self, keys: list[PrefixKey], deadline_s: float) -> PrefetchProgress:
        """Promote the cached prefix ``keys`` before ``deadline_s`` seconds are over, what is due first first.

        At most ``ANNOUNCED_AT_ONCE_MAX`` are promoted side by side. What is not begun in time is given up.
        """
        due_s = self._loop.time() + deadline_s
        turn: asyncio.Future[None] = self._loop.create_future()
        heapq.heappush(self._announced, (due_s, next(self._announcements), turn))
        self._next_announced()
        try:
            async with asyncio.timeout_at(due_s):
                await turn
        except (TimeoutError, asyncio.CancelledError) as error:
            if turn.done() and not turn.cancelled():  # it came in the very turn in which the wait ended
                self._promoted()
            if isinstance(error, asyncio.CancelledError):
                raise
            self.counters.announced_late += 1
            return PrefetchProgress(len(keys), cancelled=len(keys))
        try:
            known = keys[: len(self.store.lookup(keys))]  # what is behind the first gap is of no use
            handle = self.store.prefetch(known, priority="high", deadline_s=max(0.0, due_s - self._loop.time()))
            progress = await handle.wait()
            progress.wanted, progress.unknown = len(keys), len(keys) - len(known)
            return progress
        finally:
            self._promoted()

    def _promoted(self) -> None:
        self._promoting -= 1
        self._next_announced()

    def _next_announced(self) -> None:
        """Let those begin that are due first; those that gave up are passed over."""
        while self._announced and self._promoting < ANNOUNCED_AT_ONCE_MAX:
            _, _, turn = heapq.heappop(self._announced)
            if not turn.done():
                self._promoting += 1
                turn.set_result(None)

    # -- latency ---------------------------------------------------------------------------------

    def observe(self, request: str, seconds: float) -> None:
        """A request of this kind took so long in the service."""
        histogram = self._latency.get(request)
        if histogram is None:
            histogram = self._latency[request] = Histogram()
        histogram.observe(seconds)

    def latency_counts(self) -> dict[str, dict[str, Any]]:
        """Histogram by kind of request."""
        return {request: histogram.snapshot() for request, histogram in sorted(self._latency.items())}

    # -- facts ----------------------------------------------------------------------------------

    def list_blocks(self, after: int, count: int) -> tuple[list[BlockInfo], int]:
        """Up to ``count`` blocks and where to go on; 0: that was all."""
        infos: list[BlockInfo] = []
        for row, info in list_blocks(self.store.parts.context, after):
            if len(infos) == count:
                return infos, row
            infos.append(info)
        return infos, 0

    def statistics(self) -> dict[str, Any]:
        """The store's, and the service's under ``service``."""
        return {
            **self.store.statistics(),
            "service": {
                "generation": self.generation,
                "pid": os.getpid(),
                "uptime_seconds": time.time() - self.started_at,
                "putting_prefixes": len(self._putting),
                "loop_lag_p99_seconds": self.lag.quantile(0.99),
                "announced": len(self._announced) + self._promoting,
                **dataclasses.asdict(self.counters),
                **self.on_statistics(),
            },
        }

    @property
    def _root(self) -> str:
        return self.store.parts.context.config.root
