"""The read path of a client: shared memory first, a message where that does not know.

``ClientGetter`` is what the request objects of ``store.get`` and ``store.get_prefix`` work with.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from cascade_aio.daemon import protocol as p
from cascade_aio.daemon.connector import Connector
from cascade_aio.daemon.lending import ClientDesk, unwanted
from cascade_aio.daemon.requests import TIER_CODES
from cascade_aio.errors import ConfigError, LeaseError, TierFullError
from cascade_aio.model import BlockId, PrefixKey, Tier
from cascade_aio.store.block import Block
from cascade_aio.store.getting import PrefixLookup, raw_name, raw_prefix

REPORT_SECONDS = 1.0


@dataclasses.dataclass(slots=True)
class ClientCounters:
    """Calls of this client. What shared memory answered cost no message."""

    gets: int = 0
    shared_gets: int = 0
    lookups: int = 0
    puts: int = 0
    puts_bound: int = 0
    put_bytes: int = 0
    puts_repeated: int = 0
    reserve_copies: int = 0


class ClientLookup(PrefixLookup):
    """What shared memory knows; ``await`` it for what the service knows."""

    __slots__ = ("_getter", "_keys")

    def __init__(self, tiers: tuple[Tier, ...], getter: ClientGetter, keys: Sequence[bytes]) -> None:
        super().__init__(tiers)
        object.__setattr__(self, "_getter", getter)
        object.__setattr__(self, "_keys", keys)

    async def _full(self) -> PrefixLookup:
        getter: ClientGetter = self._getter  # type: ignore[attr-defined]
        return await getter.ask_lookup(self._keys)  # type: ignore[attr-defined]


class ClientGetter:
    """Reads of one client."""

    def __init__(self, connector: Connector, desk: ClientDesk, counters: ClientCounters) -> None:
        self._connector = connector
        self._desk = desk
        self._counters = counters

    def try_hot(self, name: BlockId | PrefixKey | str) -> Block | None:
        """A lease without a message, or ``None`` where shared memory does not serve. Never suspends.

        Works while the service is away, too. Raises ``TierFullError`` beyond the quota of this client.
        """
        self._connector.check()
        raw = raw_name(name)
        link = self._connector.sight
        if link is None or link.view is None or not link.view.current:
            return None
        block = self._desk.pin(link, raw)
        if block is not None:
            self._counters.shared_gets += 1
        return block

    async def load(self, name: BlockId | PrefixKey | str, *, early: bool = False) -> Block:
        """A lease by message. See ``Store.get`` for the errors."""
        raw = raw_name(name)
        self._counters.gets += 1
        link, reply = await self._connector.ask(lambda: p.Get(0, raw, early), p.Leased, repeat=True, undo=unwanted)
        return self._desk.lend_all(link, reply.grants)[0]

    async def load_prefix(self, keys: Sequence[PrefixKey]) -> list[Block]:
        """Leases on the longest cached prefix. See ``Store.get_prefix``."""
        self._connector.check()
        names = [raw_prefix(key) for key in keys]
        if len(names) > p.NAMES_MAX:
            raise ConfigError(f"{len(names)} keys are more than one call takes ({p.NAMES_MAX}); pass them in parts")
        blocks, full = self._pin_leading(names)
        try:
            while not full and len(blocks) < len(names):
                part = names[len(blocks) : len(blocks) + p.GRANTS_MAX]
                self._counters.gets += 1
                link, reply = await self._connector.ask(
                    lambda part=part: p.GetPrefix(0, part),  # type: ignore[misc]
                    p.Leased,
                    repeat=True,
                    undo=unwanted,
                )
                more = self._desk.lend_leading(link, reply.grants)
                blocks += more
                full = len(more) < len(part)
        except BaseException as error:
            if blocks and isinstance(error, TierFullError | LeaseError):  # those that this client may have
                return blocks
            for block in blocks:
                block.release()
            raise
        return blocks

    def _pin_leading(self, names: Sequence[bytes]) -> tuple[list[Block], bool]:
        """Leases on what leads in shared memory; whether this client may lease no more."""
        link = self._connector.sight
        blocks: list[Block] = []
        if link is None or link.view is None or not link.view.current:
            return blocks, False
        try:
            for name in names:
                block = self._desk.pin(link, name)
                if block is None:
                    break
                blocks.append(block)
        except TierFullError:
            return blocks, True
        finally:
            self._counters.shared_gets += len(blocks)
        return blocks, False

    def lookup(self, keys: Sequence[PrefixKey]) -> PrefixLookup:
        """What shared memory knows, without a message; await the result for the service's answer."""
        self._connector.check()
        self._counters.lookups += 1
        names = [raw_prefix(key) for key in keys]
        link = self._connector.sight
        if link is None or link.view is None or not link.view.current:
            return ClientLookup((), self, names)
        return ClientLookup((Tier.SHM,) * link.view.lookup(names), self, names)

    async def ask_lookup(self, names: Sequence[bytes]) -> PrefixLookup:
        """How many leading keys the service has. In parts: other clients are answered between them."""
        tiers: list[int] = []
        for start in range(0, len(names), p.LOOKUPS_MAX):
            part = list(names[start : start + p.LOOKUPS_MAX])
            _, reply = await self._connector.ask(lambda part=part: p.Lookup(0, part), p.Answer, repeat=True)  # type: ignore[misc]
            tiers += bytes(reply.value)
            if len(reply.value) < len(part):
                break
        return PrefixLookup(tuple(TIER_CODES[code] for code in tiers))

    def is_shared(self, name: BlockId | PrefixKey | str) -> bool:
        """Whether shared memory is known to hold the block."""
        self._connector.check()
        raw = raw_name(name)
        link = self._connector.sight
        return link is not None and link.view is not None and link.view.current and raw in link.view

    @property
    def blocks(self) -> int:
        """Blocks that the service knows, as shared memory says; 0 without it."""
        self._connector.check()
        link = self._connector.sight
        return 0 if link is None or link.view is None else link.view.blocks

    async def contains(self, name: BlockId | PrefixKey | str) -> bool:
        raw = raw_name(name)
        _, reply = await self._connector.ask(lambda: p.Contains(0, raw), p.Answer, repeat=True)
        return bool(reply.value)


class Reporter:
    """Tells the service what it cannot see: calls that shared memory answered."""

    def __init__(self, connector: Connector, counters: ClientCounters) -> None:
        self._connector = connector
        self._counters = counters
        self._told = (0, 0)

    async def run(self) -> None:
        """Tell it now and then, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self.tell()

    def tell(self) -> None:
        """Tell it what is new, if there is a link: also before the last one is ended."""
        now = (self._counters.lookups, self._counters.shared_gets)
        link = self._connector.link
        if now != self._told and link is not None:
            link.note(p.Report(now[0] - self._told[0], now[1] - self._told[1]))
            self._told = now
