"""What a measurement costs and where its bytes came from: CPU, memory, storage counters, page-cache residency.

Counts whole processes: this one and the servers that a peer named. Linux only; changes nothing but the
peak-memory mark of the processes (``clear_refs``) and, in ``drop_page_cache``, what the page cache holds.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import pathlib
import time
from collections.abc import Iterable, Sequence

from bench.peers.protocol import CannotRunError, PeerError

DROP_ATTEMPTS = 5
"""Pages under write-back or read-ahead survive an advice; a few attempts see them go."""
DROP_PAUSE_SECONDS = 0.05
_RESET_PEAK = "5"
_CLOCK_OF_PROCESS = 2
"""Kernel clock id of a process's CPU time: (~pid << 3) | CPUCLOCK_SCHED."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Counters of a set of processes, added up."""

    cpu_s: float
    read_bytes: int
    """Read from storage: page-cache hits do not count."""
    written_bytes: int

    def since(self, earlier: Usage) -> Usage:
        return Usage(
            self.cpu_s - earlier.cpu_s,
            self.read_bytes - earlier.read_bytes,
            self.written_bytes - earlier.written_bytes,
        )


def usage(processes: Sequence[int]) -> Usage:
    """What this process and ``processes`` have used so far. Raises ``PeerError`` if one of them has died."""
    cpu_s, read, written = 0.0, 0, 0
    for process in (os.getpid(), *processes):
        try:
            cpu_s += time.clock_gettime((~process << 3) | _CLOCK_OF_PROCESS)
            counters = _fields(process, "io")
        except (OSError, ProcessLookupError) as error:
            raise PeerError(f"process {process} of the system is gone: {error}") from error
        read += counters["read_bytes"]
        written += counters["write_bytes"]
    return Usage(cpu_s, read, written)


def resident_bytes() -> int:
    """Resident memory of this process now, shared memory included."""
    return _fields(os.getpid(), "status")["VmRSS"] * 1024


def reset_peaks(processes: Sequence[int]) -> None:
    """Start anew to watch for the peak of resident memory. Raises ``PeerError`` where that is not allowed."""
    for process in (os.getpid(), *processes):
        try:
            pathlib.Path(f"/proc/{process}/clear_refs").write_text(_RESET_PEAK)
        except OSError as error:
            raise PeerError(f"the peak memory of process {process} cannot be watched: {error}") from error


def peak_bytes(processes: Sequence[int]) -> int:
    """Sum of the peaks since ``reset_peaks``; memory that two processes share is counted in both."""
    return sum(_fields(process, "status")["VmHWM"] * 1024 for process in (os.getpid(), *processes))


def allocated_bytes(files: Iterable[pathlib.Path]) -> int:
    """Bytes that ``files`` take on their file system (holes and preallocation beyond the end aside)."""
    found = [path.stat() for path in files]
    return sum(min(stat.st_blocks * 512, stat.st_size) for stat in found)


def drop_page_cache(files: Sequence[pathlib.Path]) -> None:
    """Sync ``files``, drop them from the page cache, and look whether they are gone.

    Raises ``CannotRunError`` if pages stay (a file system that is memory, or somebody has them mapped).
    """
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            for _ in range(DROP_ATTEMPTS):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                resident = _resident_pages(fd)
                if not resident:
                    break
                time.sleep(DROP_PAUSE_SECONDS)
            else:
                raise CannotRunError(
                    f"{resident} pages of a data file stay in the page cache: reads of it would not be cold"
                )
        finally:
            os.close(fd)


def bound_page_cache(files: Sequence[pathlib.Path], keep_bytes: int) -> int:
    """Sync ``files`` and drop what exceeds ``keep_bytes`` from the page cache, what was written first going first.

    As a page cache of that size would have it. Returns the bytes that were dropped.
    """
    ordered = sorted(files, key=lambda path: path.stat().st_mtime_ns)
    excess = max(0, sum(path.stat().st_size for path in ordered) - keep_bytes)
    left = excess
    for path in ordered:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            part = min(left, os.fstat(fd).st_size)
            if part:  # a length of 0 would mean the whole file
                os.posix_fadvise(fd, 0, part, os.POSIX_FADV_DONTNEED)
            left -= part
        finally:
            os.close(fd)
    return excess


def _resident_pages(fd: int) -> int:
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    pages = -(-size // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    # A private writable mapping: ctypes wants its address, and nothing is ever written to it.
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        outcome = _libc.mincore(ctypes.addressof(start), size, ctypes.addressof(vector))
        del start
    if outcome != 0:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(byte & 1 for byte in bytes(vector))


def _fields(process: int, name: str) -> dict[str, int]:
    """The numbers of ``/proc/<process>/<name>``, whose lines read "name: number …"."""
    found: dict[str, int] = {}
    for line in pathlib.Path(f"/proc/{process}/{name}").read_text().splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[key] = int(words[0])
    return found
