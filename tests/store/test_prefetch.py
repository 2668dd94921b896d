"""Reading ahead: handles, streams and blocks that arrive in pieces, in a world of memory and virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import Priority, Urgency
from cascade_aio.errors import BlockNotFoundError, CascadeError, ClosedError, ConfigError, CorruptionError, LeaseError
from cascade_aio.io.schedule import ServiceQueues
from cascade_aio.testing.world import World, check_idle, check_invariants, pseudo_bytes, settle, virtual_loop
from cascade_aio.tiers.reading import RUN_AHEAD_BYTES_MIN
from tests.store.conftest import OpenStore, block_bytes

MIB = 1 << 20
BYTES_PER_S = 1e9
"""The device of these tests: one request at a time."""
TICK_S = 2.0**-19
"""Its times are multiples of it, so that sums are exact: the virtual clock cannot step by a rounding error."""
Story = Callable[[World], Coroutine[Any, Any, None]]
Content = tuple[bytes, bytes]


def run(story: Story, **settings: Any) -> None:
    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(story(World(**settings)))


def blocks(count: int, nbytes: int = 100_000) -> list[Content]:
    return [(pseudo_bytes(f"k{i}", nbytes // 2), pseudo_bytes(f"v{i}", nbytes - nbytes // 2)) for i in range(count)]


def ids_of(contents: list[Content]) -> list[ca.BlockId]:
    return [ca.compute_block_id(*content) for content in contents]


class Device:
    """Makes reads of a world take their time, one after the other; counts what was read at which class."""

    def __init__(self, world: World) -> None:
        self.free_s = 0.0
        self.reads = 0
        self.classes: list[Priority] = []
        storage = world.storage
        storage.hooks.append(self._delay)
        inner = storage.read

        async def read(*args: Any, priority: Priority | Urgency = Priority.DEMAND, **kwargs: Any) -> int:
            count = await inner(*args, priority=priority, **kwargs)
            self.classes.append(priority.priority if isinstance(priority, Urgency) else priority)
            return count

        storage.read = read  # type: ignore[method-assign]

    def _delay(self, operation: Any) -> Awaitable[None] | None:
        if operation.name != "read" or operation.after:
            return None
        self.reads += 1
        now_s = asyncio.get_running_loop().time()
        self.free_s = max(self.free_s, now_s) + round(operation.nbytes / BYTES_PER_S / TICK_S) * TICK_S
        return asyncio.sleep(self.free_s - now_s)


async def stored(world: World, contents: list[Content], **settings: Any) -> tuple[ca.Store, Device]:
    """A store that has ``contents`` on disk only, its reads taking their time."""
    store = await world.open(shm_bytes=64 * MIB)
    for content in contents:
        await store.put(*content)
    await store.aclose()
    store = await world.open(**settings)
    await store.wait_ready()
    return store, Device(world)


async def end(world: World, store: ca.Store) -> None:
    """Nothing is left behind."""
    gc.collect()  # tracebacks of expected errors keep arrays
    await asyncio.sleep(1)  # reads that were cancelled end when the device answers
    await store.flush()
    await settle()
    check_idle(store)
    assert store.statistics()["prefetch"]["active"] == 0
    await store.aclose()
    world.check_closed()


def tier_of(store: ca.Store, block_id: ca.BlockId) -> str:
    return next(str(info.tiers[0]) for info in store.blocks() if info.block_id == block_id)


def records_read(store: ca.Store) -> int:
    return int(store.statistics()["disk"]["records_read"])


def bytes_of(block: ca.Block) -> Content:
    return bytes(block.key), bytes(block.value)


# -- handles ------------------------------------------------------------------------------------


def test_a_prefetch_brings_what_is_on_disk_and_counts_the_rest() -> None:
    async def story(world: World) -> None:
        contents = blocks(4)
        store, device = await stored(world, contents)
        ids = ids_of(contents)
        (await store.get(ids[3])).release()
        before = records_read(store)
        unknown = ca.compute_block_id(b"no", b"where")
        handle = store.prefetch([ids[0], str(ids[1]), ids[0], unknown, ids[3]])
        progress = await handle.wait()
        assert handle.done
        assert (progress.wanted, progress.unknown, progress.failed, progress.pending) == (5, 1, 0, 0)
        assert progress.landed + progress.resident == 4
        assert records_read(store) == before + 2
        assert [tier_of(store, block_id) for block_id in ids] == ["shm", "shm", "disk", "shm"]
        assert set(device.classes[1:]) == {Priority.BACKGROUND}
        await end(world, store)

    run(story)


def test_prefix_keys_and_wrong_names() -> None:
    async def story(world: World) -> None:
        keys = ca.prefix_keys(range(24), block_tokens=8, namespace="prefetch")
        store = await world.open()
        for key, content in zip(keys, blocks(3), strict=True):
            await store.put(*content, prefix=key)
        await store.aclose()
        store = await world.open()
        assert (await store.prefetch(keys).wait()).landed == 3
        for wrong in (["xyz"], [b"short"], [7]):
            with pytest.raises(ConfigError):
                store.prefetch(wrong)  # type: ignore[arg-type]
            with pytest.raises(ConfigError):
                store.stream(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="one name"):
            store.prefetch(str(ids_of(blocks(1))[0]))
        with pytest.raises(ConfigError, match="priority"):
            store.prefetch(keys, priority="urgent")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="ready"):
            store.get(keys[0], ready="soon")  # type: ignore[call-overload]
        with pytest.raises(ConfigError, match="window_bytes"):
            store.stream(keys, window_bytes=0)
        await end(world, store)

    run(story)


@pytest.mark.parametrize("turns", range(12))
def test_cancelling_gives_everything_back_but_what_others_wait_for(turns: int) -> None:
    async def story(world: World) -> None:
        contents = blocks(6)
        store, _ = await stored(world, contents)
        ids = ids_of(contents)
        handle = store.prefetch(ids)
        other = asyncio.ensure_future(read(store, ids[2]))
        await settle(turns)
        handle.cancel()
        handle.cancel()
        progress = await handle.wait()
        assert progress.pending == 0
        assert progress.cancelled > 0
        assert await other == contents[2]
        await end(world, store)

    run(story)


async def read(store: ca.Store, name: Any) -> Content:
    async with store.get(name) as block:
        return bytes_of(block)


def test_a_dropped_handle_goes_on_and_a_deadline_ends_it() -> None:
    async def story(world: World) -> None:
        contents = blocks(8, 600_000)  # each a request of its own
        store, _ = await stored(world, contents, shm_bytes=8 * MIB)
        ids = ids_of(contents)
        store.prefetch(ids[:2])
        gc.collect()
        await asyncio.sleep(1)
        assert [tier_of(store, block_id) for block_id in ids[:3]] == ["shm", "shm", "disk"]
        progress = await store.prefetch(ids, deadline_s=0.0015).wait()  # two blocks and a half
        assert progress.landed == 2
        assert progress.cancelled == 4
        await end(world, store)

    run(story)


@pytest.mark.parametrize("turns", [0, 1, 3, 8])
def test_closing_the_store_cancels(turns: int) -> None:
    async def story(world: World) -> None:
        contents = blocks(6)
        store, _ = await stored(world, contents)
        handle = store.prefetch(ids_of(contents))
        stream = store.stream(ids_of(contents)[3:])
        waiting = asyncio.ensure_future(handle.wait())
        taking = asyncio.ensure_future(anext(stream))
        await settle(turns)
        await store.aclose()
        with pytest.raises(ClosedError):
            await waiting
        with pytest.raises(ClosedError):
            await taking
        with pytest.raises(ClosedError):
            await anext(stream)
        await stream.aclose()
        with pytest.raises(ClosedError):
            store.prefetch([])
        world.check_closed()

    run(story)


def test_a_prefetch_evicts_nothing_that_was_used_since_it_was_asked_for() -> None:
    async def story(world: World) -> None:
        contents = blocks(16)  # nine fit the arena
        store, _ = await stored(world, contents)
        ids = ids_of(contents)
        hot, cold = ids[:8], ids[8:]
        for block_id in hot:
            await read(store, block_id)
        handle = store.prefetch(cold)
        for block_id in hot:
            await read(store, block_id)
        progress = await handle.wait()
        assert progress.refused >= 6
        assert progress.landed + progress.refused == 8
        assert {tier_of(store, block_id) for block_id in hot} == {"shm"}
        assert store.statistics()["shm"]["evicted_blocks"] == 0
        await end(world, store)

    run(story)


def test_a_prefetch_evicts_what_is_colder_but_never_what_it_brings_or_found() -> None:
    async def story(world: World) -> None:
        contents = blocks(16)
        store, _ = await stored(world, contents)
        ids = ids_of(contents)
        for block_id in ids[:9]:
            await read(store, block_id)
        progress = await store.prefetch([*ids[9:], ids[0], ids[1]]).wait()
        assert (progress.landed, progress.resident, progress.refused) == (7, 2, 0)
        assert [tier_of(store, block_id) for block_id in ids] == ["shm"] * 2 + ["disk"] * 7 + ["shm"] * 7
        await end(world, store)

    run(story)


class _NewestFirst:
    """A policy that ranks by anything but age: it offers what was used last."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}
        self._pins: Counter[int] = Counter()

    def admit(self, node: int, **_: Any) -> None:
        self._order[node] = None

    def touch(self, node: int) -> None:
        self._order[node] = self._order.pop(node)

    def pin(self, node: int) -> None:
        self._pins[node] += 1

    def unpin(self, node: int) -> None:
        self._pins[node] -= 1

    def remove(self, node: int) -> None:
        del self._order[node]

    def victim(self) -> int | None:
        return next((node for node in reversed(self._order) if not self._pins[node]), None)

    def __contains__(self, node: int) -> bool:
        return node in self._order

    def __len__(self) -> int:
        return len(self._order)


def test_a_policy_that_offers_what_was_just_used_does_not_stop_a_prefetch_while_older_copies_are_there() -> None:
    async def story(world: World) -> None:
        contents = blocks(12)  # nine fit the arena
        store, _ = await stored(world, contents)
        store._context.catalog.shm_policy = policy = _NewestFirst()
        ids = ids_of(contents)
        for block_id in ids[:9]:
            await read(store, block_id)
        handle = store.prefetch(ids[9:])
        for block_id in ids[:4]:
            await read(store, block_id)
        assert (await handle.wait()).landed == 3
        assert {tier_of(store, block_id) for block_id in [*ids[:4], *ids[9:]]} == {"shm"}
        assert not any(policy._pins.values())
        await end(world, store)

    run(story)


class _OneAtATime:
    """A disk that serves one read at a time, in the order of the I/O queue's own rule."""

    def __init__(self, world: World) -> None:
        self._queues: ServiceQueues[asyncio.Future[None]] = ServiceQueues()
        self._busy = False
        inner = world.storage.read

        async def read(file: Any, buffers: Any, offset: int, *, priority: Priority | Urgency, **kwargs: Any) -> int:
            urgency = priority if isinstance(priority, Urgency) else Urgency(priority)
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waits_as = [urgency.priority]

            def rise(to: Priority) -> None:
                if not turn.done():
                    self._queues.move(turn, waits_as.pop(), to)
                    waits_as.append(to)

            self._queues.push(urgency.priority, turn)
            self._next()
            with urgency.watched(rise):
                await turn
            try:
                await asyncio.sleep(sum(len(buffer) for buffer in buffers) / BYTES_PER_S)
                return await inner(file, buffers, offset, priority=priority, **kwargs)
            finally:
                self._busy = False
                self._next()

        world.storage.read = read  # type: ignore[method-assign, assignment]

    def _next(self) -> None:
        while not self._busy and (priority := self._queues.choose()) is not None:
            turn = self._queues.pop(priority)
            if not turn.done():
                self._busy = True
                turn.set_result(None)


def test_a_get_waits_for_at_most_one_read_of_a_prefetch() -> None:
    async def story(world: World) -> None:
        contents = blocks(400)
        store = await world.open(shm_bytes=64 * MIB)
        for content in contents:
            await store.put(*content)
        await store.aclose()
        store = await world.open(shm_bytes=64 * MIB)
        await store.wait_ready()
        _OneAtATime(world)
        ids = ids_of(contents)
        loop = asyncio.get_running_loop()
        handle = store.prefetch(ids[:380])
        waits: list[float] = []
        for block_id in ids[380:]:
            await asyncio.sleep(0.001)
            started_s = loop.time()
            await read(store, block_id)
            waits.append(loop.time() - started_s)
        assert not handle.done, "it was under way all the time"
        assert max(waits) <= (RUN_AHEAD_BYTES_MIN + MIB) / BYTES_PER_S
        assert (await handle.wait()).landed == 380
        await end(world, store)

    run(story, shm_bytes=64 * MIB)


@pytest.mark.parametrize("turns", range(8))
def test_a_get_that_joined_a_prefetch_and_gave_up_does_not_cancel_it(turns: int) -> None:
    async def story(world: World) -> None:
        contents = blocks(2, 600_000)
        store, _ = await stored(world, contents, shm_bytes=8 * MIB)
        ids = ids_of(contents)
        handle = store.prefetch(ids)
        await settle(turns)
        getting = asyncio.ensure_future(read(store, ids[1]))
        await settle(turns)
        getting.cancel()
        await asyncio.wait((getting,))
        progress = await handle.wait()
        assert progress.landed + progress.resident == 2
        assert {tier_of(store, block_id) for block_id in ids} == {"shm"}
        assert records_read(store) == 2
        await end(world, store)

    run(story)


def test_a_get_makes_the_prefetch_of_its_block_a_demand() -> None:
    async def story(world: World) -> None:
        contents = blocks(3, 600_000)  # each a request of its own
        store, device = await stored(world, contents, shm_bytes=4 * MIB)
        ids = ids_of(contents)
        store.prefetch(ids)
        await settle(3)
        assert await read(store, ids[1]) == contents[1]
        await asyncio.sleep(1)
        assert records_read(store) == 3
        assert sorted(device.classes) == [Priority.DEMAND, Priority.BACKGROUND, Priority.BACKGROUND]
        assert store.statistics()["store"]["single_flight_joins"] == 1
        await end(world, store)

    run(story)


def test_a_get_of_what_a_prefetch_has_no_room_for_is_a_demand_for_room() -> None:
    async def story(world: World) -> None:
        contents = blocks(12)
        store, _ = await stored(world, contents)
        ids = ids_of(contents)
        for block_id in ids[:9]:
            await read(store, block_id)
        handle = store.prefetch([ids[10]])
        for block_id in ids[:9]:
            await read(store, block_id)
        assert store.statistics()["shm"]["evicted_blocks"] == 0
        assert await read(store, ids[10]) == contents[10]
        assert (await handle.wait()).landed == 1
        await end(world, store)

    run(story)


# -- streams ------------------------------------------------------------------------------------


async def consume(stream: Any, contents: list[Content], seconds: float = 0.0) -> int:
    """Compare every block of ``stream``, using each for ``seconds``."""
    count = 0
    async with stream:
        async for block in stream:
            assert bytes_of(block) == contents[count]
            await asyncio.sleep(seconds)
            count += 1
    return count


@pytest.mark.parametrize("arena_mib", [1, 4])
@pytest.mark.parametrize("seconds", [0.0, 0.00003, 0.001])
def test_a_stream_gives_all_blocks_in_order_also_if_they_do_not_fit(arena_mib: int, seconds: float) -> None:
    async def story(world: World) -> None:
        contents = blocks(30)
        store, _ = await stored(world, contents, shm_bytes=arena_mib * MIB)
        stream = store.stream(ids_of(contents))
        assert await consume(stream, contents, seconds) == 30
        assert stream.ended_because == "exhausted"
        assert stream.error is None
        assert records_read(store) == 30
        if seconds > 0.0001:
            assert stream.stalls <= 2  # the first, and one where neighbours came in one request
        await end(world, store)

    run(story)


def test_a_chain_of_prefixes_larger_than_the_arena_leaves_its_beginning() -> None:
    async def story(world: World) -> None:
        keys = ca.prefix_keys(range(240), block_tokens=8, namespace="chain")
        contents = blocks(30)
        store = await world.open(shm_bytes=64 * MIB)
        for i, content in enumerate(contents):
            await store.put(*content, prefix=keys[i], parent=keys[i - 1] if i else None)
        await store.aclose()
        store = await world.open()
        assert await consume(store.stream(keys), contents, 0.001) == 30
        assert [str(tier) for tier in store.lookup(keys).tiers[:3]] == ["shm"] * 3
        await end(world, store)

    run(story)


def test_duplicates_in_the_list() -> None:
    async def story(world: World) -> None:
        contents = blocks(4)
        order = [0, 0, 1, 0, 2, 2, 3, 0]
        store, _ = await stored(world, contents)
        wanted = [contents[i] for i in order]
        assert await consume(store.stream(ids_of(wanted)), wanted, 0.001) == len(order)
        assert records_read(store) == 4
        await end(world, store)

    run(story)


def test_a_stream_through_an_arena_of_one_block() -> None:
    async def story(world: World) -> None:
        contents = blocks(6, 700_000)
        store, _ = await stored(world, contents)
        assert await consume(store.stream(ids_of(contents)), contents, 0.001) == 6
        await end(world, store)

    run(story)


def test_two_streams_at_once_through_a_small_arena() -> None:
    async def story(world: World) -> None:
        contents = blocks(24)
        store, _ = await stored(world, contents)
        one, two = contents[:14], contents[10:]
        counts = await asyncio.gather(
            consume(store.stream(ids_of(one)), one, 0.0001), consume(store.stream(ids_of(two)), two, 0.0002)
        )
        assert list(counts) == [14, 14]
        await end(world, store)

    run(story)


@pytest.mark.parametrize("place", [0, 4, 9])
@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_a_stream_ends_before_the_first_block_that_cannot_be_had(place: int, what: str) -> None:
    async def story(world: World) -> None:
        contents = blocks(10)
        store, _ = await stored(world, contents)
        ids = ids_of(contents)
        if what == "missing":
            await store.delete(ids[place])
        else:
            damage(world, contents[place][1])
        stream = store.stream(ids)
        assert await consume(stream, contents, 0.001) == place
        assert stream.ended_because == what
        assert stream.position == place
        assert isinstance(stream.error, BlockNotFoundError if what == "missing" else CorruptionError)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await end(world, store)

    run(story)


def damage(world: World, part: bytes) -> None:
    """Flip a bit in the middle of ``part``, wherever it is on the disk."""
    needle = part[len(part) // 2 :][:64]
    for path in list(world.disk.files):
        offset = world.disk.content(path).find(needle)
        if offset >= 0:
            world.disk.flip_bit(path, offset * 8)
            return
    raise AssertionError("it is not on disk")


def test_breaking_out_of_a_stream_cancels_what_it_alone_wanted() -> None:
    async def story(world: World) -> None:
        contents = blocks(30)
        store, _ = await stored(world, contents)
        async for block in store.stream(ids_of(contents)):
            assert bytes_of(block) == contents[0]
            break
        block.release()
        del block
        await settle()
        assert store.statistics()["prefetch"]["active"] == 0
        assert store.statistics()["shm"]["pinned_bytes"] == 0
        await asyncio.sleep(1)
        assert records_read(store) < 15
        await end(world, store)

    run(story)


def test_a_cancelled_consumer_leaves_nothing_behind() -> None:
    async def try_step(world: World, step: int) -> bool:
        contents = blocks(12)
        store, _ = await stored(world, contents)
        task = asyncio.ensure_future(consume(store.stream(ids_of(contents)), contents))
        for turn in range(step):
            await asyncio.sleep(0.00005 if turn % 8 == 7 else 0)
        ended = task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await settle()
        check_invariants(store)
        await end(world, store)
        return ended

    def once(step: int) -> bool:
        with asyncio.Runner(loop_factory=virtual_loop) as runner:
            return runner.run(try_step(World(), step))

    assert not any(once(step) for step in range(0, 60, 3))


def test_kept_leases_are_the_callers() -> None:
    async def story(world: World) -> None:
        contents = blocks(5)
        store, _ = await stored(world, contents)
        async with store.stream(ids_of(contents), keep=True) as stream:
            kept = [block async for block in stream]
        assert [bytes_of(block) for block in kept] == contents
        for block in kept:
            block.release()
        await end(world, store)

    run(story)


def test_a_stream_has_one_consumer_at_a_time_and_may_end_early() -> None:
    async def story(world: World) -> None:
        contents = blocks(5)
        store, _ = await stored(world, contents)
        stream = store.stream(ids_of(contents))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(CascadeError, match="one consumer"):
            await anext(stream)
        assert bytes_of(await first) == contents[0]
        await stream.aclose()
        await stream.aclose()
        assert stream.ended_because == "closed"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await end(world, store)

    run(story)


def test_what_a_slow_consumer_has_not_taken_makes_way_for_foreground_calls() -> None:
    async def story(world: World) -> None:
        contents = blocks(20)
        store, _ = await stored(world, contents)
        ids = ids_of(contents)
        async with store.stream(ids[:12], window_bytes=MIB) as stream:
            await anext(stream)
            await asyncio.sleep(1)
            held = store.statistics()["shm"]["pinned_bytes"]
            assert held > 700_000
            started_s = asyncio.get_running_loop().time()
            kept = [await store.get(block_id) for block_id in ids[12:18]]
            assert asyncio.get_running_loop().time() - started_s < 0.1
            assert store.statistics()["prefetch"]["let_go"] > 0
            for block in kept:
                block.release()
            position = 1
            async for block in stream:
                assert bytes_of(block) == contents[position]
                position += 1
            assert position == 12
        await end(world, store)

    run(story)


def test_a_stream_brings_a_block_twice_only_if_it_was_given_up() -> None:
    async def story(world: World) -> None:
        contents = blocks(9)
        store, _ = await stored(world, contents)
        ids = ids_of(contents)
        (await store.get(ids[1])).release()
        assert await consume(store.stream(ids), contents) == 9
        assert records_read(store) == 9
        await end(world, store)

    run(story)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_a_decode_loop_takes_as_long_as_its_slower_side(ratio: float) -> None:
    async def story(world: World) -> None:
        contents = blocks(40, 600_000)
        store, _ = await stored(world, contents, shm_bytes=8 * MIB)
        record_s = (len(contents[0][0]) + len(contents[0][1]) + 8192) / BYTES_PER_S
        compute_s = ratio * record_s
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        assert await consume(store.stream(ids_of(contents)), contents, compute_s) == 40
        seconds = loop.time() - started_s
        assert seconds <= 1.02 * 40 * max(record_s, compute_s) + 2 * min(record_s, compute_s)
        await end(world, store)

    run(story)


# -- blocks that arrive in pieces ---------------------------------------------------------------

LARGE = 20 * MIB
LAYERS = 20


async def large(world: World) -> tuple[ca.Store, Device, Content]:
    (content,) = blocks(1, 2 * LARGE)
    store, device = await stored(world, [content], shm_bytes=64 * MIB)
    return store, device, content


def big(story: Story) -> None:
    run(story, shm_bytes=64 * MIB, segment_bytes=64 * MIB)


def test_the_first_layer_is_there_long_before_the_last() -> None:
    async def story(world: World) -> None:
        store, _, content = await large(world)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        at_s: list[float] = []
        step = LARGE // LAYERS
        async with store.get(ids_of([content])[0], ready="first-bytes") as block:
            complete_at_first = block.complete
            assert not complete_at_first
            with pytest.raises(LeaseError, match="still being read"):
                _ = block.key
            with pytest.raises(LeaseError, match="still being read"):
                block.views()
            async for key, value in block.layers(LAYERS):
                layer = len(at_s)
                assert not key.flags.writeable
                assert bytes(key) == content[0][layer * step : (layer + 1) * step]
                assert bytes(value) == content[1][layer * step : (layer + 1) * step]
                at_s.append(loop.time() - started_s)
            del key, value
            assert block.complete
            await block.ready()
            assert bytes_of(block) == content
        assert at_s == sorted(at_s)
        assert at_s[0] < 0.1 * at_s[-1]
        await settle()
        async with store.get(ids_of([content])[0], ready="first-bytes") as block:
            assert block.complete
            assert block.tier == "shm"
        await end(world, store)

    big(story)


def test_ranges_of_a_part() -> None:
    async def story(world: World) -> None:
        store, _, content = await large(world)
        async with store.get(ids_of([content])[0], ready="first-bytes") as block:
            tail = await block.ready("value", LARGE - 10)
            assert tail is not None
            assert bytes(tail) == content[1][-10:]
            del tail
            empty = await block.ready("key", 5, 5)
            assert empty is not None
            assert empty.shape == (0,)
            del empty
            for wrong in ((-1, 5), (5, 4), (0, LARGE + 1)):
                with pytest.raises(ConfigError, match="outside"):
                    await block.ready("key", *wrong)
            with pytest.raises(ConfigError, match="part"):
                await block.ready("both")  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match="equal layers"):
                await anext(block.layers(7))
        with pytest.raises(LeaseError):
            await block.ready()
        await end(world, store)

    big(story)


def test_damage_is_raised_where_it_is_awaited_and_not_before() -> None:
    async def story(world: World) -> None:
        store, _, content = await large(world)
        damage(world, content[1])
        block = await store.get(ids_of([content])[0], ready="first-bytes")
        whole = asyncio.ensure_future(read(store, ids_of([content])[0]))
        first = await block.ready("key", 0, MIB)
        assert first is not None
        assert bytes(first) == content[0][:MIB]

        async def all_layers() -> None:
            async for _ in block.layers(LAYERS):
                pass

        with pytest.raises(CorruptionError):
            await all_layers()
        with pytest.raises(CorruptionError):
            await whole
        with pytest.raises(LeaseError):
            _ = block.value
        assert bytes(first) == content[0][:MIB]  # the lease keeps what was verified
        del first
        block.release()
        assert ids_of([content])[0] not in store
        await end(world, store)

    big(story)


@pytest.mark.parametrize("turns", [0, 1, 5, 20])
def test_releasing_before_the_end_stops_the_reading_unless_others_want_it(turns: int) -> None:
    async def story(world: World) -> None:
        store, _, content = await large(world)
        (block_id,) = ids_of([content])
        block = await store.get(block_id, ready="first-bytes")
        await settle(turns)
        block.release()
        await settle()
        assert store.statistics()["shm"]["loading"] == 0
        assert tier_of(store, block_id) == "disk"
        await asyncio.sleep(1)
        assert store.statistics()["shm"]["allocated_bytes"] == 0
        block = await store.get(block_id, ready="first-bytes")
        other = asyncio.ensure_future(read(store, block_id))
        await settle(2)
        block.release()
        assert await other == content
        await end(world, store)

    big(story)


def test_a_lease_on_first_bytes_outlives_deletion_and_its_arrays_outlive_the_lease() -> None:
    async def story(world: World) -> None:
        store, _, content = await large(world)
        (block_id,) = ids_of([content])
        block = await store.get(block_id, ready="first-bytes")
        await store.delete(block_id)
        await store.flush()  # now: the virtual clock cannot take the writer's last step to a time of its own
        await block.ready()
        assert bytes_of(block) == content
        array = await block.ready("value", 0, 100)
        assert array is not None
        block.release()
        await settle()
        assert bytes(array) == content[1][:100]
        assert store.statistics()["shm"]["allocated_bytes"] > 0
        del array
        await settle()
        assert store.statistics()["shm"]["allocated_bytes"] == 0
        await end(world, store)

    big(story)


def test_closing_while_a_block_arrives() -> None:
    async def story(world: World) -> None:
        store, _, content = await large(world)
        block = await store.get(ids_of([content])[0], ready="first-bytes")
        waiting = asyncio.ensure_future(block.ready())
        await settle(2)
        with pytest.warns(ResourceWarning):
            await store.aclose()
        with pytest.raises(ClosedError):
            await waiting
        block.release()
        world.check_closed()

    big(story)


def test_a_stream_of_first_bytes() -> None:
    async def story(world: World) -> None:
        contents = blocks(3, 2 * LARGE)
        store, _ = await stored(world, contents, shm_bytes=128 * MIB)
        count = 0
        async with store.stream(ids_of(contents), ready="first-bytes") as stream:
            async for block in stream:
                layers = [(bytes(key), bytes(value)) async for key, value in block.layers(LAYERS)]
                assert b"".join(key for key, _ in layers) == contents[count][0]
                assert b"".join(value for _, value in layers) == contents[count][1]
                count += 1
        assert count == 3
        await end(world, store)

    big(story)


# -- the real thing -----------------------------------------------------------------------------


async def test_on_real_files(open_small: OpenStore) -> None:
    contents = [block_bytes(seed, 2 * MIB + 5, 3 * MIB) for seed in range(8)]
    async with open_small(shm_bytes="48MiB") as store:
        ids = [await store.put(*content) for content in contents]
    async with open_small(shm_bytes="24MiB") as store:
        assert (await store.prefetch(ids[:2]).wait()).landed == 2
        assert await consume(store.stream(ids), contents) == 8
        async with store.get(ids[3], ready="first-bytes") as block:
            key = await block.ready("key")
            assert key is not None
            assert np.array_equal(key, np.frombuffer(contents[3][0], np.uint8))
            del key
            await block.ready()
            assert bytes_of(block) == contents[3]
        async with store.stream(ids, ready="first-bytes", window_bytes="8MiB", priority="high") as stream:
            count = 0
            async for block in stream:
                value = await block.ready("value")
                assert value is not None
                assert bytes(value) == contents[count][1]
                del value
                count += 1
        assert count == 8
