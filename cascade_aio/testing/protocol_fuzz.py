"""Hostile input for the node service: ``python -m cascade_aio.testing.protocol_fuzz --messages 1000000``.

Sends well-formed messages with senseless contents, mutated and truncated ones, wrong frames and noise over
many connections, while a witness puts and gets over one of its own. Afterwards: the service lives, the
witness was never disturbed and read every byte right, nothing is leaked. A seed replays a run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import random
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import cascade_aio as ca
from cascade_aio.config import make_config
from cascade_aio.daemon import Service, ServiceConfig, serve
from cascade_aio.daemon.handshake import say_hello
from cascade_aio.tiers.arena import remove_arena

MESSAGES_PER_CONNECTION = 400
"""About: a connection ends earlier at the first message that is not allowed."""
CONNECTIONS_AT_ONCE = 8
SETTLE_SECONDS_MAX = 60.0
_FIELDS: tuple[Any, ...] = (None, 0, 1, -1, 1 << 63, 2.5, "x", b"", b"y" * 40, [], [[]], {}, True)
_TAGS = (*range(0, 30), *range(38, 48), *range(58, 70), 255)


@dataclasses.dataclass(slots=True)
class FuzzReport:
    """What a run did; ``faults`` is empty if the service kept its promises."""

    seed: int
    messages: int = 0
    """Sent; what is behind the one that cuts a connection off is never looked at."""
    requests: int = 0
    """Of these, taken by the service as well-formed requests."""
    connections: int = 0
    cut_off: int = 0
    witnessed: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


class MessageMaker:
    """Random messages, most of them nearly right."""

    def __init__(self, rng: random.Random, names: list[bytes]) -> None:
        self._rng = rng
        self._names = names
        self._request = 0

    def fresh(self) -> None:
        """A new connection: request numbers start again."""
        self._request = 0

    def frame(self, *, hostile: float) -> bytes:
        """One frame; a share ``hostile`` of them breaks the rules."""
        body = msgspec.msgpack.encode(self._message())
        if self._rng.random() >= hostile:
            return len(body).to_bytes(4, "little") + body
        return self._rng.choice((self._mutated, self._misframed, self._noise, self._foreign))(body)

    def _message(self) -> list[Any]:
        rng = self._rng
        self._request += rng.choice((1, 1, 1, 2, 1000))
        number = self._request
        small = rng.randrange(0, 9)
        makers: list[Callable[[], list[Any]]] = [
            lambda: [10, number, self._name(), rng.random() < 0.3],
            lambda: [11, number, self._prefixes()],
            lambda: [12, number, self._prefixes()],
            lambda: [13, number, self._name()],
            lambda: [14, number, rng.choice((0, 10, 5000, 1 << 20, 1 << 40)), small, *self._binding(), b"", small > 4],
            lambda: [17, number],
            lambda: [18, number],
            lambda: [19, number, rng.randbytes(16)],
            lambda: [20, number, [self._name() for _ in range(small)], False, rng.choice((None, 0.0, 0.01))],
            lambda: [21, number, [self._name() for _ in range(small)], None, False, small > 4],
            lambda: [23, number, rng.choice((0, small, 1 << 50))],
            lambda: [25, number],
            lambda: [27, number, self._prefixes(), rng.random() / 10],
            lambda: [42, max(1, number - small)],
            lambda: [44, small + 1],
            lambda: [45, small, small],
        ]
        return rng.choice(makers)()

    def _name(self) -> bytes:
        return self._rng.choice(self._names) if self._rng.random() < 0.7 else self._rng.randbytes(32)

    def _prefixes(self) -> list[bytes]:
        return [name for name in (self._name() for _ in range(self._rng.randrange(6))) if len(name) == 32]

    def _binding(self) -> tuple[bytes | None, bytes | None]:
        prefix = self._rng.choice((None, self._rng.randbytes(32)))
        return prefix, None if prefix is None else self._rng.choice((None, self._rng.randbytes(32)))

    def _mutated(self, body: bytes) -> bytes:
        raw = bytearray(body)
        for _ in range(self._rng.randrange(1, 4)):
            raw[self._rng.randrange(len(raw))] = self._rng.randrange(256)
        return len(raw).to_bytes(4, "little") + raw

    def _misframed(self, body: bytes) -> bytes:
        return (
            self._rng.choice((0, 1, len(body) + 7, 1 << 22, (1 << 22) + 1, (1 << 32) - 1)).to_bytes(4, "little") + body
        )

    def _noise(self, body: bytes) -> bytes:
        return self._rng.randbytes(self._rng.randrange(1, 2 * len(body) + 2))

    def _foreign(self, body: bytes) -> bytes:
        """Any tag, any fields; also what belongs to somebody else, or to nobody."""
        rng = self._rng
        fields: list[Any] = [
            rng.choice((None, 0, 1, -1, 1 << 63, 2.5, "x", b"", b"y" * 40, [], [[]], {}, True)) for _ in range(4)
        ]
        number = self._request = self._request + 1
        choice: list[Any] = rng.choice(
            (
                [rng.choice(_TAGS), number, *fields[: rng.randrange(5)]],
                [15, number, rng.randrange(1, 9), None, []],
                [16, number, rng.randrange(1, 9), 0, 1 << 40],
                [22, number, rng.randrange(1, 9)],
                [40, [rng.randrange(1, 9)]],
                [41, rng.randrange(1, 9)],
                [43, rng.randrange(1, 9)],
                [[[[[[]]]]]] * 3,
            )
        )
        raw = msgspec.msgpack.encode(choice)
        return len(raw).to_bytes(4, "little") + raw


async def fuzz_connection(path: str, maker: MessageMaker, rng: random.Random, count: int, report: FuzzReport) -> None:
    """One connection: about ``count`` frames in pieces, read or not, ended politely or not."""
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    report.connections += 1
    maker.fresh()
    try:
        await loop.sock_connect(connection, path)
        if rng.random() < 0.05:  # noise instead of a hello
            await loop.sock_sendall(connection, maker.frame(hostile=0.5))
            report.messages += 1
            return
        _, descriptors = await say_hello(connection, "fuzz")
        for fd in descriptors:
            socket.close(fd)
        hostile = rng.choice((0.0, 0.002, 0.02))
        reads = rng.random() < 0.9
        while count > 0:
            frames = [maker.frame(hostile=hostile) for _ in range(rng.randrange(1, 100))]
            count -= len(frames)
            report.messages += len(frames)
            await asyncio.wait_for(loop.sock_sendall(connection, b"".join(frames)), 5)
            if reads:
                with contextlib.suppress(BlockingIOError):
                    while connection.recv(1 << 20):
                        pass
            await asyncio.sleep(0)
    except (OSError, TimeoutError, ca.ProtocolError):
        report.cut_off += 1
    finally:
        connection.close()


async def witness(path: str, report: FuzzReport, stop: asyncio.Event) -> None:
    """An honest client that must not notice anything."""
    rng = random.Random(report.seed)
    async with ca.connect(path, client="witness") as store:
        kept: dict[ca.BlockId, bytes] = {}
        while not stop.is_set():
            value = rng.randbytes(rng.choice((100, 5000, 100_000)))
            kept[await store.put(b"", value)] = value
            name = rng.choice(list(kept))
            async with store.get(name) as block:
                if bytes(block.value) != kept[name]:
                    report.faults.append(f"the witness read wrong bytes of block {name}")
            report.witnessed += 1
            if len(kept) > 64:
                kept.pop(next(iter(kept)))
            await asyncio.sleep(0.01)
        if store.statistics()["reconnects"]:
            report.faults.append("the witness lost its connection")


async def fuzz(root: Path, *, messages: int, seed: int) -> FuzzReport:
    """Send ``messages`` to a service of its own on ``root``."""
    report = FuzzReport(seed)
    rng = random.Random(seed)
    config = make_config(
        root, shm_bytes="64MiB", arena=f"cascade-fuzz-{uuid.uuid4().hex[:12]}", put_wait_seconds_max=1.0,
        disk_bytes="256MiB", segment_bytes="8MiB",
    )  # fmt: skip
    try:
        await _fuzz(config, rng, messages, report)
    finally:
        await asyncio.to_thread(remove_arena, f"{config.shm_dir}/{config.arena}")
    return report


async def _fuzz(config: ca.StoreConfig, rng: random.Random, messages: int, report: FuzzReport) -> None:
    async with serve(config, ServiceConfig(linger_seconds_max=0.0, refresh_seconds=60.0)) as service:
        path = service.socket_path
        async with ca.connect(path) as store:
            ids = [await store.put(b"", rng.randbytes(1000), prefix=key) for key in _keys()]
        names: list[bytes] = [bytes(name) for name in (*ids, *_keys())]
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(witness(path, report, stop))
            async with asyncio.TaskGroup() as attackers:
                for number in range(CONNECTIONS_AT_ONCE):
                    attackers.create_task(_attack(path, report.seed * 1000 + number, names, messages, report))
            stop.set()
        await _settled(service, report)
        report.requests = service.node.counters.requests


async def _attack(path: str, seed: int, names: list[bytes], messages: int, report: FuzzReport) -> None:
    rng = random.Random(seed)
    maker = MessageMaker(rng, names)
    while report.messages < messages:
        await fuzz_connection(path, maker, rng, rng.randrange(1, 2 * MESSAGES_PER_CONNECTION), report)


async def _settled(service: Service, report: FuzzReport) -> None:
    """Everything was given back."""
    try:
        async with asyncio.timeout(SETTLE_SECONDS_MAX):
            while True:
                gc.collect()
                statistics = service.node.statistics()
                shm, node = statistics["shm"], statistics["service"]
                held = {name: shm[name] for name in ("leases",)} | {
                    name: node[name] for name in ("clients", "leases", "reserved_bytes", "requests_in_flight")
                }
                held["extents"] = shm["allocated_bytes"] - shm["copy_bytes"]
                if not any(held.values()):
                    break
                await asyncio.sleep(0.05)
    except TimeoutError:
        report.faults.append(f"not given back: {held}")
    if service.failed.is_set() or service.node.errors:
        report.faults.append(f"the service failed: {list(service.node.errors)[:3]}")


def _keys() -> list[ca.PrefixKey]:
    return ca.prefix_keys(range(64), block_tokens=8, namespace="fuzz")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("cascade_aio.service").setLevel(logging.CRITICAL)  # one line per cut-off connection
    with tempfile.TemporaryDirectory(prefix="cascade-fuzz-") as folder:
        report = asyncio.run(fuzz(Path(folder) / "kv", messages=arguments.messages, seed=arguments.seed))
    sys.stdout.write(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    sys.exit(1 if report.faults else 0)


if __name__ == "__main__":
    main()
