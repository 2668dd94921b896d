"""One connection of a client: pipelined calls, batched writes, and the arena that came with it.

A ``Link`` lives as long as its connection and is never repaired; ``connector`` makes the next one.
Everything a link lent keeps it in mind: leases and reservations count as ``outstanding`` until they are
given back, also after the connection was lost, because the service keeps their memory from reuse until
it hears that they are settled. Loop thread only.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import mmap
import os
import socket
import stat
from collections.abc import Callable
from typing import cast

from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.faults import KINDS, to_error
from cascade_aio.daemon.framing import FrameCutter
from cascade_aio.daemon.handshake import say_hello
from cascade_aio.daemon.place import peer_of
from cascade_aio.errors import ConfigError, ProtocolError, ServiceUnavailableError
from cascade_aio.tiers.view import DirectoryView, map_arena, map_extent

POPULATE_BYTES_MAX = 2 << 20
"""Memory of a reservation up to this size is mapped with its pages present, in one call of some 0.1 ms on the loop.
Larger memory is mapped in by a worker, huge pages as such: page faults while it is filled take 0.35 ms per MiB."""


class ConnectionLostError(ServiceUnavailableError):
    """The connection ended before the answer came: the call may be made again where that is safe."""


class _Call:
    __slots__ = ("future", "on_progress", "undo")

    def __init__(
        self,
        future: asyncio.Future[p.Reply],
        undo: Callable[[Link, p.Reply], None] | None,
        on_progress: Callable[[list[int]], None] | None,
    ) -> None:
        self.future = future
        self.undo = undo
        self.on_progress = on_progress


class Link(asyncio.Protocol):
    """Made by ``open_link``. ``on_lost`` is called once, when the connection has ended."""

    def __init__(
        self, path: str, welcome: p.Welcome, arena: memoryview, writable_fd: int, view: DirectoryView | None
    ) -> None:
        self.path = path
        self.welcome = welcome
        self.arena = arena
        """Read-only, all of it."""
        self.view = view
        """The shared directory and our pin table; ``None``: everything goes by message."""
        self.on_lost: Callable[[Link], None] = lambda link: None
        self.on_settled: Callable[[Link], None] = lambda link: None
        """Called when the connection is lost and nothing that was lent over it is in use any more."""
        self.lost: str | None = None
        """Why it ended; ``None`` while it lives."""
        self.outstanding = 0
        self._writable_fd = writable_fd
        self._loop = asyncio.get_running_loop()
        self._cutter = FrameCutter()
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, _Call] = {}
        self._calls_max = max(1, welcome.requests_in_flight_max - 1)
        """One less than the service takes: what lets others end (``Seal``) always gets in, whoever waits there."""
        self._turns: collections.deque[asyncio.Future[None]] = collections.deque()
        self._number = 0
        self._out: list[bytes] = []
        self._released: list[int] = []
        self._flushing = self._wrote = False
        self._closed: asyncio.Future[None] = self._loop.create_future()

    # -- calls ----------------------------------------------------------------------------------

    async def call(
        self,
        message: p.Request,
        *,
        undo: Callable[[Link, p.Reply], None] | None = None,
        on_progress: Callable[[list[int]], None] | None = None,
    ) -> p.Reply:
        """Send a request (its number is set here) and return its answer.

        ``undo(link, answer)`` gives back what an answer brings that comes after the caller was cancelled. Raises
        what the service answers with, and ``ConnectionLostError``.
        """
        if (self._turns or len(self._calls) >= self._calls_max) and not isinstance(message, p.Seal):
            await self._turn()
        if self.lost is not None:
            raise self._gone()
        self._number = number = self._number + 1
        message.request = number
        try:
            frame = p.encode(message)  # before the call is noted: it may be too long
        except ProtocolError:
            self._next_turn()
            raise
        future: asyncio.Future[p.Reply] = self._loop.create_future()
        self._calls[number] = _Call(future, undo, on_progress)
        self._send(frame)
        try:
            reply = await future
        except asyncio.CancelledError:
            if number in self._calls:
                self.note(p.Cancel(number))
            elif undo is not None and not future.cancelled() and future.exception() is None:
                undo(self, future.result())
            raise
        if isinstance(reply, p.Failed):
            raise to_error(reply)
        return reply

    async def _turn(self) -> None:
        """Return while fewer calls than ``_calls_max`` are under way, or when the connection is lost.

        More would wait in the socket, and what they wait for behind them.
        """
        waited = False
        while self.lost is None and (len(self._calls) >= self._calls_max or (self._turns and not waited)):
            turn: asyncio.Future[None] = self._loop.create_future()
            (self._turns.appendleft if waited else self._turns.append)(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._turns:
                    self._turns.remove(turn)
                else:  # it was this one's turn just now
                    self._next_turn()
                raise
            waited = True

    def _next_turn(self) -> None:
        """A call has ended: the next one that waits may begin."""
        if self._turns and len(self._calls) < self._calls_max:
            turn = self._turns.popleft()
            if not turn.done():  # else it was cancelled in this turn of the loop, and passes its turn on
                turn.set_result(None)

    def note(self, note: p.Note) -> None:
        """Send what has no answer; nothing if the connection is lost."""
        if self.lost is None:
            self._send(p.encode(note))

    def release(self, lease: int) -> None:
        """Give a lease back, together with others of this loop turn."""
        if self.lost is None:
            self._released.append(lease)
            self._flush_soon()

    def took(self) -> None:
        """A lease or reservation of this link is in use."""
        self.outstanding += 1

    def gave_back(self) -> None:
        """One less is in use."""
        self.outstanding -= 1
        if not self.outstanding and self.lost is not None:
            self.on_settled(self)

    def close_view(self) -> None:
        """Let go of our pin table: the sign that this client lives, as far as this link is concerned."""
        if self.view is not None:
            self.view.close()

    def map_writable(self, offset: int, nbytes: int) -> memoryview:
        """Memory of a reservation; unmapped with its last view. Raises ``ConnectionLostError``, ``OSError``.

        More than ``POPULATE_BYTES_MAX`` of it is not mapped in yet: that is to be left to a worker.
        """
        assert nbytes > 0, "mmap takes 0 for the whole file"
        if self._writable_fd < 0:
            raise self._gone()
        if nbytes > POPULATE_BYTES_MAX:
            return map_extent(self._writable_fd, offset, nbytes)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return memoryview(mmap.mmap(self._writable_fd, nbytes, flags=flags, offset=offset))

    async def aclose(self) -> None:
        """End the connection after what was queued has left. Repeated calls do nothing."""
        self._write()
        if not self.outstanding:
            self.close_view()  # before the service hears of the end, so that it need not wait for us
        if self._transport is not None:
            self._transport.close()
        await asyncio.wait((self._closed,))

    # -- bytes ----------------------------------------------------------------------------------

    def _send(self, frame: bytes) -> None:
        self._queue_releases()  # what was said before is heard before
        self._out.append(frame)
        if not self._wrote:  # the first of a loop turn does not wait for those that may follow it
            self._wrote = True
            self._write()
        self._flush_soon()

    def _queue_releases(self) -> None:
        leases, self._released = self._released, []
        for start in range(0, len(leases), p.RELEASES_MAX):
            self._out.append(p.encode(p.Release(leases[start : start + p.RELEASES_MAX])))

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = self._wrote = False
        self._write()

    def _write(self) -> None:
        if self._transport is None:
            return
        self._queue_releases()
        if self._out:
            frames, self._out = self._out, []
            self._transport.write(b"".join(frames))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, chunk: bytes) -> None:
        self._cutter.feed(chunk)
        try:
            for frame in self._cutter.frames():
                self._take(p.decode_reply(frame))
        except ProtocolError as error:
            self._lose(f"the service broke the protocol: {error}")
            if self._transport is not None:
                self._transport.abort()

    def _take(self, reply: p.Reply) -> None:
        if isinstance(reply, p.Goodbye):
            self._lose(reply.reason)
            return
        if isinstance(reply, p.Progress):
            running = self._calls.get(reply.request)
            if running is not None and running.on_progress is not None:
                running.on_progress(reply.values)
            return
        call = self._calls.pop(reply.request, None)
        if call is None:
            raise ProtocolError(f"an answer to request {reply.request}, which was not asked")
        self._next_turn()
        if not call.future.done():
            call.future.set_result(reply)
        elif call.undo is not None and not isinstance(reply, p.Failed):
            call.undo(self, reply)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lose("it closed the connection" if error is None else str(error))
        fd, self._writable_fd = self._writable_fd, -1
        os.close(fd)
        self._closed.set_result(None)

    def _lose(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.future.done():
                call.future.set_exception(self._gone())
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
        self.on_lost(self)
        if not self.outstanding:
            self.on_settled(self)

    def _gone(self) -> ConnectionLostError:
        return ConnectionLostError(
            f"the service at {self.path} was lost during the call ({self.lost}); what was put and not flushed may be "
            "lost, reading can be tried again"
        )


def _check_is_socket(path: str) -> None:
    """Raises ``ConfigError`` if something else is there: waiting for a service would not help."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{path} is a directory and no socket; a root is connected to by connect(root={path!r})")
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is a file and no socket; give the path that the service was started with")


async def open_link(path: str, client: str, owner: int | None) -> Link:
    """Connect once, to a service of this user or of ``owner``.

    Raises ``ConfigError`` (no socket), ``ServiceUnavailableError`` (nobody listens, or refuses), ``ProtocolError``.
    """
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        try:
            await loop.sock_connect(connection, path)
            peer = peer_of(connection)
            welcome, descriptors = await say_hello(connection, client)
        except TimeoutError:
            raise ServiceUnavailableError(f"the service at {path} does not answer; it may be overloaded") from None
        except OSError as error:
            _check_is_socket(path)
            raise ServiceUnavailableError(
                f"no service answers at {path} ({error.strerror}); start one: cascade-aio serve ROOT --socket {path}"
            ) from None
        with contextlib.ExitStack() as closers:
            for fd in descriptors:
                closers.callback(os.close, fd)
            if isinstance(welcome, p.Refused):
                raise KINDS.get(welcome.kind, ServiceUnavailableError)(welcome.message)
            if peer.uid not in {os.geteuid(), owner}:
                raise ServiceUnavailableError(
                    f"the service at {path} belongs to user {peer.uid}; if you trust that user, connect with "
                    f"owner={peer.uid}"
                )
            wanted = 4 if welcome.lookup_shared else 2
            if len(descriptors) != wanted:
                raise ProtocolError(f"the service at {path} passed {len(descriptors)} descriptors instead of {wanted}")
            arena = map_arena(descriptors[0], welcome.arena_bytes)
            view = DirectoryView(descriptors[2], descriptors[3]) if welcome.lookup_shared else None
            link = Link(path, welcome, arena, os.dup(descriptors[1]), view)
        try:
            await loop.create_unix_connection(lambda: link, sock=connection)
        except BaseException:
            link.connection_lost(None)
            raise
        return link
    except BaseException:
        connection.close()
        raise
