"""One client's connection, as the service sees it.

Requests are handled in the order in which they come; answers leave as they are ready, all of one loop
turn in one write. A client that asks faster than it is served, or does not read its answers, waits in
its own socket. A message that the protocol does not allow ends this connection, with the reason in the
log, and touches nobody else. At the end, however it comes, everything the client held is given back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, cast

from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.faults import is_bug, to_failed
from cascade_aio.daemon.framing import FrameCutter
from cascade_aio.daemon.holdings import Holdings
from cascade_aio.daemon.node import Node
from cascade_aio.daemon.place import Peer
from cascade_aio.daemon.requests import Requests
from cascade_aio.errors import ProtocolError
from cascade_aio.telemetry import span

logger = logging.getLogger("cascade_aio.service")

MESSAGES_PER_TURN_MAX = 64
"""Handled for one client before others have their turn: well below 1 ms of hot gets."""
UNSENT_BYTES_MAX = 1 << 20
"""Answers that a client has not read; above it nothing more is taken from it."""


class Session(asyncio.Protocol):
    """See the module's text. ``run`` lives as long as the connection."""

    def __init__(self, node: Node, holdings: Holdings, number: int, peer: Peer, client: str) -> None:
        self._node = node
        self.holdings = holdings
        self.number = number
        self.peer = peer
        self.client = client
        self.requests = Requests(node, holdings, self.send)
        self._loop = asyncio.get_running_loop()
        self._cutter = FrameCutter()
        self._transport: asyncio.Transport | None = None
        self._running: dict[int, asyncio.Task[None]] = {}
        self._newest = 0
        self._out: list[bytes] = []
        self._flushing = self._pumping = False
        self._reading = self._writable = True
        self._ended = asyncio.Event()
        self.settled: list[int] = []
        """Earlier sessions of which this client says that nothing is in use any more."""

    @property
    def requests_in_flight(self) -> int:
        return len(self._running)

    def __str__(self) -> str:
        return f"client {self.number} ({self.client or 'unnamed'}, pid {self.peer.pid}, uid {self.peer.uid})"

    async def run(self) -> None:
        """Until the connection ends or the caller is cancelled; then no request of it runs any more.

        The holdings are the caller's to give back.
        """
        try:
            await self._ended.wait()
        finally:
            self._end()
            while self._running:
                for task in self._running.values():
                    task.cancel()
                await asyncio.wait(list(self._running.values()))
            await self.holdings.close_streams()

    def say_goodbye(self, reason: str) -> None:
        """Tell the client that the service ends, and end."""
        self.send(p.Goodbye(reason[: p.TEXT_BYTES_MAX]))
        self._flush()
        self._end()

    def refuse(self, error: ProtocolError) -> None:
        """The peer broke the rules: end this connection."""
        if not self._ended.is_set():
            self._node.counters.protocol_errors += 1
            logger.warning("%s is cut off: %s", self, error)
            self.say_goodbye(f"protocol error: {error}")

    def peer_ended(self) -> None:
        """The process is dead: end, whoever has inherited its connection."""
        self._end()

    def _end(self) -> None:
        self.requests.gone = True
        self._ended.set()
        if self._transport is not None:
            self._transport.abort()  # what ``_flush`` wrote is in the socket, or the peer does not read

    # -- bytes in -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=UNSENT_BYTES_MAX)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._end()

    def data_received(self, chunk: bytes) -> None:
        self._cutter.feed(chunk)
        self._pump()

    def pause_writing(self) -> None:
        self._writable = False
        self._regulate()

    def resume_writing(self) -> None:
        self._writable = True
        self._pump_soon()

    @property
    def _busy(self) -> bool:
        return not self._writable or len(self._running) >= self._node.config.requests_per_client_max

    def _regulate(self) -> None:
        """Take bytes from the socket only while messages can be taken from the bytes."""
        if self._transport is None or self._ended.is_set():
            return
        wanted = not self._busy and not self._pumping
        if wanted != self._reading:
            self._reading = wanted
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump_again)

    def _pump_again(self) -> None:
        self._pumping = False
        self._pump()

    def _pump(self) -> None:
        """Handle whole messages, a bounded number in one turn; what is answered at once leaves at once."""
        flushing, self._flushing = self._flushing, True
        try:
            for _ in range(MESSAGES_PER_TURN_MAX):
                if self._busy or self._ended.is_set():
                    break
                frame = self._cutter.take()
                if frame is None:
                    break
                self._take(p.decode_request(frame))
            else:
                self._pump_soon()
        except ProtocolError as error:
            self.refuse(error)
        self._flush()
        self._flushing = flushing
        self._regulate()

    # -- messages -------------------------------------------------------------------------------

    def _take(self, message: p.Request | p.Note) -> None:
        """One message. Raises ``ProtocolError``."""
        if isinstance(message, p.Release):
            for lease in message.leases:
                self.holdings.release(lease)
            return
        if isinstance(message, p.Abort | p.Cancel | p.CloseStream | p.Settled | p.Report):
            self._note(message)
            return
        if message.request <= self._newest:
            raise ProtocolError(f"request {message.request} came after request {self._newest}")
        self._newest = message.request
        self._node.counters.requests += 1
        began_s = self._loop.time()
        try:
            handled = self.requests.handle(message)
        except ProtocolError:
            raise
        except Exception as error:
            self._fail(message.request, error)
            return
        if isinstance(handled, Coroutine):
            task = self._loop.create_task(self._perform(message, handled, began_s))
            self._running[message.request] = task
            task.add_done_callback(lambda task: self._done(message, handled, task))
        else:
            self.send(handled)
            self._node.observe(type(message).__name__, self._loop.time() - began_s)

    def _note(self, note: p.Abort | p.Cancel | p.CloseStream | p.Settled | p.Report) -> None:
        if isinstance(note, p.Abort):
            self.holdings.drop_reservation(note.reservation)
        elif isinstance(note, p.Cancel):
            if note.request > self._newest:
                raise ProtocolError(f"request {note.request} was never made")
            task = self._running.get(note.request)
            if task is not None:
                task.cancel()
        elif isinstance(note, p.CloseStream):
            stream = self.holdings.take_stream(note.stream)
            stream.stop()
        elif isinstance(note, p.Settled):
            self.settled.append(note.session)
            self._node.on_settled(self, note.session)
        else:
            self._node.counters.shared_lookups += note.lookups
            self._node.counters.shared_hits += note.hits

    async def _perform(self, message: p.Request, work: Coroutine[Any, Any, p.Reply], began_s: float) -> None:
        kind = type(message).__name__
        try:
            with span(f"service.{kind}", **{"cascade.client": self.number}):
                reply = await work
        except ProtocolError as error:
            self.refuse(error)
        except (asyncio.CancelledError, Exception) as error:
            self._fail(message.request, error)
        else:
            self.send(reply)
            self._node.observe(kind, self._loop.time() - began_s)

    def _fail(self, request: int, error: BaseException) -> None:
        self._node.counters.failed_requests += 1
        if is_bug(error):
            logger.error("request %d of %s failed", request, self, exc_info=error)
            self._node.note_error(f"{self}: {error!r}")
        self.send(to_failed(request, error))

    def _done(self, message: p.Request, work: Coroutine[Any, Any, p.Reply], task: asyncio.Task[None]) -> None:
        if task.cancelled():  # before its first step: ``_perform`` has answered otherwise
            work.close()
            try:
                self.requests.never_began(message)
            except ProtocolError as error:
                self.refuse(error)
            self._fail(message.request, asyncio.CancelledError())
        was_busy = self._busy
        del self._running[message.request]
        if was_busy and not self._busy:
            self._pump_soon()

    # -- bytes out ------------------------------------------------------------------------------

    def send(self, message: p.Reply) -> None:
        """Queue an answer; all of one loop turn leave together."""
        if self._ended.is_set():
            return
        try:
            frame = p.encode(message)
        except ProtocolError as error:  # an answer that is too long, such as a prefix of very many blocks
            assert not isinstance(message, p.Failed), message
            assert not isinstance(message, p.Goodbye), message
            self.requests.unsent(message)
            frame = p.encode(to_failed(message.request, error))
        self._out.append(frame)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._out and self._transport is not None:
            frames, self._out = self._out, []
            self._transport.write(b"".join(frames))
