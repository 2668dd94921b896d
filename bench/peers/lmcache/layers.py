"""LMCache's L2 adapters (multi-process mode): ``fs``, ``fs_native`` and ``raw_block``, driven as its controllers do.

Tasks are submitted with memory objects around the caller's memory (as ``lmcache bench l2`` does: no copy besides
LMCache's own) and awaited on its event descriptors. One task per block and a window of them, because ``fs`` works
on the blocks of one task one after the other.

What could not be run when this was written: ``raw_block``. Its extension ``lmcache_rust_raw_block_io`` is neither in
LMCache's wheel nor on PyPI; without it the system is "not run". Its configuration follows LMCache's own help.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import select
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from bench.peers.lmcache.common import (  # first: it sets what LMCache reads while it is imported
    MODEL,
    NO_SYNC,
    THREADS_DEFAULT,
    WAIT_SECONDS_MAX,
    NewFiles,
    checked_version,
    module_file,
    object_around,
)

# isort: split
import numpy as np
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.platform import consume_fd

from bench.peers.protocol import BlockingPeer, CannotRunError, Description, Feature, Job, PeerError, Settings

Scalar = str | int | float | bool | None

RUST_EXTENSION = "lmcache_rust_raw_block_io"
RAW_HEADER_BYTES = 4096
RAW_META_BYTES = 256 << 20
"""What ``raw_block`` reserves of its file by default."""
ALIGN_BYTES = 4096


class LayerPeer(BlockingPeer):
    """Systems ``lmcache-fs``, ``lmcache-fs-native``, ``lmcache-fs-native-direct`` and ``lmcache-raw-block``."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._direct = system in ("lmcache-fs-native-direct", "lmcache-raw-block")
        self._raw = system == "lmcache-raw-block"
        self._configuration: dict[str, Scalar] = {}
        self._layer: Any = None
        self._lock = threading.Lock()
        self._new: NewFiles | None = None

    def open(self, settings: Settings) -> None:
        checked_version()
        folder = settings.folder / "l2"
        folder.mkdir(exist_ok=True)
        self._new = NewFiles(folder, settings.in_flight_max)
        asked = self._asked(folder, settings)
        parsed = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(asked)]))
        self._layer = create_l2_adapter(parsed.adapters[0], l1_memory_desc=_region(settings.source))
        self._configuration = {name: value for name, value in asked.items() if not name.endswith("path")}

    def describe(self) -> Description:
        lacks: dict[Feature, str] = {"lease": "an L2 adapter reads into the caller's memory"}
        if self._direct:
            lacks["hot"] = "O_DIRECT keeps nothing in memory: every read is one of the disk"
            lacks["volatile"] = "O_DIRECT writes go to the disk; only synced ones are compared"
        if self._raw:
            lacks["clients"] = "raw_block's index is in the memory of one process"
            lacks["restart"] = "raw_block writes its index once a minute: what came after is lost"
        return Description(
            version=checked_version(),
            module=module_file(sys.modules[type(self._layer).__module__]),
            tuning="a window of one-block tasks, memory objects around the caller's memory as in `lmcache bench l2`"
            + ("" if self.system == "lmcache-fs" else "; as many workers as in flight, at least its default"),
            durability=NO_SYNC,
            medium="page cache",
            configuration=self._configuration,
            lacks=lacks,
        )

    def files(self) -> Sequence[pathlib.Path]:
        assert self._new is not None
        return self._new.all()

    def put(self, name: str, data: memoryview) -> None:
        self.put_many([Job(name, data)], 1)

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        def submit(job: Job) -> int:
            return int(self._layer.submit_store_task([_key(job.name)], [object_around(job.data)]))

        def finished(_open: Sequence[int]) -> dict[int, bool]:
            done = self._layer.pop_completed_store_tasks()
            return {task: result.is_successful() for task, result in done.items()}

        with self._lock:
            failed = _through(jobs, in_flight, submit, finished, self._layer.get_store_event_fd())
        if failed:
            raise PeerError(f"{self.system} failed to store {len(failed)} blocks")

    def flush(self) -> None:
        assert self._new is not None
        self._new.sync()

    def get(self, name: str, into: memoryview) -> memoryview:
        return self.get_many([Job(name, into)], 1)[0]

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview]:
        def submit(job: Job) -> int:
            return int(self._layer.submit_load_task([_key(job.name)], [object_around(job.data)]))

        def finished(open_tasks: Sequence[int]) -> dict[int, bool]:
            return _answers(self._layer.query_load_result, open_tasks)

        with self._lock:
            failed = _through(jobs, in_flight, submit, finished, self._layer.get_load_event_fd())
        if failed:
            raise KeyError(failed[0].name)
        return [job.data for job in jobs]

    def contains(self, name: str) -> bool:
        key = _key(name)

        def submit(_job: Job) -> int:
            return int(self._layer.submit_lookup_and_lock_task([key], {}))

        def finished(open_tasks: Sequence[int]) -> dict[int, bool]:
            return _answers(self._layer.query_lookup_and_lock_result, open_tasks)

        with self._lock:
            job = Job(name, memoryview(b""))
            found = not _through([job], 1, submit, finished, self._layer.get_lookup_and_lock_event_fd())
            if found:
                self._layer.submit_unlock([key])
        return found

    def delete(self, name: str) -> None:
        if not self.contains(name):
            raise KeyError(name)
        self._layer.delete([_key(name)])

    def drop_caches(self) -> None:
        self.flush()  # stores are finished when they return; nothing else is in memory

    def close(self) -> None:
        if self._layer is not None:
            self._layer.close()
            self._layer = None

    def _asked(self, folder: pathlib.Path, settings: Settings) -> dict[str, Scalar]:
        workers = max(THREADS_DEFAULT, settings.in_flight_max)
        if self._raw:
            try:
                importlib.import_module(RUST_EXTENSION)
            except ImportError as error:
                raise CannotRunError(f"LMCache's {RUST_EXTENSION} is in no wheel and not installed") from error
            slot_bytes = settings.block_bytes + RAW_HEADER_BYTES
            path = folder / "raw.data"
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(fd, 0, RAW_META_BYTES + settings.blocks_max * slot_bytes)
            finally:
                os.close(fd)
            sizes: dict[str, Scalar] = {"device_path": str(path), "slot_bytes": slot_bytes}
            threads: dict[str, Scalar] = {"num_store_workers": workers, "num_load_workers": workers}
            return {"type": "raw_block", "io_engine": "io_uring", "use_odirect": True, **sizes, **threads}
        if self.system == "lmcache-fs":
            return {"type": "fs", "base_path": str(folder)}
        return {
            "type": "fs_native",
            "base_path": str(folder),
            "num_workers": workers,
            "use_odirect": self._direct,
        }


def _key(name: str) -> ObjectKey:
    return ObjectKey(chunk_hash=bytes.fromhex(name), model_name=MODEL, kv_rank=0)


def _region(view: memoryview) -> L1MemoryDesc:
    pointer = int(np.frombuffer(view, np.uint8).ctypes.data)
    return L1MemoryDesc(ptr=pointer, size=view.nbytes, align_bytes=ALIGN_BYTES)


def _answers(query: Callable[[int], Any], tasks: Sequence[int]) -> dict[int, bool]:
    """Which of the tasks have ended, and whether their one block was there."""
    found = {task: query(task) for task in tasks}
    return {task: bool(bitmap.test(0)) for task, bitmap in found.items() if bitmap is not None}


def _through(
    jobs: Sequence[Job],
    in_flight: int,
    submit: Callable[[Job], int],
    finished: Callable[[Sequence[int]], dict[int, bool]],
    event_fd: int,
) -> list[Job]:
    """All jobs through tasks, at most ``in_flight`` open at once. Returns those that failed."""
    poller = select.poll()
    poller.register(event_fd, select.POLLIN)
    waiting = iter(jobs)
    opened: dict[int, Job] = {}
    failed: list[Job] = []
    left = len(jobs)
    while left:
        while len(opened) < in_flight and (job := next(waiting, None)) is not None:
            opened[submit(job)] = job
        if not poller.poll(WAIT_SECONDS_MAX * 1000):
            raise PeerError(f"LMCache finished none of {len(opened)} tasks within {WAIT_SECONDS_MAX:g} s")
        consume_fd(event_fd)
        for task, successful in finished(list(opened)).items():
            job = opened.pop(task)
            left -= 1
            if not successful:
                failed.append(job)
    return failed
