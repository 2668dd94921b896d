"""The writer on a disk that forgets and fails: order, grouping, bounds, failures."""

from __future__ import annotations

import asyncio
import dataclasses
import errno

import pytest

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import BrokenTierError, ClosedError, TierFullError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.facts import BindingFact, BlockFact, TombstoneFact
from cascade_aio.segments.writer import LINGER_SHARE, WriterLimits
from cascade_aio.testing.memory import FaultHook, MemoryDisk, MemoryStorage, Operation
from tests.segments.harness import QUIET, SMALL, Block, blocks_of, damages, running, start


def fail(name: str, code: int, times: int = 1 << 30, suffix: str = ".seg") -> FaultHook:
    """A hook that fails the next ``times`` operations ``name`` on segment files."""
    left = [times]

    def hook(operation: Operation) -> BaseException | None:
        if operation.name == name and operation.path.endswith(suffix) and not operation.after and left[0] > 0:
            left[0] -= 1
            return OSError(code, "injected", operation.path)
        return None

    return hook


async def test_flush_makes_everything_before_it_durable_and_reports_it_once() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        blocks = [Block(n, bindings=n % 3) for n in range(20)]
        for block in blocks:
            process.writer.append(block.pending())
        assert process.writer.backlog_bytes == sum(block.record_bytes for block in blocks)
        assert not any(block.durable for block in blocks)
        await process.writer.flush()
        assert [len(block.locations) for block in blocks] == [1] * 20
        assert process.writer.backlog_bytes == process.writer.unsynced_bytes == 0
        pages = [block.locations[0].page for block in blocks]
        assert pages == sorted(pages), "placed in the order of appending"
        reads = await process.read(*(block.read() for block in blocks))
        assert all(block.matches(read) for block, read in zip(blocks, reads, strict=True))
        survivor = storage.crash()
    async with running(survivor) as process:
        assert set(blocks_of(await process.facts())) == {block.block_id for block in blocks}


async def test_small_records_of_one_turn_are_one_write_and_one_sync() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        for n in range(50):
            process.writer.append(Block(n).pending())
        await process.writer.flush()
        assert process.writer.statistics.writes == 1
        assert process.writer.statistics.syncs == 1
        assert storage.write_sizes == [PAGE_BYTES, 50 * 2 * PAGE_BYTES], "header page, then all records at once"


async def test_64_concurrent_flushes_share_a_few_syncs() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:

        async def client(number: int) -> None:
            for turn in range(4):
                block = Block(number * 10 + turn)
                process.writer.append(block.pending())
                await process.writer.flush()
                assert block.durable

        async with asyncio.TaskGroup() as tasks:
            for number in range(64):
                tasks.create_task(client(number))
        assert process.writer.statistics.durable_records == 256
        assert process.writer.statistics.syncs <= 16


async def test_appends_and_writes_go_on_during_a_sync() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        gate = asyncio.Event()
        first, second = Block(1), Block(2)
        process.writer.append(first.pending())
        flush = asyncio.create_task(process.writer.flush())
        await process.settle()
        assert first.durable
        await flush
        storage.hooks.append(lambda op: gate.wait() if op.name == "sync" and not op.after else None)
        process.writer.append(second.pending())
        flush = asyncio.create_task(process.writer.flush())
        await process.settle()
        third = Block(3)
        process.writer.append(third.pending())
        process.writer.expedite()
        await process.settle()
        assert process.writer.statistics.writes == 3, "the third was written while the sync of the second hung"
        assert not flush.done()
        gate.set()
        await flush
        assert second.durable


async def test_flush_does_not_wait_for_later_appends() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        first, later = Block(1), Block(2, 2_000_000)
        process.writer.append(first.pending())
        await process.writer.flush()
        gate = asyncio.Event()
        second = Block(3)
        process.writer.append(second.pending())
        flush = asyncio.create_task(process.writer.flush())
        while process.writer.statistics.writes < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not flush.done()
        storage.hooks.append(lambda op: gate.wait() if op.name == "write" and op.nbytes > 1 << 20 else None)
        process.writer.append(later.pending())
        await flush
        assert second.durable
        assert not later.durable
        gate.set()


async def test_the_unwritten_tail_is_bounded_in_time() -> None:
    storage = MemoryStorage()
    now_s = asyncio.get_running_loop().time
    async with running(storage, SMALL) as process:
        written_s: list[float] = []
        block = Block(1, 100)

        def watch(operation: Operation) -> None:
            if operation.name == "write" and operation.offset and not operation.after:  # at 0 the segment's header
                written_s.append(now_s())

        storage.hooks.append(watch)
        begun_s = now_s()
        process.writer.append(block.pending())
        async with asyncio.timeout(60):
            while not block.durable:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert written_s[0] - begun_s >= 0.9 * LINGER_SHARE * SMALL.tail_seconds_max, "a small record lingers"


async def test_large_blocks_start_at_once_in_bounded_writes() -> None:
    storage = MemoryStorage()
    limits = WriterLimits(
        segment_bytes=1 << 24, write_bytes_max=1 << 20, inflight_bytes_max=2 << 20, tail_seconds_max=3600
    )
    async with running(storage, limits) as process:
        inflight, most = 0, 0

        def watch(operation: Operation) -> None:
            nonlocal inflight, most
            if operation.name == "write":
                inflight += -operation.nbytes if operation.after else operation.nbytes
                most = max(most, inflight)

        storage.hooks.append(watch)
        block = Block(1, 5 << 20)
        process.writer.append(block.pending())
        await process.settle()
        assert process.writer.statistics.written_bytes == block.record_bytes, "nobody asked, yet it is written"
        assert max(storage.write_sizes) <= 1 << 20
        assert 1 << 20 < most <= 2 << 20
        await process.writer.flush()
        (read,) = await process.read(block.read())
        assert block.matches(read)


async def test_segments_are_filled_sealed_and_switched_without_losing_any() -> None:
    storage = MemoryStorage()
    blocks = [Block(n, bindings=1) for n in range(300)]
    async with running(storage, SMALL) as process:
        for start_at in range(0, 300, 10):
            for block in blocks[start_at : start_at + 10]:
                process.writer.append(block.pending())
            await process.writer.flush()
        statistics = process.writer.statistics
    assert statistics.segments_sealed == statistics.segments_created - 1, "all but the unused spare, which is removed"
    assert {block.locations[0].segment for block in blocks} == set(range(statistics.segments_sealed))
    async with running(storage, SMALL) as process:
        facts = blocks_of(await process.facts())
        assert process.recovery.report.from_footer == statistics.segments_sealed
        assert process.recovery.report.scanned == 0
        reads = await process.read(*(block.read(facts[block.block_id].location) for block in blocks))
        assert all(block.matches(read) for block, read in zip(blocks, reads, strict=True))
    assert not storage.open_files


async def test_the_next_segment_is_there_before_it_is_needed() -> None:
    storage = MemoryStorage()
    async with running(storage, SMALL) as process:
        for n in range(40):
            process.writer.append(Block(n).pending())
        await process.writer.flush()
        await process.settle()
        assert process.writer.statistics.segments_created == 2, "more than half of the first is used"
        assert all(
            storage.disk.inode(path).size == SMALL.segment_bytes for path in storage.disk.files if path.endswith(".seg")
        )


async def test_a_block_larger_than_a_segment_gets_one_of_its_own() -> None:
    storage = MemoryStorage()
    async with running(storage, SMALL) as process:
        small, large, after = Block(1), Block(2, 3 << 20), Block(3)
        for block in (small, large, after):
            process.writer.append(block.pending())
        await process.writer.flush()
        assert large.locations[0].segment not in (small.locations[0].segment, after.locations[0].segment)
        assert small.locations[0].segment == after.locations[0].segment
        for block in (small, large, after):
            (read,) = await process.read(block.read())
            assert block.matches(read)


@pytest.mark.parametrize("operation", ["write", "sync"])
async def test_a_failed_operation_moves_everything_unacknowledged_to_a_new_segment(operation: str) -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        safe = [Block(n) for n in range(5)]
        for block in safe:
            process.writer.append(block.pending())
        await process.writer.flush()
        storage.hooks.append(fail(operation, errno.EIO, times=1))
        moved = [Block(n) for n in range(10, 20)]
        for block in moved:
            process.writer.append(block.pending())
        process.writer.append_note([fmt.NoteBinding(safe[0].block_id, b"k" * 32, None, 77)])
        await process.writer.flush()
        assert {block.locations[0].segment for block in safe} == {0}
        assert all(len(block.locations) == 1 and block.locations[0].segment > 0 for block in moved)
        assert process.writer.statistics.failures == 1
        assert process.writer.statistics.replaced_records == 11
        survivor = storage.crash()
    async with running(survivor) as process:
        facts = await process.facts()
        found = blocks_of(facts)
        reads = await process.read(*(block.read(found[block.block_id].location) for block in safe + moved))
        assert all(block.matches(read) for block, read in zip(safe + moved, reads, strict=True))
        assert any(isinstance(fact, BindingFact) and fact.key == b"k" * 32 for fact in facts)
        assert not damages(facts)


async def test_the_abandoned_segment_is_never_synced_or_written_again() -> None:
    storage = MemoryStorage()
    async with running(storage, SMALL) as process:
        seen: list[str] = []
        storage.hooks.append(fail("sync", errno.EIO, times=2))
        storage.hooks.pop()
        first = Block(1)
        process.writer.append(first.pending())
        await process.writer.flush()
        path = process.table[first.locations[0].segment].path
        storage.hooks.append(fail("sync", errno.EIO, times=1))

        def watch(operation: Operation) -> None:
            if operation.path == path and operation.name in ("write", "sync") and not operation.after:
                seen.append(operation.name)

        storage.hooks.append(watch)
        process.writer.append(Block(2).pending())
        await process.writer.flush()
        for n in range(3, 30):
            process.writer.append(Block(n).pending())
        await process.writer.flush()
        assert seen == ["write"], "one write, and the sync that failed before it was seen here"


async def test_after_too_many_failures_the_writer_is_broken() -> None:
    storage = MemoryStorage()
    async with running(storage, dataclasses.replace(QUIET, retry_seconds=0.01)) as process:
        storage.hooks.append(fail("sync", errno.EIO))
        block = Block(1)
        process.writer.append(block.pending())
        with pytest.raises(BrokenTierError, match="4 times in a row"):
            await process.writer.flush()
        await process.settle()
        assert not block.durable
        assert [type(failure) for failure in block.failures] == [BrokenTierError]
        assert process.writer.broken
        with pytest.raises(BrokenTierError):
            process.writer.append(Block(2).pending())
        with pytest.raises(BrokenTierError):
            await process.writer.flush()
        storage.hooks.clear()
        with pytest.raises(BrokenTierError):
            await process.writer.aclose()


async def test_a_success_in_between_forgives_failures() -> None:
    storage = MemoryStorage()
    async with running(storage, dataclasses.replace(QUIET, retry_seconds=0.01)) as process:
        for n in range(10):
            storage.hooks[:] = [fail("write", errno.EIO, times=2)]
            block = Block(n)
            process.writer.append(block.pending())
            await process.writer.flush()
            assert block.durable
        assert process.writer.statistics.failures == 20


@pytest.mark.parametrize("operation", ["create", "write"])
async def test_no_space_keeps_records_and_goes_on_when_there_is_room(operation: str) -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        storage.hooks.append(fail(operation, errno.ENOSPC))
        blocks = [Block(n) for n in range(5)]
        for block in blocks:
            process.writer.append(block.pending())
        with pytest.raises(TierFullError, match="no room"):
            await process.writer.flush()
        assert process.writer.full
        with pytest.raises(TierFullError):
            await process.writer.flush()
        later = Block(9)
        process.writer.append(later.pending())
        assert not any(block.failures for block in blocks)
        storage.hooks.clear()
        process.writer.space_freed()
        await process.settle()
        await process.writer.flush()
        assert all(block.durable for block in [*blocks, later])
        assert not process.writer.full


async def test_a_nearly_full_disk_gets_a_smaller_segment() -> None:
    storage = MemoryStorage(MemoryDisk(capacity_bytes=QUIET.segment_bytes // 2))
    async with running(storage) as process:
        block = Block(1)
        process.writer.append(block.pending())
        await process.writer.flush()
        assert block.durable


async def test_closing_a_full_writer_tells_the_owners() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        storage.hooks.append(fail("create", errno.ENOSPC))
        block = Block(1)
        process.writer.append(block.pending())
        with pytest.raises(TierFullError):
            await process.writer.aclose()
        assert [type(failure) for failure in block.failures] == [ClosedError]
        with pytest.raises(ClosedError):
            process.writer.append(Block(2).pending())


async def test_notes_of_a_commit_group_are_one_record() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        for n in range(30):
            process.writer.append_note([fmt.NoteBinding(bytes(16), bytes([n]) * 32, b"p" * 32, n)])
            process.writer.append_note(tombstones=[fmt.Tombstone(bytes([n]) * 16, n)])
        await process.writer.flush()
        assert process.writer.statistics.writes == 1
        process.writer.append_note([fmt.NoteBinding(bytes(16), b"%032d" % n, None, n) for n in range(2000)])
        await process.writer.flush()
    async with running(storage) as process:
        facts = await process.facts()
        assert sum(isinstance(fact, TombstoneFact) for fact in facts) == 30
        assert sum(isinstance(fact, BindingFact) for fact in facts) == 2030


async def test_cancelling_run_tells_owners_and_leaves_no_open_file() -> None:
    storage = MemoryStorage()
    process = await start(storage, QUIET)
    run = asyncio.create_task(process.writer.run())
    flushed, lost = Block(1), Block(2)
    process.writer.append(flushed.pending())
    await process.writer.flush()
    process.writer.append(lost.pending())
    flush = asyncio.create_task(process.writer.flush())
    await asyncio.sleep(0)
    run.cancel()
    outcomes = await asyncio.gather(run, flush, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, ClosedError]
    assert lost.durable or [type(failure) for failure in lost.failures] == [ClosedError]
    assert not storage.open_files


async def test_cancelling_a_flush_cancels_nothing_else() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        block = Block(1)
        process.writer.append(block.pending())
        flush = asyncio.create_task(process.writer.flush())
        await asyncio.sleep(0)
        flush.cancel()
        await asyncio.gather(flush, return_exceptions=True)
        await process.writer.flush()
        assert block.durable


async def test_an_empty_block_is_a_record_of_its_header() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        block = Block(1, 0)
        process.writer.append(block.pending())
        await process.writer.flush()
        (read,) = await process.read(block.read())
        assert block.matches(read)


async def test_block_facts_carry_what_the_index_needs() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        block = Block(5, 10_000, bindings=2)
        process.writer.append(block.pending())
    async with running(storage) as process:
        facts = await process.facts()
        number = block.locations[0].segment
        assert facts[0] == BlockFact(
            block.locations[0], block.record_bytes, block.digest, len(block.key), len(block.value), block.stamp, False
        )
        assert [fact.key for fact in facts[1:] if isinstance(fact, BindingFact)] == [b.key for b in block.bindings]
        assert process.table[number].sealed
