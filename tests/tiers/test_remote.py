"""Whole stores that are ranks of one job, over a transport in memory that tears, reorders, delays and loses."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from cascade_aio.abc.storage import Platform
from cascade_aio.config import make_config
from cascade_aio.core.remote_operations import Operation
from cascade_aio.errors import BlockNotFoundError, BrokenTierError, ClosedError, ConfigError, TierFullError
from cascade_aio.model import BlockId, PrefixKey, Tier, prefix_keys
from cascade_aio.store.opening import open_with
from cascade_aio.store.store import Store
from cascade_aio.testing.clock import ManualClock
from cascade_aio.testing.memory import MemoryDisk, MemoryEngine, MemoryStorage
from cascade_aio.testing.rma import FakeRanks
from cascade_aio.testing.world import ROOT, SMALL_SETTINGS, check_idle, check_invariants, pseudo_bytes, virtual_loop
from cascade_aio.tiers.remote.group import Call

KIB = 1024


class Job:
    """Ranks on one shared root."""

    def __init__(self, size: int, *, seed: int = 0, **settings: Any) -> None:
        self.ranks = FakeRanks(size, seed=seed)
        self.disk = MemoryDisk()
        self.clock = ManualClock(tick_ns=1000)
        self.settings = {**SMALL_SETTINGS, **settings}
        self.stores: list[Store] = []

    async def open_rank(self, rank: int, **settings: Any) -> Store:
        config = make_config(ROOT, **{**self.settings, **settings})
        platform = Platform(MemoryStorage(self.disk), MemoryEngine(), self.clock)
        return await open_with(config, platform=platform, group=self.ranks.group(rank))

    async def __aenter__(self) -> list[Store]:
        self.stores = list(await asyncio.gather(*(self.open_rank(rank) for rank in range(self.ranks.size))))
        for store in self.stores:
            await store.wait_ready()
        return self.stores

    async def __aexit__(self, *_: object) -> None:
        for store in self.stores:
            if not store._context.closed:
                await store.flush()
                check_idle(store)
                await store.aclose()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, others


def in_virtual_time(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(work)


def at_once(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The test on a loop whose time jumps."""

    def run(**arguments: Any) -> None:
        in_virtual_time(test(**arguments))  # type: ignore[arg-type]

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


async def shown(store: Store) -> None:
    """Return once everything of the store is listed."""
    sharing = store._context.sharing
    assert sharing is not None
    for _ in range(1000):
        if not any(sharing.sharer.statistics()[what] for what in ("to_list", "to_take_out")):
            break
        await asyncio.sleep(0.01)


async def put(store: Store, seed: str, nbytes: int = 40 * KIB, prefix: PrefixKey | None = None) -> BlockId:
    payload = pseudo_bytes(seed, nbytes)
    return await store.put(payload[: nbytes // 2], payload[nbytes // 2 :], prefix=prefix)


async def check(store: Store, name: BlockId | PrefixKey, seed: str, nbytes: int = 40 * KIB) -> Tier:
    """Get the block, compare every byte, and tell where it came from."""
    async with store.get(name) as block:
        assert bytes(block.key) + bytes(block.value) == pseudo_bytes(seed, nbytes)
        return block.tier


def remote(store: Store) -> dict[str, Any]:
    statistics: dict[str, Any] = store.statistics()["remote"]
    return statistics


# -- finding and reading --------------------------------------------------------------------------


@at_once
async def test_a_block_of_another_rank_is_read_from_its_arena_once_and_is_then_ones_own() -> None:
    async with Job(4) as stores:
        block_id = await put(stores[1], "a")
        await shown(stores[1])
        assert block_id not in stores[0]
        assert await stores[0].contains(block_id)
        assert await check(stores[0], block_id, "a") is Tier.REMOTE
        assert await check(stores[0], block_id, "a") is Tier.SHM
        assert remote(stores[0])["reads"] == 1
        assert stores[0].statistics()["store"]["remote_hits"] == 1


@at_once
async def test_what_no_rank_has_is_a_miss_and_empty_blocks_travel() -> None:
    async with Job(3) as stores:
        with pytest.raises(BlockNotFoundError):
            await stores[0].get(BlockId(bytes(16)))
        assert not await stores[0].contains(BlockId(bytes(16)))
        empty = await stores[1].put(b"", b"")
        await shown(stores[1])
        async with stores[2].get(empty) as block:
            assert (len(block.key), len(block.value), block.tier) == (0, 0, Tier.REMOTE)


@at_once
async def test_many_who_ask_for_one_block_cost_one_transfer() -> None:
    async with Job(2) as stores:
        block_id = await put(stores[1], "a")
        await shown(stores[1])
        tiers = await asyncio.gather(*(check(stores[0], block_id, "a") for _ in range(20)))
        assert set(tiers) == {Tier.REMOTE}
        assert remote(stores[0])["reads"] == 1


@at_once
async def test_prefixes_are_found_across_ranks() -> None:
    keys = prefix_keys(range(8 * 16), 16, "m")
    async with Job(4) as stores:
        for number, key in enumerate(keys[:6]):
            await put(stores[number % 3], f"p{number}", prefix=key)
        for store in stores[:3]:
            await shown(store)
        lookup = stores[3].lookup(keys)
        assert len(lookup) == 0
        assert (await lookup).tiers == (Tier.REMOTE,) * 6
        async with stores[3].get_prefix(keys) as blocks:
            assert len(blocks) == 6
            for number, block in enumerate(blocks):
                assert bytes(block.key) + bytes(block.value) == pseudo_bytes(f"p{number}", 40 * KIB)
        assert len(stores[3].lookup(keys)) == 6
        assert await check(stores[3], keys[2], "p2") is Tier.SHM


@at_once
async def test_what_was_just_looked_up_is_not_looked_up_again_unless_it_has_gone() -> None:
    keys = prefix_keys(range(4 * 16), 16, "m")
    async with Job(3) as stores:
        for number, key in enumerate(keys):
            await put(stores[1], f"p{number}", prefix=key)
        await shown(stores[1])
        assert (await stores[0].lookup(keys)).blocks == 4
        asked = remote(stores[0])["looked_up"]
        assert await check(stores[0], keys[0], "p0") is Tier.REMOTE
        assert remote(stores[0])["looked_up"] == asked
        row = stores[1]._context.catalog.index.find_prefix(keys[1])
        await stores[1].flush()
        await put(stores[2], "p1", prefix=keys[1])  # another rank has it, too …
        await shown(stores[2])
        stores[1]._context.catalog.evict(stores[1]._context.catalog.copies[row])  # … and the one looked up no more
        assert await check(stores[0], keys[1], "p1") is Tier.REMOTE
        assert remote(stores[0])["stale"] == 1


@at_once
async def test_a_name_bound_after_the_block_was_shown_is_found_too() -> None:
    first, second = prefix_keys(range(32), 16, "m")
    async with Job(2) as stores:
        await put(stores[0], "a", prefix=first)
        await shown(stores[0])
        await put(stores[0], "a", prefix=second)  # equal content: a further name
        await shown(stores[0])
        assert await check(stores[1], second, "a") is Tier.REMOTE


@at_once
async def test_prefetch_and_stream_bring_blocks_of_other_ranks() -> None:
    keys = prefix_keys(range(12 * 16), 16, "m")
    async with Job(3) as stores:
        for number, key in enumerate(keys[:10]):
            await put(stores[1 + number % 2], f"p{number}", prefix=key)
        await shown(stores[1])
        await shown(stores[2])
        progress = await stores[0].prefetch(keys[:5] + keys[11:]).wait()
        assert (progress.landed, progress.unknown) == (5, 1)
        assert [await check(stores[0], key, f"p{n}") for n, key in enumerate(keys[:5])] == [Tier.SHM] * 5
        seen = 0
        async with stores[0].stream(keys) as blocks:
            async for block in blocks:
                assert bytes(block.key) + bytes(block.value) == pseudo_bytes(f"p{seen}", 40 * KIB)
                seen += 1
        assert seen == 10
        assert remote(stores[0])["reads"] == 10


@at_once
async def test_a_hot_block_is_found_with_those_who_read_it() -> None:
    """Readers spread over the copies that earlier readers have."""
    async with Job(8) as stores:
        block_id = await put(stores[0], "hot")
        await shown(stores[0])
        for store in stores[1:4]:
            assert await check(store, block_id, "hot") is Tier.REMOTE
            await shown(store)
        sources = set()
        for store in stores[4:]:
            sharing = store._context.sharing
            assert sharing is not None
            (listings,) = await sharing.fetcher.lookup([block_id])
            assert {listing.rank for listing in listings} == {0, 1, 2, 3}
            sources.add(listings[0].rank)
        assert len(sources) == 4


@at_once
async def test_a_block_that_the_disk_has_is_read_from_another_rank_first() -> None:
    async with Job(2) as stores:
        block_id = await put(stores[1], "a")
        await stores[1].flush()
        await stores[0].refresh()
        await shown(stores[1])
        assert block_id in stores[0]
        assert await check(stores[0], block_id, "a") is Tier.REMOTE


@at_once
async def test_content_that_came_from_another_rank_is_made_durable_when_it_is_put() -> None:
    async with Job(2) as stores:
        block_id = await put(stores[1], "a")
        await shown(stores[1])
        await check(stores[0], block_id, "a")
        records = stores[0]._context.disk.writer.statistics.records
        assert await put(stores[0], "a") == block_id
        await stores[0].flush()
        assert stores[0]._context.disk.writer.statistics.records == records + 1


# -- what goes away -------------------------------------------------------------------------------


@at_once
async def test_what_is_evicted_or_deleted_is_withdrawn() -> None:
    async with Job(2) as stores:
        gone = await put(stores[1], "a")
        kept = await put(stores[1], "b")
        await shown(stores[1])
        await stores[1].delete(gone)
        await shown(stores[1])
        sharing = stores[0]._context.sharing
        assert sharing is not None
        assert [bool(found) for found in await sharing.fetcher.lookup([gone, kept])] == [False, True]
        assert remote(stores[1])["withdrawn"] == 1


@at_once
async def test_a_block_deleted_here_does_not_come_back_from_a_rank_that_still_has_it() -> None:
    async with Job(2) as stores:
        block_id = await put(stores[1], "a")
        await shown(stores[1])
        await check(stores[0], block_id, "a")
        await stores[0].delete(block_id)
        with pytest.raises(BlockNotFoundError):
            await stores[0].get(block_id)


@pytest.mark.parametrize("seed", range(3))
@at_once
async def test_extents_reused_while_they_are_read_never_give_a_wrong_byte(seed: int) -> None:
    """A small arena that its owner rewrites as fast as the others read: stale reads abound, the disk serves."""
    async with Job(3, seed=seed) as stores:
        chance = random.Random(seed)
        ids: list[tuple[BlockId, str, int]] = []
        reads = 0
        done = False

        async def write() -> None:
            nonlocal done
            for number in range(120):
                nbytes = chance.choice((20, 60, 130)) * KIB
                name = f"{seed}-{number}"
                ids.append((await put(stores[0], name, nbytes), name, nbytes))
                if number % 16 == 0:
                    await stores[0].flush()
                await asyncio.sleep(chance.random() * 3e-3)
            done = True

        async def read(store: Store) -> None:
            nonlocal reads
            while not done:
                await asyncio.sleep(chance.random() * 1e-3)
                if not ids:
                    continue
                block_id, name, nbytes = chance.choice(ids[-12:])
                try:
                    await check(store, block_id, name, nbytes)
                except (BlockNotFoundError, TierFullError):
                    continue
                reads += 1

        await asyncio.gather(write(), *(read(store) for store in stores[1:] for _ in range(3)))
        counts = [remote(store) for store in stores[1:]]
        assert sum(count["reads"] for count in counts) > 30
        assert sum(count["stale"] for count in counts) > 3
        assert sum(count["torn"] for count in counts) == 0
        assert reads > 60
        for store in stores:
            check_invariants(store)


@at_once
async def test_bytes_that_are_not_the_blocks_are_refused_even_if_the_generation_holds() -> None:
    async with Job(2) as stores:
        block_id = await put(stores[1], "a")
        await stores[1].flush()
        await shown(stores[1])
        copy = stores[1]._context.catalog.hot[block_id]
        copy.extent.memory[copy.header_bytes + 5] ^= 1
        with pytest.raises(BlockNotFoundError):
            await stores[0].get(block_id)
        assert remote(stores[0])["torn"] == 1
        await stores[0].refresh()
        assert await check(stores[0], block_id, "a") is Tier.DISK


@at_once
async def test_an_entry_that_gives_an_id_to_another_block_is_not_believed() -> None:
    async with Job(2) as stores:
        block_id = await put(stores[1], "a")
        await shown(stores[1])
        first, second = (store._context.sharing for store in stores)
        assert first is not None
        assert second is not None
        (listings,) = await first.fetcher.lookup([block_id])
        other = BlockId(bytes(range(16)))
        await second.tier.publish([listings[0]._replace(name=other)])
        assert await stores[0].contains(other)  # a hint
        with pytest.raises(BlockNotFoundError):
            await stores[0].get(other)


# -- ranks that go --------------------------------------------------------------------------------


@at_once
async def test_a_rank_that_closes_is_noticed_and_its_names_are_kept_by_others() -> None:
    async with Job(4) as stores:
        ids = [await put(stores[1], f"b{number}", 8 * KIB) for number in range(24)]
        await shown(stores[1])
        await stores[3].aclose()
        sharing = stores[0]._context.sharing
        assert sharing is not None
        found = await sharing.fetcher.lookup(ids)
        assert 0 < sum(map(bool, found)) < 24  # what the closed rank kept is not found …
        assert remote(stores[0])["ranks_closed"] == [3]
        await sharing.fetcher.lookup(ids)
        await put(stores[1], "one more")  # … until its owner has noticed, too
        for number in range(8):
            await put(stores[1], f"more{number}", 4 * KIB)
        await shown(stores[1])
        assert remote(stores[1])["ranks_closed"] == [3]
        assert all(await sharing.fetcher.lookup(ids))
        assert await check(stores[0], ids[0], "b0", 8 * KIB) is Tier.REMOTE


@at_once
async def test_a_rank_that_does_not_answer_is_left_alone_and_the_disk_serves() -> None:
    loop = asyncio.get_running_loop()
    job = Job(3)
    async with job as stores:
        ids = [await put(stores[1], f"b{number}") for number in range(6)]
        await stores[1].flush()
        await stores[0].refresh()
        await shown(stores[1])
        job.ranks.silence(1)
        job.ranks.silence(2)
        started = loop.time()
        for number, block_id in enumerate(ids):
            assert await check(stores[0], block_id, f"b{number}") is Tier.DISK
        assert loop.time() - started < 3 * job.ranks.seconds_max
        assert remote(stores[0])["ranks_lost"] == [1, 2]
        job.ranks.revive(1)
        job.ranks.revive(2)
        await asyncio.sleep(100)
        assert remote(stores[0])["ranks_lost"] == []
        await shown(stores[1])


@at_once
async def test_memory_that_a_silent_rank_may_still_write_to_is_not_used_again() -> None:
    job = Job(2, seed=3)
    async with job as stores:
        block_id = await put(stores[1], "a")
        await shown(stores[1])
        sharing = stores[0]._context.sharing
        assert sharing is not None
        (listings,) = await sharing.fetcher.lookup([block_id])
        before = stores[0]._context.shm.allocated_bytes
        extent = stores[0]._context.shm.allocate(listings[0].record_bytes)
        assert extent is not None
        freed = []
        job.ranks.silence(1)
        header = await sharing.tier.read(listings[0], extent.memory, lambda: freed.append(True))
        assert header is None
        assert not freed
        job.ranks.revive(1)
        await asyncio.sleep(1)
        assert freed
        stores[0]._context.shm.free(extent)
        assert stores[0]._context.shm.allocated_bytes == before


@at_once
async def test_giving_up_a_get_gives_everything_back() -> None:
    async with Job(2) as stores:
        ids = [await put(stores[1], f"b{number}") for number in range(10)]
        await shown(stores[1])
        chance = random.Random(5)
        for number, block_id in enumerate(ids):
            task = asyncio.ensure_future(check(stores[0], block_id, f"b{number}"))
            await asyncio.sleep(chance.random() * 2e-3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(1)


@at_once
async def test_a_transport_that_hangs_is_waited_for_once_and_used_again_when_it_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    async with Job(2) as stores:
        ids = [await put(stores[1], f"b{number}") for number in range(3)]
        await stores[1].flush()
        await stores[0].refresh()
        await shown(stores[1])
        sharing = stores[0]._context.sharing
        assert sharing is not None
        stuck: list[Call[Any]] = []

        def submit(operation: Operation[Any]) -> Call[Any]:
            stuck.append(Call(operation, loop))
            return stuck[-1]

        with monkeypatch.context() as patch:
            patch.setattr(sharing.tier._group, "submit", submit)
            started = loop.time()
            assert await check(stores[0], ids[0], "b0") is Tier.DISK
            patience_s = loop.time() - started
            assert patience_s < 4 * stores[0]._context.config.remote_seconds_max
            assert await check(stores[0], ids[1], "b1") is Tier.DISK
            assert loop.time() - started < patience_s + 1
            assert remote(stores[0])["hangs"]
        unlisted = await put(stores[0], "while it hung")
        await asyncio.sleep(1)
        for call in stuck:
            call.operation.close()
            call.outcome.set_exception(BrokenTierError("it moves"))
        await asyncio.sleep(0)
        assert not remote(stores[0])["hangs"]
        await shown(stores[0])
        assert await check(stores[0], ids[2], "b2") is Tier.REMOTE
        assert await stores[1].contains(unlisted)


@at_once
async def test_closing_in_the_middle_of_transfers_ends_them() -> None:
    async with Job(3) as stores:
        ids = [await put(stores[1], f"b{number}") for number in range(12)]
        await shown(stores[1])
        gets = [asyncio.ensure_future(check(stores[0], block_id, f"b{n}")) for n, block_id in enumerate(ids)]
        prefetch = stores[0].prefetch(ids)
        await asyncio.sleep(3e-4)
        await stores[0].aclose()
        outcomes = await asyncio.gather(*gets, return_exceptions=True)
        assert all(isinstance(end, Tier | ClosedError | BlockNotFoundError) for end in outcomes), outcomes
        assert prefetch.done


# -- opening --------------------------------------------------------------------------------------


@at_once
async def test_a_rank_that_cannot_open_is_everybodys_error() -> None:
    job = Job(3)
    opened = await asyncio.gather(
        job.open_rank(0), job.open_rank(1, warm_restart=True), job.open_rank(2), return_exceptions=True
    )
    assert isinstance(opened[1], ConfigError)
    assert "warm_restart" in str(opened[1])
    for other in (opened[0], opened[2]):
        assert isinstance(other, BrokenTierError)
        assert "rank 1" in str(other)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@at_once
async def test_a_rank_that_fails_late_is_everybodys_error_too() -> None:
    job = Job(3)
    opened = await asyncio.gather(
        job.open_rank(0), job.open_rank(1), job.open_rank(2, disk_bytes=2 << 20), return_exceptions=True
    )
    assert isinstance(opened[2], ConfigError)
    assert [type(error) for error in opened[:2]] == [BrokenTierError] * 2


@at_once
async def test_ranks_of_different_roots_are_refused() -> None:
    job, other = Job(2), MemoryDisk()

    async def elsewhere() -> Store:
        platform = Platform(MemoryStorage(other), MemoryEngine(), job.clock)
        config = make_config(ROOT, **job.settings)
        return await open_with(config, platform=platform, group=job.ranks.group(1))

    opened = await asyncio.gather(job.open_rank(0), elsewhere(), return_exceptions=True)
    assert [type(error) for error in opened] == [ConfigError, ConfigError]
    assert "open the same root on every rank" in str(opened[0])


@at_once
async def test_one_rank_alone_works() -> None:
    async with Job(1) as (store,):
        block_id = await put(store, "a")
        assert await check(store, block_id, "a") is Tier.SHM
        assert not await store.contains(BlockId(bytes(16)))
        with pytest.raises(BlockNotFoundError):
            await store.get(BlockId(bytes(16)))


def test_what_is_no_communicator_is_refused() -> None:
    import cascade_aio

    async def attempt() -> None:
        async with cascade_aio.open_store("/nowhere", comm="COMM_WORLD"):
            raise AssertionError("opened")

    with pytest.raises(ConfigError, match="comm"):
        asyncio.run(attempt())
