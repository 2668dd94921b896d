"""Recovery: what was flushed is there, what is there is right, damage is named, and nothing else matters."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine

import pytest

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import CascadeError, CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.checkpoint import covers_of
from cascade_aio.segments.facts import BlockFact, DamageFact, Fact, FactMerger, TombstoneFact, VanishedFact
from cascade_aio.segments.scan import verify_records
from cascade_aio.segments.writer import WriterLimits
from cascade_aio.testing.memory import MemoryStorage, Operation
from tests.segments.harness import QUIET, SMALL, Block, Process, blocks_of, damages, running, said, start

CRASH = WriterLimits(
    segment_bytes=40 * PAGE_BYTES,
    write_bytes_max=4 * PAGE_BYTES,
    inflight_bytes_max=16 * PAGE_BYTES,
    linger_bytes=4 * PAGE_BYTES,
    mark_bytes=3 * PAGE_BYTES,
    tail_seconds_max=3600.0,
)
"""Tiny segments and writes, and marks between them, so that a short run crosses every kind of boundary."""


class Acknowledged:
    """What the workload was promised before the power went."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.appended: dict[bytes, Block] = {}
        self.tombstones: set[bytes] = set()


async def workload(process: Process, promised: Acknowledged) -> None:
    """Puts, flushes and a deletion, over several segments."""
    rng = random.Random(1)
    number = 0
    for _ in range(7):
        group = []
        for _ in range(rng.randrange(1, 5)):
            block = Block(number, rng.choice([40, 700, 5000, 20_000, 120_000]), bindings=rng.randrange(2))
            number += 1
            promised.appended[block.block_id] = block
            process.writer.append(block.pending())
            group.append(block)
        await process.writer.flush()
        promised.blocks += group
    victim = promised.blocks[0].block_id
    process.writer.append_note(tombstones=[fmt.Tombstone(victim, 1000)])
    await process.writer.flush()
    promised.tombstones.add(victim)
    for _ in range(3):
        block = Block(number, 9000)
        number += 1
        promised.appended[block.block_id] = block
        process.writer.append(block.pending())
    await process.writer.aclose()


async def check(storage: MemoryStorage, promised: Acknowledged) -> None:
    """Open twice after the crash: everything promised is there and everything there is right."""
    said_before = None
    for _ in range(2):
        async with running(storage, CRASH) as process:
            facts = await process.facts()
            assert not damages(facts)
            found = blocks_of(facts)
            missing = [block.number for block in promised.blocks if block.block_id not in found]
            assert not missing, "flushed, and lost"
            reads = [promised.appended[block_id].read(fact.location) for block_id, fact in found.items()]
            await process.read(*reads)
            assert all(promised.appended[read.digest[:16]].matches(read) for read in reads)
            buried = {fact.block_id for fact in facts if isinstance(fact, TombstoneFact)}
            assert promised.tombstones <= buried
            if said_before is not None:
                assert said(facts) == said_before, "sealed by the first opening: it says the same"
                assert process.recovery.report.scanned == 0
            said_before = said(facts)


async def crashed(freeze_at: int) -> tuple[MemoryStorage, Acknowledged, bool]:
    """Run the workload until the given event of the storage; whether that was reached."""
    storage, promised = MemoryStorage(), Acknowledged()
    async with running(storage, CRASH):
        pass
    storage.events = 0
    storage.freeze_at = freeze_at

    async def process_life() -> None:
        process = await start(storage, CRASH)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(process.writer.run())
            await workload(process, promised)

    reached = await _until_frozen(storage, process_life())
    then = Acknowledged()
    then.blocks, then.appended, then.tombstones = list(promised.blocks), promised.appended, set(promised.tombstones)
    return await _killed(storage), then, reached


async def _until_frozen(storage: MemoryStorage, life: Coroutine[None, None, None]) -> bool:
    """Let a process live until its storage stands still (True) or it has ended."""
    _LIVES[storage] = task = asyncio.create_task(life)
    frozen = asyncio.create_task(storage.frozen.wait())
    await asyncio.wait([task, frozen], return_when=asyncio.FIRST_COMPLETED)
    frozen.cancel()
    if task.done():
        task.result()
    return not task.done()


async def _killed(storage: MemoryStorage) -> MemoryStorage:
    """What the next process finds; the old one is then ended."""
    after = storage.kill()
    life = _LIVES.pop(storage)
    life.cancel()
    await asyncio.gather(life, return_exceptions=True)
    return after


_LIVES: dict[MemoryStorage, asyncio.Task[None]] = {}


async def test_power_loss_at_every_operation_with_many_seeds() -> None:
    event, reached = 0, True
    while reached:
        storage, promised, reached = await crashed(event)
        for seed in (None, event, event + 10_000):
            try:
                await check(storage.crash(seed), promised)
            except (AssertionError, CascadeError) as exc:
                raise AssertionError(f"event {event}, seed {seed}") from exc
        event += 1
    assert event > 150, "the workload has shrunk"


async def test_kill_at_every_operation() -> None:
    """The process dies, the kernel lives: what was written stays, synced or not."""
    event, reached = 0, True
    while reached:
        storage, promised, reached = await crashed(event)
        await check(storage, promised)
        event += 3


async def test_a_crash_while_the_adopter_seals_loses_nothing() -> None:
    storage, promised, _ = await crashed(150)
    base = storage.crash(7)
    event, reached = 0, True
    while reached:
        again = MemoryStorage(base.disk.crash(None))
        again.freeze_at = event
        reached = await _until_frozen(again, _open(again))
        left = await _killed(again)
        for seed in (None, event):
            await check(left.crash(seed), promised)
        await check(left, promised)
        event += 1
    assert event > 10


async def _open(storage: MemoryStorage) -> None:
    process = await start(storage, CRASH)
    await process.facts()


async def stored(
    count: int = 12, *, seal: bool = True, limits: WriterLimits = QUIET
) -> tuple[MemoryStorage, list[Block]]:
    storage = MemoryStorage()
    blocks = [Block(n, 3000 + 500 * n, bindings=n % 2) for n in range(count)]
    async with running(storage, limits, seal=seal) as process:
        for block in blocks:
            process.writer.append(block.pending())
            await process.writer.flush()
    return storage, blocks


def only_segment(storage: MemoryStorage) -> str:
    (path,) = [path for path in storage.disk.files if path.endswith(".seg")]
    return path


async def test_footer_and_scan_say_the_same() -> None:
    sealed, _ = await stored(seal=True)
    unsealed, _ = await stored(seal=False)
    async with running(sealed) as process:
        from_footer = await process.facts()
        assert process.recovery.report.from_footer == 1
    async with running(unsealed, host="elsewhere") as process:
        from_scan = await process.facts()
        assert process.recovery.report.scanned == 1
        assert process.recovery.report.sealed == 0, "a foreign segment is not touched"
    assert said(from_footer) == said(from_scan)


async def test_a_damaged_footer_or_trailer_is_replaced_by_a_scan() -> None:
    for from_end, reported in ((PAGE_BYTES + 8, 1), (100, 0)):
        storage, blocks = await stored()
        path = only_segment(storage)
        storage.disk.flip_bit(path, 8 * (storage.disk.inode(path).size - from_end))
        async with running(storage) as process:
            facts = await process.facts()
            assert set(blocks_of(facts)) == {block.block_id for block in blocks}
            assert len(damages(facts)) == reported


@pytest.mark.parametrize("sealed", [True, False])
async def test_a_flipped_bit_anywhere_is_reported_with_path_and_offset_and_never_returned(sealed: bool) -> None:
    rng = random.Random(3)
    pristine, blocks = await stored(seal=sealed)
    path = only_segment(pristine)
    end = max(block.locations[0].page * PAGE_BYTES + block.record_bytes for block in blocks)
    for _ in range(150):
        bit = rng.randrange(8 * end)
        storage = pristine.crash()
        storage.disk.flip_bit(path, bit)
        async with running(storage) as process:
            facts = await process.facts()
            found = blocks_of(facts)
            reads = [block.read(found[block.block_id].location) for block in blocks if block.block_id in found]
            await process.read(*reads)
            by_id = {block.block_id: block for block in blocks}
            wrong = [read for read in reads if not by_id[read.digest[:16]].matches(read)]
            reports = [(fact.path, fact.offset, fact.nbytes) for fact in damages(facts)]
            for read in wrong:
                assert isinstance(read.outcome, CorruptionError)
                assert read.outcome.offset is not None
                assert read.outcome.path is not None
                reports.append((read.outcome.path, read.outcome.offset, PAGE_BYTES + fmt.CHUNK_BYTES))
            if bit // 8 < PAGE_BYTES and sealed:
                assert reports
            last = blocks[-1].locations[0].page * PAGE_BYTES
            torn = not sealed and bit // 8 >= last  # nothing durable says that the last record was acknowledged
            assert torn or any(where == path and at <= bit // 8 < at + nbytes for where, at, nbytes in reports), (
                bit // 8
            )


async def test_damage_stays_known_after_the_adopter_sealed() -> None:
    storage, blocks = await stored(seal=False)
    path = only_segment(storage)
    offset = blocks[4].locations[0].page * PAGE_BYTES
    storage.disk.poke(path, offset, b"\0" * PAGE_BYTES)
    for scanned in (1, 0):
        async with running(storage) as process:
            facts = await process.facts()
            assert process.recovery.report.scanned == scanned
            assert [(fact.path, fact.offset, fact.nbytes) for fact in damages(facts)] == [
                (path, offset, blocks[4].record_bytes)
            ]
            assert len(blocks_of(facts)) == len(blocks) - 1


async def test_an_unreadable_sector_is_damage_and_the_rest_is_found() -> None:
    storage, blocks = await stored(seal=False)
    bad = blocks[3].locations[0].page * PAGE_BYTES

    def hook(operation: Operation) -> OSError | None:
        covers = operation.offset <= bad < operation.offset + operation.nbytes
        return OSError(5, "Input/output error") if operation.name == "read" and covers else None

    storage.hooks.append(hook)
    async with running(storage) as process:
        facts = await process.facts()
        assert set(blocks_of(facts)) == {block.block_id for block in blocks} - {blocks[3].block_id}
        assert [fact.offset for fact in damages(facts)] == [bad]


async def test_an_empty_segment_of_ours_is_removed_and_its_number_not_reused() -> None:
    storage = MemoryStorage()
    async with running(storage) as process:
        writers = process.claim.path
    await storage.create(f"{writers}/0000000009.seg", preallocate_bytes=1 << 16)
    async with running(storage) as process:
        assert await process.facts() == []
        assert process.recovery.report.removed == 1
        assert process.claim.sequence_next == 10
        assert not [path for path in storage.disk.files if path.endswith(".seg")]


async def test_checkpoint_and_tail_equal_a_full_scan() -> None:
    storage = MemoryStorage()
    async with running(storage, SMALL) as process:
        for n in range(60):
            process.writer.append(Block(n).pending())
        await process.writer.flush()
        covers, positions = covers_of(process.table)
        covered = {(n, fact) for n, fact in enumerate(said(await _facts_elsewhere(storage)))}
        for n in range(60, 120):
            process.writer.append(Block(n, bindings=1).pending())
        await process.writer.flush()
        process.writer.append_note(tombstones=[fmt.Tombstone(Block(3).block_id, 5)])
        await process.writer.flush()
        survivor = storage.crash(1)
    assert sorted(positions.values()) == list(range(len(covers)))
    async with running(survivor) as process:
        everything = said(await process.facts())
    async with running(survivor) as process:
        news = said(await process.facts(covers))
        assert process.recovery.report.covered == sum(cover.sealed for cover in covers)
    before = {fact for _, fact in covered}
    assert before | news == everything
    assert not any(fact[0] == "block" and fact in before for fact in news)


async def _facts_elsewhere(storage: MemoryStorage) -> list[Fact]:
    async with running(MemoryStorage(storage.disk), host="elsewhere") as process:
        return await process.facts()


async def test_refresh_yields_only_news_of_other_writers() -> None:
    storage = MemoryStorage()
    async with running(storage, SMALL, host="a") as writer:
        first = [Block(n) for n in range(5)]
        for block in first:
            writer.writer.append(block.pending())
        await writer.writer.flush()
        async with running(MemoryStorage(storage.disk), host="b") as reader:
            facts = await reader.facts()
            assert set(blocks_of(facts)) == {block.block_id for block in first}
            assert all(fact.provisional for fact in facts if isinstance(fact, BlockFact)), "nothing says it was synced"
            assert said(await reader.refresh()) == said(facts), "what is not known to be durable is told again"
            second = [Block(n) for n in range(10, 100)]
            for block in second:
                writer.writer.append(block.pending())
            await writer.writer.flush()
            await writer.settle()
            news = blocks_of(await reader.refresh())
            assert set(news) == {block.block_id for block in first + second}
            assert not any(news[block.block_id].provisional for block in first)
            assert not {block.block_id for block in first} & set(blocks_of(await reader.refresh()))
            reads = await reader.read(*(block.read(news[block.block_id].location) for block in second))
            assert all(block.matches(read) for block, read in zip(second, reads, strict=True))
            gone = next(entry for entry in reader.table if entry.sealed)
            await storage.unlink(gone.path)
            assert VanishedFact(gone.number) in await reader.refresh()
            assert reader.table.get(gone.number) is None


async def test_a_reader_that_holds_a_removed_segment_open_reads_on_and_others_miss() -> None:
    storage, blocks = await stored()
    async with running(MemoryStorage(storage.disk), host="b") as process:
        found = blocks_of(await process.facts())
        async with running(MemoryStorage(storage.disk), host="c") as late:
            there = blocks_of(await late.facts())
            await late.table.aclose()
            await storage.unlink(only_segment(storage))
            (read,) = await process.read(blocks[0].read(found[blocks[0].block_id].location))
            assert blocks[0].matches(read)
            (read,) = await late.read(blocks[0].read(there[blocks[0].block_id].location))
            assert isinstance(read.outcome, LookupError)


async def test_segments_of_another_store_are_not_read() -> None:
    storage, _ = await stored()
    path = only_segment(storage)
    page = memoryview(bytearray(storage.disk.content(path)[:PAGE_BYTES]))
    page[16:32] = b"X" * 16
    fmt.seal_page(page)
    storage.disk.poke(path, 0, bytes(page))
    async with running(storage) as process:
        (fact,) = await process.facts()
        assert isinstance(fact, DamageFact)
        assert "another store" in fact.reason
        assert path in storage.disk.files


async def test_a_segment_of_another_format_version_is_refused() -> None:
    storage, _ = await stored()
    path = only_segment(storage)
    page = memoryview(bytearray(storage.disk.content(path)[:PAGE_BYTES]))
    page[8] = 2
    fmt.seal_page(page)
    storage.disk.poke(path, 0, bytes(page))
    async with running(storage) as process:
        with pytest.raises(CascadeError, match="written by format 2"):
            await process.facts()


async def test_verify_reads_everything_and_names_the_damaged_mebibyte() -> None:
    storage = MemoryStorage()
    large = Block(1, 20 << 20)
    async with running(storage, WriterLimits(segment_bytes=32 << 20)) as process:
        process.writer.append(large.pending())
        process.writer.append(Block(2).pending())
    path = only_segment(storage)
    bad = large.locations[0].page * PAGE_BYTES + PAGE_BYTES + (11 << 20) + 12345
    storage.disk.flip_bit(path, 8 * bad)
    async with running(storage) as process:
        facts = blocks_of(await process.facts())
        entry = process.table[0]
        async with process.table.opened(0) as file:
            end = PAGE_BYTES + entry.record_bytes
            outcomes = [pair async for pair in verify_records(storage, process.engine, file, entry, end=end)]
        assert [damage is None for _, damage in outcomes] == [False, True]
        assert outcomes[0][1] is not None
        assert outcomes[0][1].offset == bad - 12345
        (read,) = await process.read(large.read(facts[large.block_id].location))
        assert isinstance(read.outcome, CorruptionError)
        assert read.outcome.offset == bad - 12345


async def test_one_bad_record_does_not_fail_its_neighbours() -> None:
    storage, blocks = await stored()
    storage.disk.flip_bit(only_segment(storage), 8 * (blocks[5].locations[0].page * PAGE_BYTES + PAGE_BYTES + 7))
    async with running(storage) as process:
        found = blocks_of(await process.facts())
        reads = await process.read(*(block.read(found[block.block_id].location) for block in blocks))
        assert [n for n, read in enumerate(reads) if not blocks[n].matches(read)] == [5]
        assert process.reader.requests == 1, "neighbours are one request"


async def test_cancelling_a_read_waits_and_leaks_nothing() -> None:
    storage, blocks = await stored()
    async with running(storage) as process:
        found = blocks_of(await process.facts())
        for turns in range(12):
            reads = [block.read(found[block.block_id].location) for block in blocks]
            task = asyncio.create_task(process.reader.read(reads))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await process.table.aclose()
        assert not storage.open_files


def test_merging_is_independent_of_order() -> None:
    merger = FactMerger()
    assert merger.is_live(b"a" * 16, 5)
    assert merger.bury(b"a" * 16, 7)
    assert not merger.bury(b"a" * 16, 6)
    assert not merger.is_live(b"a" * 16, 7)
    assert merger.is_live(b"a" * 16, 8), "put again after the deletion"
    assert merger.tombstones() == {b"a" * 16: 7}
