"""One file per block, in one directory: buffered, or with O_DIRECT; as many threads as are in flight.

A block is written to a temporary name and renamed, so that a reader never meets half of it. ``flush`` syncs every
file that was written since the last one, from as many threads as may be in flight, and then the directory. No
checksum, no index, no limit on space. O_DIRECT goes straight from and to the caller's page-aligned memory.
"""

from __future__ import annotations

import os
import pathlib
import platform
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.peers.protocol import BlockingPeer, CannotRunError, Description, Settings

SUFFIX = ".block"


class FilesPeer(BlockingPeer):
    """Systems ``files`` and ``files-direct``."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._direct = os.O_DIRECT if system == "files-direct" else 0
        self._folder = pathlib.Path()
        self._threads = 1
        self._unsynced: list[str] = []
        self._lock = threading.Lock()

    def open(self, settings: Settings) -> None:
        self._folder = settings.folder
        self._threads = settings.in_flight_max
        probe = self._folder / f".probe-{os.getpid()}"
        try:
            os.close(os.open(probe, os.O_RDWR | os.O_CREAT | self._direct, 0o600))
        except OSError as error:
            raise CannotRunError(f"files cannot be opened so here: {error.strerror}") from error
        finally:
            probe.unlink(missing_ok=True)

    def describe(self) -> Description:
        lacks = {"lease": "a file is read into the caller's memory"}
        if self._direct:
            no_memory = "O_DIRECT keeps nothing in memory: every read is one of the disk"
            lacks |= {"hot": no_memory, "volatile": "O_DIRECT writes go to the disk; only synced ones are compared"}
        return Description(
            version=f"Python {platform.python_version()}",
            module="bench/peers/files/peer.py",
            tuning="one thread per operation in flight, one write per file, rename into place; "
            + ("O_DIRECT from aligned memory" if self._direct else "through the page cache"),
            durability="fsync of each file and of the directory",
            medium="page cache",
            configuration={"o_direct": bool(self._direct)},
            lacks=lacks,  # type: ignore[arg-type]
        )

    def files(self) -> Sequence[pathlib.Path]:
        return sorted(self._folder.glob("*" + SUFFIX))

    def put(self, name: str, data: memoryview) -> None:
        path = f"{self._folder}/{name}{SUFFIX}"
        fd = os.open(path + ".part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | self._direct, 0o600)
        try:
            rest = data
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)
        os.rename(path + ".part", path)
        with self._lock:
            self._unsynced.append(path)

    def flush(self) -> None:
        with self._lock:
            paths, self._unsynced = self._unsynced, []
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(_sync, paths))
        _sync(str(self._folder))

    def get(self, name: str, into: memoryview) -> memoryview:
        try:
            fd = os.open(f"{self._folder}/{name}{SUFFIX}", os.O_RDONLY | self._direct)
        except FileNotFoundError as error:
            raise KeyError(name) from error
        try:
            rest = into
            while rest:
                count = os.readv(fd, [rest])
                if count == 0:
                    raise KeyError(f"{name}: the file is too short")
                rest = rest[count:]
        finally:
            os.close(fd)
        return into

    def contains(self, name: str) -> bool:
        return os.path.exists(f"{self._folder}/{name}{SUFFIX}")

    def delete(self, name: str) -> None:
        path = f"{self._folder}/{name}{SUFFIX}"
        try:
            os.unlink(path)
        except FileNotFoundError as error:
            raise KeyError(name) from error
        with self._lock:
            if path in self._unsynced:
                self._unsynced.remove(path)

    def drop_caches(self) -> None:
        self.flush()

    def close(self) -> None:
        self._unsynced.clear()


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
