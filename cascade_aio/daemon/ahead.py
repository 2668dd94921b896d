"""Reading ahead by a client: the service performs the plan, the client follows it.

A stream asks for one block after the other; the service's own stream promotes the next ones meanwhile.
If the service is lost in the middle, the stream goes on where it was with the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.connector import ATTEMPTS_MAX, Connector
from cascade_aio.daemon.faults import to_error
from cascade_aio.daemon.lending import ClientDesk, unwanted
from cascade_aio.daemon.link import ConnectionLostError, Link
from cascade_aio.errors import CascadeError, ServiceUnavailableError
from cascade_aio.store.block import Block
from cascade_aio.store.prefetching import PrefetchProgress
from cascade_aio.store.streaming import StreamEnd


class RemotePlan:
    """A prefetch that the service performs. ``progress`` is what it said last, a tenth of a second ago or less."""

    def __init__(self, connector: Connector, make: Callable[[], p.Request], wanted: int) -> None:
        self.progress = PrefetchProgress(wanted)
        self.finished = asyncio.Event()
        self.failure: Exception | None = None
        self._connector = connector
        self._make = make
        self._task = connector.spawn(self._run(), "cascade-client-prefetch")
        self._task.add_done_callback(lambda _: self._over())

    async def _run(self) -> None:
        try:
            _, reply = await self._connector.ask(self._make, p.Answer, repeat=True, on_progress=self._tell)
            self._tell(msgspec.convert(reply.value, list[int]))
        except (CascadeError, OSError) as error:
            self.failure = error

    def _tell(self, values: list[int]) -> None:
        self.progress = PrefetchProgress(*values)

    def _over(self) -> None:
        if self._connector.closed and self.failure is None and self.progress.pending:
            self.failure = ServiceUnavailableError(f"the connection to {self._connector.path} was closed")
        self.finished.set()

    def stop(self) -> None:
        """Not wanted any more. Repeated: nothing."""
        if not self._task.done():
            self.progress.cancelled += self.progress.pending
            self._task.cancel()


def _closed_too_late(link: Link, reply: p.Reply) -> None:
    if isinstance(reply, p.Answer):
        link.note(p.CloseStream(int(reply.value)))


class ServiceStream:
    """``BlockStream`` of a client; see ``Store.stream``."""

    def __init__(
        self,
        connector: Connector,
        desk: ClientDesk,
        names: list[bytes],
        *,
        window_bytes: int | None,
        urgent: bool,
        keep: bool,
        early: bool,
    ) -> None:
        self._connector = connector
        self._desk = desk
        self._names = names
        self._window_bytes = window_bytes
        self._urgent = urgent
        self._keep = keep
        self._early = early
        self._link: Link | None = None
        self._number = 0
        self._asking = False
        self._position = 0
        self._last: Block | None = None
        self.ended_because: StreamEnd | None = None
        """As ``BlockStream.ended_because``."""
        self.error: Exception | None = None
        """The error behind ``ended_because``."""

    @property
    def position(self) -> int:
        """How many blocks were given so far."""
        return self._position

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Block:
        """The next lease. Raises ``StopAsyncIteration`` before the first block that cannot be had."""
        if self._asking:
            raise CascadeError("this stream is waiting for a block already; it serves one consumer at a time")
        self._give_back()
        if self.ended_because is not None:
            raise StopAsyncIteration
        self._connector.check()
        self._asking = True
        try:
            block = await self._next()
        finally:
            self._asking = False
        if block is None:
            self._close()
            raise StopAsyncIteration
        self._position += 1
        if not self._keep:
            self._last = block
        return block

    async def _next(self) -> Block | None:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                link = await self._opened()
                reply = await link.call(p.NextBlock(0, self._number), undo=unwanted)
                if isinstance(reply, p.Leased):
                    return self._desk.lend_all(link, reply.grants)[0]
            except ConnectionLostError:
                if attempt == ATTEMPTS_MAX:
                    raise
                continue
            except BaseException:  # cancelled, or over the quota: the service may be one block further than we are
                self._close()
                raise
            assert isinstance(reply, p.Answer), reply
            why, failed = msgspec.convert(reply.value, tuple[StreamEnd, p.Failed | None])
            self.ended_because = why
            self.error = None if failed is None else to_error(failed)
            return None
        raise AssertionError("unreachable")

    async def _opened(self) -> Link:
        """The link over which this stream is open, opening it for the blocks that are left."""
        link = self._link
        if link is None or link.lost is not None:
            rest = self._names[self._position :]
            link, reply = await self._connector.ask(
                lambda: p.OpenStream(0, rest, self._window_bytes, self._urgent, self._early),
                p.Answer,
                repeat=True,
                undo=_closed_too_late,
            )
            self._link, self._number = link, int(reply.value)
        return link

    def _give_back(self) -> None:
        block, self._last = self._last, None
        if block is not None and not block.released:
            block.release()

    def _close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.note(p.CloseStream(self._number))

    async def aclose(self) -> None:
        """Release the last lease and cancel what is on its way for this stream alone. Repeated calls do nothing."""
        self._give_back()
        if self.ended_because is None:
            self.ended_because = "closed"
        self._close()

    async def __aenter__(self) -> Self:
        await self._opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        link = getattr(self, "_link", None)
        if link is not None:
            loop = self._connector.loop
            if not loop.is_closed():
                loop.call_soon_threadsafe(link.note, p.CloseStream(self._number))
