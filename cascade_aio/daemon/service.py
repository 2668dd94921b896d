"""The node service: one store, lent to the processes of this node over a Unix socket.

``serve`` opens the store, owns the socket, and runs until its scope is left: then nobody is let in any
more, clients are told, what they held is given back, and the store is closed (flushed, sealed).

End of a connection: if its process is dead, or has said so, what it held is given back at once. A
process that lives on may still read leased bytes or be in the middle of filling an extent, and shared
memory cannot be taken away from it; so its holdings linger until it says that nothing is in use, ends,
or ``linger_seconds_max`` have passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

from cascade_aio.config import StoreConfig
from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.handshake import receive_hello, send_welcome
from cascade_aio.daemon.holdings import Holdings, Quota
from cascade_aio.daemon.node import Node
from cascade_aio.daemon.place import OwnedSocket, Peer, peer_of
from cascade_aio.daemon.session import Session
from cascade_aio.daemon.settings import ServiceConfig, default_socket, group_id
from cascade_aio.errors import ConfigError, ProtocolError, TierFullError
from cascade_aio.store import open_store
from cascade_aio.store.context import TaskScope
from cascade_aio.store.publishing import Publisher
from cascade_aio.tiers.arena import check_shm_dir
from cascade_aio.tiers.directory import ClientPins

logger = logging.getLogger("cascade_aio.service")

ACCEPT_PAUSE_SECONDS = 0.1
"""After a failed accept (no descriptors left), before the next."""
RESERVE_ARENA_PART = 4
PIN_ARENA_PART = 2


class Service:
    """See the module's text; made by ``serve``."""

    def __init__(self, node: Node, place: OwnedSocket, publisher: Publisher) -> None:
        self.node = node
        self._place = place
        self._publisher = publisher
        self._loop = asyncio.get_running_loop()
        self._tasks = TaskScope(self._failed)
        self._sessions: dict[int, Session] = {}
        self._lingering: dict[int, _Lingering] = {}
        self._numbers = 0
        self._greeting = 0
        self._closing = False
        self.failed = asyncio.Event()
        """Something nobody foresaw: the service should be ended."""
        node.on_statistics = self._statistics
        node.on_settled = self._settled
        publisher.on_over_quota = self._over_quota

    @property
    def socket_path(self) -> str:
        return self._place.path

    @property
    def clients(self) -> int:
        return len(self._sessions)

    def start(self) -> None:
        self._tasks.spawn(self._accept(), "cascade-service-accept")
        self._tasks.spawn(self.node.refresh_for_ever(), "cascade-service-refresh")

    async def close(self) -> None:
        """No new clients; tell those there are; give back what they held."""
        self._closing = True
        for session in list(self._sessions.values()):
            session.say_goodbye("the service is shutting down")
        await self._tasks.close()
        self.node.close()
        for lingering in list(self._lingering.values()):
            lingering.end(pins=False)

    def _failed(self, error: BaseException) -> None:
        logger.error("a task of the service failed", exc_info=error)
        self.node.note_error(f"a task of the service failed: {error!r}")
        self.failed.set()

    # -- connections ----------------------------------------------------------------------------

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._place.listener)
            except OSError as error:
                logger.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            self._tasks.spawn(self._serve(connection), "cascade-service-client")

    async def _serve(self, connection: socket.socket) -> None:
        """One connection from its hello to the end of what it held."""
        connection.setblocking(False)
        session: Session | None = None
        try:
            try:
                session = await self._greet(connection)
            except ProtocolError as error:
                self.node.counters.protocol_errors += 1
                logger.warning("a connection was refused: %s", error)
                return
            except OSError as error:
                logger.warning("a connection was lost: %s", error)
                return
            if session is None:
                return
            self._sessions[session.number] = session
            await self._loop.connect_accepted_socket(lambda: session, connection)
            logger.info("%s connected", session)
            with self._watched(session):
                await session.run()
        finally:
            if session is None:
                connection.close()
            else:
                self._sessions.pop(session.number, None)
                self._part(session)

    @contextlib.contextmanager
    def _watched(self, session: Session) -> Iterator[None]:
        """End ``session`` with its process, whose connection lives on in processes that it has forked."""
        try:
            fd = os.pidfd_open(session.peer.pid)
        except OSError as error:
            if isinstance(error, ProcessLookupError):
                session.peer_ended()
            yield  # else it cannot be watched: its connection tells
            return
        self._loop.add_reader(fd, session.peer_ended)
        try:
            yield
        finally:
            self._loop.remove_reader(fd)
            os.close(fd)

    async def _greet(self, connection: socket.socket) -> Session | None:
        """A session for a peer that may have one; ``None``: it was refused and told why."""
        peer = peer_of(connection)
        config = self.node.config
        group = None if config.group is None else group_id(config.group)
        if not peer.may_enter(group):
            self._refuse(connection, peer, "ServiceUnavailableError", f"user {peer.uid} may not use it")
            return None
        if self._greeting + len(self._sessions) >= config.clients_max:
            self._refuse(connection, peer, "ThrottledError", f"it has {config.clients_max} clients, its most")
            return None
        self._greeting += 1
        try:
            hello = await receive_hello(connection)
        finally:
            self._greeting -= 1
        try:
            version = p.choose_version(hello)
        except ProtocolError as error:
            self._refuse(connection, peer, "ProtocolError", str(error))
            return None
        self._numbers += 1
        self.node.counters.connections += 1
        quota = self._quota()
        holdings = Holdings(self.node.store.parts, quota, self._pin_table(quota.pinned_bytes))
        try:
            self._welcome(connection, version, holdings)
        except BaseException:
            holdings.give_back()
            raise
        return Session(self.node, holdings, self._numbers, peer, hello.client)

    def _pin_table(self, quota_bytes: int) -> ClientPins | None:
        """``None``: there are too many already; this client asks for everything by message."""
        try:
            return self._publisher.open_client(quota_bytes)
        except (TierFullError, OSError) as error:
            logger.warning("a client gets no pin table: %s", error)
            return None

    def _welcome(self, connection: socket.socket, version: int, holdings: Holdings) -> None:
        """The answer to a hello, with the descriptors, of which we keep none."""
        context, publisher = self.node.store.parts.context, self._publisher
        welcome = p.Welcome(
            version,
            self._numbers,
            self.node.generation,
            context.config.root,
            context.config.digest,
            publisher.arena_bytes,
            self.node.verifies,
            self.node.config.requests_per_client_max,
            lookup_shared=holdings.pins is not None,
        )
        with contextlib.ExitStack() as closers:
            openers = [functools.partial(publisher.arena_fd, writable=writable) for writable in (False, True)]
            if holdings.pins is not None:
                openers += [functools.partial(publisher.directory_fd), functools.partial(holdings.pins.take_fd)]
            descriptors: list[int] = []
            for opened in openers:
                descriptors.append(opened())
                closers.callback(os.close, descriptors[-1])
            send_welcome(connection, welcome, descriptors)

    def _refuse(self, connection: socket.socket, peer: Peer, kind: str, why: str) -> None:
        self.node.counters.refused += 1
        logger.warning("pid %d of user %d is refused: %s", peer.pid, peer.uid, why)
        send_welcome(connection, p.Refused(kind, f"the service at {self.socket_path} refuses: {why}"), [])

    def _quota(self) -> Quota:
        config, context = self.node.config, self.node.store.parts.context
        arena_bytes = context.shm.capacity_bytes
        return Quota(
            leases=config.leases_per_client_max,
            pinned_bytes=config.pinned_bytes_per_client_max or arena_bytes // PIN_ARENA_PART,
            reserved_bytes=config.reserved_bytes_per_client_max or arena_bytes // RESERVE_ARENA_PART,
            streams=config.streams_per_client_max,
            reserve_wait_s=context.config.put_wait_seconds_max,
        )

    # -- the end of a connection ----------------------------------------------------------------

    def _part(self, session: Session) -> None:
        holdings = session.holdings
        if self._closing or not holdings:
            holdings.give_back(pins=not self._closing)
            return
        logger.info("%s left, holding %d leases", session, holdings.leases)
        lingering = _Lingering(session, self._lingering, self.node.config.linger_seconds_max)
        self._lingering[session.number] = lingering
        lingering.watch()

    def _over_quota(self, pins: ClientPins) -> None:
        """A client has more pinned than it may, past what its library allows: it is cut off and its pins are void."""
        for session in [*self._sessions.values(), *(entry.session for entry in self._lingering.values())]:
            if session.holdings.pins is pins:
                pins.revoke()
                session.refuse(ProtocolError(f"it has pinned more than its quota of {pins.quota_bytes} bytes"))
                session.holdings.give_back()

    def _settled(self, session: Session, number: int) -> None:
        """The process of ``session`` has done with its earlier session ``number``."""
        lingering = self._lingering.get(number)
        if lingering is not None and lingering.session.peer.pid == session.peer.pid:
            lingering.end()

    def _statistics(self) -> dict[str, Any]:
        sessions = list(self._sessions.values())
        lingering = [entry.session.holdings for entry in self._lingering.values()]
        return {
            "socket": self.socket_path,
            "clients": len(sessions),
            "leases": sum(session.holdings.leases for session in sessions),
            "reserved_bytes": sum(session.holdings.reserved_bytes for session in sessions),
            "requests_in_flight": sum(session.requests_in_flight for session in sessions),
            "lingering": len(lingering),
            "lingering_leases": sum(holdings.leases for holdings in lingering),
        }


class _Lingering:
    """Holdings of a connection that ended, until their process is known to use them no more."""

    def __init__(self, session: Session, registry: dict[int, _Lingering], seconds_max: float) -> None:
        self.session = session
        self._registry = registry
        self._seconds_max = seconds_max
        self._loop = asyncio.get_running_loop()
        self._pidfd = -1
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """End at once if the process is dead, else with it, or when time is up."""
        if not self._seconds_max or self._is_dead():
            self.end()
            return
        if self._pidfd >= 0:
            self._loop.add_reader(self._pidfd, self.end)
        self._timer = self._loop.call_later(self._seconds_max, self._time_is_up)

    def _is_dead(self) -> bool:
        """Whether it is known to be; a process of another pid namespace, or one that cannot be asked for, may live."""
        pid, pins = self.session.peer.pid, self.session.holdings.pins
        if pid > 0:
            try:
                self._pidfd = os.pidfd_open(pid)
                return False
            except ProcessLookupError:
                return True
            except OSError as error:  # no descriptors left, or a kernel without
                logger.warning("%s cannot be watched: %s", self.session, error)
        return pins is not None and not pins.is_alive()

    def _time_is_up(self) -> None:
        logger.warning("%s lives on; what it held is used again after %g s", self.session, self._seconds_max)
        self.end()

    def end(self, *, pins: bool = True) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._timer is not None:
            self._timer.cancel()
        self._registry.pop(self.session.number, None)
        self.session.holdings.give_back(pins=pins)


@contextlib.asynccontextmanager
async def serve(config: StoreConfig, service: ServiceConfig | None = None) -> AsyncIterator[Service]:
    """Open the store of ``config`` and lend it to this node's processes within the scope.

    Raises as ``open_store``, and ``ConfigError`` for a socket that cannot be had. Leaving flushes and closes
    the store; it raises what that raises.
    """
    service = ServiceConfig() if service is None else service
    if config.gpu_bytes is not None:
        raise ConfigError("gpu_bytes: a node service lends no device memory; set it in stores that are embedded")
    if config.read_only:
        raise ConfigError("read_only: a node service writes; to look at a root, open_store(root, read_only=True)")
    config = dataclasses.replace(config, warm_restart=True)
    group = None if service.group is None else group_id(service.group)
    check_shm_dir(config.shm_dir)  # the socket is there, too, and would complain of a lock that nobody has heard of
    place = OwnedSocket(service.socket or default_socket(config), group=group)
    try:
        async with open_store(config) as store:
            publisher = store.parts.context.publisher
            assert publisher is not None, "a store that keeps its arena publishes"
            running = Service(Node(store, service), place, publisher)
            running.start()
            try:
                yield running
            finally:
                place.stop_listening()
                await running.close()
    finally:
        place.close()
