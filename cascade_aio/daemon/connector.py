"""Staying connected: the current link, the next one when it is lost, and calls over whichever lives.

A call that is safe to repeat is repeated over the next link; any other ends with
``ServiceUnavailableError``. Waiting for a link is bounded by ``reconnect_seconds_max``; trying to get one
goes on, with growing pauses, until the client is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.link import ConnectionLostError, Link, open_link
from cascade_aio.errors import CascadeError, ClosedError, ProtocolError, ServiceUnavailableError
from cascade_aio.store.context import TaskScope
from cascade_aio.telemetry import span

logger = logging.getLogger("cascade_aio.client")

BACKOFF_SECONDS_MIN = 0.02
BACKOFF_SECONDS_MAX = 1.0
ATTEMPTS_MAX = 5
"""Links over which one repeatable call is tried."""

_R = TypeVar("_R", bound=p.Reply)


class Connector:
    """See the module's text. Loop thread only."""

    def __init__(self, path: str, client: str, owner: int | None, reconnect_seconds_max: float) -> None:
        self.path = path
        self.reconnects = 0
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.link: Link | None = None
        self.sight: Link | None = None
        """The newest link, living or lost: what it sees in shared memory serves hot gets until its pins are void."""
        self.changes = 0
        """Blocks put and deleted so far."""
        self.unflushed: dict[str, int] = {}
        """Runs of the service with changes that no flush has covered yet: the number of the last one."""
        self._client = client
        self._owner = owner
        self._patience_s = reconnect_seconds_max
        self._linked = asyncio.Event()
        self._why = "it was never reached"
        self._tasks = TaskScope(self._failed)
        self._settled: list[tuple[str, int]] = []
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Every public call starts here. Raises ``ClosedError`` or ``CascadeError`` (another loop)."""
        if self.closed:
            raise ClosedError(f"the connection to {self.path} is closed; connect again")
        if asyncio.get_running_loop() is not self.loop:
            raise CascadeError(f"the connection to {self.path} belongs to another event loop; connect once per loop")

    async def start(self, wait_s: float) -> None:
        """The first link. Raises ``ServiceUnavailableError`` if there is none within ``wait_s`` seconds."""
        deadline_s = self.loop.time() + wait_s
        pause_s = BACKOFF_SECONDS_MIN
        while True:
            try:
                self._adopt(await open_link(self.path, self._client, self._owner))
                return
            except ServiceUnavailableError:
                if self.loop.time() + pause_s > deadline_s:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_SECONDS_MAX)

    async def linked(self) -> Link:
        """The living link, waiting for it if need be. Raises ``ServiceUnavailableError``, ``ClosedError``."""
        self.check()
        link = self.link
        if link is not None:
            return link
        try:
            async with asyncio.timeout(self._patience_s):
                await self._linked.wait()
        except TimeoutError:
            raise ServiceUnavailableError(
                f"the service at {self.path} is away ({self._why}) and did not come back within {self._patience_s:g} s"
            ) from self._failure
        self.check()
        if self.link is None:  # lost again in this very turn
            raise ServiceUnavailableError(f"the service at {self.path} is away ({self._why})")
        return self.link

    async def ask(
        self,
        make: Callable[[], p.Request],
        kind: type[_R],
        *,
        repeat: bool,
        undo: Callable[[Link, p.Reply], None] | None = None,
        on_progress: Callable[[list[int]], None] | None = None,
    ) -> tuple[Link, _R]:
        """The answer to a request and the link it came over; ``repeat``: it is safe to ask more than once."""
        for attempt in range(1, ATTEMPTS_MAX + 1):
            link = await self.linked()
            message = make()
            try:
                with span(f"client.{type(message).__name__}"):
                    reply = await link.call(message, undo=undo, on_progress=on_progress)
            except ConnectionLostError:
                if not repeat or attempt == ATTEMPTS_MAX:
                    raise
                continue
            return link, expect(reply, kind)
        raise AssertionError("unreachable")

    def noted(self, link: Link) -> None:
        """Something was changed that only a flush in the same run of the service makes durable."""
        self.changes += 1
        self.unflushed[link.welcome.generation] = self.changes

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task of the client; cancelled when it closes."""
        return self._tasks.spawn(work, name)

    async def aclose(self) -> None:
        """End the link and the tasks. Repeated calls do nothing."""
        self.closed = True
        self._linked.set()  # whoever waits looks again
        link, self.link = self.link, None
        self.sight = None
        await self._tasks.close()
        if link is not None:
            await link.aclose()

    # -- links ----------------------------------------------------------------------------------

    def _adopt(self, link: Link) -> None:
        before, self.link, self.sight = self.sight, link, link
        link.on_lost = self._lost
        link.on_settled = self._settle
        for generation, session in self._settled:
            if generation == link.welcome.generation:
                link.note(p.Settled(session))
        self._settled.clear()
        self._linked.set()
        if before is not None and not before.outstanding:
            self._settle(before)
        if link.lost is not None:  # between its welcome and now
            self._lost(link)

    def _lost(self, link: Link) -> None:
        if self.link is not link:
            return
        self.link = None
        self._why = link.lost or ""
        if not self.closed:
            self._linked.clear()
            logger.warning("the service at %s was lost: %s", self.path, self._why)
            self.spawn(self._reconnect(), "cascade-client-reconnect")

    def _settle(self, link: Link) -> None:
        """Nothing of a lost link is in use any more: the service may use the memory again.

        What the newest link sees in shared memory is in use until there is a newer one.
        """
        if link is self.sight:
            return
        link.close_view()
        settled = (link.welcome.generation, link.welcome.session)
        if self.link is None:
            self._settled.append(settled)
        elif self.link.welcome.generation == settled[0]:
            self.link.note(p.Settled(settled[1]))

    async def _reconnect(self) -> None:
        pause_s = BACKOFF_SECONDS_MIN
        while True:
            try:
                link = await open_link(self.path, self._client, self._owner)
            except (CascadeError, OSError) as error:
                self._why = str(error)
            else:
                self.reconnects += 1
                self._adopt(link)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_SECONDS_MAX)

    def _failed(self, error: BaseException) -> None:
        logger.error("a task of the client of %s failed", self.path, exc_info=error)
        self._failure = error


def expect(reply: p.Reply, kind: type[_R]) -> _R:
    """``reply``, which must be a ``kind``. Raises ``ProtocolError``."""
    if not isinstance(reply, kind):
        raise ProtocolError(f"the service answered with {type(reply).__name__} instead of {kind.__name__}")
    return reply
