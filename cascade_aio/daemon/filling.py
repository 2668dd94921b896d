"""The write path of a client: reserve, fill the extent in place, seal.

The service gives room, the client's own threads copy the bytes into it, the service digests what it
finds there and makes it visible; where it is told to believe its clients, they digest. A reservation is
mapped writable only while it is filled. ``put`` starts again over a new connection if one is lost: equal
content is stored once, so that is safe.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cascade_aio.abc.storage import ByteEngine
from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.connector import ATTEMPTS_MAX, Connector, expect
from cascade_aio.daemon.link import POPULATE_BYTES_MAX, ConnectionLostError, Link
from cascade_aio.daemon.reading import ClientCounters
from cascade_aio.errors import LeaseError
from cascade_aio.model import BlockId, BlockMeta, PrefixKey, as_bytes_view
from cascade_aio.segments.format import CHUNK_BYTES
from cascade_aio.store.putting import Draft, Slot, check_part_sizes, make_draft, once_dead, take_arrays

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Filling:
    """A reservation over one link, mapped while it is filled."""

    def __init__(self, link: Link, reserved: p.Reserved, draft: Draft) -> None:
        self.link = link
        self.number = reserved.reservation
        self.known = None if reserved.bound is None else BlockId(reserved.bound)
        self.payload = memoryview(bytearray())
        """All of it, once ``map`` was called; writable also where there is nothing."""
        self._draft = draft
        self._offset = reserved.offset + reserved.header_bytes
        self._nbytes = reserved.nbytes - reserved.header_bytes
        link.took()

    async def map(self, engine: ByteEngine) -> None:
        """Map the payload, its pages present. Raises ``ConnectionLostError``, ``OSError``."""
        if self._nbytes:
            self.payload = self.link.map_writable(self._offset, self._nbytes)
        if self._nbytes > POPULATE_BYTES_MAX:
            await engine.prefault(self.payload, huge=False)

    @property
    def parts(self) -> tuple[memoryview, memoryview]:
        """Where key and value go; writable, after ``map``."""
        draft = self._draft
        return (
            self.payload[: draft.key_bytes],
            self.payload[draft.value_offset : draft.value_offset + draft.value_bytes],
        )

    def unmap(self) -> None:
        """Done with writing."""
        self.payload = memoryview(b"")

    async def seal(self, digest: bytes | None = None, chunk_crcs: tuple[int, ...] = ()) -> BlockId:
        """The reservation is the service's again, whatever comes of it. Raises what the service answers with."""
        self.unmap()
        number, self.number = self.number, 0
        try:
            reply = await self.link.call(p.Seal(0, number, digest, list(chunk_crcs)))
        finally:
            self.link.gave_back()
        return BlockId(expect(reply, p.Sealed).block_id)

    def abort(self) -> None:
        """Nobody writes into it any more and nobody wants it. Nothing after ``seal``."""
        self.unmap()
        if self.number:
            number, self.number = self.number, 0
            self.link.note(p.Abort(number))
            self.link.gave_back()


def _unwanted(link: Link, reply: p.Reply) -> None:
    if isinstance(reply, p.Reserved) and reply.reservation:
        link.note(p.Abort(reply.reservation))


class ClientPutter:
    """Writes of one client."""

    def __init__(self, connector: Connector, engine: ByteEngine, counters: ClientCounters) -> None:
        self._connector = connector
        self._engine = engine
        self._counters = counters

    @property
    def counters(self) -> ClientCounters:
        return self._counters

    @property
    def engine(self) -> ByteEngine:
        return self._engine

    async def put(
        self,
        key: Buffer,
        value: Buffer,
        prefix: PrefixKey | None,
        parent: PrefixKey | None,
        meta: BlockMeta | None,
    ) -> BlockId:
        """See ``Store.put``."""
        key_view, value_view = as_bytes_view(key, "key"), as_bytes_view(value, "value")
        draft = make_draft(len(key_view), len(value_view), prefix, parent, meta)
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                return await self._put_once(draft, key_view, value_view)
            except ConnectionLostError:
                if attempt == ATTEMPTS_MAX:
                    raise
                self._counters.puts_repeated += 1
        raise AssertionError("unreachable")

    async def _put_once(self, draft: Draft, key: memoryview, value: memoryview) -> BlockId:
        link, reserved = await self.reserve(draft, put=True)
        if not reserved.reservation:
            assert reserved.bound is not None, reserved
            self._counters.puts_bound += 1
            self.noted(link)
            return BlockId(reserved.bound)
        filling = _Filling(link, reserved, draft)
        try:
            await filling.map(self._engine)
            if link.welcome.verifies:
                await self._engine.copy(list(zip(filling.parts, (key, value), strict=True)))
                block_id = await filling.seal()
            else:
                digest = link.welcome.digest
                done = await self._engine.ingest(key, value, filling.payload, draft.value_offset, CHUNK_BYTES, digest)
                block_id = await filling.seal(done.digest, done.chunk_crcs)
        finally:
            filling.abort()
        self._counters.puts += 1
        self._counters.put_bytes += draft.key_bytes + draft.value_bytes
        self.noted(link)
        return block_id

    async def reserve(self, draft: Draft, *, put: bool) -> tuple[Link, p.Reserved]:
        """Room in the service's arena, or the block that the prefix names already."""
        return await self._connector.ask(
            lambda: p.Reserve(0, draft.key_bytes, draft.value_bytes, draft.prefix, draft.parent, draft.meta, put),
            p.Reserved,
            repeat=True,
            undo=_unwanted,
        )

    async def begin(self, draft: Draft) -> _Filling:
        """A reservation to be filled by the caller."""
        link, reserved = await self.reserve(draft, put=False)
        filling = _Filling(link, reserved, draft)
        try:
            await filling.map(self._engine)
        except BaseException:
            filling.abort()
            raise
        return filling

    def noted(self, link: Link) -> None:
        """See ``Connector.noted``."""
        self._connector.noted(link)


class ClientReserveRequest:
    """``async with store.reserve(...) as slot`` of a client: see ``Store.reserve``."""

    def __init__(
        self,
        connector: Connector,
        putter: ClientPutter,
        key_bytes: int,
        value_bytes: int,
        prefix: PrefixKey | None,
        parent: PrefixKey | None,
        meta: BlockMeta | None,
    ) -> None:
        check_part_sizes(key_bytes, value_bytes)
        self._connector = connector
        self._putter = putter
        self._draft = make_draft(key_bytes, value_bytes, prefix, parent, meta)
        self._filling: _Filling | None = None
        self._slot: Slot | None = None

    async def __aenter__(self) -> Slot:
        self._connector.check()
        if self._slot is not None:
            raise LeaseError("a reservation can be entered once; call reserve() again")
        filling = self._filling = await self._putter.begin(self._draft)
        key, value = filling.parts
        self._slot = Slot(
            np.frombuffer(key, dtype=np.uint8), np.frombuffer(value, dtype=np.uint8), filling.known is not None
        )
        return self._slot

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        slot, filling = self._slot, self._filling
        assert slot is not None, "entered"
        assert filling is not None, "entered"
        survivors = take_arrays(slot)
        try:
            if error is None:
                self._connector.check()
                if survivors and filling.known is None:
                    filling = await self._move_away(filling, survivors)
                    survivors = []
                slot.seal_as(await self._seal(filling))
                self._putter.noted(filling.link)
        finally:
            once_dead(survivors, self._connector.loop, filling.abort)

    async def _seal(self, filling: _Filling) -> BlockId:
        if filling.link.welcome.verifies or filling.known is not None:
            return await filling.seal()
        draft = self._draft
        done = await self._putter.engine.digest(
            filling.payload,
            draft.key_bytes,
            draft.value_offset,
            draft.value_bytes,
            CHUNK_BYTES,
            filling.link.welcome.digest,
        )
        return await filling.seal(done.digest, done.chunk_crcs)

    async def _move_away(self, filling: _Filling, survivors: list[weakref.ref[npt.NDArray[np.uint8]]]) -> _Filling:
        """Writable arrays of the slot are still referenced: seal a copy that nobody can write to."""
        self._putter.counters.reserve_copies += 1
        fresh = await self._putter.begin(self._draft)
        try:
            await self._putter.engine.copy([(fresh.payload, filling.payload)])
        except BaseException:
            fresh.abort()
            raise
        once_dead(survivors, self._connector.loop, filling.abort)
        self._filling = fresh
        return fresh
