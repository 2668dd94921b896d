"""The store and its eviction policies: every event is one the protocol allows, whatever the policy answers."""

from __future__ import annotations

import asyncio
import collections
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.core.eviction import PrefixLru
from cascade_aio.errors import TierFullError
from cascade_aio.testing.world import World, check_idle, check_invariants, settle, virtual_loop
from tests.store.test_pressure import Block, block, crowd

KEYS = ca.prefix_keys(range(40), block_tokens=1, namespace="policies")


def run(story: Callable[[World], Awaitable[None]], **settings: Any) -> None:
    with asyncio.Runner(loop_factory=virtual_loop) as runner:

        async def tell() -> None:
            await story(World(**settings))

        runner.run(tell())


async def read(store: ca.Store, name: Any) -> Block:
    async with store.get(name) as got:
        return bytes(got.key), bytes(got.value)


class Strict:
    """Passes everything on to ``inner`` and fails on an event that ``EvictionPolicy`` does not allow."""

    def __init__(self, inner: EvictionPolicy) -> None:
        self.inner = inner
        self.pins: collections.Counter[int] = collections.Counter()
        self.sizes: dict[int, int] = {}
        self.events = 0

    def admit(self, node: int, *, parent: int = -1, nbytes: int, **more: Any) -> None:
        assert node not in self.sizes
        assert nbytes > 0
        assert parent != node
        self.sizes[node] = nbytes
        self.events += 1
        self.inner.admit(node, parent=parent, nbytes=nbytes, **more)

    def touch(self, node: int) -> None:
        assert node in self.sizes
        self.inner.touch(node)

    def pin(self, node: int) -> None:
        assert node in self.sizes
        self.pins[node] += 1
        self.inner.pin(node)

    def unpin(self, node: int) -> None:
        assert self.pins[node] > 0
        self.pins[node] -= 1
        self.inner.unpin(node)

    def remove(self, node: int) -> None:
        assert node in self.sizes
        assert not self.pins[node]
        del self.sizes[node]
        self.inner.remove(node)

    def victim(self) -> int | None:
        node = self.inner.victim()
        assert node is None or (node in self.sizes and not self.pins[node])
        return node

    def __contains__(self, node: int) -> bool:
        return node in self.inner

    def __len__(self) -> int:
        return len(self.inner)


class AnyOrder(Strict):
    """A policy of bad taste but good manners: any node that is not pinned may be the victim."""

    def __init__(self, seed: int) -> None:
        super().__init__(PrefixLru())
        self.rng = random.Random(seed)
        self.chosen: int | None = None

    def victim(self) -> int | None:
        if self.chosen not in self.sizes or self.pins[self.chosen]:
            free = [node for node in self.sizes if not self.pins[node]]
            self.chosen = self.rng.choice(free) if free else None
        return self.chosen


class Miser(Strict):
    """Gives nothing away."""

    def victim(self) -> int | None:
        return None


def use(store: ca.Store, *, shm: Strict, disk: Strict | None = None) -> None:
    """Replace the policies of a store that is still empty."""
    catalog = store._context.catalog
    assert len(catalog.index) == 0
    catalog.shm_policy = shm
    catalog.disk_policy = disk


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [lambda seed: Strict(PrefixLru()), AnyOrder], ids=["lru", "any-order"])
def test_every_event_is_allowed_and_any_choice_of_victims_is_harmless(make: Callable[[int], Strict], seed: int) -> None:
    async def story(world: World) -> None:
        store = await world.open(disk_bytes=8 << 20)
        shm, disk = make(seed), make(seed + 100)
        use(store, shm=shm, disk=disk)
        await crowd(store, seed, tasks=32, calls=40, pause_s=0.01)
        await store.flush()
        await settle()
        check_idle(store)
        assert shm.events > 100
        assert disk.events > 30
        assert not any(shm.pins.values())
        assert not any(disk.pins.values())
        assert set(shm.sizes) == set(store._context.catalog.copies)
        await store.aclose()
        world.check_closed()

    run(story)


def test_a_policy_that_gives_nothing_away_makes_puts_and_cold_gets_fail_in_time() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        cold = await store.put(*block("cold", 300_000))
        await store.aclose()
        store = await world.open()
        stored: list[Block] = []
        store._context.catalog.shm_policy = Miser(PrefixLru())
        started_s = asyncio.get_running_loop().time()

        async def fill() -> None:
            while True:
                content = block(f"{len(stored)}", 100_000)
                await store.put(*content)
                stored.append(content)

        with pytest.raises(TierFullError):
            await fill()
        with pytest.raises(TierFullError):
            await store.get(cold)
        assert asyncio.get_running_loop().time() - started_s < 11.0
        assert len(stored) > 5
        for content in stored:
            assert await read(store, ca.compute_block_id(*content)) == content
        check_invariants(store)
        for content in stored:
            await store.delete(ca.compute_block_id(*content))
        assert await read(store, cold) == block("cold", 300_000)
        await store.flush()
        await settle()
        check_idle(store)
        await store.aclose()

    run(story)


def test_a_prefix_outlives_its_suffixes_in_the_arena() -> None:
    async def story(world: World) -> None:
        store = await world.open()
        parent = None
        for i, key in enumerate(KEYS[:8]):
            await store.put(*block(f"chain {i}"), prefix=key, parent=parent)
            parent = key
        for i in range(12):
            await store.put(*block(f"filler {i}"))
        await store.flush()
        tiers = store.lookup(KEYS[:8]).tiers
        assert len(tiers) == 8
        assert sorted(tiers, reverse=True) == list(tiers), tiers  # shm ... shm disk ... disk
        await store.aclose()

    run(story)
