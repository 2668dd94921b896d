"""A read that gives wrong bytes once: nothing is given up, cut off or written over because of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cascade_aio.abc.storage import PAGE_BYTES, File
from cascade_aio.store.repairing import repair_root
from cascade_aio.testing.clock import ManualClock
from cascade_aio.testing.memory import MemoryStorage, Operation, memory_platform
from cascade_aio.testing.world import ROOT, World, cancel_others, pseudo_bytes, run


class Errs:
    """The next read that covers ``place`` gives one wrong bit there; the one after it does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Callable[[str], int | None]) -> None:
        self.wrong: set[tuple[str, int]] = set()
        read = MemoryStorage.read

        async def err(
            storage: MemoryStorage, file: File, buffers: Sequence[memoryview], offset: int, **options: Any
        ) -> int:
            count = await read(storage, file, buffers, offset, **options)
            at = place(file.path)
            if at is not None and offset <= at < offset + count and (file.path, at) not in self.wrong:
                self.wrong.add((file.path, at))
                for buffer in buffers:
                    if at - offset < len(buffer):
                        buffer[at - offset] ^= 1
                        break
                    offset += len(buffer)
            return count

        monkeypatch.setattr(MemoryStorage, "read", err)


def segment(path: str) -> bool:
    return path.endswith(".seg")


async def crashed(world: World, blocks: int) -> list[bytes]:
    """A root whose writer was killed during a sync: its records lie beyond the last one that a header speaks of."""
    store = await world.open()
    ids: list[bytes] = [await store.put(b"key %d" % n, pseudo_bytes(f"value {n}", 30_000)) for n in range(blocks)]
    synced = 0

    def hang(operation: Operation) -> Any:
        nonlocal synced
        if operation.name != "sync" or operation.after or not segment(operation.path):
            return None
        synced += 1
        return asyncio.sleep(1000) if synced > 1 else None  # the first makes the file

    world.storage.hooks.append(hang)
    flushing = asyncio.ensure_future(store.flush())
    await asyncio.sleep(1.0)
    assert synced == 2
    assert not flushing.done()
    world.disk = world.disk.kill()
    for storage in world.storages:
        storage.freeze_at = 0
    await cancel_others()
    world.storages.clear()
    return ids


@pytest.mark.parametrize("at", ["segment header", "record header", "payload", "last payload"])
def test_an_opening_that_reads_wrongly_once_loses_nothing(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Before, it took sound records for torn, and wrote what it had read wrongly over what was right."""

    async def story() -> None:
        world = World(tail_seconds_max=1000.0)
        ids = await crashed(world, 5)
        record_bytes = 9 * PAGE_BYTES
        offsets = {
            "segment header": 100,
            "record header": PAGE_BYTES + record_bytes + 100,
            "payload": PAGE_BYTES + record_bytes + PAGE_BYTES + 100,
            "last payload": PAGE_BYTES + 4 * record_bytes + PAGE_BYTES + 100,
        }
        with monkeypatch.context() as patch:
            errs = Errs(patch, lambda path: offsets[at] if segment(path) else None)
            store = await world.open()
            assert errs.wrong
            await check(store, ids)
            assert store.statistics()["damage"] == []
            assert store.statistics()["disk"]["recovery"]["torn_records"] == 0
        await store.aclose()
        store = await world.open()
        await check(store, ids)
        assert (await store.verify()).clean
        await store.aclose()

    run(story)


def test_what_recovery_writes_again_is_what_it_has_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second read, the one before the write, is the wrong one."""

    async def story() -> None:
        world = World(tail_seconds_max=1000.0)
        ids = await crashed(world, 3)
        seen = 0

        def place(path: str) -> int | None:
            return 3 * PAGE_BYTES + 5 if segment(path) and seen else None

        with monkeypatch.context() as patch:
            errs = Errs(patch, place)
            checked = MemoryStorage.write

            async def write(storage: MemoryStorage, file: File, *rest: Any, **options: Any) -> None:
                nonlocal seen
                seen += segment(file.path)
                await checked(storage, file, *rest, **options)

            patch.setattr(MemoryStorage, "write", write)
            store = await world.open()
            assert errs.wrong
        await store.aclose()
        store = await world.open()
        await check(store, ids)
        assert (await store.verify()).clean
        await store.aclose()

    run(story)


@pytest.mark.parametrize("at", [PAGE_BYTES + 50, 2 * PAGE_BYTES + 50])
def test_a_get_that_reads_wrongly_once_reads_again(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    async def story() -> None:
        world = World()
        store = await world.open()
        block_id = await store.put(b"key", pseudo_bytes("value", 30_000))
        await store.aclose()
        store = await world.open()
        with monkeypatch.context() as patch:
            errs = Errs(patch, lambda path: at if segment(path) else None)
            await check(store, [block_id])
            assert errs.wrong
        assert store.statistics()["damage"] == []
        await store.aclose()

    run(story)


def test_a_repair_whose_verification_reads_wrongly_once_sets_nothing_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        world = World()
        store = await world.open()
        block_id = await store.put(b"key", pseudo_bytes("value", 30_000))
        await store.aclose()
        with monkeypatch.context() as patch:
            errs = Errs(patch, lambda path: 2 * PAGE_BYTES + 50 if segment(path) else None)
            report = await repair_root(
                ROOT,
                make_platform=lambda: memory_platform(MemoryStorage(world.disk), ManualClock()),
                shm_bytes=1 << 20,
                segment_bytes=1 << 20,
            )
            assert errs.wrong
        assert report.clean
        assert report.quarantined == ()
        store = await world.open()
        await check(store, [block_id])
        await store.aclose()

    run(story)


async def check(store: Any, ids: Sequence[bytes]) -> None:
    for number, block_id in enumerate(ids):
        async with store.get(block_id) as block:
            assert bytes(block.value) == pseudo_bytes(f"value {number}" if len(ids) > 1 else "value", 30_000)
