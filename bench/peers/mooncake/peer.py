"""Mooncake Store 0.3.13: a master and memory segments over its TCP transport, with its zero-copy batch calls.

``mooncake`` keeps the segment in the client's own process, as its documentation shows first; ``mooncake-tcp`` keeps it
in a ``mooncake_client`` process, so that every byte crosses TCP; ``mooncake-ssd`` adds SSD offload. Source and target
are registered once. A batch is cut into calls of as many blocks as may be in flight.

SSD offload writes full buckets in the background; no call waits for it and nothing is synced, so it is in no durable
column. For cold reads the adapter waits until every block has a copy on disk, and has the master forget the copies in
memory.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("MC_TCP_BIND_ADDRESS", "127.0.0.1")  # read while the library is loaded
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

import mooncake
import numpy as np
from mooncake import store as mooncake_store

from bench.peers.mooncake import servers
from bench.peers.protocol import (
    BlockingPeer,
    CannotRunError,
    Description,
    Feature,
    Job,
    PeerError,
    Scalar,
    Settings,
)

PACKAGE = "mooncake-transfer-engine-non-cuda"
VERSION = "0.3.13.post1"
SEGMENT_STEP_BYTES = 64 << 20
"""Mooncake refuses segments that are no multiple of its allocator's chunks (error -600)."""
LOCAL_BUFFER_BYTES = 64 << 20
"""For calls that are not zero-copy; none is made."""
OFFLOAD_BUFFER_BYTES = 1 << 30
"""What one call reads from disk must fit in. The default of 1.25 GiB is more than io_uring registers at once, and
Mooncake then goes on without registration."""
BUFFER_TTL_MS = 60_000
"""How long what was read from disk may stay in that buffer until it is taken. Under the default a batch came back with
other bytes once, on a loaded machine, and under 200 ms calls fail; whether that was the cause is not known."""
BUCKET_KEYS = 1
"""Objects wait in memory for a full bucket, for ever if none comes (by default 500 objects or 256 MiB): a cold read of
all blocks needs buckets that every object fills."""
HEARTBEAT_SECONDS = 1
"""How often offload looks for new objects; its default of 10 s only adds waiting."""
OFFLOAD_SECONDS_MAX = 120.0
POLL_SECONDS = 0.2
NOT_FOUND = -704
NO_DISK = "without SSD offload Mooncake keeps everything in memory"
NO_SYNC = "SSD offload writes full buckets in the background: no call waits for the disk and nothing is synced"


class MooncakePeer(BlockingPeer):
    """Systems ``mooncake``, ``mooncake-tcp`` and ``mooncake-ssd``."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._ssd = system == "mooncake-ssd"
        self._apart = system == "mooncake-tcp"
        self._store: Any = None
        self._servers: list[servers.Server] = []
        self._master = self._server_version = ""
        self._folder: pathlib.Path | None = None
        self._block_bytes = 0
        self._lock = threading.Lock()
        self._names: set[str] = set()

    def open(self, settings: Settings) -> None:
        found = importlib.metadata.version(PACKAGE)
        if found != VERSION:
            raise PeerError(f"Mooncake {found} was imported, not {VERSION}")
        programs = pathlib.Path(str(mooncake.__file__)).parent
        if pathlib.Path(mooncake_store.__file__).parent != programs:
            raise PeerError("mooncake.store was imported from another place than mooncake")
        if self._ssd and settings.endpoint is not None:
            raise CannotRunError("SSD offload is driven for one client only")
        self._block_bytes = settings.block_bytes
        options: dict[str, Any] = {}
        if self._ssd:
            self._folder = settings.folder / "ssd"
            self._folder.mkdir(exist_ok=True)
            os.environ.update(
                MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS=str(HEARTBEAT_SECONDS),
                MOONCAKE_OFFLOAD_LOCAL_BUFFER_SIZE_BYTES=str(OFFLOAD_BUFFER_BYTES),
                MOONCAKE_OFFLOAD_CLIENT_BUFFER_GC_TTL_MS=str(BUFFER_TTL_MS),
                MOONCAKE_OFFLOAD_BUCKET_KEYS_LIMIT=str(BUCKET_KEYS),
                MOONCAKE_OFFLOAD_USE_URING="1",
            )
            options = {"enable_ssd_offload": True, "ssd_offload_path": str(self._folder)}
        segment_bytes = -(-settings.memory_bytes // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES
        if settings.endpoint is None:
            self._server_version = servers.master_version(programs)
            master, self._master = servers.start_master(programs, offload=self._ssd)
            self._servers.append(master)
            if self._apart:
                self._servers.append(servers.start_holder(programs, self._master, segment_bytes, {}))
        else:
            self._master = str(settings.endpoint["master"])
            self._server_version = str(settings.endpoint["version"])
        if self._server_version != VERSION:
            raise PeerError(f"mooncake_master is of version {self._server_version}, not {VERSION}")
        if self._apart or settings.endpoint is not None:
            segment_bytes = 0
        self._store = mooncake_store.MooncakeDistributedStore()
        arguments = ("P2PHANDSHAKE", segment_bytes, LOCAL_BUFFER_BYTES, "tcp", "", self._master)
        if code := self._store.setup(servers.HOST, *arguments, **options):
            raise PeerError(f"Mooncake's setup gave {code}")
        for view in (settings.source, settings.target):
            if view.nbytes and (code := self._store.register_buffer(_address(view), view.nbytes)):
                raise PeerError(f"Mooncake's register_buffer gave {code}")

    def describe(self) -> Description:
        lacks: dict[Feature, str] = {"lease": "Mooncake copies into the caller's memory", "durable": NO_DISK}
        lacks |= {"cold": NO_DISK, "restart": NO_DISK, "overflow": NO_DISK}
        if self._ssd:
            del lacks["cold"]
            lacks |= {"durable": NO_SYNC, "restart": NO_SYNC, "clients": "SSD offload is driven for one client only"}
            lacks["overflow"] = "puts are refused (error -200) while the memory is full: eviction runs behind"
        configuration: dict[str, Scalar] = {"protocol": "tcp", "default_kv_lease_ttl_ms": servers.LEASE_MS}
        if self._ssd:
            configuration |= {
                "use_uring": True,
                "bucket_keys": BUCKET_KEYS,
                "offload_buffer_bytes": OFFLOAD_BUFFER_BYTES,
                "heartbeat_s": HEARTBEAT_SECONDS,
            }
        return Description(
            version=importlib.metadata.version(PACKAGE),
            module=mooncake_store.__file__.rpartition("site-packages/")[2],
            tuning="register_buffer, batch_put_from, batch_get_into (Mooncake's zero-copy API), P2PHANDSHAKE"
            + (", io_uring offload with a buffer that can be registered" if self._ssd else ""),
            server=self._server_version,
            medium="server memory" if self._apart else "own memory",
            configuration=configuration,
            lacks=lacks,
        )

    def endpoint(self) -> Mapping[str, Scalar]:
        return {"master": self._master, "version": self._server_version}

    def processes(self) -> Sequence[int]:
        return [server.process for server in self._servers]

    def files(self) -> Sequence[pathlib.Path]:
        return sorted(path for path in self._folder.rglob("*") if path.is_file()) if self._folder else []

    def put(self, name: str, data: memoryview) -> None:
        self._check_put(1, [self._store.put_from(name, _address(data), data.nbytes)])
        self._remember([name])

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        for some in _cut(jobs, in_flight):
            names, places, sizes = _columns(some)
            self._check_put(len(some), self._store.batch_put_from(names, places, sizes))
        self._remember([job.name for job in jobs])

    def flush(self) -> None:
        raise CannotRunError(NO_SYNC if self._ssd else NO_DISK)

    def get(self, name: str, into: memoryview) -> memoryview:
        self._check_got([name], [self._store.get_into(name, _address(into), into.nbytes)], into.nbytes)
        return into

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview]:
        room = max(1, OFFLOAD_BUFFER_BYTES // self._block_bytes - 1) if self._ssd else in_flight
        for some in _cut(jobs, min(in_flight, room)):
            names, places, sizes = _columns(some)
            self._check_got(names, self._store.batch_get_into(names, places, sizes), sizes[0])
        return [job.data for job in jobs]

    def contains(self, name: str) -> bool:
        return bool(self._store.is_exist(name) == 1)

    def delete(self, name: str) -> None:
        code = self._store.remove(name, True)  # forced: a lease of an earlier get would refuse it
        if code == NOT_FOUND:
            raise KeyError(name)
        if code != 0:
            raise PeerError(f"Mooncake's remove gave {code}")
        with self._lock:
            self._names.discard(name)

    def drop_caches(self) -> None:
        if not self._ssd:
            raise CannotRunError(NO_DISK)
        names = sorted(self._names)
        deadline = time.monotonic() + OFFLOAD_SECONDS_MAX
        while waiting := self._not_on_disk(names):
            if time.monotonic() > deadline:
                raise PeerError(f"{len(waiting)} blocks are not on disk after {OFFLOAD_SECONDS_MAX:g} s")
            time.sleep(POLL_SECONDS)
        time.sleep(servers.LEASE_MS / 1000)
        cleared = self._store.batch_replica_clear(names, self._store.get_hostname())
        if len(cleared) != len(names):
            raise PeerError(f"Mooncake kept {len(names) - len(cleared)} blocks in memory")

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
        for server in reversed(self._servers):
            server.close()
        self._servers.clear()

    def _not_on_disk(self, names: Sequence[str]) -> list[str]:
        found = self._store.batch_get_replica_desc(list(names))
        return [name for name in names if not any(one.is_local_disk_replica() for one in found.get(name, []))]

    def _remember(self, names: Sequence[str]) -> None:
        with self._lock:
            self._names.update(names)

    def _check_put(self, count: int, codes: Sequence[int]) -> None:
        if len(codes) != count or any(codes):
            raise PeerError(f"Mooncake's put gave {sorted(set(codes))}")

    def _check_got(self, names: Sequence[str], counts: Sequence[int], size: int) -> None:
        for name, count in zip(names, counts, strict=True):
            if count == NOT_FOUND:
                raise KeyError(name)
            if count != size:
                raise PeerError(f"Mooncake's get gave {count} instead of {size} bytes")


def _cut(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def _columns(jobs: Sequence[Job]) -> tuple[list[str], list[int], list[int]]:
    return [job.name for job in jobs], [_address(job.data) for job in jobs], [job.data.nbytes for job in jobs]


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)
