"""What of a store other processes may find: its copies in the arena's directory, and what its clients have pinned.

The catalog tells of every copy that becomes resident or goes (``CopyPublisher``); the index of every name.
A copy that a client has pinned is *lent*: held here, so that no policy offers it, until the client has let
go, which is noticed within ``HARVEST_SECONDS``. One that was dropped meanwhile keeps slot and extent until
then. In the same rhythm it is learnt what clients have used, so that the policy knows.

An embedded store has no publisher and pays nothing. Must not know: how clients are talked to.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.core.index import BlockIndex
from cascade_aio.errors import LeaseError
from cascade_aio.model import DIGEST_BYTES
from cascade_aio.segments.format import BLOCK, Binding, RecordHeader, SegmentIdentity, bindings_room, encode_record
from cascade_aio.store.catalog import Catalog, Copy
from cascade_aio.tiers.arena import SharedArena
from cascade_aio.tiers.directory import ArenaDirectory, ClientPins, DirectoryEntry, SlotState
from cascade_aio.tiers.shm import Extent, ShmTier

HARVEST_SECONDS = 0.05
"""Between two looks at what clients use and have let go."""

UPKEEP_TICKS = 20
"""Every so many looks: one client's quota, former clients that died."""

NAMES_PUBLISHED = 4
"""Names per block that clients find without asking: the oldest. The directory's slots have room for no more."""

_NOWHERE = SegmentIdentity(bytes(16), 0)


@dataclasses.dataclass(slots=True)
class RewarmReport:
    """What became of the arena that was found. Blocks unless the name says bytes; JSON-ready."""

    empty_because: str | None = None
    """Why nothing was taken over; ``None`` if something was."""
    blocks: int = 0
    bytes: int = 0
    dropped: int = 0
    """Sealed, but of no use: not sound, unknown and unreadable, or deleted."""
    fenced: int = 0
    """Extents that clients of the former owner still had."""
    unwritten: int = 0
    """Of ``blocks``: those that are not on disk and are being written."""
    verified: int = 0
    damaged: int = 0


def describe(copy: Copy, index: BlockIndex, digest: str) -> None:
    """Make the extent of a resident copy a record of no segment, so that whoever finds it knows what it is."""
    room = bindings_room(copy.header_bytes // PAGE_BYTES, len(copy.chunk_crcs), len(copy.meta))
    names = index.oldest_bindings(copy.row, room)
    header = RecordHeader(
        BLOCK, copy.header_bytes // PAGE_BYTES, copy.extent.nbytes, 0, copy.stamp or index.stamp(copy.row), 0,
        digest, copy.digest, copy.key_bytes, copy.value_bytes, copy.value_offset, copy.chunk_crcs,
        bindings=tuple(Binding(*name) for name in names), meta=copy.meta,
    )  # fmt: skip
    encode_record(copy.extent.memory[: copy.header_bytes], header, _NOWHERE)
    copy.described = True


class Publisher:
    """The owner's side of one arena. Loop thread only; nothing blocks but ``run``, which sleeps."""

    def __init__(self, arena: SharedArena, directory: ArenaDirectory, catalog: Catalog, digest: str) -> None:
        self._arena = arena
        self._directory = directory
        self._catalog = catalog
        self._digest = digest
        self._copies: dict[int, Copy] = {}
        self._lent: dict[int, Copy] = {}
        self._fenced: dict[int, tuple[ShmTier, Extent] | None] = {}
        self._wake = asyncio.Event()
        self._ticks = 0
        self.on_over_quota: Callable[[ClientPins], None] = lambda client: None
        """Called for a client that has pinned more by itself than it may, again and again: end its connection."""
        self.used = 0
        """Uses by clients that were harvested; a block counts once per look."""

    def start(self) -> None:
        """The catalog is complete: tell of everything that changes from now on."""
        catalog = self._catalog
        catalog.publisher = self
        catalog.index.on_bind = self._bound
        catalog.index.on_unbind = self._unbound
        self._directory.set_blocks(len(catalog.index))
        self._directory.begin()
        self._arena.keep = True

    def discard_arena(self) -> None:
        """The kernel may still write into the arena, or a reader of ours read it, when this store is closed: nobody
        may take it over."""
        self._arena.keep = False

    # -- for the service ------------------------------------------------------------------------

    @property
    def arena_bytes(self) -> int:
        return self._arena.nbytes

    @property
    def session(self) -> bytes:
        """Names this opening: what ``DirectoryView.session`` compares."""
        return self._directory.session

    def directory_fd(self) -> int:
        """A new read-only descriptor of the directory, to be sent and closed."""
        return self._directory.reopen_fd()

    def arena_fd(self, *, writable: bool) -> int:
        """A new descriptor of the arena, to be sent and closed."""
        return self._arena.reopen_fd(writable=writable)

    def open_client(self, quota_bytes: int) -> ClientPins:
        """A pin table for a client that may pin ``quota_bytes`` of arena. Raises ``TierFullError``."""
        client = self._directory.open_client(self._arena.path, quota_bytes)
        self._directory.set_blocks(len(self._catalog.index))
        self._wake.set()
        return client

    def close_client(self, client: ClientPins) -> None:
        """Its connection has ended: its pins are void. Not at shutdown: the next owner honours those of the living."""
        self._directory.close_client(client)
        self._settle()

    def slot_of(self, copy: Copy) -> int:
        """Where ``copy`` is listed, so that a client can be given a pin; -1: it is not."""
        return -1 if copy.slot < 0 or self._directory.entry(copy.slot).by_message else copy.slot

    def entry_of(self, slot: int) -> DirectoryEntry:
        """What the slot says."""
        return self._directory.entry(slot)

    def begin_filling(self, client: ClientPins, extent: Extent) -> int:
        """``client`` is given ``extent`` to write: its slot, or -1 without room. A next owner leaves the extent
        alone while the client lives."""
        entry = DirectoryEntry(
            0, extent.offset, extent.nbytes, 0, extent.nbytes, 0, 0, False, bytes(DIGEST_BYTES), b""
        )  # fmt: skip
        slot = self._directory.publish(entry, SlotState.FILLING)
        if slot >= 0:
            client.pin(slot)
        return slot

    def end_filling(self, client: ClientPins, slot: int) -> None:
        """The client writes no more: before the extent is sealed or freed."""
        if not client.closed:
            with contextlib.suppress(LeaseError):  # it has let go by itself
                client.unpin(slot)
        if not self._directory.retire(slot):
            self._fence(slot, None)

    # -- what the catalog tells -----------------------------------------------------------------

    def publish(self, copy: Copy) -> None:
        """See ``CopyPublisher``. Without a free slot the copy stays unlisted: clients ask for it."""
        if not copy.described:
            describe(copy, self._catalog.index, self._digest)
        entry = DirectoryEntry(
            0, copy.extent.offset, copy.key_bytes, copy.value_bytes, copy.value_offset, 0, copy.header_bytes, False,
            copy.digest, copy.meta,
        )  # fmt: skip
        slot = self._directory.publish(entry)
        if slot >= 0:
            copy.slot = slot
            self._copies[slot] = copy
            for name in self._catalog.index.oldest_bindings(copy.row, NAMES_PUBLISHED):
                self._directory.bind(slot, name[0])

    def withdraw(self, copy: Copy) -> bool:
        slot = copy.slot
        if not self._directory.withdraw(slot):
            self._lend(copy)
            return False
        self._forget(copy)
        return True

    def retire(self, copy: Copy) -> None:
        if self._directory.retire(copy.slot):
            self._take_back(copy)
        elif copy.slot not in self._lent:
            self._lend(copy)

    def awaken(self, copy: Copy) -> None:
        if copy.slot < 0:
            return
        if self._directory.awaken(copy.slot):
            for name in self._catalog.index.oldest_bindings(copy.row, NAMES_PUBLISHED):
                self._directory.bind(copy.slot, name[0])

    def _bound(self, prefix: bytes, row: int) -> None:
        copy = self._catalog.copies.get(row)
        if copy is not None and copy.slot >= 0:
            self._directory.bind(copy.slot, prefix)

    def _unbound(self, prefix: bytes, row: int) -> None:
        copy = self._catalog.copies.get(row)
        if copy is not None and copy.slot >= 0:
            self._directory.unbind(copy.slot, prefix)

    # -- what was taken over --------------------------------------------------------------------

    def list_dormant(self, copy: Copy, slot: int) -> None:
        """``copy`` is dormant in ``slot``."""
        copy.slot = slot
        self._copies[slot] = copy
        self._directory.keep(slot)

    def fence(self, slot: int, shm: ShmTier, extent: Extent) -> None:
        """A client of a former owner has ``extent`` pinned, which is of no use to us."""
        self._directory.quarantine(slot)
        self._fence(slot, (shm, extent))

    def _fence(self, slot: int, what: tuple[ShmTier, Extent] | None) -> None:
        self._fenced[slot] = what
        self._wake.set()

    # -- lending --------------------------------------------------------------------------------

    def _lend(self, copy: Copy) -> None:
        self._catalog.hold(copy)
        self._lent[copy.slot] = copy
        self._wake.set()

    def _take_back(self, copy: Copy) -> None:
        lent = self._lent.pop(copy.slot, None)
        self._forget(copy)
        if lent is not None:
            self._catalog.release(copy)

    def _forget(self, copy: Copy) -> None:
        del self._copies[copy.slot]
        copy.slot = -1

    async def run(self) -> None:
        """Look after clients until cancelled; asleep while there is none."""
        while True:
            if not (self._directory.clients or self._lent or self._fenced):
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(HARVEST_SECONDS)
            self.tick()

    def tick(self) -> None:
        """One look: uses to the policy, what was let go back to it. O(tables, uses harvested, lent copies)."""
        catalog, directory = self._catalog, self._directory
        directory.set_blocks(len(catalog.index))
        for slot in directory.harvest():
            copy = self._copies.get(slot)
            if copy is not None and copy.row >= 0:
                self.used += 1
                catalog.touch(copy.row)
        self._ticks += 1
        if self._ticks % UPKEEP_TICKS == 0:
            directory.reap_former()
            clients = directory.live_clients()
            if clients:
                client = clients[self._ticks // UPKEEP_TICKS % len(clients)]
                if directory.is_over_quota(client):
                    self.on_over_quota(client)
        self._settle()

    def _settle(self) -> None:
        """Take back what clients have let go."""
        directory = self._directory
        for slot, copy in list(self._lent.items()):
            if copy.row < 0:  # dropped while it was pinned
                if directory.retire(slot):
                    self._take_back(copy)
            elif not directory.is_pinned(slot):
                del self._lent[slot]
                self._catalog.release(copy)
        for slot, fenced in list(self._fenced.items()):
            if directory.retire(slot):
                del self._fenced[slot]
                if fenced is not None:
                    shm, extent = fenced
                    shm.free(extent)
                    self._catalog.on_room()

    def statistics(self) -> dict[str, object]:
        """Counts, JSON-ready."""
        return {
            **self._directory.statistics(),
            "used": self.used,
            "lent_blocks": len(self._lent),
            "fenced_extents": len(self._fenced),
        }
