"""Giving out and taking back leases: the accounting between ``Block`` objects and the catalog."""

from __future__ import annotations

import asyncio
import collections
from typing import Generic, Protocol, TypeVar

from cascade_aio.config import format_size
from cascade_aio.core.leases import LeaseLedger
from cascade_aio.model import Tier
from cascade_aio.store.block import Block, caller_of_package
from cascade_aio.store.catalog import Copy


class Place(Protocol):
    """Where a copy lies: an extent."""

    offset: int

    @property
    def nbytes(self) -> int: ...


class Lendable(Protocol):
    """A copy, of the arena or of a device."""

    leases: int

    @property
    def extent(self) -> Place: ...


_C = TypeVar("_C", bound=Lendable)
_D = TypeVar("_D", contravariant=True)


class Holder(Protocol[_D]):
    """Who keeps copies as long as somebody holds them."""

    def hold(self, copy: _D) -> None: ...
    def release(self, copy: _D) -> None: ...
    def note_use(self, copy: _D) -> None: ...


class Desk(Generic[_C]):
    """The accounting of leases in one arena. The ledger knows copies by their place in it, which no other
    living copy has, also after the block was deleted and its row given to another."""

    def __init__(self, catalog: Holder[_C], loop: asyncio.AbstractEventLoop) -> None:
        self._catalog = catalog
        self._loop = loop
        self._late: collections.deque[tuple[_C, int]] = collections.deque()
        self._ledger = LeaseLedger()
        self.outlived = 0
        """Leases that ended with the last array taken from them, or in the garbage collector."""

    @property
    def leases(self) -> int:
        """Leases out now, arrays that outlived theirs included."""
        return len(self._ledger)

    @property
    def leased_bytes(self) -> int:
        """Arena bytes that leases pin; each copy counts once."""
        return self._ledger.pinned_bytes

    def take(self, copy: _C) -> tuple[int, str]:
        """Note a lease on ``copy``: its number, and where it was taken."""
        extent = copy.extent
        where = caller_of_package()
        number = self._ledger.take(extent.offset, extent.nbytes, where)
        if not copy.leases:
            self._catalog.hold(copy)
        copy.leases += 1
        return number, where

    def release(self, copy: _C, number: int) -> None:
        self._ledger.release(number)
        copy.leases -= 1
        if not copy.leases:
            self._catalog.note_use(copy)
            self._catalog.release(copy)

    def release_later(self, copy: _C, number: int) -> None:
        """From a finalizer, on whatever thread: the loop does it in a turn of its own."""
        self._late.append((copy, number))
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.settle)

    def settle(self) -> None:
        """Take back what finalizers have queued."""
        while self._late:
            self.outlived += 1
            self.release(*self._late.popleft())

    def describe(self) -> str:
        """For messages: how much of the arena readers hold, and who has held it longest."""
        text = f"{self.leases} leases pin {format_size(self.leased_bytes)}"
        oldest = self._ledger.oldest()
        return text if oldest is None else f"{text} (the oldest was taken at {oldest.where})"


class LeaseDesk(Desk[Copy]):
    """The store's ``Lender``."""

    def lend(self, copy: Copy, tier: Tier) -> Block:
        """A new lease on ``copy``, which must be sealed."""
        number, where = self.take(copy)
        return Block(copy, tier, self, number, where)
