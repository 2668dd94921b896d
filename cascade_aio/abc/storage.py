"""What the store needs from the outside: files, one queue of I/O on them, time, and byte work.

Four small Protocols, so that production (io_uring or threads), memory and the simulated disk are
interchangeable and one conformance suite serves all. A ``Platform`` bundles them; everything above
``io`` sees only these.

Buffers belong to the caller. While ``read`` or ``write`` has not returned, the buffers belong to
the operation: a cancelled call asks for cancellation and *keeps waiting* until the kernel has given
the memory back, then raises ``CancelledError``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

PAGE_BYTES = 4096
"""Alignment of every offset, length and address on the data path (O_DIRECT on 4K-sector disks)."""


class Priority(enum.IntEnum):
    """Service order of queued I/O: what a request waits for, before writes, before the rest.

    ``IDLE`` is upkeep that nobody waits for: compaction, scrubbing.
    """

    DEMAND = 0
    WRITE = 1
    BACKGROUND = 2
    IDLE = 3


class Urgency:
    """The ``Priority`` of reads that may become more urgent while they wait: somebody joined a prefetch.

    One object serves everything that is done for one block. It only ever rises. Loop thread only.
    """

    __slots__ = ("_listeners", "priority")

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        self._listeners: list[Callable[[Priority], None]] = []

    def rise(self, priority: Priority) -> None:
        """To ``priority``, if that is more urgent; everybody who watches is told at once."""
        if priority < self.priority:
            self.priority = priority
            for listener in list(self._listeners):
                listener(priority)

    @contextlib.contextmanager
    def watched(self, listener: Callable[[Priority], None]) -> Iterator[None]:
        """Within this scope ``listener(new priority)`` is called at each rise. It must not raise."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    """One name in a directory. ``size_bytes`` is 0 for directories."""

    name: str
    size_bytes: int
    is_dir: bool


@runtime_checkable
class File(Protocol):
    """An open file. ``direct`` tells whether the page cache is bypassed (then PAGE_BYTES rules hold)."""

    @property
    def path(self) -> str: ...

    @property
    def direct(self) -> bool: ...

    async def close(self) -> None:
        """Waits for requests in flight on it, then closes. Repeated calls do nothing."""
        ...


class Lock(Protocol):
    """An exclusive advisory lock held until ``release`` or the end of the process."""

    def release(self) -> None: ...


class Storage(Protocol):
    """Files and the I/O queue. Not thread-safe: one event loop owns it.

    Errors are ``OSError`` with errno and file name. Reads and writes are resumed when short.
    """

    async def open(self, path: str, *, writable: bool = False) -> File:
        """Open an existing file, O_DIRECT where the file system takes it."""
        ...

    async def create(self, path: str, *, preallocate_bytes: int = 0) -> File:
        """Create a new file (``FileExistsError`` if it is there), really allocated, size
        ``preallocate_bytes``, reading as zeros; the name is durable once ``sync_directory`` returned."""
        ...

    async def read(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority | Urgency = Priority.DEMAND,
        deadline_s: float | None = None,
    ) -> int:
        """Fill ``buffers`` one after the other from ``offset``; returns bytes read, less only at end of file.

        Given an ``Urgency``, what still waits in the queue moves to another class when it rises.

        With ``deadline_s`` the request is asked to cancel when it passes, and ``TimeoutError`` is
        raised once the buffers are free again (a hung device may take longer than the deadline:
        callers that must not wait do not wait for this call).
        """
        ...

    async def write(
        self,
        file: File,
        buffers: Sequence[memoryview],
        offset: int,
        *,
        priority: Priority = Priority.WRITE,
        deadline_s: float | None = None,
    ) -> None:
        """Write ``buffers`` one after the other at ``offset``, all of them or ``OSError``."""
        ...

    async def sync(self, file: File) -> None:
        """fdatasync: writes completed before this call are on stable storage when it returns.

        A failed sync must not be retried: what it covered is lost as far as anyone can know.
        """
        ...

    async def truncate(self, file: File, size_bytes: int) -> None: ...

    async def size(self, file: File) -> int: ...

    async def list_directory(self, path: str) -> list[FileEntry]:
        """Entries sorted by name; ``FileNotFoundError`` if there is no such directory."""
        ...

    async def make_directory(self, path: str) -> None:
        """Create it and its parents; no error if it is there."""
        ...

    async def sync_directory(self, path: str) -> None:
        """Make creations, renames and removals in ``path`` durable."""
        ...

    async def unlink(self, path: str) -> None: ...

    async def read_small(self, path: str) -> bytes:
        """A whole small file (settings, checkpoints), off the data path."""
        ...

    async def write_small(self, path: str, data: Sequence[bytes | memoryview]) -> None:
        """Replace ``path`` atomically and durably (temporary file, fsync, rename, directory sync)."""
        ...

    async def free_bytes(self, path: str) -> int: ...

    async def register_memory(self, memory: memoryview) -> None:
        """Announce memory that most transfers will use, so that the kernel may map it once.

        Only a speed-up: never raises for a refusal, ``statistics()`` tells what came of it.
        """
        ...

    async def try_lock(self, path: str) -> Lock | None:
        """Create and lock ``path``; ``None`` if another process (or this one) holds it."""
        ...

    def statistics(self) -> dict[str, object]: ...

    def abandon(self) -> None:
        """The storage hangs: every call in progress and every later one raises ``OSError`` (ETIMEDOUT) now.

        The only way out of waiting for the kernel. Whatever memory it still has stays referenced and must
        not be used for anything else, ever; ``aclose`` is to be called still. May be repeated.
        """
        ...

    async def aclose(self) -> None:
        """Drain and close; then every call raises ``ClosedError``."""
        ...


class Clock(Protocol):
    """Time, so that tests can bend it. Sleeping goes through the event loop (virtual in simulation)."""

    def wall_ns(self) -> int: ...

    def monotonic_s(self) -> float: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Ingested:
    """Result of copying a block into an extent: full digest and one CRC-32C per checksum chunk."""

    digest: bytes
    chunk_crcs: tuple[int, ...]


class ByteEngine(Protocol):
    """Work proportional to bytes, off the event loop: copies, digests, checksums, prefault.

    A cancelled call waits for the work in progress (it owns the buffers), then raises.
    """

    async def ingest(
        self,
        key: memoryview,
        value: memoryview,
        payload: memoryview,
        value_offset: int,
        chunk_bytes: int,
        digest: str,
    ) -> Ingested:
        """Copy ``key`` to ``payload[0:]`` and ``value`` to ``payload[value_offset:]`` (gap zeroed),
        and compute the digest of ``key ‖ value`` and the CRC-32C of each ``chunk_bytes`` of payload."""
        ...

    async def digest(
        self, payload: memoryview, key_bytes: int, value_offset: int, value_bytes: int, chunk_bytes: int, digest: str
    ) -> Ingested:
        """The same for bytes that are in place already (``reserve``); zeroes the gap and the padding."""
        ...

    async def checksum(self, payload: memoryview, chunk_bytes: int) -> tuple[int, ...]:
        """CRC-32C of each chunk of ``payload`` (last one shorter)."""
        ...

    async def checksums(self, payloads: Sequence[memoryview], chunk_bytes: int) -> list[tuple[int, ...]]:
        """``checksum`` of each of several payloads, for little more than the price of one."""
        ...

    async def copy(self, pairs: Sequence[tuple[memoryview, memoryview]]) -> None:
        """Streaming copy of each ``(destination, source)``, split over the workers when large."""
        ...

    async def prefault(self, memory: memoryview, *, huge: bool = True) -> int:
        """Make page-aligned ``memory`` present without changing a byte, in huge pages where the system
        gives them; returns how many bytes are. The caller is its only writer meanwhile.

        ``huge=False``: the memory is another's, who has seen to that; it is only mapped in.
        """
        ...

    async def trim_heap(self) -> None:
        """Large temporary memory was freed: return what the C library keeps of it to the system."""
        ...

    async def aclose(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Platform:
    """The world a store runs in."""

    storage: Storage
    engine: ByteEngine
    clock: Clock
