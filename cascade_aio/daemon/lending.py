"""Leases of a client: blocks of the service's arena, read in place.

``RemoteCopy`` is what a ``Block`` leases; ``ClientDesk`` makes them of what the service grants and gives
them back. A lease is worth as much as the connection it came over: when that is lost, arrays that were
taken stay mapped, but no new ones are given, because the service may use the memory for something else
once it has waited long enough (``linger_seconds_max``), and a new one knows nothing of the lease.
"""

from __future__ import annotations

import asyncio
import collections

from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.connector import expect
from cascade_aio.daemon.link import Link
from cascade_aio.errors import CascadeError, LeaseError
from cascade_aio.model import BlockId, Tier
from cascade_aio.store.block import Block, caller_of_package


class RemoteArrival:
    """How far the service has read a block that was leased early."""

    def __init__(self, link: Link, lease: int) -> None:
        self._link = link
        self._lease = lease
        self.complete = False

    async def wait(self, start: int, stop: int) -> None:
        """Return once the payload's bytes are verified. Raises what the read failed with."""
        if self.complete:
            return
        reply = expect(await self._link.call(p.Ready(0, self._lease, start, stop)), p.Answer)
        self.complete |= bool(reply.value)


class RemoteCopy:
    """A block in the service's arena, as one grant describes it."""

    __slots__ = (
        "_header_bytes",
        "_offset",
        "arrival",
        "block_id",
        "key_bytes",
        "link",
        "meta",
        "value_bytes",
        "value_offset",
    )

    def __init__(self, link: Link, grant: p.Grant) -> None:
        end = grant.offset + grant.header_bytes + grant.value_offset + grant.value_bytes
        if end > len(link.arena) or grant.key_bytes > grant.value_offset:
            raise LeaseError(f"the service at {link.path} granted a block outside of its arena; please report this")
        self.link = link
        self.block_id = BlockId(grant.block_id)
        self.key_bytes = grant.key_bytes
        self.value_bytes = grant.value_bytes
        self.value_offset = grant.value_offset
        self.meta = grant.meta
        self.arrival = None if grant.complete else RemoteArrival(link, grant.lease)
        self._offset = grant.offset
        self._header_bytes = grant.header_bytes

    def key_view(self) -> memoryview:
        """Read-only. Raises ``LeaseError`` if the service is gone."""
        return self._view(0, self.key_bytes)

    def value_view(self) -> memoryview:
        """Read-only. Raises ``LeaseError`` if the service is gone."""
        return self._view(self.value_offset, self.value_bytes)

    def _view(self, start: int, nbytes: int) -> memoryview:
        link = self.link
        if link.lost is not None:
            raise LeaseError(
                f"the lease on block {self.block_id} ended with its connection to the service at {link.path} "
                f"({link.lost}); get the block again"
            )
        begin = self._offset + self._header_bytes + start
        return link.arena[begin : begin + nbytes]


class ClientDesk:
    """The ``Lender`` of a client."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._late: collections.deque[tuple[RemoteCopy, int]] = collections.deque()
        self.leases = 0
        """Leases out now, arrays that outlived theirs included."""

    def lend(self, link: Link, grant: p.Grant) -> Block:
        """The lease that ``link``'s service granted."""
        copy = RemoteCopy(link, grant)
        link.took()
        self.leases += 1
        return Block(copy, Tier(grant.tier), self, grant.lease, caller_of_package())

    def lend_all(self, link: Link, grants: list[p.Grant]) -> list[Block]:
        """All or none. Raises ``LeaseError``."""
        blocks: list[Block] = []
        try:
            for grant in grants:
                blocks.append(self.lend(link, grant))
        except CascadeError:
            for block in blocks:
                block.release()
            for grant in grants[len(blocks) :]:
                link.release(grant.lease)
            raise
        return blocks

    def release(self, copy: RemoteCopy, number: int) -> None:
        self.leases -= 1
        copy.link.release(number)
        copy.link.gave_back()

    def release_later(self, copy: RemoteCopy, number: int) -> None:
        """From a finalizer, on whatever thread: the loop does it in a turn of its own."""
        self._late.append((copy, number))
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.settle)

    def settle(self) -> None:
        """Give back what finalizers have queued."""
        while self._late:
            self.release(*self._late.popleft())


def unwanted(link: Link, reply: p.Reply) -> None:
    """Leases that came after their asker had gone."""
    if isinstance(reply, p.Leased):
        for grant in reply.grants:
            link.release(grant.lease)
