"""What the root holds already: recovery at opening, news of other writers at ``refresh``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from cascade_aio.segments.facts import BindingFact, BlockFact, Fact, TombstoneFact
from cascade_aio.segments.layout import Root, WriterClaim
from cascade_aio.segments.recovery import Recovery
from cascade_aio.store.context import StoreContext


async def recover(context: StoreContext, root: Root, claim: WriterClaim) -> None:
    """Fill the catalog from the root's segments. Own open segments of a crash are sealed on the way."""
    recovery = Recovery(context.platform.storage, context.platform.engine, root, context.disk.table, claim)
    context.recovery = recovery
    await _take_in(context, recovery.recover_root())


async def refresh(context: StoreContext) -> int:
    """See ``Store.refresh``: apply what other writers added, deleted and removed; count new blocks."""
    async with context.refreshing:
        return await _take_in(context, context.recovery.refresh_root())


async def _take_in(context: StoreContext, facts: AsyncIterator[Fact]) -> int:
    fresh = 0
    wall_ns = context.platform.clock.wall_ns()
    async with contextlib.aclosing(facts) as stream:  # type: ignore[type-var]
        async for fact in stream:
            if isinstance(fact, BlockFact | BindingFact | TombstoneFact):
                context.disk.clock.observe(fact.stamp, wall_ns)
            fresh += context.merger.apply(fact)
    context.merger.settle()
    return fresh
