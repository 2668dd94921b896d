"""The public face of a client: a store whose bytes and decisions are a node service's.

``connect`` gives the interface of an embedded ``Store``. Payload bytes never cross the socket: blocks are
read in place in the service's arena, and puts fill reserved extents of it.

What answers at once (``lookup``, ``in``, ``len``, ``statistics``) answers from what this process sees in
shared memory; ``await`` the result of ``lookup`` and ``statistics``, or ``contains``, for the service's word.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from cascade_aio.config import parse_size
from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.ahead import RemotePlan, ServiceStream
from cascade_aio.daemon.connector import Connector
from cascade_aio.daemon.faults import to_error
from cascade_aio.daemon.filling import ClientPutter, ClientReserveRequest
from cascade_aio.daemon.lending import ClientDesk
from cascade_aio.daemon.reading import ClientCounters, ClientGetter, Reporter
from cascade_aio.daemon.settings import check_socket_path, socket_path_of
from cascade_aio.errors import ConfigError, CorruptionError, ServiceUnavailableError
from cascade_aio.io.workers import ByteWorkers
from cascade_aio.model import BlockId, BlockMeta, PrefixKey, Tier
from cascade_aio.store import BlockInfo, PrefetchHandle, PrefixLookup, VerifyReport
from cascade_aio.store.block import GetRequest, Readiness, is_early
from cascade_aio.store.getting import raw_name
from cascade_aio.store.prefetching import PrefetchPriority, checked_names
from cascade_aio.store.store import PrefixRequest, Statistics, copy_and_release, writable_targets

if TYPE_CHECKING:
    from typing_extensions import Buffer

CONNECT_SECONDS_DEFAULT = 5.0
RECONNECT_SECONDS_DEFAULT = 30.0


def connect(
    socket_path: str | os.PathLike[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    client: str | None = None,
    owner: int | None = None,
    wait_seconds: float = CONNECT_SECONDS_DEFAULT,
    reconnect_seconds_max: float = RECONNECT_SECONDS_DEFAULT,
    workers: int | None = None,
) -> Connecting:
    """Attach to the node service at ``socket_path``: ``async with connect(path) as store``.

    Or to the one that serves ``root`` on this node, at the place where it listens if nobody said where
    (``socket_path_of``): ``connect(root=directory)``.

    ``client`` names this process in the service's log; ``owner`` is the user id of a service that is not this
    user's; ``wait_seconds`` is how long to wait for a service that is just starting, ``reconnect_seconds_max``
    how long a call waits for one that was lost; ``workers`` are threads that copy (default: the CPUs).

    Raises ``ConfigError`` for a path that can be no socket's. Connecting raises ``ConfigError`` (something else is at
    the path), ``ServiceUnavailableError`` (nobody listens, or it refuses), ``ProtocolError`` (another version).
    """
    if (socket_path is None) == (root is None):
        raise ConfigError(
            "name the service: connect(socket_path), or connect(root=...) for the one that serves it here"
        )
    path = socket_path_of(root or "") if socket_path is None else os.fspath(socket_path)
    check_socket_path(path)
    name = os.path.basename(sys.argv[0] or "python") if client is None else client
    return Connecting(path, name[:256], owner, wait_seconds, reconnect_seconds_max, workers)


class Connecting:
    """What ``connect`` returns: ``await`` it, or use it as a scope."""

    def __init__(
        self, path: str, client: str, owner: int | None, wait_s: float, reconnect_s: float, workers: int | None
    ) -> None:
        self._path = path
        self._client = client
        self._owner = owner
        self._wait_s = wait_s
        self._reconnect_s = reconnect_s
        self._workers = workers
        self._store: ServiceStore | None = None

    def __await__(self) -> Generator[Any, None, ServiceStore]:
        return self._open().__await__()

    async def __aenter__(self) -> ServiceStore:
        self._store = await self._open()
        return self._store

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        store, self._store = self._store, None
        if store is not None:
            await store.aclose()

    async def _open(self) -> ServiceStore:
        connector = Connector(self._path, self._client, self._owner, self._reconnect_s)
        try:
            await connector.start(self._wait_s)
            return ServiceStore(connector, ByteWorkers(self._workers))
        except BaseException:
            await connector.aclose()
            raise


class ServiceStore:
    """A store behind a socket, with the interface of ``Store``; belongs to the event loop that connected it.

    Calls may be made by any number of tasks of that loop. When the service is lost, reading and putting wait for
    it to come back and go on; ``flush``, ``delete``, ``verify`` and the end of ``reserve`` raise
    ``ServiceUnavailableError``, because they cannot be known to have happened. Leases of a lost connection end
    with it: their arrays stay mapped, but get the block again.
    """

    def __init__(self, connector: Connector, engine: ByteWorkers) -> None:
        self._connector = connector
        self._engine = engine
        self._desk = ClientDesk(connector.loop)
        self._counters = ClientCounters()
        self._getter = ClientGetter(connector, self._desk, self._counters)
        self._putter = ClientPutter(connector, engine, self._counters)
        self._reporter = Reporter(connector, self._counters)
        connector.spawn(self._reporter.run(), "cascade-client-report")

    # -- reads ----------------------------------------------------------------------------------

    def get(self, name: BlockId | PrefixKey | str, *, ready: Readiness = "whole") -> GetRequest:
        """A lease on a block. See ``Store.get``."""
        return GetRequest(self._getter, name, early=is_early(ready))

    def get_prefix(self, keys: Sequence[PrefixKey]) -> PrefixRequest:
        """Leases on the longest cached prefix of ``keys``. See ``Store.get_prefix``."""
        return PrefixRequest(self._getter, keys)

    def lookup(self, keys: Sequence[PrefixKey]) -> PrefixLookup:
        """How many leading keys are in shared memory; ``await`` it for how many are cached at all."""
        return self._getter.lookup(keys)

    def __contains__(self, name: BlockId | PrefixKey | str) -> bool:
        """Whether the block is in shared memory; ``await contains(name)`` asks all tiers."""
        return self._getter.is_shared(name)

    def __len__(self) -> int:
        """Blocks that the service knows, up to date within a fraction of a second."""
        return self._getter.blocks

    async def contains(self, name: BlockId | PrefixKey | str) -> bool:
        """Whether any tier holds the block."""
        self._connector.check()
        return await self._getter.contains(name)

    async def read_into(self, name: BlockId | PrefixKey | str, key_buffer: Buffer, value_buffer: Buffer) -> None:
        """Copy a block into the caller's buffers, by this process's threads. See ``Store.read_into``."""
        self._connector.check()
        targets = writable_targets(key_buffer, value_buffer)
        block = self._getter.try_hot(name)
        if block is None:
            block = await self._getter.load(name)
        await copy_and_release(self._engine, block, targets)

    # -- writes ---------------------------------------------------------------------------------

    async def put(
        self,
        key: Buffer,
        value: Buffer,
        *,
        prefix: PrefixKey | None = None,
        parent: PrefixKey | None = None,
        meta: BlockMeta | None = None,
    ) -> BlockId:
        """Store a block and return its id once it is readable, by all clients. See ``Store.put``.

        A put that is cancelled while the service seals it may have happened.
        """
        self._connector.check()
        return await self._putter.put(key, value, prefix, parent, meta)

    def reserve(
        self,
        *,
        key_bytes: int,
        value_bytes: int,
        prefix: PrefixKey | None = None,
        parent: PrefixKey | None = None,
        meta: BlockMeta | None = None,
    ) -> ClientReserveRequest:
        """Memory in the service's arena to be filled in place. See ``Store.reserve``."""
        self._connector.check()
        return ClientReserveRequest(self._connector, self._putter, key_bytes, value_bytes, prefix, parent, meta)

    async def flush(self) -> None:
        """Return once everything put, bound or deleted before this call is on stable storage. See ``Store.flush``.

        Raises ``ServiceUnavailableError`` if the service was lost since something was put: it may be gone, put
        it again.
        """
        unflushed = self._connector.unflushed
        link = await self._connector.linked()
        generation, covered = link.welcome.generation, self._connector.changes
        lost = unflushed.keys() - {generation}
        if lost:
            for each in lost:
                del unflushed[each]
            raise ServiceUnavailableError(
                f"the service at {self._connector.path} was started anew since something was put that no flush has "
                "covered; it may be lost: put it again, then flush"
            )
        await self._connector.ask(lambda: p.Flush(0), p.Answer, repeat=False)
        if unflushed.get(generation, covered + 1) <= covered:  # else something was put while this flush was under way
            del unflushed[generation]

    async def delete(self, name: BlockId | PrefixKey | str) -> None:
        """Forget a block and all of its names. See ``Store.delete``."""
        raw = raw_name(name)
        link, _ = await self._connector.ask(lambda: p.Delete(0, raw), p.Answer, repeat=False)
        self._putter.noted(link)

    async def refresh(self) -> int:
        """Let the service learn of blocks that other writers of its root stored; how many are new."""
        _, reply = await self._connector.ask(lambda: p.Refresh(0), p.Answer, repeat=True)
        return int(reply.value)

    # -- reading ahead --------------------------------------------------------------------------

    def prefetch(
        self,
        keys: Sequence[BlockId | PrefixKey | str],
        *,
        priority: PrefetchPriority = "low",
        deadline_s: float | None = None,
    ) -> PrefetchHandle:
        """Let the service promote blocks to shared memory, first key first. See ``Store.prefetch``."""
        self._connector.check()
        names = [raw_name(name) for name in checked_names(keys)]
        urgent = _is_urgent(priority)
        return PrefetchHandle(RemotePlan(self._connector, lambda: p.Prefetch(0, names, urgent, deadline_s), len(names)))

    def announce(self, keys: Sequence[PrefixKey], *, deadline_s: float) -> PrefetchHandle:
        """Say that a prompt with these prefix keys will be computed in ``deadline_s`` seconds.

        For schedulers and routers: of all that is announced, by all clients, the service promotes what is due
        first first, and gives up what was not promoted in time. The handle may be dropped.
        """
        self._connector.check()
        names = [raw_name(name) for name in checked_names(keys)]
        if not 0 <= deadline_s <= p.SECONDS_MAX:
            raise ConfigError(f"deadline_s={deadline_s!r} must be between 0 and {p.SECONDS_MAX:g} seconds")
        return PrefetchHandle(RemotePlan(self._connector, lambda: p.Announce(0, names, deadline_s), len(names)))

    def stream(
        self,
        keys: Sequence[BlockId | PrefixKey | str],
        *,
        window_bytes: int | str | None = None,
        priority: PrefetchPriority = "low",
        keep: bool = False,
        ready: Readiness = "whole",
    ) -> ServiceStream:
        """Leases on ``keys`` in order, the next ones promoted meanwhile. See ``Store.stream``."""
        self._connector.check()
        size = None if window_bytes is None else parse_size(window_bytes)
        if size == 0:
            raise ConfigError("window_bytes=0 is no window; use at least one block's bytes, or leave it out")
        return ServiceStream(
            self._connector,
            self._desk,
            [raw_name(name) for name in checked_names(keys)],
            window_bytes=size,
            urgent=_is_urgent(priority),
            keep=keep,
            early=is_early(ready),
        )

    # -- the rest -------------------------------------------------------------------------------

    def blocks(self) -> AsyncIterator[BlockInfo]:
        """All blocks that the service knows: ``async for info in store.blocks()``. Ids, not names."""
        self._connector.check()
        return self._blocks()

    async def _blocks(self) -> AsyncIterator[BlockInfo]:
        after = 0
        while True:
            _, reply = await self._connector.ask(
                lambda after=after: p.ListBlocks(0, after),  # type: ignore[misc]
                p.Answer,
                repeat=True,
            )
            after, rows = msgspec.convert(reply.value, tuple[int, list[tuple[bytes, int, int, list[str], int]]])
            for block_id, key_bytes, value_bytes, tiers, prefixes in rows:
                yield BlockInfo(BlockId(block_id), key_bytes, value_bytes, tuple(map(Tier, tiers)), prefixes)
            if not after:
                return

    async def verify(self, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Let the service read and check every record of its root. See ``Store.verify``."""

        def progress(values: list[int]) -> None:
            if on_progress is not None:
                on_progress(values[0], values[1])

        _, reply = await self._connector.ask(lambda: p.Verify(0), p.Answer, repeat=False, on_progress=progress)
        blocks, nbytes, damage = msgspec.convert(reply.value, tuple[int, int, list[p.Failed]])
        errors = [to_error(failed) for failed in damage]
        return VerifyReport(blocks, nbytes, tuple(error for error in errors if isinstance(error, CorruptionError)))

    async def wait_ready(self) -> None:
        """Return once the service's whole arena is populated."""
        await self._connector.ask(lambda: p.WaitReady(0), p.Answer, repeat=True)

    def statistics(self) -> ClientStatistics:
        """What this client counted; ``await`` it for the service's own statistics as well."""
        link = self._connector.link
        return ClientStatistics(
            self._connector,
            {
                "socket": self._connector.path,
                "connected": link is not None,
                "generation": None if link is None else link.welcome.generation,
                "reconnects": self._connector.reconnects,
                "leases": self._desk.leases,
                **dataclasses.asdict(self._counters),
            },
        )

    async def aclose(self) -> None:
        """Give everything back and end the connection; the service and its blocks stay. Repeated calls do nothing.

        What was put stays in the service, which makes it durable by and by; ``flush`` first to be sure.
        """
        if not self._connector.closed:
            self._reporter.tell()
            self._desk.settle()
            await self._connector.aclose()
            await self._engine.aclose()


class ClientStatistics(Statistics):
    """What a client counted; ``await`` it for ``{**service's statistics, "client": this}``."""

    def __init__(self, connector: Connector, counted: dict[str, Any]) -> None:
        super().__init__(counted)
        self._connector = connector

    async def _full(self) -> dict[str, Any]:
        _, reply = await self._connector.ask(lambda: p.Statistics(0), p.Answer, repeat=True)
        return {**msgspec.convert(reply.value, dict[str, Any]), "client": dict(self)}


def _is_urgent(priority: str) -> bool:
    if priority not in ("low", "high"):
        raise ConfigError(f"priority={priority!r} is unknown; use one of low, high")
    return priority == "high"
