"""The remote tier of an open store, put together: group → tier → who shares and who fetches."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

from cascade_aio.config import StoreConfig
from cascade_aio.core.remote_directory import geometry_of
from cascade_aio.errors import ConfigError
from cascade_aio.store.context import StoreContext
from cascade_aio.store.fetching import Fetcher
from cascade_aio.store.sharing import Sharer
from cascade_aio.tiers.remote.group import Regions, RmaGroup
from cascade_aio.tiers.remote.tier import RemoteTier, WindowArena

REFUSAL_CHARACTERS_MAX = 500
"""What of a rank's error the others are told."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """What an open store with a communicator has beyond others."""

    tier: RemoteTier
    sharer: Sharer
    fetcher: Fetcher

    def statistics(self) -> dict[str, Any]:
        """Counts, JSON-ready."""
        return {**self.tier.statistics(), **self.sharer.statistics()}


def check_shareable(config: StoreConfig) -> None:
    """Raise ``ConfigError`` for settings that cannot go with a communicator."""
    for name in ("warm_restart", "arena"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does not go with comm=: the arena is memory that MPI allocates, "
                "which no file names and which ends with the job; leave one of the two out"
            )


class Joining:
    """One rank's part in opening a store together: every rank goes through both steps, or tells that it cannot.

    A failure before the end becomes the others' failure: nobody waits for a rank that gave up.
    """

    def __init__(self, group: RmaGroup, config: StoreConfig) -> None:
        self._group = group
        self._config = config
        self._regions: Regions | None = None
        self._context: StoreContext | None = None
        self._owes_answer = True
        """Whether the others wait, or will wait, for what this rank says."""

    async def arena(self, push: Callable[[Callable[[], Awaitable[None]]], None]) -> WindowArena:
        """The first step: memory that all ranks can read. ``push`` takes what leaves the group again, last of all."""
        push(self._leave)
        check_shareable(self._config)
        control_bytes = geometry_of(self._config.shm_bytes).control_bytes
        self._owes_answer = False
        try:
            self._regions = await self._group.join(self._config.shm_bytes, control_bytes)
        except asyncio.CancelledError:
            self._owes_answer = True
            raise
        self._owes_answer = True
        return WindowArena(self._regions.arena, self._group.rank)

    async def complete(self, context: StoreContext, push: Callable[[Callable[[], Awaitable[None]]], None]) -> None:
        """The second step, when the store is open: show it to all others."""
        assert self._regions is not None, "arena comes first"
        control, self._regions = self._regions.control, None
        self._owes_answer = False
        self._context = context
        tier = await RemoteTier.open(
            self._group, control, store=context.store_id, digest=context.config.digest,
            arena_bytes=context.shm.capacity_bytes, seconds_max=context.config.remote_seconds_max,
        )  # fmt: skip
        push(tier.aclose)
        sharer = Sharer(context.catalog, tier, context.config.digest)
        context.sharing = Sharing(tier, sharer, Fetcher(context, tier))
        sharer.start()
        context.tasks.spawn(sharer.run(), "cascade-sharer")
        context.tasks.spawn(tier.run(), "cascade-remote")

    async def give_up(self, error: BaseException) -> None:
        """Opening failed with ``error``: tell the others, unless they know. May be called whatever happened."""
        self._regions = None
        if self._owes_answer:
            self._owes_answer = False
            await self._group.refuse(f"{type(error).__name__}: {error}"[:REFUSAL_CHARACTERS_MAX])

    async def _leave(self) -> None:
        """The arena is closed: let go of it, so that the group can give it back."""
        self._regions = None
        if self._context is not None:
            self._context.catalog.forget_copies()
        await self._group.aclose()
