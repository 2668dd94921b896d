"""What arrives on the socket: frames, messages, hellos; hostile ones cost their own connection only."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

import cascade_aio as ca
from cascade_aio import errors
from cascade_aio.daemon import connect
from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.faults import KINDS, to_error, to_failed
from cascade_aio.daemon.framing import FrameCutter
from cascade_aio.daemon.handshake import say_hello
from cascade_aio.daemon.place import Peer
from cascade_aio.errors import CorruptionError, ProtocolError
from cascade_aio.testing.protocol_fuzz import fuzz
from cascade_aio.testing.store import eventually
from tests.service.conftest import KEYS, running


@given(st.binary(max_size=300))
def test_noise_is_a_protocol_error_or_a_message(raw: bytes) -> None:
    for decode in (p.decode_request, p.decode_reply, p.decode_hello, p.decode_welcome):
        try:
            decode(raw)
        except ProtocolError:
            continue


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.integers(1, 30))
def test_frames_survive_any_cut(bodies: list[bytes], piece: int) -> None:
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    cutter = FrameCutter()
    found: list[bytes] = []
    for start in range(0, len(stream), piece):
        cutter.feed(stream[start : start + piece])
        found += cutter.frames()
    assert found == bodies
    assert cutter.pending_bytes == 0


@pytest.mark.parametrize("length", [0, p.FRAME_BYTES_MAX + 1, 0xFFFFFFFF])
def test_a_frame_of_a_forbidden_length_is_refused_before_it_is_kept(length: int) -> None:
    cutter = FrameCutter()
    cutter.feed(length.to_bytes(4, "little"))
    with pytest.raises(ProtocolError, match="frame"):
        cutter.take()


@pytest.mark.parametrize(
    "body",
    [
        [10, 1, b"x" * 15, False],
        [10, 0, b"x" * 16, False],
        [10, 1, b"x" * 16],
        [10, 1, b"x" * 16, False, 1],
        [10, 1, "x" * 16, False],
        [14, 1, -1, 0, None, None, b"", True],
        [14, 1, 1 << 63, 0, None, None, b"", True],
        [14, 1, 1, 0, None, None, b"x" * 1025, True],
        [20, 1, [b"x" * 16] * (p.NAMES_MAX + 1), False, None],
        [20, 1, [], False, -1.0],
        [20, 1, [], False, float("nan")],
        [40, [0]],
        [99, 1],
        {"request": 1},
        17,
    ],
)
def test_messages_out_of_bounds_are_refused(body: Any) -> None:
    with pytest.raises(ProtocolError):
        p.decode_request(msgspec.msgpack.encode(body))


def test_versions_are_negotiated() -> None:
    assert p.choose_version(p.Hello(p.MAGIC, 1, 9, "")) == p.VERSION_MAX
    with pytest.raises(ProtocolError, match="same cascade_aio"):
        p.choose_version(p.Hello(p.MAGIC, p.VERSION_MAX + 1, p.VERSION_MAX + 5, ""))
    with pytest.raises(ProtocolError, match="hello"):
        p.decode_hello(p.encode(p.Hello("other", 1, 1, ""))[4:])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_error_arrives_as_itself(kind: str) -> None:
    error = getattr(errors, kind)(f"message of {kind}")
    received = to_error(p.decode_reply(p.encode(to_failed(7, error))[4:]))  # type: ignore[arg-type]
    assert type(received) is type(error)
    assert str(received) == str(error)


def test_details_of_errors_arrive() -> None:
    damaged = CorruptionError("bad", path="/x/1.seg", segment="1.seg", offset=4096, expected=1, found=2)
    received = to_error(to_failed(1, damaged))
    assert isinstance(received, CorruptionError)
    assert (received.path, received.offset, received.found) == ("/x/1.seg", 4096, 2)
    missing = to_error(to_failed(1, FileNotFoundError(2, "No such file", "/x")))
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.filename) == (2, "/x")
    assert isinstance(to_error(to_failed(1, ZeroDivisionError("oops"))), ca.InternalError)


def test_who_may_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert Peer(1, 1000, frozenset({1000})).may_enter(None)
    assert not Peer(1, 1001, frozenset({50})).may_enter(None)
    assert not Peer(1, 0, frozenset({0})).may_enter(None)
    assert Peer(1, 1001, frozenset({50})).may_enter(50)
    assert not Peer(1, 1001, frozenset({51})).may_enter(50)


async def _attach(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    await asyncio.get_running_loop().sock_connect(connection, path)
    _, descriptors = await say_hello(connection, "hostile")
    for fd in descriptors:
        socket.close(fd)
    return connection


async def _is_cut_off(connection: socket.socket) -> bool:
    """Whether the service has ended the connection, whatever it said before."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60):
        try:
            while await loop.sock_recv(connection, 1 << 16):
                pass
        except ConnectionError:
            pass
    connection.close()
    return True


@pytest.mark.parametrize(
    "messages",
    [
        [[15, 1, 1, None, []]],  # a reservation of somebody else
        [[16, 1, 1, 0, 10]],  # a lease of somebody else
        [[40, [1]]],
        [[41, 1]],
        [[22, 1, 1]],
        [[43, 1]],
        [[42, 5]],  # cancels what was never asked
        [[17, 3], [17, 3]],  # numbers must grow
        [[17, 3], [17, 2]],
        [[1, "cascade-aio", 1, 1, "again"]],
        [[11, 1, [b"x" * 20]]],
    ],
)
async def test_what_no_honest_client_sends_costs_the_connection(
    tmp_path: Path, messages: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as other:
        name = await other.put(b"key", b"value", prefix=KEYS[0])
        lease = await other.get(name)
        connection = await _attach(service.socket_path)
        for message in messages:
            body = msgspec.msgpack.encode(message)
            await asyncio.get_running_loop().sock_sendall(connection, len(body).to_bytes(4, "little") + body)
        assert await _is_cut_off(connection)
        assert any("is cut off" in record.message for record in caplog.records)
        assert bytes(lease.value) == b"value"
        lease.release()
        async with other.get(KEYS[0]) as block:
            assert bytes(block.key) == b"key"
        assert other.statistics()["reconnects"] == 0
        await eventually(lambda: service.clients == 1)


async def test_a_peer_that_says_nothing_or_too_much_gets_no_session(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service:
        for hello in (b"\x00\x00\x00\x00", b"GET / HTTP/1.1\r\n\r\n", p.encode(p.Hello(p.MAGIC, 1, 1, "")) * 2):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            await asyncio.get_running_loop().sock_connect(connection, service.socket_path)
            await asyncio.get_running_loop().sock_sendall(connection, hello)
            assert await _is_cut_off(connection)
        silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        await asyncio.get_running_loop().sock_connect(silent, service.socket_path)
        async with connect(service.socket_path) as store:
            await store.put(b"a", b"b")
        silent.close()
        assert service.node.counters.protocol_errors == 3


async def test_a_client_that_does_not_read_is_not_served_on(tmp_path: Path) -> None:
    """Answers nobody reads are bounded, and others are served meanwhile."""
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as other:
        connection = await _attach(service.socket_path)
        frames = b"".join(p.encode(p.Statistics(number)) for number in range(1, 20_000))
        sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(connection, frames))
        await asyncio.sleep(0.3)
        for i in range(20):
            await other.put(bytes([i]), b"v")
        assert service.node.counters.requests < 19_000
        sending.cancel()
        connection.close()
        await eventually(lambda: service.clients == 1)


@pytest.mark.shm(96)
async def test_fuzzing_disturbs_nobody(tmp_path: Path) -> None:
    report = await fuzz(tmp_path / "kv", messages=20_000, seed=7)
    assert report.faults == []
    assert report.witnessed
    assert report.requests
