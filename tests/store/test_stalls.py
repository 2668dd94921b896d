"""Storage that does not answer: nobody hangs, nothing is lost, no memory is used twice, and in the end all goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

import cascade_aio as ca
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import MemoryStorage, Operation
from cascade_aio.testing.world import World, cancel_others, check_idle, check_invariants, pseudo_bytes, run
from tests.store.test_adopting import NBYTES, disk, expect, put

NAMES = ca.prefix_keys(range(64), block_tokens=4, namespace="stalls")


def now() -> float:
    return asyncio.get_running_loop().time()


def reads(operation: Operation) -> bool:
    return operation.name == "read"


def writes(operation: Operation) -> bool:
    return operation.name == "write" and operation.path.endswith(".seg")


def syncs(operation: Operation) -> bool:
    return operation.name == "sync"


async def reopened(world: World, blocks: int = 12) -> tuple[Store, list[ca.BlockId], MemoryStorage]:
    """A store with ``blocks`` on disk and none in the arena."""
    store = await world.open()
    ids = [
        await store.put(b"", pseudo_bytes(str(n), NBYTES), prefix=NAMES[n], parent=NAMES[n - 1] if n else None)
        for n in range(blocks)
    ]
    await store.aclose()
    store = await world.open()
    return store, ids, world.storage


def test_a_read_that_hangs_is_a_miss_and_the_next_ones_do_not_wait() -> None:
    async def story() -> None:
        store, ids, storage = await reopened(World(read_seconds_max=2.0))
        storage.stall(reads)
        begun = now()
        with pytest.raises(ca.BlockNotFoundError, match="read_seconds_max"):
            await store.get(ids[0])
        assert now() - begun == pytest.approx(2.0, abs=0.1)
        assert disk(store)["slow"]
        begun = now()
        for block_id in ids:
            with pytest.raises(ca.BlockNotFoundError, match="not answered"):
                await store.get(block_id)
        assert await store.get_prefix(NAMES[:4]) == []
        async with store.stream(NAMES[:4]) as blocks:
            assert [block async for block in blocks] == []
        assert now() - begun < 0.1
        assert storage.stuck == 1, "one request waits, whoever asks"
        assert len(store) == len(ids), "nothing is forgotten"
        assert disk(store)["refused_reads"] >= len(ids)
        storage.resume()
        await asyncio.sleep(1)
        assert not disk(store)["slow"]
        await expect(store, ids)
        check_idle(store)
        await store.aclose()

    run(story)


@pytest.mark.parametrize("how", ["prefix", "stream", "first-bytes", "read_into"])
def test_no_way_of_reading_waits_longer(how: str) -> None:
    async def story() -> None:
        store, ids, storage = await reopened(World(read_seconds_max=2.0))
        storage.stall(reads)
        begun = now()
        if how == "prefix":
            assert await store.get_prefix(NAMES[:5]) == []
        elif how == "stream":
            async with store.stream(NAMES[:5]) as blocks:
                assert [block async for block in blocks] == []
                assert blocks.ended_because == "missing"
        elif how == "first-bytes":
            with pytest.raises(ca.BlockNotFoundError):
                await store.get(ids[0], ready="first-bytes")
        else:
            with pytest.raises(ca.BlockNotFoundError):
                await store.read_into(ids[0], bytearray(0), bytearray(NBYTES))
        assert now() - begun < 2.5
        assert disk(store)["slow"]
        storage.resume()
        await asyncio.sleep(1)
        await expect(store, ids)
        await store.aclose()

    run(story)


def test_the_memory_of_a_stuck_read_is_not_used_before_it_is_given_back() -> None:
    """The kernel writes into it at the very end: nobody else's block may lie there by then."""

    async def story() -> None:
        store, ids, storage = await reopened(World(read_seconds_max=2.0))
        storage.stall(reads)
        with pytest.raises(ca.BlockNotFoundError):
            await store.get(ids[0])
        assert store.statistics()["shm"]["allocated_bytes"] > NBYTES
        others = []
        for number in range(100, 160):  # several times what the arena holds
            others.append(await store.put(b"", pseudo_bytes(str(number), NBYTES)))
            await store.flush()
        resident = [(n, block_id) for n, block_id in enumerate(others, 100) if block_id in store._context.catalog.hot]
        assert len(resident) > 5
        storage.resume()
        for number, block_id in resident:
            async with store.get(block_id) as block:
                assert bytes(block.value) == pseudo_bytes(str(number), NBYTES)
        await asyncio.sleep(1)
        check_idle(store)
        await store.aclose()

    run(story)


def test_a_probe_that_hangs_keeps_the_disk_marked_and_one_that_fails_does_not() -> None:
    async def story() -> None:
        store, ids, storage = await reopened(World(read_seconds_max=2.0))
        storage.stall(reads)
        with pytest.raises(ca.BlockNotFoundError):
            await store.get(ids[0])
        for future in storage._stuck:
            future.set_result(None)  # the read is given back, the next request hangs again
        await asyncio.sleep(100)
        assert disk(store)["slow"]
        assert storage.stuck == 1
        assert disk(store)["slow_s"] > 90

        def fail(operation: Operation) -> OSError | None:
            return OSError(5, "bad") if operation.name == "read" and operation.after else None

        storage.hooks.append(fail)
        storage.resume()
        await asyncio.sleep(1)
        assert not disk(store)["slow"]
        with pytest.raises(OSError, match="bad"):
            await store.get(ids[1])
        storage.hooks.clear()
        await expect(store, ids)
        await store.aclose()

    run(story)


@pytest.mark.parametrize("which", [writes, syncs])
def test_writes_that_hang_leave_puts_going_and_flush_failing_in_time(which: Callable[[Operation], bool]) -> None:
    async def story() -> None:
        world = World(stall_seconds_max=3.0, put_wait_seconds_max=1.0)
        store = await world.open()
        ids = await put(store, range(2))
        world.storage.stall(which)
        begun = now()
        ids.append(await store.put(b"", pseudo_bytes("2", NBYTES)))
        waiting = [asyncio.ensure_future(store.flush()) for _ in range(3)]
        for flush in waiting:
            with pytest.raises(ca.TierStalledError, match="not answered"):
                await flush
        assert now() - begun < 4.5
        assert disk(store)["stalled"]
        begun = now()
        with pytest.raises(ca.TierStalledError):
            await store.flush()
        assert now() == begun, "known to hang"
        with pytest.raises(ca.TierFullError, match="does not answer"):  # noqa: PT012 - one of them is the first refused
            for number in range(3, 40):
                ids.append(await store.put(b"", pseudo_bytes(str(number), NBYTES)))
        assert len(ids) > 8, "memory takes what it can"
        check_invariants(store)
        for number, block_id in enumerate(ids[2:], 2):
            async with store.get(block_id) as block:
                assert bytes(block.value) == pseudo_bytes(str(number), NBYTES)
        world.storage.resume()
        await asyncio.sleep(0.1)
        await store.flush()
        assert not disk(store)["stalled"]
        await world.crash()
        store = await world.open()
        await expect(store, ids)
        await store.aclose()

    run(story)


async def _read(store: Store, block_id: ca.BlockId) -> list[str]:
    """How a get ends."""
    try:
        async with store.get(block_id):
            return ["read"]
    except ca.BlockNotFoundError:
        return ["missed"]
    except ca.ClosedError:
        return ["closed"]


@pytest.mark.parametrize("which", [reads, writes, syncs, lambda operation: True], ids=["read", "write", "sync", "all"])
def test_closing_a_store_whose_storage_hangs_ends_in_time(which: Callable[[Operation], bool]) -> None:
    async def story() -> None:
        world = World(stall_seconds_max=3.0, read_seconds_max=2.0)
        store, ids, storage = await reopened(world)
        lease = await store.get(ids[3])
        storage.stall(which)
        reading = asyncio.ensure_future(_read(store, ids[0]))
        ids.append(await store.put(b"", pseudo_bytes("new", NBYTES)))
        await asyncio.sleep(0.5)
        begun = now()
        with pytest.warns(ResourceWarning), pytest.raises(ca.TierStalledError, match="given up"):
            await store.aclose()
        assert now() - begun < 20
        assert await reading in (["read"], ["missed"], ["closed"])
        assert bytes(lease.value) == pseudo_bytes("3", NBYTES)
        lease.release()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others
        world.disk.locked.clear()
        again = await world.open()
        await expect(again, ids[:12])
        await again.aclose()

    run(story)


def test_a_slow_but_working_storage_is_not_given_up_at_the_end() -> None:
    async def story() -> None:
        world = World(stall_seconds_max=3.0, shm_bytes=4 << 20)
        store = await world.open()
        world.storage.hooks.append(
            lambda operation: asyncio.sleep(2) if operation.name == "write" and not operation.after else None
        )
        ids = [await store.put(b"", pseudo_bytes(str(number), NBYTES)) for number in range(20)]
        await store.aclose()
        store = await world.open()
        await expect(store, ids)
        await store.aclose()
        await cancel_others()

    run(story)


@pytest.mark.parametrize("call", ["refresh", "verify", "adopt"])
def test_calls_that_look_at_files_end_in_time_and_work_later(call: str) -> None:
    async def story() -> None:
        world = World(stall_seconds_max=3.0)
        store, ids, storage = await reopened(world)
        storage.stall()
        begun = now()
        with pytest.raises(ca.TierStalledError, match="may be made again"):
            await getattr(store, call)()
        assert now() - begun < 7
        impatient = asyncio.ensure_future(getattr(store, call)())
        await asyncio.sleep(0.1)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert now() - begun < 14
        storage.resume()
        await asyncio.sleep(0.1)
        await getattr(store, call)()
        await expect(store, ids)
        check_idle(store)
        await store.aclose()

    run(story)


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("where", ["list_directory", "read", "try_lock"])
def test_an_opening_on_storage_that_hangs_ends_in_time_and_gives_all_back(where: str, patient: bool) -> None:
    async def story() -> None:
        world = World(stall_seconds_max=3.0)
        store = await world.open()
        block_id = await store.put(b"", pseudo_bytes("0", NBYTES))
        await store.flush()
        world.disk = world.disk.kill()
        for storage in world.storages:
            storage.freeze_at = 0
        await cancel_others()

        class Stalling(list[MemoryStorage]):
            def append(self, storage: MemoryStorage) -> None:
                storage.stall(lambda operation: operation.name == where)
                super().append(storage)

        world.storages = Stalling()
        begun = now()
        opening = asyncio.ensure_future(world.open())
        if not patient:
            await asyncio.sleep(0.5)
            opening.cancel()
        with pytest.raises(ca.TierStalledError if patient else asyncio.CancelledError):
            await opening
        assert now() - begun < 10
        world.check_closed()
        world.storages = []
        store = await world.open()
        await expect(store, [block_id])
        await store.aclose()
        world.check_closed()

    run(story)
