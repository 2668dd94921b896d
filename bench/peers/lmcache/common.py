"""What all adapters of LMCache share: which LMCache was imported, syncing what it wrote, its objects around our memory.

LMCache never syncs a file. For the durable columns the adapters do it, for every file that is new since the last
time, from as many threads as may be in flight: the cheapest way to make what LMCache wrote durable.
"""

from __future__ import annotations

import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")  # read while LMCache is imported; it would call home
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")

import lmcache
import numpy as np
import torch
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

from bench.peers.protocol import PeerError

VERSION = "0.5.6"
MODEL = "bench"
THREADS_DEFAULT = 4
"""What LMCache takes for its disk threads and workers if nothing is said."""
NO_SYNC = "fsync of each file and of the folder, by the adapter: LMCache syncs nothing"
WAIT_SECONDS_MAX = 60.0
"""LMCache reports no error of some failed writes, it only never finishes them."""


def checked_version() -> str:
    """The version of the imported LMCache. Raises ``PeerError`` if it is another than the pinned one."""
    found = str(lmcache.__version__)
    if found != VERSION:
        raise PeerError(f"LMCache {found} was imported, not {VERSION}")
    if "site-packages" not in lmcache.__file__:
        raise PeerError("an LMCache outside of its environment was imported")
    return found


def module_file(module: Any) -> str:
    """The file of a module, from ``site-packages`` on."""
    return str(module.__file__).rpartition("site-packages/")[2]


def bytes_of(view: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Any buffer as a flat array of its bytes, without a copy."""
    return np.frombuffer(memoryview(view).cast("B"), np.uint8)


def object_around(view: memoryview, address: int = 0) -> TensorMemoryObj:
    """A memory object of LMCache's kind whose bytes are ``view``, as its own ``bench l2`` makes them.

    ``address`` is where it lies in the region that LMCache was told of, if any.
    """
    raw = torch.frombuffer(view, dtype=torch.uint8)
    metadata = MemoryObjMetadata(
        shape=torch.Size([view.nbytes]),
        dtype=torch.uint8,
        address=address,
        phy_size=view.nbytes,
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
    )
    return TensorMemoryObj(raw_data=raw, metadata=metadata, parent_allocator=None)


class NewFiles:
    """The files of a folder (not of those in it), and which of them are synced."""

    def __init__(self, folder: pathlib.Path, threads: int) -> None:
        self.folder, self._threads = folder, threads
        self._synced: set[tuple[str, int]] = set()

    def sync(self) -> None:
        """Return when all files are on the medium, and their names."""
        with os.scandir(self.folder) as entries:
            found = {(entry.path, entry.inode()) for entry in entries if entry.is_file()}
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda one: _sync(one[0]), found - self._synced))
        _sync(str(self.folder))
        self._synced = found

    def all(self) -> list[pathlib.Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
