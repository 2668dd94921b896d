"""NIXL 1.5: descriptors of memory and of one preallocated file, moved by its POSIX plug-in with io_uring.

NIXL moves bytes and keeps no names, so the adapter has what every user of it must have: a table of names and slots.
The file is preallocated and registered once, as are the caller's source and target, so nothing is copied on the way.
A batch is one transfer of many descriptors in an agent whose queue is as deep as there may be operations in flight:
the plug-in itself keeps the device busy. Waiting is polling (``check_xfer_state``): NIXL has no other way.
NIXL has no sync either: ``flush`` is this adapter's ``fdatasync`` of the file.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from nixl import _api as nixl_api

from bench.peers.protocol import BlockingPeer, CannotRunError, Description, Feature, Job, PeerError, Settings

PACKAGE_VERSION = "1.5.1"
PLUGIN = "POSIX"
QUEUE_POOL = 1024
"""Requests an agent may hold; far above any batch's descriptors per queue slot."""


class NixlPeer(BlockingPeer):
    """Systems ``nixl`` (through the page cache) and ``nixl-direct`` (O_DIRECT)."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._direct = system == "nixl-direct"
        self._fd = -1
        self._path = pathlib.Path()
        self._block_bytes = 0
        self._lock = threading.Lock()
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._deep: dict[int, _Agent] = {}
        self._singles: queue.SimpleQueue[_Agent] = queue.SimpleQueue()

    def open(self, settings: Settings) -> None:
        module = os.path.basename(os.path.dirname(nixl_api.__file__))
        found = importlib.metadata.version("nixl")
        if found != PACKAGE_VERSION or not module.startswith("nixl_cu"):
            raise PeerError(f"nixl {found} in {module} was imported, not {PACKAGE_VERSION}")
        if settings.endpoint is not None:
            raise CannotRunError("NIXL keeps no names that a second client could find")
        self._block_bytes = settings.block_bytes
        self._free = list(range(settings.blocks_max))[::-1]
        self._path = settings.folder / "nixl.data"
        file_bytes = settings.blocks_max * settings.block_bytes
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self._direct else 0), 0o600)
            os.posix_fallocate(self._fd, 0, file_bytes)
        except OSError as error:
            raise CannotRunError(f"the file cannot be made so here: {error.strerror}") from error
        memory = [view for view in (settings.source, settings.target) if view.nbytes]
        depths = {1 << power for power in range(settings.in_flight_max.bit_length())} | {settings.in_flight_max}
        for depth in sorted(depths):
            self._deep[depth] = _Agent(f"deep-{depth}", depth, memory, self._fd, file_bytes)
        for number in range(settings.in_flight_max):
            self._singles.put(_Agent(f"single-{number}", 1, memory, self._fd, file_bytes))

    def describe(self) -> Description:
        lacks: dict[Feature, str] = {
            "lease": "NIXL copies into the caller's memory",
            "restart": "NIXL keeps no names: a new process finds nothing",
            "clients": "NIXL keeps no names that a second client could find",
        }
        if self._direct:
            lacks["hot"] = "O_DIRECT keeps nothing in memory: every read is one of the disk"
            lacks["volatile"] = "O_DIRECT writes go to the disk; only synced ones are compared"
        backend = nixl_api.__file__.split("/site-packages/")[-1]
        return Description(
            version=importlib.metadata.version("nixl"),
            module=backend,
            tuning="use_uring, source, target and one preallocated file registered once, a batch is one transfer, "
            "kernel_queue_size as deep as in flight (NIXL's POSIX plug-in README)",
            durability="fdatasync of the file, by the adapter: NIXL has no sync",
            medium="page cache",
            configuration={"plugin": PLUGIN, "use_uring": True, "o_direct": self._direct},
            lacks=lacks,
        )

    def files(self) -> Sequence[pathlib.Path]:
        return [self._path]

    def put(self, name: str, data: memoryview) -> None:
        slot = self._take(1)[0]
        self._single("WRITE", slot, data)
        with self._lock:
            self._slots[name] = slot

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        slots = self._take(len(jobs))
        self._batch("WRITE", slots, [job.data for job in jobs], in_flight)
        with self._lock:
            self._slots.update({job.name: slot for job, slot in zip(jobs, slots, strict=True)})

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def get(self, name: str, into: memoryview) -> memoryview:
        self._single("READ", self._slots[name], into)
        return into

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview]:
        self._batch("READ", [self._slots[job.name] for job in jobs], [job.data for job in jobs], in_flight)
        return [job.data for job in jobs]

    def contains(self, name: str) -> bool:
        return name in self._slots

    def delete(self, name: str) -> None:
        with self._lock:
            self._free.append(self._slots.pop(name))

    def drop_caches(self) -> None:
        self.flush()

    def close(self) -> None:
        for agent in self._deep.values():
            agent.close()
        self._deep.clear()
        while not self._singles.empty():
            self._singles.get().close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _take(self, count: int) -> list[int]:
        with self._lock:
            if len(self._free) < count:
                raise PeerError(f"{count} blocks more than the {len(self._slots)} of the file were put")
            return [self._free.pop() for _ in range(count)]

    def _single(self, operation: str, slot: int, data: memoryview) -> None:
        agent = self._singles.get()
        try:
            agent.move(operation, [(slot * self._block_bytes, data)])
        finally:
            self._singles.put(agent)

    def _batch(self, operation: str, slots: Sequence[int], data: Sequence[memoryview], in_flight: int) -> None:
        agent = self._deep[max(depth for depth in self._deep if depth <= in_flight)]
        agent.move(operation, [(slot * self._block_bytes, one) for slot, one in zip(slots, data, strict=True)])


class _Agent:
    """A NIXL agent with one POSIX back end, everything registered. Used by one thread at a time."""

    def __init__(self, name: str, depth: int, memory: Sequence[memoryview], fd: int, file_bytes: int) -> None:
        self._name, self._fd = name, fd
        self._agent: Any = nixl_api.nixl_agent(name, nixl_api.nixl_agent_config(backends=[]))
        if PLUGIN not in self._agent.get_plugin_list():
            raise CannotRunError("this build of NIXL has no POSIX plug-in")
        asked = {"use_uring": "true", "kernel_queue_size": str(depth), "ios_pool_size": str(max(QUEUE_POOL, depth))}
        try:
            self._agent.create_backend(PLUGIN, asked)
        except Exception as error:  # NIXL's own exception types; no io_uring here is the usual cause
            raise CannotRunError(f"NIXL's POSIX plug-in does not start with io_uring: {error}") from error
        if self._agent.get_backend_params(PLUGIN).get("use_uring") != "true":
            raise PeerError("NIXL's POSIX plug-in did not take use_uring")
        regions = [(_address(view), view.nbytes, 0, "") for view in memory]
        self._registered = [
            self._agent.register_memory(regions, "DRAM", backends=[PLUGIN]),
            self._agent.register_memory([(0, file_bytes, fd, "")], "FILE", backends=[PLUGIN]),
        ]

    def move(self, operation: str, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Move each ``(offset in the file, memory)``. Returns when all are done; raises ``PeerError`` if one failed."""
        agent = self._agent
        memory = agent.get_xfer_descs([(_address(data), data.nbytes, 0) for _, data in pieces], "DRAM")
        file = agent.get_xfer_descs([(offset, data.nbytes, self._fd) for offset, data in pieces], "FILE")
        transfer = agent.initialize_xfer(operation, memory, file, self._name, backends=[PLUGIN])
        try:
            state = agent.transfer(transfer)
            while state == "PROC":
                time.sleep(0)  # other threads' polling wants the interpreter lock too
                state = agent.check_xfer_state(transfer)
        finally:
            agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise PeerError(f"a {operation} of {len(pieces)} blocks ended as {state}")

    def close(self) -> None:
        for registered in self._registered:
            self._agent.deregister_memory(registered, backends=[PLUGIN])
        self._registered.clear()
        self._agent = None


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)
