"""What ``verify`` finds beyond damaged records: files that are gone or cut, and contradictions."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Callable

import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.store.store import Store
from cascade_aio.store.verifying import VerifyReport
from cascade_aio.testing.memory import MemoryDisk, Operation
from cascade_aio.testing.world import World, cancel_others, pseudo_bytes, run
from tests.store.test_adopting import NBYTES, directory_of, kill, put


async def filled(world: World) -> tuple[str, list[str], list[ca.BlockId]]:
    """A closed root of several segments: (its writer directory, segments in order, block ids)."""
    store = await world.open()
    ids = await put(store, range(60))
    directory = directory_of(store)
    await store.aclose()
    segments = sorted(path for path in world.disk.files if path.endswith(".seg"))
    assert len(segments) > 3
    return directory, segments, ids


async def look(world: World) -> VerifyReport:
    store = await world.open(read_only=True)
    report = await store.verify()
    await store.aclose()
    return report


def blocks_of(store: Store, path: str) -> int:
    (entry,) = [entry for entry in store._context.disk.table if entry.path == path]
    return len(store._context.catalog.index.rows_in_segment(entry.number))


@pytest.mark.parametrize("writable", [False, True])
def test_a_segment_that_somebody_removed_is_named_with_its_blocks(writable: bool) -> None:
    async def story() -> None:
        world = World()
        _, segments, _ = await filled(world)
        del world.disk.files[segments[1]]
        store = await world.open(read_only=not writable)
        report = await store.verify()
        (lost,) = report.lost
        assert (lost.path, lost.offset) == (segments[1], 0)
        assert lost.blocks == 60 - len(store) > 5
        assert not report.damage
        assert not report.clean
        if writable:
            assert "blocks are lost" in store.statistics()["damage"][0]
        await store.aclose()
        assert (await look(world)).clean is writable, "the writer's new checkpoint knows"

    run(story)


def test_a_segment_that_somebody_cut_is_named_with_the_blocks_behind_the_cut() -> None:
    async def story() -> None:
        world = World()
        _, segments, ids = await filled(world)
        whole = await world.open(read_only=True)
        before = blocks_of(whole, segments[0])
        await whole.aclose()
        world.disk.files[segments[0]].truncate(PAGE_BYTES + 5 * (NBYTES // PAGE_BYTES + 2) * PAGE_BYTES)
        report = await look(world)
        assert [(one.path, one.blocks) for one in report.lost] == [(segments[0], before - 5)]
        store = await world.open()
        assert len(store) == len(ids) - (before - 5)
        await store.aclose()

    run(story)


def test_a_segment_that_goes_while_the_store_is_open() -> None:
    async def story() -> None:
        world = World()
        store = await world.open()
        ids = await put(store, range(60))
        segments = sorted(path for path in world.disk.files if path.endswith(".seg"))
        lost_blocks = blocks_of(store, segments[0])
        await store._context.disk.table._handles.aclose()
        del world.disk.files[segments[0]]
        report = await store.verify()
        assert [(one.path, one.blocks) for one in report.lost] == [(segments[0], lost_blocks)]
        resident = sum(block_id in store for block_id in ids)
        assert resident >= 60 - lost_blocks
        await store.flush()
        await store.aclose()

    run(story)


def zero(disk: MemoryDisk, path: str, *offsets: int) -> None:
    for offset in offsets:
        disk.poke(path, offset, bytes(64))


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda disk, directory, segment: zero(disk, segment, disk.files[segment].size - PAGE_BYTES), "footer"),
        (lambda disk, directory, segment: zero(disk, segment, disk.files[segment].size - 2 * PAGE_BYTES), "footer"),
        (lambda disk, directory, segment: zero(disk, posixpath.join(directory, "checkpoint"), 4096), "checkpoint"),
        (lambda disk, directory, segment: zero(disk, posixpath.join(directory, "checkpoint"), 0), "checkpoint"),
    ],
    ids=["trailer", "footer", "columns", "header of the checkpoint"],
)
def test_hints_that_do_not_fit_are_named(spoil: Callable[[MemoryDisk, str, str], None], what: str) -> None:
    async def story() -> None:
        world = World()
        directory, segments, ids = await filled(world)
        spoil(world.disk, directory, segments[0])
        report = await look(world)
        assert len(report.inconsistent) == 1
        assert what in report.inconsistent[0].what
        assert (report.blocks, report.damage) == (len(ids), ())

    run(story)


def test_the_first_page_of_a_segment_is_checked() -> None:
    async def story() -> None:
        world = World()
        _, segments, ids = await filled(world)
        zero(world.disk, segments[1], 16)
        report = await look(world)
        assert [(error.path, error.offset) for error in report.damage] == [(segments[1], 0)]
        assert report.blocks == len(ids)

    run(story)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOMEM])
def test_what_cannot_be_read_is_kept_and_named_apart(code: int) -> None:
    """A transient failure says nothing about the bytes: nobody's block is forgotten for it."""

    async def story() -> None:
        world = World()
        _, segments, ids = await filled(world)
        store = await world.open()

        def fail(operation: Operation) -> OSError | None:
            bad = operation.name == "read" and operation.path == segments[2] and operation.offset > PAGE_BYTES
            return OSError(code, os.strerror(code)) if bad else None

        world.storage.hooks.append(fail)
        report = await store.verify()
        assert report.unreadable
        assert not report.damage
        assert not report.lost
        assert not report.inconsistent
        assert len(store) == len(ids)
        world.storage.hooks.clear()
        assert (await store.verify()).clean
        for number, block_id in enumerate(ids):
            async with store.get(block_id) as block:
                assert bytes(block.value) == pseudo_bytes(str(number), NBYTES)
        await store.aclose()

    run(story)


def test_a_sound_root_is_clean_for_its_writer_for_others_and_after_a_kill() -> None:
    async def story() -> None:
        world = World(disk_bytes=12 << 20)
        store = await world.open()
        for number in range(300):
            await store.put(b"", pseudo_bytes(str(number), NBYTES))
            await store.flush()
        await store.delete(await store.put(b"", b"deleted"))
        await store.flush()
        assert (await store.verify()).clean
        assert (await look(world)).clean, "beside its writer"
        kill(world, store)
        assert (await look(world)).clean, "as a kill leaves it"
        await cancel_others()

    run(story)
