"""What a compared system must do, and what it is told: the contract between harness and adapters.

An adapter is a ``BlockingPeer`` or an ``AsyncPeer``: the same nine verbs, called from threads or awaited. The
harness (``driving``) owns the clock, the bytes and every comparison; an adapter only moves bytes, the way its
system's documentation advises. ``conformance`` holds every adapter to this text. Standard library only.

Rules for adapters:

* no fallback: what does not work raises ``CannotRunError`` (with the reason, printed as "not run: …") from ``open``
  if it cannot run at all, or is in ``Description.lacks`` if one feature is missing;
* ``open`` asserts the version and the file of the module that was imported, and that a server answered with its
  version; ``describe`` reports them;
* a ``get`` of what is not there raises ``KeyError``, never returns other bytes;
* threads, servers and files that ``open`` made are gone after ``close``, also after a failure of ``open``.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

Scalar = str | int | float | bool | None

Feature = Literal["volatile", "durable", "hot", "lease", "cold", "restart", "clients", "overflow"]
"""What a system may be able to do; what it cannot is in ``Description.lacks`` with the reason.

* ``volatile``: ``put`` returns when the block can be got; nothing is promised about a crash.
* ``durable``: after ``flush`` every earlier ``put`` survives a loss of power.
* ``hot``: ``get`` of what was just put reads memory (own memory, a server's, or the page cache).
* ``lease``: ``lease`` gives the bytes without copying them.
* ``cold``: after ``drop_caches`` a ``get`` reads the medium.
* ``restart``: what was flushed is found by a new process.
* ``clients``: several processes can work on one store at once.
* ``overflow``: blocks beyond ``memory_bytes`` can still be got (from disk).
"""
FEATURES: tuple[Feature, ...] = get_args(Feature)


class CannotRunError(Exception):
    """This system cannot run here as it was asked to; the message is the reason, without "not run"."""


class PeerError(Exception):
    """The system answered something it must not: a wrong version, lost bytes, a failed call. Stops the run."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How a peer is to be opened. Sizes in bytes."""

    folder: pathlib.Path
    """An existing directory on the measured file system, shared by all clients of the store, empty at first."""
    block_bytes: int
    """Every block has exactly this size, a multiple of 8 KiB."""
    blocks_max: int
    """No more than so many blocks are stored at a time."""
    memory_bytes: int
    """What the system may use as its memory tier; the same for all."""
    in_flight_max: int
    """The most operations the harness has under way at once."""
    durable: bool
    """Whether ``flush`` will be called and timed; a system may choose its mode by it."""
    source: memoryview
    """Page-aligned memory in which every block that is put lies (registrable; written to between calls)."""
    target: memoryview
    """Page-aligned memory into which gets are asked to read: registrable, ``into`` always lies in it."""
    settled: bool = True
    """Whether ``open`` waits until the system is at its best, its memory touched. A restart is timed without."""
    options: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    """What the suite found out for this system, such as the best request size of the raw limit; usually empty."""
    endpoint: Mapping[str, Scalar] | None = None
    """``None``: the first client, which starts what must run. Else what the first one's ``endpoint`` gave."""


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """What was opened. Everything in it is published: no host names, no absolute paths."""

    version: str
    """As the module says (or the package's metadata, if the module says nothing)."""
    module: str
    """The imported file, from ``site-packages`` (or the repository) on: what really ran."""
    tuning: str
    """What was set, and whose advice that is."""
    durability: str = ""
    """What ``flush`` waits for; empty if it is in ``lacks``."""
    server: str = ""
    """Version with which the server answered; empty without one."""
    medium: str = "own memory"
    """What a hot get reads: ``own memory``, ``server memory``, ``shared memory`` or ``page cache``."""
    configuration: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    lacks: Mapping[Feature, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One block of a batch: ``name`` is 32 hex digits; ``data`` is put, or is the room for what is got."""

    name: str
    data: memoryview


class _Common(abc.ABC):
    """What needs no waiting, of both kinds of peer."""

    def __init__(self, system: str) -> None:
        self.system = system
        """Which of the folder's ``SYSTEMS`` this is: one adapter may serve several."""

    @abc.abstractmethod
    def describe(self) -> Description:
        """What is open. Called after ``open`` only."""

    def endpoint(self) -> Mapping[str, Scalar]:
        """What further clients need to attach to this store. Called on the first client, after ``open``."""
        return {}

    def processes(self) -> Sequence[int]:
        """Process ids of servers this client started: their CPU seconds and memory are counted too."""
        return []

    def files(self) -> Sequence[pathlib.Path]:
        """The files that hold what was flushed, for the proof that a read was cold. None: a memory-only system."""
        return []


class BlockingPeer(_Common):
    """A system whose calls block. ``put``, ``get``, ``contains`` and ``delete`` come from as many threads as
    operations are in flight (one: from the main thread), all other calls from one thread at a time."""

    @abc.abstractmethod
    def open(self, settings: Settings) -> None:
        """Start or attach, and be ready: servers up, with ``settled`` memory touched. Raises ``CannotRunError``."""

    @abc.abstractmethod
    def put(self, name: str, data: memoryview) -> None:
        """Store a new block; returns when ``get`` finds it. ``data`` is the caller's again afterwards."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Return when everything put before survives a loss of power. Raises ``CannotRunError`` if it never does."""

    @abc.abstractmethod
    def get(self, name: str, into: memoryview) -> memoryview | bytes:
        """The block's bytes, owned by the caller: ``into``, filled, or an object of their own that nothing else
        will change. Raises ``KeyError`` if the block is not there."""

    @abc.abstractmethod
    def contains(self, name: str) -> bool:
        """Whether ``get`` would find the block."""

    @abc.abstractmethod
    def delete(self, name: str) -> None:
        """Forget a block; it is not found any more. Raises ``KeyError`` if it is not there."""

    @abc.abstractmethod
    def drop_caches(self) -> None:
        """Write out and forget all copies in memory, keep what is on disk; then ready again as after ``open``.
        The page cache of ``files`` is the harness's business. Raises ``CannotRunError`` for memory-only systems."""

    @abc.abstractmethod
    def close(self) -> None:
        """End everything ``open`` started. May be called after a failed ``open``, and twice."""


class AsyncPeer(_Common):
    """A system driven from an event loop: the verbs of ``BlockingPeer``, awaited, as many at once as are in flight."""

    @abc.abstractmethod
    async def open(self, settings: Settings) -> None: ...
    @abc.abstractmethod
    async def put(self, name: str, data: memoryview) -> None: ...
    @abc.abstractmethod
    async def flush(self) -> None: ...
    @abc.abstractmethod
    async def get(self, name: str, into: memoryview) -> memoryview | bytes: ...
    @abc.abstractmethod
    async def contains(self, name: str) -> bool: ...
    @abc.abstractmethod
    async def delete(self, name: str) -> None: ...
    @abc.abstractmethod
    async def drop_caches(self) -> None: ...
    @abc.abstractmethod
    async def close(self) -> None: ...


Peer = BlockingPeer | AsyncPeer


@runtime_checkable
class Batching(Protocol):
    """A blocking peer whose documentation advises calls on many blocks at once. ``put`` and ``get`` stay for one.

    Both get all blocks of a round and keep at most ``in_flight`` of them under way.
    """

    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None: ...
    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview | bytes]:
        """Bytes in the order of ``jobs``, each as ``get`` would give them. Raises ``KeyError`` for any miss."""
        ...


@runtime_checkable
class Leasing(Protocol):
    """A blocking peer that can hand out the bytes where they are."""

    def lease(self, name: str) -> contextlib.AbstractContextManager[Sequence[memoryview]]:
        """The block in one or several pieces, unchanged until the context is left. Raises ``KeyError``."""
        ...


@runtime_checkable
class AsyncLeasing(Protocol):
    """The same, awaited."""

    def lease(self, name: str) -> contextlib.AbstractAsyncContextManager[Sequence[memoryview]]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class System:
    """One line of the tables: a way to run a peer. Listed as ``SYSTEMS`` in its folder's ``__init__``."""

    name: str
    """What ``--systems`` takes, such as ``redis-unix``."""
    title: str
    """What tables print, such as ``Redis (Unix socket)``."""
    adapter: str
    """``module:class`` of the adapter; imported in the peer's own environment only."""
    own_environment: bool = True
    """False: runs in the environment of the suite (the engine itself, plain files)."""
    round_bytes_max: int | None = None
    """A slow system moves no more than this in one round (at least two blocks); said in the table."""


def published_path(file: str | None) -> str:
    """The path of an imported module from ``site-packages`` (or the checkout) on, for ``Description.module``.

    Raises ``PeerError`` for a package that is not of this process's own environment: another one was imported.
    """
    path = pathlib.Path(file or "unknown")
    parts = path.parts
    for marker in ("site-packages", "dist-packages"):
        if marker in parts:
            if not path.is_relative_to(sys.prefix):
                raise PeerError(f"{path.name} was imported from outside of the peer's own environment")
            return "/".join(parts[parts.index(marker) :])
    repository = pathlib.Path(__file__).resolve().parent.parent.parent.parts
    return "/".join(parts[len(repository) :] if parts[: len(repository)] == repository else parts[-2:])


def require_version(package: str, module_version: str, pins: pathlib.Path) -> str:
    """``module_version`` if that is what ``pins`` (a ``requirements.txt``) asks for; else raises ``PeerError``.

    Keeps a result from carrying the name of another version than was measured.
    """
    for line in pins.read_text().splitlines():
        words = line.removeprefix("# no-deps:").split()
        if any(word.partition("==")[0].lower() == package.lower() for word in words):
            wanted = next(word.partition("==")[2] for word in words if word.lower().startswith(package.lower() + "=="))
            if wanted != module_version:
                raise PeerError(
                    f"{package} {module_version} was imported, {pins.parent.name}/{pins.name} pins {wanted}"
                )
            return module_version
    raise PeerError(f"{pins.parent.name}/{pins.name} does not pin {package}")
