"""Repair: afterwards nothing is wrong, what was damaged is set aside, and what was lost is named."""

from __future__ import annotations

import asyncio
import json
import posixpath
from collections.abc import Callable

import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES, Platform
from cascade_aio.config import make_config
from cascade_aio.store.repairing import RepairReport, repair_root
from cascade_aio.testing.memory import MemoryEngine, MemoryStorage
from cascade_aio.testing.world import ROOT, World, cancel_others, pseudo_bytes, run
from tests.store.test_adopting import NBYTES, directory_of, kill, put
from tests.store.test_verify import look, zero

NAMES = ca.prefix_keys(range(16), block_tokens=4, namespace="repair")
RECORD_BYTES = (NBYTES // PAGE_BYTES + 2) * PAGE_BYTES


async def filled(world: World, blocks: int = 60) -> tuple[str, list[str], list[ca.BlockId]]:
    """A closed root of several segments; the first four blocks have names; one block was deleted."""
    store = await world.open()
    gone = await store.put(b"", pseudo_bytes("deleted", NBYTES))
    ids = [await store.put(b"", pseudo_bytes(str(n), NBYTES), prefix=NAMES[n] if n < 4 else None) for n in range(4)]
    await store.flush()
    await store.delete(gone)
    await store.flush()
    ids += await put(store, range(4, blocks))
    directory = directory_of(store)
    await store.aclose()
    return directory, sorted(path for path in world.disk.files if path.endswith(".seg")), ids


async def repaired(world: World, **options: object) -> RepairReport:
    def platform() -> Platform:
        storage = MemoryStorage(world.disk)
        world.storages.append(storage)
        return Platform(storage, MemoryEngine(), world.clock)

    return await repair_root(make_config(ROOT, **world.settings), make_platform=platform, **options)  # type: ignore[arg-type]


async def expect_rest(world: World, ids: list[ca.BlockId], lost: set[str]) -> None:
    store = await world.open()
    assert ca.BlockId.from_hex(ca.compute_block_id(b"", pseudo_bytes("deleted", NBYTES)).hex()) not in store
    for number, block_id in enumerate(ids):
        if block_id.hex() in lost:
            assert block_id not in store
            continue
        async with store.get(NAMES[number] if number < 4 else block_id) as block:
            assert bytes(block.value) == pseudo_bytes(str(number), NBYTES)
    await store.aclose()


def test_damaged_payloads_are_set_aside_and_named() -> None:
    async def story() -> None:
        world = World()
        _, segments, ids = await filled(world)
        bad = PAGE_BYTES + 2 * RECORD_BYTES
        before = world.disk.content(segments[0])[bad : bad + RECORD_BYTES]
        zero(world.disk, segments[0], bad + 3 * PAGE_BYTES)
        damaged = world.disk.content(segments[0])[bad : bad + RECORD_BYTES]
        report = await repaired(world)
        assert report.clean
        (copy,) = report.quarantined
        assert (copy.path, copy.offset, copy.nbytes) == (segments[0], bad, RECORD_BYTES)
        assert world.disk.content(copy.copy) == damaged != before
        description = json.loads(world.disk.content(f"{copy.copy}.json"))
        (lost,) = report.lost_blocks
        assert description["block"] == lost.block_id == ids[1].hex()
        assert lost.names == (NAMES[1].hex(),)
        assert (await look(world)).clean
        await expect_rest(world, ids, {lost.block_id})
        assert (await repaired(world)).before.clean, "nothing more to do"

    run(story)


@pytest.mark.parametrize(
    ("spoil", "lost"),
    [
        (lambda disk, directory, segment: zero(disk, segment, 0), 0),
        (lambda disk, directory, segment: zero(disk, segment, PAGE_BYTES + 2 * RECORD_BYTES), 1),
        (lambda disk, directory, segment: disk.poke(segment, PAGE_BYTES, b"x" * (5 * RECORD_BYTES)), 4),
        (lambda disk, directory, segment: zero(disk, segment, disk.files[segment].size - PAGE_BYTES), 0),
        (lambda disk, directory, segment: zero(disk, segment, disk.files[segment].size - 2 * PAGE_BYTES), 0),
        (
            lambda disk, directory, segment: zero(
                disk, segment, PAGE_BYTES + 2 * RECORD_BYTES + 3 * PAGE_BYTES, disk.files[segment].size - 2 * PAGE_BYTES
            ),
            1,
        ),
        (lambda disk, directory, segment: disk.files.pop(segment), None),
        (lambda disk, directory, segment: disk.files[segment].truncate(disk.files[segment].size // 2), None),
        (lambda disk, directory, segment: zero(disk, posixpath.join(directory, "checkpoint"), 4096), 0),
    ],
    ids=[
        "page 0",
        "record header",
        "many records",
        "trailer",
        "footer",
        "payload and footer",
        "removed",
        "cut",
        "checkpoint",
    ],
)
def test_after_a_repair_verify_is_clean(spoil: Callable[..., object], lost: int | None) -> None:
    async def story() -> None:
        world = World()
        directory, segments, ids = await filled(world)
        spoil(world.disk, directory, segments[0])
        assert not (await look(world)).clean
        report = await repaired(world)
        assert report.clean, (report.left, report.remaining)
        assert (await look(world)).clean
        if lost is None:
            assert len(report.lost_blocks) > 3
            assert report.lost_segments
        else:
            assert len(report.lost_blocks) == lost
        await expect_rest(world, ids, {one.block_id for one in report.lost_blocks})

    run(story)


def test_a_deletion_in_a_damaged_note_is_written_again_from_the_footer() -> None:
    async def story() -> None:
        world = World()
        store = await world.open()
        gone = await store.put(b"", pseudo_bytes("gone", NBYTES))
        await store.flush()
        await store.delete(gone)
        await store.flush()
        await put(store, range(20))
        await store.aclose()
        segments = sorted(path for path in world.disk.files if path.endswith(".seg"))
        zero(world.disk, segments[0], PAGE_BYTES + RECORD_BYTES)  # the note
        report = await repaired(world)
        assert report.clean
        assert report.lost_blocks == ()
        store = await world.open()
        assert gone not in store
        assert len(store) == 20
        await store.aclose()

    run(story)


def test_what_a_live_writer_owns_is_left_and_named() -> None:
    async def story() -> None:
        world = World()
        store = await world.open()
        await put(store, range(40))
        (segment, *_) = sorted(path for path in world.disk.files if path.endswith(".seg"))
        zero(world.disk, segment, PAGE_BYTES + RECORD_BYTES + 3 * PAGE_BYTES)
        before = world.disk.content(segment)
        report = await repaired(world)
        assert not report.clean
        assert report.quarantined == ()
        assert "its writer is alive" in report.left[0]
        assert world.disk.content(segment) == before
        kill(world, store)
        await cancel_others()
        assert (await repaired(world)).clean
        assert (await look(world)).clean

    run(story)


async def cut_off(step: int) -> bool:
    """A repair that stops before its ``step``-th operation, by Ctrl-C, a kill or loss of power, and another one."""
    world = World()
    _, segments, ids = await filled(world, 24)
    bad = PAGE_BYTES + 2 * RECORD_BYTES
    zero(world.disk, segments[0], bad + 3 * PAGE_BYTES)
    zero(world.disk, segments[1], 100)
    damaged = world.disk.content(segments[0])[bad : bad + RECORD_BYTES]
    events = 0
    stopped = asyncio.Event()
    held: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def count(operation: object) -> asyncio.Future[None] | None:
        nonlocal events
        events += 1
        if events < step or stopped.is_set():
            return None
        stopped.set()
        return held

    def platform() -> Platform:
        storage = MemoryStorage(world.disk)
        storage.hooks.append(count)
        world.storages.append(storage)
        return Platform(storage, MemoryEngine(), world.clock)

    work = asyncio.ensure_future(repair_root(make_config(ROOT, **world.settings), make_platform=platform))
    await asyncio.wait((work, asyncio.ensure_future(stopped.wait())), return_when="FIRST_COMPLETED")
    ended = work.done()
    if step % 3 == 0:
        work.cancel()
        if not held.done():
            held.set_result(None)  # the operation in progress ends
        await asyncio.gather(work, return_exceptions=True)
    elif step % 3 == 1:
        world.disk = world.disk.kill()
        for storage in world.storages:
            storage.freeze_at = 0
        await cancel_others()
    else:
        await world.crash(seed=step)
    report = await repaired(world)
    assert report.clean, (step, report.left, report.remaining)
    assert (await look(world)).clean
    assert damaged in [world.disk.content(path) for path in world.disk.files if path.endswith(".bin")]
    await expect_rest(world, ids, {ids[1].hex()})
    await cancel_others()
    return ended


def test_a_repair_that_is_cut_off_anywhere_is_finished_by_the_next() -> None:
    """Nothing more is lost than was damaged, and nothing that was set aside is lost."""

    async def story() -> None:
        step = 1
        while not await cut_off(step):
            step += 41
        assert step > 100

    run(story)
