"""PDC: one object per block in one container, written and read by region transfer requests through a real server.

PDC's documentation gives the way: create (or open) the object, one region over all of it here and there, start all
transfers of a round and wait for all. The server is ``pdc_server`` of ``PDC_DIR`` with its data in the measured folder.
``flush`` asks the server to write (``PDCobj_flush_all_start``) and syncs its files, since PDC syncs nothing.

**What could not be run when this was written**: all of it; no installation was at hand. The binding was compiled
against the headers of hpc-io/pdc at 6999ac7c, so names, arguments and types hold. How calls behave (that opening an
unknown object gives 0, that a flush has ended when its call returns, deletion) was read in its source and not tried.
Restart and further clients are not driven. A server built with its own cache may answer cold reads from memory: the
harness finds that by the kernel's counts and voids the sample.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from bench.peers.pdc import binding
from bench.peers.protocol import BlockingPeer, CannotRunError, Description, Feature, Job, PeerError, Settings

CONTAINER = b"blocks"
START_SECONDS_MAX = 30.0
END_SECONDS_MAX = 20.0
POLL_SECONDS = 0.05
TRANSPORT = "na+sm"
"""Mercury's shared memory, the fastest within a node; ``HG_TRANSPORT`` names another."""


class PdcPeer(BlockingPeer):
    """System ``pdc``. PDC's library is for one thread: calls take turns, a batch is under way at once."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._ffi: Any = None
        self._lib: Any = None
        self._installation = self._folder = pathlib.Path()
        self._server: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._pdc = self._container = self._property = 0
        self._block_bytes = 0
        self._transport = TRANSPORT

    def open(self, settings: Settings) -> None:
        self._installation = binding.installation()
        binding.version(self._installation)
        if settings.endpoint is not None:
            raise CannotRunError("PDC is driven for one client only")
        self._ffi, self._lib = binding.load(self._installation)
        self._folder, self._block_bytes = settings.folder, settings.block_bytes
        self._transport = os.environ.setdefault("HG_TRANSPORT", TRANSPORT)
        # Server and client find each other, and the server its data, by these.
        os.environ["PDC_TMPDIR"] = f"{self._folder}/tmp/"
        os.environ["PDC_DATA_LOC"] = f"{self._folder}/data"
        (self._folder / "tmp").mkdir(exist_ok=True)
        (self._folder / "data").mkdir(exist_ok=True)
        self._start_server()
        if self._lib.bench_mpi_begin() != 0:
            raise CannotRunError("MPI_Init failed, which this build of PDC needs")
        self._pdc = self._made(self._lib.PDCinit(b"bench"), "PDCinit")
        container_property = self._made(
            self._lib.PDCprop_create(self._lib.PDC_CONT_CREATE, self._pdc), "PDCprop_create"
        )
        self._container = self._made(self._lib.PDCcont_create(CONTAINER, container_property), "PDCcont_create")
        self._check(self._lib.PDCprop_close(container_property), "PDCprop_close")
        self._property = self._made(self._lib.PDCprop_create(self._lib.PDC_OBJ_CREATE, self._pdc), "PDCprop_create")
        dims = self._ffi.new("uint64_t[1]", [self._block_bytes])
        self._check(self._lib.PDCprop_set_obj_dims(self._property, 1, dims), "PDCprop_set_obj_dims")
        self._check(self._lib.PDCprop_set_obj_type(self._property, self._lib.PDC_UINT8), "PDCprop_set_obj_type")

    def describe(self) -> Description:
        one_client = "PDC is driven for one client only"
        lacks: dict[Feature, str] = {
            "lease": "PDC copies into the caller's memory",
            "restart": "a restart of the server from its checkpoint is not driven",
            "clients": one_client,
        }
        found = binding.version(self._installation)
        return Description(
            version=found,
            module="include/pdc.h of PDC_DIR",
            tuning="region transfer requests, a whole batch started and awaited together (PDC's documentation)",
            durability="PDCobj_flush_all_start and fsync of the server's files, by the adapter: PDC syncs nothing",
            server=found,
            medium="server memory",
            configuration={"transport": self._transport},
            lacks=lacks,
        )

    def processes(self) -> Sequence[int]:
        return [self._server.pid] if self._server is not None else []

    def files(self) -> Sequence[pathlib.Path]:
        return sorted(path for path in (self._folder / "data").rglob("*") if path.is_file())

    def put(self, name: str, data: memoryview) -> None:
        self.put_many([Job(name, data)], 1)

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        def create(name: str) -> int:
            return self._made(self._lib.PDCobj_create(self._container, name.encode(), self._property), "PDCobj_create")

        self._move(jobs, in_flight, self._lib.PDC_WRITE, create)

    def get(self, name: str, into: memoryview) -> memoryview:
        return self.get_many([Job(name, into)], 1)[0]

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview]:
        self._move(jobs, in_flight, self._lib.PDC_READ, self._opened)
        return [job.data for job in jobs]

    def contains(self, name: str) -> bool:
        with self._lock:
            try:
                found = self._opened(name)
            except KeyError:
                return False
            self._check(self._lib.PDCobj_close(found), "PDCobj_close")
            return True

    def delete(self, name: str) -> None:
        with self._lock:
            self._check(self._lib.PDCobj_del(self._opened(name)), "PDCobj_del")

    def flush(self) -> None:
        with self._lock:
            self._check(self._lib.PDCobj_flush_all_start(), "PDCobj_flush_all_start")
        for path in (*self.files(), self._folder / "data"):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def drop_caches(self) -> None:
        self.flush()

    def close(self) -> None:
        if self._pdc:
            self._lib.PDCprop_close(self._property)
            self._lib.PDCcont_close(self._container)
            self._lib.PDCclose(self._pdc)
            self._pdc = 0
        if self._server is not None:
            self._end_server(self._server)
            self._server = None

    def _move(self, jobs: Sequence[Job], in_flight: int, access: int, object_of: Any) -> None:
        with self._lock:
            for start in range(0, len(jobs), in_flight):
                self._round(jobs[start : start + in_flight], access, object_of)

    def _round(self, jobs: Sequence[Job], access: int, object_of: Any) -> None:
        """One transfer per block, all started, all awaited, everything closed whatever happens."""
        objects: list[int] = []
        regions: list[int] = []
        transfers: list[int] = []
        held = []
        try:
            for job in jobs:
                objects.append(object_of(job.name))
                buffer = self._ffi.from_buffer(job.data)
                held.append(buffer)
                regions += [self._region(job.data.nbytes), self._region(job.data.nbytes)]
                made = self._lib.PDCregion_transfer_create(buffer, access, objects[-1], regions[-2], regions[-1])
                transfers.append(self._made(made, "PDCregion_transfer_create"))
            requests = self._ffi.new("pdcid_t[]", transfers)
            self._check(
                self._lib.PDCregion_transfer_start_all(requests, len(transfers)), "PDCregion_transfer_start_all"
            )
            self._check(self._lib.PDCregion_transfer_wait_all(requests, len(transfers)), "PDCregion_transfer_wait_all")
        finally:
            for transfer in transfers:
                self._lib.PDCregion_transfer_close(transfer)
            for region in regions:
                self._lib.PDCregion_close(region)
            for one in objects:
                self._lib.PDCobj_close(one)

    def _region(self, size: int) -> int:
        offset, sizes = self._ffi.new("uint64_t[1]", [0]), self._ffi.new("uint64_t[1]", [size])
        return self._made(self._lib.PDCregion_create(1, offset, sizes), "PDCregion_create")

    def _opened(self, name: str) -> int:
        found = int(self._lib.PDCobj_open(name.encode(), self._pdc))
        if found == 0:
            raise KeyError(name)
        return found

    def _made(self, identity: int, call: str) -> int:
        if identity == 0:
            raise PeerError(f"{call} failed")
        return int(identity)

    def _check(self, code: int, call: str) -> None:
        if code < 0:
            raise PeerError(f"{call} gave {code}")

    def _start_server(self) -> None:
        self._server = subprocess.Popen(
            [str(self._installation / "bin" / "pdc_server")],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS_MAX
        address = self._folder / "tmp" / "server.cfg"
        while not (address.exists() and address.stat().st_size):  # the client reads the server's address there
            if self._server.poll() is not None:
                raise PeerError(f"pdc_server ended with {self._server.returncode} while it started")
            if time.monotonic() > deadline:
                raise PeerError(f"pdc_server did not write its address within {START_SECONDS_MAX:g} s")
            time.sleep(POLL_SECONDS)

    def _end_server(self, server: subprocess.Popen[bytes]) -> None:
        """PDC's own way first; whatever does not end so is ended."""
        closing = subprocess.Popen(
            [str(self._installation / "bin" / "close_server")],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for process in (closing, server):
            try:
                process.wait(END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
