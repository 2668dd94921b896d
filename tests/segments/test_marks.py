"""Marks: what a flush has made durable is said in the segment, so that recovery need not read it again."""

from __future__ import annotations

import asyncio
import dataclasses

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import CorruptionError
from cascade_aio.segments.facts import BlockFact
from cascade_aio.testing.memory import MemoryStorage, Operation
from tests.segments.harness import QUIET, SMALL, Block, blocks_of, running

MARKED = dataclasses.replace(QUIET, mark_bytes=64 << 10)
LARGE, LITTLE = 100_000, 3_000
"""Bytes of a block that is worth a mark, and of one that is not."""


async def flushed_and_killed(*sizes: int) -> tuple[MemoryStorage, list[Block]]:
    """One flush after each block, then the process dies; the kernel lives."""
    storage = MemoryStorage()
    blocks = [Block(number, nbytes) for number, nbytes in enumerate(sizes)]
    async with running(storage, MARKED) as process:
        for block in blocks:
            process.writer.append(block.pending())
            await process.writer.flush()
        return storage.kill(), blocks


async def test_recovery_reads_no_payload_that_a_mark_speaks_for() -> None:
    storage, blocks = await flushed_and_killed(LARGE, LITTLE, LARGE)
    read: list[tuple[int, int]] = []

    def note(operation: Operation) -> None:
        if operation.name == "read" and operation.path.endswith(".seg") and not operation.after:
            read.append((operation.offset, operation.nbytes))

    written_before = storage.write_sizes.copy()
    storage.hooks.append(note)
    async with running(storage, MARKED) as process:
        facts = await process.facts()
        assert process.recovery.report.sealed == 1
        assert {fact.block_id for fact in facts if isinstance(fact, BlockFact) and not fact.provisional} == {
            block.block_id for block in blocks
        }
        middle = blocks[0].locations[0].page * PAGE_BYTES + PAGE_BYTES + (80 << 10)
        assert not any(start <= middle < start + nbytes for start, nbytes in read), "behind what any header needs"
        assert sum(storage.write_sizes) - sum(written_before) < LARGE, "nor is it written again"
        reads = await process.read(*(block.read(blocks_of(facts)[block.block_id].location) for block in blocks))
        assert all(block.matches(one) for block, one in zip(blocks, reads, strict=True))


async def test_what_was_acknowledged_with_a_mark_and_rots_is_damage_and_no_torn_write() -> None:
    storage, (block,) = await flushed_and_killed(LARGE)
    path = next(path for path in storage.disk.files if path.endswith(".seg"))
    storage.disk.flip_bit(path, 8 * (block.locations[0].page * PAGE_BYTES + 2 * PAGE_BYTES))
    async with running(storage, MARKED) as process:
        found = blocks_of(await process.facts())
        assert process.recovery.report.torn_records == 0
        (read,) = await process.read(block.read(found[block.block_id].location))
        assert isinstance(read.outcome, CorruptionError)


async def test_a_lost_mark_costs_reading_and_nothing_else() -> None:
    storage = MemoryStorage()
    block = Block(1, LARGE)
    async with running(storage, MARKED) as process:
        process.writer.append(block.pending())
        await process.writer.flush()
        after_power_loss = storage.crash(None)  # nothing that was not synced, so no mark
    async with running(after_power_loss, MARKED) as process:
        found = blocks_of(await process.facts())
        (read,) = await process.read(block.read(found[block.block_id].location))
        assert block.matches(read)


async def test_there_is_a_mark_only_where_much_is_unsaid() -> None:
    storage = MemoryStorage()
    async with running(storage, MARKED) as process:
        for number in range(3):
            process.writer.append(Block(number, LITTLE).pending())
            await process.writer.flush()
        assert PAGE_BYTES not in storage.write_sizes[-3:], "little was written, and the next header says the rest"
        process.writer.append(Block(3, LARGE).pending())
        await process.writer.flush()
        assert storage.write_sizes[-1] == PAGE_BYTES
        process.writer.append(Block(4, LITTLE).pending())
        await process.writer.flush()
        assert storage.write_sizes[-1] != PAGE_BYTES, "its own header has said it"
        process.writer.append(Block(5, LARGE).pending())
        await process.writer.aclose()
        assert process.writer.statistics.segments_sealed == 1
    async with running(storage, MARKED) as process:
        assert len(blocks_of(await process.facts())) == 6
        assert process.recovery.report.from_footer == 1
        assert process.table[0].record_bytes == sum(Block(n, LITTLE).record_bytes for n in (0, 1, 2, 4)) + sum(
            Block(n, LARGE).record_bytes for n in (3, 5)
        ) + PAGE_BYTES, "one mark: a footer follows the last flush"  # fmt: skip


async def test_nothing_is_synced_for_the_sake_of_a_mark() -> None:
    storage = MemoryStorage()
    async with running(storage, dataclasses.replace(SMALL, mark_bytes=PAGE_BYTES)) as process:
        process.writer.append(Block(1, LITTLE).pending())
        await process.writer.flush()
        syncs = process.writer.statistics.syncs
        assert process.writer.unsynced_bytes == PAGE_BYTES
        await asyncio.sleep(4 * SMALL.tail_seconds_max)
        await process.settle()
        assert process.writer.statistics.syncs == syncs
        assert process.writer.settled


async def test_a_mark_that_cannot_be_written_fails_no_flush_and_loses_nothing() -> None:
    storage = MemoryStorage()
    broken = [True]

    def refuse(operation: Operation) -> OSError | None:
        mark = operation.name == "write" and operation.nbytes == PAGE_BYTES and operation.offset > PAGE_BYTES
        return OSError(5, "Input/output error") if mark and broken[0] else None

    storage.hooks.append(refuse)
    blocks = [Block(number, LARGE) for number in range(2)]
    async with running(storage, MARKED) as process:
        process.writer.append(blocks[0].pending())
        await process.writer.flush()
        assert blocks[0].durable
        broken[0] = False
        process.writer.append(blocks[1].pending())
        await process.writer.flush()
        assert blocks[0].locations[0].segment != blocks[1].locations[0].segment, "no further byte after a failure"
        assert process.writer.statistics.replaced_records == 0
    async with running(storage, MARKED) as process:
        found = blocks_of(await process.facts())
        reads = await process.read(*(block.read(found[block.block_id].location) for block in blocks))
        assert all(block.matches(read) for block, read in zip(blocks, reads, strict=True))
