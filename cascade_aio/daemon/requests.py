"""What the service does for each request. A handler answers, or returns the coroutine that will.

What can be answered without waiting is answered in the turn in which the request came. Errors are
raised: ``ProtocolError`` for what no honest client sends (it costs the connection), everything else is
the answer. Bytes of blocks are touched only by the byte workers.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any, cast

from cascade_aio.abc.storage import Ingested
from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.faults import to_failed
from cascade_aio.daemon.holdings import Holdings, Reservation
from cascade_aio.daemon.node import Node
from cascade_aio.errors import ConfigError, LeaseError, ProtocolError, TierFullError
from cascade_aio.model import BLOCK_ID_BYTES, BlockId, BlockMeta, PrefixKey, Tier
from cascade_aio.segments.format import CHUNK_BYTES
from cascade_aio.store.block import LeasedCopy, decode_meta
from cascade_aio.store.prefetching import PrefetchHandle, PrefetchPriority
from cascade_aio.store.streaming import BlockStream

PROGRESS_SECONDS = 0.1
"""Least time between two progress messages of one request."""

TIER_CODES = tuple(Tier)
"""A lookup is answered with one byte per block: the position of its tier here."""

Handled = p.Reply | Coroutine[Any, Any, p.Reply]


def name_of(raw: bytes) -> BlockId | PrefixKey:
    """Raises ``ProtocolError`` for a length between the two."""
    try:
        return BlockId(raw) if len(raw) == BLOCK_ID_BYTES else PrefixKey(raw)
    except ConfigError:
        raise ProtocolError(f"a name of {len(raw)} bytes is neither a block id nor a prefix key") from None


def prefixes_of(raw: list[bytes]) -> list[PrefixKey]:
    try:
        return [PrefixKey(name) for name in raw]
    except ConfigError as error:
        raise ProtocolError(str(error)) from None


class Requests:
    """The requests of one connection. ``send`` is for progress of a request that is not answered yet."""

    def __init__(self, node: Node, holdings: Holdings, send: Callable[[p.Reply], None]) -> None:
        self._node = node
        self._store = node.store
        self._parts = node.store.parts
        self._holdings = holdings
        self._send = send
        self.gone = False
        """The connection has ended: requests are cancelled because of that, not because somebody said so."""
        self._handlers: dict[type, Callable[[Any], Handled]] = {
            p.Get: self._get,
            p.GetPrefix: self._get_prefix,
            p.Lookup: self._lookup,
            p.Contains: self._contains,
            p.Reserve: self._reserve,
            p.Seal: self._seal,
            p.Ready: self._ready,
            p.Flush: self._flush,
            p.Refresh: self._refresh,
            p.Delete: self._delete,
            p.Prefetch: self._prefetch,
            p.Announce: self._announce,
            p.OpenStream: self._open_stream,
            p.NextBlock: self._next_block,
            p.ListBlocks: self._list_blocks,
            p.Verify: self._verify,
            p.Statistics: self._statistics,
            p.WaitReady: self._wait_ready,
        }

    def handle(self, request: p.Request) -> Handled:
        """The answer, or the coroutine that gives it."""
        return self._handlers[type(request)](request)

    def never_began(self, request: p.Request) -> None:
        """The coroutine of ``request`` was cancelled before its first step: give back what it would have taken."""
        if isinstance(request, p.Seal) and not self.gone:
            self._holdings.drop_reservation(request.reservation)

    # -- reads ----------------------------------------------------------------------------------

    def _get(self, request: p.Get) -> Handled:
        name = name_of(request.name)
        block = self._parts.getter.try_hot(name)
        if block is None:
            return self._load(request, name)
        return p.Leased(request.request, [self._holdings.grant(block)])

    async def _load(self, request: p.Get, name: BlockId | PrefixKey) -> p.Reply:
        if self._parts.getter.find(name) < 0:
            await self._node.refresh_on_miss()
        block = await self._store.get(name, ready="first-bytes" if request.early else "whole")
        return p.Leased(request.request, [self._holdings.grant(block)])

    async def _get_prefix(self, request: p.GetPrefix) -> p.Reply:
        keys = prefixes_of(request.names)
        if len(self._store.lookup(keys)) < len(keys):
            await self._node.refresh_on_miss()
        blocks = await self._store.get_prefix(keys)
        grants: list[p.Grant] = []
        try:
            while blocks:
                grants.append(self._holdings.grant(blocks.pop(0)))
        except (TierFullError, LeaseError):
            if not grants:  # else this client has those that it may have
                raise
        finally:
            for block in blocks:
                block.release()
        return p.Leased(request.request, grants)

    def unsent(self, reply: p.Reply) -> None:
        """``reply`` could not be sent: take back what it would have brought."""
        if isinstance(reply, p.Leased):
            for grant in reply.grants:
                self._holdings.revoke(grant)

    def _lookup(self, request: p.Lookup) -> Handled:
        keys = prefixes_of(request.names)
        found = self._store.lookup(keys)
        if len(found) < len(keys) and self._node.refresh_is_due:
            return self._lookup_again(request, keys)
        return p.Answer(request.request, bytes(map(TIER_CODES.index, found.tiers)))

    async def _lookup_again(self, request: p.Lookup, keys: list[PrefixKey]) -> p.Reply:
        await self._node.refresh_on_miss()
        return p.Answer(request.request, bytes(map(TIER_CODES.index, self._store.lookup(keys).tiers)))

    async def _contains(self, request: p.Contains) -> p.Reply:
        name = name_of(request.name)
        if name not in self._store:
            await self._node.refresh_on_miss()
        return p.Answer(request.request, name in self._store)

    def _ready(self, request: p.Ready) -> Handled:
        copy = self._holdings.block(request.lease).leased_copy  # now: the next message may give the lease back
        end = copy.value_offset + copy.value_bytes
        if not request.start <= request.stop <= end:
            raise ProtocolError(f"bytes {request.start} to {request.stop} are outside a payload of {end}")
        return self._wait_arrived(request, copy)

    async def _wait_arrived(self, request: p.Ready, copy: LeasedCopy) -> p.Reply:
        if copy.arrival is not None:
            await copy.arrival.wait(request.start, request.stop)
        return p.Answer(request.request, copy.arrival is None or copy.arrival.complete)

    # -- writes ---------------------------------------------------------------------------------

    async def _reserve(self, request: p.Reserve) -> p.Reply:
        prefix, parent = (None if raw is None else PrefixKey(raw) for raw in (request.prefix, request.parent))
        putter, holdings = self._parts.putter, self._holdings
        draft = putter.draft(request.key_bytes, request.value_bytes, prefix, parent, _meta(request.meta))
        leave = await self._node.enter_prefix(prefix) if request.put and prefix is not None else _nothing
        try:
            known = putter.bound(prefix)
            if known is not None and request.put:
                leave()
                return p.Reserved(request.request, 0, -1, 0, 0, 0, 0, known)
            self._parts.context.room.check_size(draft.record_bytes)
            await holdings.admit_reservation(draft.record_bytes)
            try:
                extent = await putter.reserve_extent(draft)
            except BaseException:
                holdings.dismiss_reservation(draft.record_bytes)
                raise
        except BaseException:
            leave()
            raise
        made = holdings.add_reservation(draft, extent, known, leave)
        return p.Reserved(
            request.request,
            made.number,
            made.slot,
            extent.offset,
            extent.nbytes,
            draft.header_bytes,
            draft.value_offset,
            known,
        )

    async def _seal(self, request: p.Seal) -> p.Reply:
        reservation = self._holdings.take_reservation(request.reservation)
        draft, extent, putter, sealed = reservation.draft, reservation.extent, self._parts.putter, False
        self._holdings.filled(reservation)
        try:
            known = putter.bound(draft.prefix) or reservation.known
            if known is None:
                ingested = await self._ingested(request, reservation)
                self._parts.context.check()
                known, sealed = putter.seal(draft, extent, ingested)
        finally:
            self._holdings.end_reservation(reservation, sealed=sealed)
        return p.Sealed(request.request, known)

    async def _ingested(self, request: p.Seal, reservation: Reservation) -> Ingested:
        """Digest and checksums of what the client has filled."""
        draft, context = reservation.draft, self._parts.context
        if self._node.verifies:
            payload = reservation.extent.memory[draft.header_bytes :]
            return await context.platform.engine.digest(
                payload, draft.key_bytes, draft.value_offset, draft.value_bytes, CHUNK_BYTES, context.config.digest
            )
        if request.digest is None or len(request.chunk_crcs) != -(-draft.payload_bytes // CHUNK_BYTES):
            raise ProtocolError("this service takes the client's digest and checksums, and they are missing")
        return Ingested(request.digest, tuple(request.chunk_crcs))

    async def _flush(self, request: p.Flush) -> p.Reply:
        await self._store.flush()
        return p.Answer(request.request, None)

    async def _delete(self, request: p.Delete) -> p.Reply:
        await self._store.delete(name_of(request.name))
        return p.Answer(request.request, None)

    # -- reading ahead --------------------------------------------------------------------------

    async def _prefetch(self, request: p.Prefetch) -> p.Reply:
        names = [name_of(raw) for raw in request.names]
        if any(name not in self._store for name in names):
            await self._node.refresh_on_miss()
        handle = self._store.prefetch(names, priority=_priority(request.urgent), deadline_s=request.deadline_s)
        waiting = asyncio.ensure_future(handle.wait())
        try:
            while not waiting.done():
                await asyncio.wait((waiting,), timeout=PROGRESS_SECONDS)
                if not waiting.done():
                    self._send(p.Progress(request.request, _counts(handle)))
            waiting.result()
        except asyncio.CancelledError:
            waiting.cancel()
            if not self.gone:  # the caller's word; a lost connection leaves it going
                handle.cancel()
            raise
        return p.Answer(request.request, _counts(handle))

    async def _announce(self, request: p.Announce) -> p.Reply:
        keys = prefixes_of(request.names)
        if len(self._store.lookup(keys)) < len(keys):
            await self._node.refresh_on_miss()
        progress = await self._node.announce(keys, request.deadline_s)
        return p.Answer(request.request, list(dataclasses.astuple(progress)))

    def _open_stream(self, request: p.OpenStream) -> Handled:
        stream = self._store.stream(
            [name_of(raw) for raw in request.names],
            window_bytes=request.window_bytes,
            priority=_priority(request.urgent),
            ready="first-bytes" if request.early else "whole",
        )
        return p.Answer(request.request, self._holdings.add_stream(stream))

    def _next_block(self, request: p.NextBlock) -> Handled:
        return self._next_of(request, self._holdings.stream(request.stream))  # now: the next message may close it

    async def _next_of(self, request: p.NextBlock, stream: BlockStream) -> p.Reply:
        try:
            block = await anext(stream)
        except StopAsyncIteration:
            failed = None if stream.error is None else to_failed(request.request, stream.error)
            return p.Answer(request.request, [stream.ended_because, failed])
        # The stream has its lease until it is asked again; the client's own lasts as long as the client likes.
        copy = block.leased_copy
        own = self._parts.context.desk.lend(cast(Any, copy), block.tier)
        if stream.ended_because is not None:  # closed while this request waited: nobody will ask it again
            stream.stop()
        return p.Leased(request.request, [self._holdings.grant(own)])

    # -- the rest -------------------------------------------------------------------------------

    async def _refresh(self, request: p.Refresh) -> p.Reply:
        return p.Answer(request.request, await self._store.refresh())

    def _list_blocks(self, request: p.ListBlocks) -> Handled:
        infos, after = self._node.list_blocks(request.after, p.LISTED_MAX)
        rows = [
            [info.block_id, info.key_bytes, info.value_bytes, [str(tier) for tier in info.tiers], info.prefixes]
            for info in infos
        ]
        return p.Answer(request.request, [after, rows])

    async def _verify(self, request: p.Verify) -> p.Reply:
        clock = asyncio.get_running_loop().time
        told_s = clock()

        def progress(done: int, total: int) -> None:
            nonlocal told_s
            if clock() - told_s >= PROGRESS_SECONDS or done == total:
                told_s = clock()
                self._send(p.Progress(request.request, [done, total]))

        report = await self._store.verify(progress)
        damage = [to_failed(request.request, error) for error in report.damage]
        return p.Answer(request.request, [report.blocks, report.bytes, damage])

    def _statistics(self, request: p.Statistics) -> Handled:
        return p.Answer(request.request, self._node.statistics())

    async def _wait_ready(self, request: p.WaitReady) -> p.Reply:
        await self._store.wait_ready()
        return p.Answer(request.request, None)


def _counts(handle: PrefetchHandle) -> list[int]:
    return list(dataclasses.astuple(handle.progress))


def _nothing() -> None:
    return


def _priority(urgent: bool) -> PrefetchPriority:
    return "high" if urgent else "low"


def _meta(raw: bytes) -> BlockMeta | None:
    return decode_meta(raw) if raw else None
