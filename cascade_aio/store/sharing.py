"""What of a store other ranks may find: its resident copies, announced at once and listed soon after.

The catalog tells of every copy that appears in the arena or leaves it (``CopyWatcher``), the index of every name.
Leaving is immediate: the copy's generation ends in the same turn, so that no reader can take its bytes for the
block's, and its entries in the shared directory are taken out later, in batches, like new ones are put in. One
batch is under way at a time; what appears and leaves again before its turn costs no message.

Must not know: where entries are kept and how, or who reads.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable
from typing import TypeVar

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.core.remote_directory import Listing
from cascade_aio.core.remote_operations import Placed
from cascade_aio.store.catalog import Catalog, Copy
from cascade_aio.store.publishing import NAMES_PUBLISHED, describe
from cascade_aio.tiers.directory_format import directory_name
from cascade_aio.tiers.remote.tier import Announced, RemoteTier

_T = TypeVar("_T")

BATCH_NAMES_MAX = 64
"""Names of one publication: some hundred microseconds for which the interpreter is not the loop's."""


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    """A name of a shown copy. ``placed`` once it is listed; ``wanted`` until it is to go; ``queued`` for a batch."""

    shown: _Shown
    name: bytes
    placed: Placed | None = None
    wanted: bool = True
    queued: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class _Shown:
    copy: Copy
    announced: Announced
    entries: dict[bytes, _Entry] = dataclasses.field(default_factory=dict)

    def listing(self, name: bytes) -> Listing:
        copy = self.copy
        return Listing(
            name, copy.block_id, 0, self.announced.slot, self.announced.generation, copy.extent.offset // PAGE_BYTES,
            copy.extent.nbytes // PAGE_BYTES, copy.header_bytes // PAGE_BYTES,
        )  # fmt: skip


class Sharer:
    """A store's side of the shared directory. Loop thread only; nothing suspends but ``run``."""

    def __init__(self, catalog: Catalog, tier: RemoteTier, digest: str) -> None:
        self._catalog = catalog
        self._tier = tier
        self._digest = digest
        self._shown: dict[Copy, _Shown] = {}
        self._queue: collections.deque[_Entry] = collections.deque()
        self._leaving: collections.deque[Placed] = collections.deque()
        self._wake = asyncio.Event()
        self._moved = False
        self._listing_now = self._taking_out_now = 0
        self._others: tuple[Callable[[bytes, int], None] | None, Callable[[bytes, int], None] | None] = (None, None)

    def start(self) -> None:
        """Show what is there, and tell of everything that changes from now on."""
        catalog, index = self._catalog, self._catalog.index
        self._others = index.on_bind, index.on_unbind
        index.on_bind, index.on_unbind = self._bound, self._unbound
        catalog.watcher = self
        self._tier.on_moved = self._ranks_moved
        for copy in catalog.copies.values():
            self.appeared(copy)

    # -- what the catalog and the index tell --------------------------------------------------

    def appeared(self, copy: Copy) -> None:
        """See ``CopyWatcher``."""
        announced = self._tier.announce()
        if announced is None:
            return
        index = self._catalog.index
        if not copy.described:
            describe(copy, index, self._digest)
        shown = self._shown[copy] = _Shown(copy, announced)
        self._want(shown, copy.block_id)
        for prefix, _, _ in index.oldest_bindings(copy.row, NAMES_PUBLISHED):
            self._want(shown, directory_name(prefix))

    def gone(self, copy: Copy) -> None:
        """See ``CopyWatcher``."""
        shown = self._shown.pop(copy, None)
        if shown is not None:
            self._tier.retract(shown.announced)
            for entry in shown.entries.values():
                self._drop(entry)

    def _bound(self, prefix: bytes, row: int) -> None:
        if self._others[0] is not None:
            self._others[0](prefix, row)
        shown = self._shown_in(row)
        if shown is not None and len(shown.entries) <= NAMES_PUBLISHED:
            self._want(shown, directory_name(prefix))

    def _unbound(self, prefix: bytes, row: int) -> None:
        if self._others[1] is not None:
            self._others[1](prefix, row)
        shown = self._shown_in(row)
        entry = None if shown is None else shown.entries.pop(directory_name(prefix), None)
        if entry is not None:
            self._drop(entry)

    def _shown_in(self, row: int) -> _Shown | None:
        copy = self._catalog.copies.get(row)
        return None if copy is None else self._shown.get(copy)

    def _want(self, shown: _Shown, name: bytes) -> None:
        if name not in shown.entries:
            entry = shown.entries[name] = _Entry(shown, name)
            self._enqueue(entry)

    def _enqueue(self, entry: _Entry) -> None:
        if not entry.queued:
            entry.queued = True
            self._queue.append(entry)
            self._wake.set()

    def _drop(self, entry: _Entry) -> None:
        entry.wanted = False
        if entry.placed is not None:
            self._leaving.append(entry.placed)
            entry.placed = None
            self._wake.set()

    def _ranks_moved(self) -> None:
        self._moved = True
        self._wake.set()

    # -- telling others -----------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the shared directory up to date until cancelled; asleep while nothing changes."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._leaving or self._queue or self._moved:
                if self._moved:
                    self._moved = False
                    await self._look_where_names_belong()
                if self._leaving:
                    leaving = _taken(self._leaving)
                    self._taking_out_now = len(leaving)
                    await self._tier.withdraw(leaving)
                    self._taking_out_now = 0
                if self._queue:
                    batch = _taken(self._queue)
                    self._listing_now = len(batch)
                    await self._publish(batch)
                    self._listing_now = 0

    async def _publish(self, batch: list[_Entry]) -> None:
        for entry in batch:
            entry.queued = False
        batch = [entry for entry in batch if entry.wanted]
        if not batch:
            return
        rank = self._tier.rank
        listings = [entry.shown.listing(entry.name)._replace(rank=rank) for entry in batch]
        for entry, answer in zip(batch, await self._tier.publish(listings), strict=True):
            if not isinstance(answer, Placed):
                continue
            if entry.placed is not None:  # it had a place with a rank that does not keep it any more
                self._leaving.append(entry.placed)
            entry.placed = answer
            if not entry.wanted:  # it went while it was being listed
                self._drop(entry)

    async def _look_where_names_belong(self) -> None:
        """Ranks went or came back: what they kept is to be listed elsewhere."""
        everything = [entry for shown in self._shown.values() for entry in shown.entries.values()]
        for start in range(0, len(everything), BATCH_NAMES_MAX):
            part = everything[start : start + BATCH_NAMES_MAX]
            places = self._tier.membership.places_of([entry.name for entry in part])
            for entry, place in zip(part, places, strict=True):
                if entry.wanted and (entry.placed is None or entry.placed.place.rank != place.rank):
                    self._enqueue(entry)
            await asyncio.sleep(0)

    def statistics(self) -> dict[str, object]:
        """Counts, JSON-ready. ``to_list`` and ``to_take_out``: names not yet told, those being told included."""
        return {
            "shown_blocks": len(self._shown),
            "to_list": len(self._queue) + self._listing_now,
            "to_take_out": len(self._leaving) + self._taking_out_now,
        }


def _taken(queue: collections.deque[_T]) -> list[_T]:
    return [queue.popleft() for _ in range(min(len(queue), BATCH_NAMES_MAX))]
