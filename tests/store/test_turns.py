"""What touches every block of a segment lets the loop turn meanwhile, and is not left half done by a cancellation."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from cascade_aio.segments.facts import BlockFact, Fact, Location, VanishedFact
from cascade_aio.store.recovering import STEPS_PER_TURN, take_in
from cascade_aio.store.store import Store
from cascade_aio.store.verifying import Examination, Verifier
from cascade_aio.testing.world import World, run
from tests.store.test_merging import segment_of

BLOCKS = 2000


def fill(store: Store, segment: int) -> None:
    for number in range(BLOCKS):
        digest = hashlib.sha256(b"%d" % number).digest()
        fact = BlockFact(Location(segment, 1 + 2 * number, 1), 8192, digest, 100, 1000, number, False)
        store._context.merger.apply(fact)


async def turns(work: Awaitable[object]) -> int:
    """How often others get their turn while ``work`` is done."""
    count = 0

    async def tick() -> None:
        nonlocal count
        while True:
            await asyncio.sleep(0)
            count += 1

    ticking = asyncio.ensure_future(tick())
    await work
    ticking.cancel()
    return count


async def told(fact: Fact) -> AsyncIterator[Fact]:
    yield fact


def test_a_segment_that_is_gone_is_forgotten_in_steps_and_whole() -> None:
    async def story(cut_short: bool) -> None:
        store = await World().open()
        segment = segment_of(store, 1)
        fill(store, segment)
        await store._context.disk.table.forget(segment)
        taking = take_in(store._context, told(VanishedFact(segment)))
        if cut_short:
            task = asyncio.ensure_future(taking)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            assert await turns(taking) >= BLOCKS // STEPS_PER_TURN - 2
        assert len(store) == 0
        await store.aclose()

    run(lambda: story(cut_short=False))
    run(lambda: story(cut_short=True))


@pytest.mark.parametrize("what", ["verify", "adopt", "evict"])
def test_others_have_their_turn(what: str) -> None:
    async def story() -> None:
        store = await World().open(when_full="evict")
        segment = segment_of(store, 1, own=what != "adopt")
        fill(store, segment)
        entry = store._context.disk.table[segment]
        entry.own = entry.sealed = True
        work: dict[str, Callable[[], Awaitable[object]]] = {
            "verify": lambda: Verifier(store._context, None)._check_index(Examination(entry)),
            "adopt": lambda: store._context.adopter._take_stock([entry]),
            "evict": lambda: store._space._evict(segment),
        }
        assert await turns(work[what]()) >= BLOCKS // 256 - 2
        if what == "evict":
            assert len(store) == 0
        await store._context.disk.table.forget(segment)
        store._context.merger.apply(VanishedFact(segment))
        await store.aclose()

    run(story)
