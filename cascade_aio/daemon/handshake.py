"""The first two messages of a connection, on the bare socket, because file descriptors travel with them.

Client: hello, alone. Service: looks at the peer's credentials, then welcome with the descriptors, or a
refusal. Only then does the connection become an asyncio transport. Each side waits at most
``HANDSHAKE_SECONDS_MAX``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence

from cascade_aio.daemon.framing import LENGTH_BYTES, FrameCutter
from cascade_aio.daemon.protocol import (
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    MAGIC,
    VERSION_MAX,
    VERSION_MIN,
    Hello,
    Refused,
    Welcome,
    decode_hello,
    decode_welcome,
    encode,
)
from cascade_aio.errors import ProtocolError

HANDSHAKE_SECONDS_MAX = 5.0
DESCRIPTORS_MAX = 4
_RECEIVE_BYTES = 64 << 10
_MSG_CMSG_CLOEXEC = 0x40000000
"""Descriptors that arrive are not inherited by children; ``socket`` has no name for it."""


async def receive_hello(connection: socket.socket) -> Hello:
    """Service side. Raises ``ProtocolError`` (also for a peer that is silent or says more than hello)."""
    loop = asyncio.get_running_loop()
    cutter = FrameCutter(HELLO_BYTES_MAX)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
            while True:
                chunk = await loop.sock_recv(connection, HELLO_BYTES_MAX + LENGTH_BYTES)
                if not chunk:
                    raise ProtocolError("the peer left before it said hello")
                cutter.feed(chunk)
                frame = cutter.take()
                if frame is not None:
                    break
    except TimeoutError:
        raise ProtocolError(f"the peer said no hello within {HANDSHAKE_SECONDS_MAX:g} s") from None
    except OSError as error:
        raise ProtocolError(f"the peer was lost before it said hello: {error.strerror}") from None
    if cutter.pending_bytes:
        raise ProtocolError("the peer spoke on before it was welcomed")
    return decode_hello(frame)


def send_welcome(connection: socket.socket, welcome: Welcome | Refused, descriptors: Sequence[int]) -> None:
    """Service side; the peer gets descriptors of its own. Raises ``ProtocolError`` if it is gone.

    Never blocks: nothing else was ever sent, so the socket has room for so little.
    """
    frame = encode(welcome)
    try:
        sent = socket.send_fds(connection, [frame], list(descriptors)) if descriptors else connection.send(frame)
    except OSError as error:
        raise ProtocolError(f"the peer was lost before it was welcomed: {error.strerror}") from None
    if sent != len(frame):
        raise ProtocolError("the peer takes no welcome")


async def say_hello(connection: socket.socket, client: str) -> tuple[Welcome | Refused, list[int]]:
    """Client side, on a connected non-blocking socket: (the answer, descriptors that the caller closes).

    Raises ``ProtocolError``, ``TimeoutError`` or ``OSError``.
    """
    loop = asyncio.get_running_loop()
    cutter = FrameCutter(FRAME_BYTES_MAX)
    descriptors: list[int] = []
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
            await loop.sock_sendall(connection, encode(Hello(MAGIC, VERSION_MIN, VERSION_MAX, client)))
            while True:
                await _readable(connection)
                chunk, passed, flags, _ = socket.recv_fds(
                    connection, _RECEIVE_BYTES, DESCRIPTORS_MAX, _MSG_CMSG_CLOEXEC
                )
                descriptors += passed
                if flags & socket.MSG_CTRUNC:
                    raise ProtocolError("file descriptors of the service were lost: raise this process's RLIMIT_NOFILE")
                if not chunk:
                    raise ProtocolError("the service closed the connection before it said welcome")
                cutter.feed(chunk)
                frame = cutter.take()
                if frame is not None:
                    break
        return decode_welcome(frame), descriptors
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, wake)
    try:
        await ready
    finally:
        with contextlib.suppress(OSError, ValueError):
            loop.remove_reader(connection)
