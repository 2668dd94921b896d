"""Redis through redis-py: one connection per operation in flight, values as they are, one key per block.

``flush`` of the append-only variant turns ``appendfsync always`` on for one small write: Redis answers that write only
after an fdatasync of the whole file, so everything put before is durable. That is one sync for the whole batch, the
most favourable way that Redis 7.0 has. A ``get`` gives redis-py's own ``bytes``: nothing is copied for us.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import redis
import redis.asyncio
from redis._parsers import _RESP2Parser

from bench.peers.protocol import (
    AsyncPeer,
    BlockingPeer,
    CannotRunError,
    Description,
    Feature,
    Job,
    PeerError,
    Scalar,
    Settings,
    published_path,
    require_version,
)
from bench.peers.redis.server import RedisServer

PINS = pathlib.Path(__file__).with_name("requirements.txt")
MARKER = "cascade-bench-flush"
NO_DISK = "without persistence nothing is on disk"
NO_COLD = "Redis serves from memory only; the append-only file is read at a restart (see the workload restart)"


class _Opened:
    """What both kinds of client share: the server, and what is said about it."""

    def __init__(self, system: str, settings: Settings) -> None:
        import hiredis

        self.system = system
        require_version("redis", redis.__version__, PINS)
        self.hiredis = require_version("hiredis", str(hiredis.__version__), PINS)
        self.server = RedisServer(settings, tcp=system == "redis-tcp", append_only=system == "redis-aof")

    def describe(self) -> Description:
        plain = self.system == "redis-plain"
        kept = self.server.append_only
        lacks: dict[Feature, str] = {
            "lease": "a value is copied out of the server",
            "cold": NO_COLD,
            "overflow": "what exceeds maxmemory is refused or evicted",
        }
        if not kept:
            lacks |= {"durable": NO_DISK, "restart": NO_DISK}
        return Description(
            version=f"redis-py {redis.__version__}" + ("" if plain else f", hiredis {self.hiredis}"),
            module=published_path(redis.__file__),
            server=f"redis-server {self.server.version}",
            tuning="one connection per operation in flight; hiredis parser and local socket as redis.io advises"
            + ("; here without hiredis, for comparison" if plain else ""),
            durability="append-only file, fdatasync by appendfsync always at flush" if kept else "",
            medium="server memory",
            configuration={
                "transport": "tcp" if self.server.tcp else "unix socket",
                "appendonly": kept,
                "appendfsync": "everysec" if kept else "none",
            },
            lacks=lacks,
        )


class RedisPeer(BlockingPeer):
    """Systems ``redis-tcp``, ``redis-unix``, ``redis-plain`` and ``redis-aof``: the blocking client."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._opened: _Opened | None = None
        self._client: Any = None

    def open(self, settings: Settings) -> None:
        self._opened = _Opened(self.system, settings)
        parser = {"parser_class": _RESP2Parser} if self.system == "redis-plain" else {}
        kind = redis.Connection if self._opened.server.tcp else redis.UnixDomainSocketConnection
        address = {name.replace("unix_socket_path", "path"): at for name, at in self._opened.server.address().items()}
        pool = redis.ConnectionPool(
            connection_class=kind, max_connections=settings.in_flight_max + 1, **address, **parser
        )
        self._client = redis.Redis(connection_pool=pool)

    @property
    def _server(self) -> RedisServer:
        assert self._opened is not None, "not open"
        return self._opened.server

    def describe(self) -> Description:
        assert self._opened is not None, "not open"
        return self._opened.describe()

    def endpoint(self) -> Mapping[str, Scalar]:
        return self._server.endpoint()

    def processes(self) -> Sequence[int]:
        return self._server.processes()

    def files(self) -> Sequence[pathlib.Path]:
        return self._server.files()

    def put(self, name: str, data: memoryview) -> None:
        self._client.set(name, data)

    def flush(self) -> None:
        if not self._server.append_only:
            raise CannotRunError(NO_DISK)
        self._client.config_set("appendfsync", "always")
        try:
            self._client.set(MARKER, b"")
        finally:
            self._client.config_set("appendfsync", "everysec")
        state = self._client.info("persistence")
        if state["aof_last_write_status"] != "ok":
            raise PeerError(f"redis-server could not write its append-only file: {state['aof_last_write_status']}")

    def get(self, name: str, into: memoryview) -> bytes:
        found: bytes | None = self._client.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def contains(self, name: str) -> bool:
        return bool(self._client.exists(name))

    def delete(self, name: str) -> None:
        if not self._client.delete(name):
            raise KeyError(name)

    def drop_caches(self) -> None:
        raise CannotRunError(NO_COLD)

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.connection_pool.disconnect()
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.server.end()


class PipelinedPeer(RedisPeer):
    """System ``redis-pipelined``: as many commands as may be in flight in one pipeline, on one connection."""

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        for part in _parts(jobs, in_flight):
            with self._client.pipeline(transaction=False) as pipeline:
                for job in part:
                    pipeline.set(job.name, job.data)
                pipeline.execute()

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[bytes]:
        found: list[bytes | None] = []
        for part in _parts(jobs, in_flight):
            with self._client.pipeline(transaction=False) as pipeline:
                for job in part:
                    pipeline.get(job.name)
                found += pipeline.execute()
        missing = [job.name for job, one in zip(jobs, found, strict=True) if one is None]
        if missing:
            raise KeyError(missing[0])
        return [one for one in found if one is not None]


class AsyncRedisPeer(AsyncPeer):
    """System ``redis-async``: redis.asyncio, one connection per operation in flight."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._opened: _Opened | None = None
        self._client: Any = None

    async def open(self, settings: Settings) -> None:
        self._opened = _Opened(self.system, settings)
        self._client = redis.asyncio.Redis(
            **self._opened.server.address(),
            max_connections=settings.in_flight_max + 1,
        )

    def describe(self) -> Description:
        assert self._opened is not None, "not open"
        return self._opened.describe()

    def endpoint(self) -> Mapping[str, Scalar]:
        assert self._opened is not None, "not open"
        return self._opened.server.endpoint()

    def processes(self) -> Sequence[int]:
        return self._opened.server.processes() if self._opened else []

    async def put(self, name: str, data: memoryview) -> None:
        await self._client.set(name, data)

    async def flush(self) -> None:
        raise CannotRunError(NO_DISK)

    async def get(self, name: str, into: memoryview) -> bytes:
        found: bytes | None = await self._client.get(name)
        if found is None:
            raise KeyError(name)
        return found

    async def contains(self, name: str) -> bool:
        return bool(await self._client.exists(name))

    async def delete(self, name: str) -> None:
        if not await self._client.delete(name):
            raise KeyError(name)

    async def drop_caches(self) -> None:
        raise CannotRunError(NO_COLD)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.server.end()


def _parts(jobs: Sequence[Job], in_flight: int) -> list[Sequence[Job]]:
    return [jobs[start : start + in_flight] for start in range(0, len(jobs), in_flight)]
