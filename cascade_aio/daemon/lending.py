"""Leases of a client: blocks of the service's arena, read in place.

``RemoteCopy`` is what a ``Block`` leases; ``ClientDesk`` makes them of what shared memory or the service
grants, and gives them back. A lease that is a pin in shared memory outlives the service: its successor
honours it. A lease by number (what shared memory does not list, such as a block that is still being read)
is worth as much as its connection: when that is lost, arrays that were taken stay mapped, but no new ones
are given, because the memory may be used for something else after a while.
"""

from __future__ import annotations

import asyncio
import collections

from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.connector import expect
from cascade_aio.daemon.link import Link
from cascade_aio.errors import CascadeError, LeaseError, TierFullError
from cascade_aio.model import BLOCK_ID_BYTES, BlockId, Tier
from cascade_aio.segments.buffers import page_padded
from cascade_aio.store.block import Block, caller_of_package

_CURE = ", or start the service with a larger pinned_bytes_per_client_max"


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
    """A block in the service's arena: pinned in ``slot`` of our table, or leased by number (``slot`` is -1)."""

    __slots__ = (
        "_payload",
        "arrival",
        "block_id",
        "key_bytes",
        "link",
        "meta",
        "nbytes",
        "slot",
        "value_bytes",
        "value_offset",
    )

    def __init__(
        self,
        link: Link,
        slot: int,
        block_id: BlockId,
        payload: int,
        key_bytes: int,
        value_offset: int,
        value_bytes: int,
        nbytes: int,
        meta: bytes,
        arrival: RemoteArrival | None = None,
    ) -> None:
        self.link = link
        self.slot = slot
        self.block_id = block_id
        self.key_bytes = key_bytes
        self.value_offset = value_offset
        self.value_bytes = value_bytes
        self.nbytes = nbytes
        self.meta = meta
        self.arrival = arrival
        self._payload = payload

    def key_view(self) -> memoryview:
        """Read-only. Raises ``LeaseError`` if the service is gone."""
        return self._view(0, self.key_bytes)

    def value_view(self) -> memoryview:
        """Read-only. Raises ``LeaseError`` if the service is gone."""
        return self._view(self.value_offset, self.value_bytes)

    def _view(self, start: int, nbytes: int) -> memoryview:
        link = self.link
        why = link.lost
        if self.slot >= 0:
            assert link.view is not None, "who has a slot has a directory"
            why = "this client had more pinned than it may" if link.view.revoked else None
        if why is not None:
            raise LeaseError(
                f"the lease on block {self.block_id} ended with its connection to the service at {link.path} ({why}); "
                "get the block again"
            )
        begin = self._payload + start
        return link.arena[begin : begin + nbytes]


class ClientDesk:
    """The ``Lender`` of a client."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._late: collections.deque[tuple[RemoteCopy, int]] = collections.deque()
        self.leases = 0
        """Leases out now, arrays that outlived theirs included."""

    def pin(self, link: Link, name: bytes) -> Block | None:
        """A lease by shared memory alone, or ``None`` where that does not serve. Never suspends.

        Raises ``TierFullError`` beyond the quota.
        """
        view = link.view
        assert view is not None, "checked by the caller"
        try:
            pinned = view.pin(name)
        except LeaseError as error:
            raise TierFullError(f"{error}{_CURE}") from None
        if pinned is None:
            return None
        copy = RemoteCopy(
            link,
            pinned.slot,
            BlockId(pinned.digest[:BLOCK_ID_BYTES]),
            pinned.offset + pinned.header_bytes,
            pinned.key_bytes,
            pinned.value_offset,
            pinned.value_bytes,
            pinned.nbytes,
            pinned.meta,
        )
        link.outstanding += 1
        self.leases += 1
        return Block(copy, Tier.SHM, self, pinned.slot, caller_of_package())

    def lend(self, link: Link, grant: p.Grant) -> Block:
        """The lease that ``link``'s service granted. What raises (``LeaseError``, ``TierFullError``) gives it back."""
        payload_bytes = grant.value_offset + grant.value_bytes
        nbytes = grant.header_bytes + page_padded(payload_bytes)
        try:
            if grant.offset + nbytes > len(link.arena) or grant.key_bytes > grant.value_offset:
                raise LeaseError(f"the service at {link.path} granted a block outside of its arena; please report this")
            view = link.view
            if grant.slot >= 0 and (view is None or not view.fits(grant.slot, nbytes)):
                raise TierFullError(f"this client leases as much of the arena as it may; release blocks sooner{_CURE}")
        except CascadeError:
            give_back(link, grant)
            raise
        if view is not None and grant.slot >= 0:
            view.account(grant.slot, nbytes)
        copy = RemoteCopy(
            link,
            grant.slot,
            BlockId(grant.block_id),
            grant.offset + grant.header_bytes,
            grant.key_bytes,
            grant.value_offset,
            grant.value_bytes,
            nbytes,
            grant.meta,
            None if grant.complete else RemoteArrival(link, grant.lease),
        )
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
            for grant in grants[len(blocks) + 1 :]:  # the one that failed is given back already
                give_back(link, grant)
            raise
        return blocks

    def lend_leading(self, link: Link, grants: list[p.Grant]) -> list[Block]:
        """Those that this client may lease, up to the first that is too many. Raises ``LeaseError``."""
        blocks: list[Block] = []
        for place, grant in enumerate(grants):
            try:
                blocks.append(self.lend(link, grant))
            except CascadeError as error:
                for unused in grants[place + 1 :]:
                    give_back(link, unused)
                if isinstance(error, TierFullError):
                    break
                for block in blocks:
                    block.release()
                raise
        return blocks

    def release(self, copy: RemoteCopy, number: int) -> None:
        self.leases -= 1
        link = copy.link
        if copy.slot >= 0:
            assert link.view is not None, "who has a slot has a directory"
            link.view.unpin(copy.slot, copy.nbytes)
        else:
            link.release(number)
        link.gave_back()

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
            give_back(link, grant)


def give_back(link: Link, grant: p.Grant) -> None:
    """A lease that nobody took."""
    if grant.lease:
        link.release(grant.lease)
    elif link.view is not None:
        link.view.account(grant.slot, 0)
        link.view.unpin(grant.slot, 0)
