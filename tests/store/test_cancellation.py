"""Every public coroutine, cancelled at every step: nothing leaks, the store works on, blocks are absent or right.

A scenario runs as a task; it is cancelled at its k-th step of the loop, for k = 0, 1, 2 … until it
ends by itself. In the memory world every step is tried; over the real one (io_uring, threads) some.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.errors import BlockNotFoundError, ClosedError
from cascade_aio.testing.world import World, check_idle, check_invariants, pseudo_bytes, settle, virtual_loop
from tests.store.conftest import OpenStore

KEYS = ca.prefix_keys(range(8), block_tokens=1, namespace="cancel")
STEPS_MAX = 400
"""A scenario that has not ended by then hangs."""

Block = tuple[bytes, bytes]
Scenario = Callable[[ca.Store], Coroutine[Any, Any, None]]
Opener = Callable[[], Awaitable[ca.Store]]


def block(name: str, nbytes: int = 60_000) -> Block:
    return pseudo_bytes("k" + name, nbytes // 2), pseudo_bytes("v" + name, nbytes - nbytes // 2)


STORED = [block(f"stored {i}") for i in range(4)]
NEW = block("new")
LARGE = block("large", 700_000)


async def read(store: ca.Store, name: Any) -> Block:
    async with store.get(name) as got:
        return bytes(got.key), bytes(got.value)


# -- scenarios: each is given a store that has STORED on disk only, under KEYS[0:4] ----------------


async def cold_get(store: ca.Store) -> None:
    assert await read(store, KEYS[0]) == STORED[0]


async def awaited_get(store: ca.Store) -> None:
    got = await store.get(KEYS[0])
    try:
        await asyncio.sleep(0)
    finally:
        got.release()


async def gets_of_one_block_of_which_some_give_up(store: ca.Store) -> None:
    gets = [asyncio.ensure_future(read(store, KEYS[1])) for _ in range(3)]
    try:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gets[0].cancel()
        assert await gets[1] == STORED[1]
    finally:
        gets[2].cancel()
        await asyncio.gather(*gets, return_exceptions=True)


async def get_prefix(store: ca.Store) -> None:
    async with store.get_prefix(KEYS) as blocks:
        assert [bytes(got.key) for got in blocks] == [key for key, _ in STORED]
        await asyncio.sleep(0)


async def put(store: ca.Store) -> None:
    await store.put(*NEW, prefix=KEYS[5], parent=KEYS[3])


async def two_puts_of_one_name(store: ca.Store) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(put(store))
        tasks.create_task(put(store))


async def put_again(store: ca.Store) -> None:
    await store.put(*STORED[2], prefix=KEYS[6])


async def put_waiting_for_room(store: ca.Store) -> None:
    holding = await store.get_prefix(KEYS[:4])

    def let_go() -> None:
        for got in holding:
            got.release()

    letting_go = asyncio.get_running_loop().call_later(0.05, let_go)
    try:
        await store.put(*LARGE)
        await store.put(*block("large too", 700_000))
    finally:
        letting_go.cancel()
        for got in holding:
            if not got.released:
                got.release()


async def reserve(store: ca.Store) -> None:
    async with store.reserve(key_bytes=len(NEW[0]), value_bytes=len(NEW[1]), prefix=KEYS[5]) as slot:
        slot.key[:] = memoryview(NEW[0])
        await asyncio.sleep(0)
        slot.value[:] = memoryview(NEW[1])


async def reserve_and_keep_a_view(store: ca.Store) -> None:
    kept = None
    try:
        async with store.reserve(key_bytes=len(NEW[0]), value_bytes=len(NEW[1]), prefix=KEYS[5]) as slot:
            kept = slot.key
            slot.key[:] = memoryview(NEW[0])
            slot.value[:] = memoryview(NEW[1])
        kept[:] = 0
    finally:
        del kept


async def read_into(store: ca.Store) -> None:
    key, value = (bytearray(len(part)) for part in STORED[0])
    await store.read_into(KEYS[0], key, value)
    assert (bytes(key), bytes(value)) == STORED[0]


async def flush(store: ca.Store) -> None:
    await store.put(*NEW, prefix=KEYS[5])
    await store.flush()


async def delete(store: ca.Store) -> None:
    await store.delete(KEYS[3])
    await store.flush()
    await store.put(*STORED[3], prefix=KEYS[3])


async def delete_while_loading(store: ca.Store) -> None:
    async def get() -> None:
        with contextlib.suppress(BlockNotFoundError):
            assert await read(store, KEYS[3]) == STORED[3]

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(get())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await store.delete(KEYS[3])
        await store.put(*NEW)  # gets the row of the deleted block
        await store.put(*STORED[3], prefix=KEYS[3])


async def verify(store: ca.Store) -> None:
    assert (await store.verify()).damage == ()


async def refresh(store: ca.Store) -> None:
    await store.refresh()


async def prefetch_and_wait(store: ca.Store) -> None:
    store.prefetch(KEYS[:4])
    await store.wait_ready()
    await asyncio.sleep(0)
    assert await read(store, KEYS[2]) == STORED[2]


async def close(store: ca.Store) -> None:
    await store.put(*NEW, prefix=KEYS[5])
    await store.aclose()


SCENARIOS = [
    cold_get,
    awaited_get,
    gets_of_one_block_of_which_some_give_up,
    get_prefix,
    put,
    two_puts_of_one_name,
    put_again,
    put_waiting_for_room,
    reserve,
    reserve_and_keep_a_view,
    read_into,
    flush,
    delete,
    delete_while_loading,
    verify,
    refresh,
    prefetch_and_wait,
    close,
]
scenarios = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)


async def cancel_at(work: Coroutine[Any, Any, None], step: int, pause_s: float = 0.0) -> bool:
    """Run ``work`` as a task and cancel it at its ``step``-th turn; whether it ended by itself before."""
    task = asyncio.ensure_future(work)
    for turn in range(step):
        if task.done():
            break
        await asyncio.sleep(0.02 if turn % 40 == 39 else pause_s)  # timers must come, too
    ended = task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return ended


async def absent_or_right(store: ca.Store) -> None:
    """What was stored is there and right, but for what the scenario deletes; what it puts is there and right or not."""
    for name, wanted in [*zip(KEYS[:3], STORED[:3], strict=True), (KEYS[6], STORED[2])]:
        if name != KEYS[6] or name in store:
            assert await read(store, name) == wanted
    also: list[tuple[Any, Block]] = [(KEYS[3], STORED[3]), (KEYS[5], NEW), (ca.compute_block_id(*LARGE), LARGE)]
    for name, wanted in also:
        if name in store:
            assert await read(store, name) == wanted


async def prepare(open_store: Opener) -> ca.Store:
    store = await open_store()
    for i, content in enumerate(STORED):
        await store.put(*content, prefix=KEYS[i], parent=KEYS[i - 1] if i else None)
    await store.aclose()
    return await open_store()


@scenarios
def test_in_memory_at_every_step(scenario: Scenario) -> None:
    async def try_step(step: int) -> bool:
        world = World()
        store = await prepare(world.open)
        ended = await cancel_at(scenario(store), step)
        await settle()
        if scenario is not close or not store._context.closed:
            check_invariants(store)
            await absent_or_right(store)
            assert await read(store, await store.put(*block("after"))) == block("after")
            await store.flush()
            await settle()
            check_idle(store)
            await store.aclose()
        world.check_closed()
        store = await world.open()
        await absent_or_right(store)
        await store.aclose()
        world.check_closed()
        return ended

    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        assert any(runner.run(try_step(step)) for step in range(STEPS_MAX))
        gc.collect()


def test_opening_in_memory_at_every_step() -> None:
    async def try_step(step: int, crashed: bool) -> bool:
        world = World()
        store = await prepare(world.open)
        await store.put(*NEW, prefix=KEYS[5])
        await store.flush()
        await (world.crash() if crashed else store.aclose())

        async def open_and_close() -> None:
            async with contextlib.AsyncExitStack() as stack:
                opened = await world.open()
                stack.push_async_callback(opened.aclose)

        ended = await cancel_at(open_and_close(), step)
        await settle()
        world.check_closed()
        store = await world.open()
        await absent_or_right(store)
        assert KEYS[5] in store
        await store.aclose()
        world.check_closed()
        return ended

    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        for crashed in (False, True):
            assert any(runner.run(try_step(step, crashed)) for step in range(STEPS_MAX))


# -- the same over files, io_uring and threads ------------------------------------------------------


@contextlib.asynccontextmanager
async def nothing_leaks(arena: str) -> AsyncIterator[None]:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    gc.collect()
    assert len(set(os.listdir("/proc/self/fd"))) <= len(before)
    assert not os.path.exists(f"/dev/shm/{arena}")
    assert asyncio.all_tasks() == {asyncio.current_task()}


REAL_STEPS = (1, 2, 3, 5, 8, 13, 21, 34)


@scenarios
async def test_over_real_files(scenario: Scenario, open_small: OpenStore, arena: str) -> None:
    async def open_store() -> ca.Store:
        store: ca.Store = await open_small(shm_bytes="1MiB", segment_bytes="1MiB")
        return store

    await (await prepare(open_store)).aclose()
    async with nothing_leaks(arena):
        for step in REAL_STEPS:
            store = await open_store()
            if scenario is put_waiting_for_room:
                await store.wait_ready()
            ended = await cancel_at(scenario(store), step, pause_s=0.0 if step % 2 else 0.0005)
            if store._context.closed:
                store = await open_store()
            await absent_or_right(store)
            if KEYS[3] not in store:
                await store.put(*STORED[3], prefix=KEYS[3])
            await store.flush()
            await _until_idle(store)
            await store.aclose()
            if ended:
                break


async def _until_idle(store: ca.Store) -> None:
    """Loads that were cancelled drain in the kernel's time, not in turns of the loop."""
    for _ in range(6000):
        if store.statistics()["shm"]["loading"] == 0:
            with contextlib.suppress(AssertionError):
                check_idle(store)
                return
        await asyncio.sleep(0.01)
    check_idle(store)


async def test_opening_over_real_files(open_small: OpenStore, arena: str) -> None:
    async def open_store() -> ca.Store:
        store: ca.Store = await open_small()
        return store

    await (await prepare(open_store)).aclose()
    async with nothing_leaks(arena):
        for step in (*REAL_STEPS, 55, 89):
            opened: list[ca.Store] = []

            async def open_it(opened: list[ca.Store] = opened) -> None:
                opened.append(await open_store())

            await cancel_at(open_it(), step, pause_s=0.0005)
            for store in opened:
                await store.aclose()
                with pytest.raises(ClosedError):
                    await store.flush()
        store = await open_store()
        await absent_or_right(store)
        await store.aclose()
