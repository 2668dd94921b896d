"""HDF5 as h5py's users keep arrays: one float16 dataset per block, contiguous or gzip-compressed in chunks.

``flush`` is ``H5Fflush`` and an fsync of the file (HDF5 itself only hands its buffers to the kernel). Contiguous
datasets are read with ``read_direct`` into the caller's memory. h5py holds one lock around every call, so
batches are done one block after the other: threads would only queue. gzip is h5py's own default level (4) and chunk
shape.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from bench.peers.protocol import (
    BlockingPeer,
    Description,
    Feature,
    Job,
    Settings,
    published_path,
    require_version,
)

PINS = pathlib.Path(__file__).with_name("requirements.txt")
FILE = "blocks.h5"


class Hdf5Peer(BlockingPeer):
    """Systems ``hdf5-contiguous`` and ``hdf5-gzip``."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._gzip = system == "hdf5-gzip"
        self._path = pathlib.Path()
        self._file: Any = None

    def open(self, settings: Settings) -> None:
        require_version("h5py", h5py.__version__, PINS)
        self._path = settings.folder / FILE
        self._file = h5py.File(self._path, "a", libver="latest")

    def describe(self) -> Description:
        lacks: dict[Feature, str] = {
            "lease": "a dataset is read into the caller's memory",
            "clients": "HDF5 locks a file that is open for writing: one process at a time (SWMR adds no datasets)",
        }
        return Description(
            version=f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}",
            module=published_path(h5py.__file__),
            tuning="libver latest, one float16 dataset per block, "
            + ("gzip level 4 in h5py's own chunks" if self._gzip else "contiguous, read_direct"),
            durability="H5Fflush and fsync of the file",
            medium="page cache",
            configuration={"compression": "gzip" if self._gzip else "none"},
            lacks=lacks,
        )

    def files(self) -> Sequence[pathlib.Path]:
        return [self._path]

    def put(self, name: str, data: memoryview) -> None:
        array = np.frombuffer(data, np.float16)
        compression = {"compression": "gzip", "compression_opts": 4} if self._gzip else {}
        self._file.create_dataset(name, data=array, **compression)

    def flush(self) -> None:
        self._file.flush()
        fd = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def get(self, name: str, into: memoryview) -> memoryview:
        try:
            dataset = self._file[name]
        except KeyError as error:
            raise KeyError(name) from error
        dataset.read_direct(np.frombuffer(into, np.float16))
        return into

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        for job in jobs:
            self.put(job.name, job.data)

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview]:
        return [self.get(job.name, job.data) for job in jobs]

    def contains(self, name: str) -> bool:
        return name in self._file

    def delete(self, name: str) -> None:
        try:
            del self._file[name]
        except KeyError as error:
            raise KeyError(name) from error

    def drop_caches(self) -> None:
        self.flush()
        self._file.close()
        self._file = h5py.File(self._path, "a", libver="latest")

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
