"""The segment writer after failures that pass: nothing sticks, nothing waits longer than it has to."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cascade_aio.errors import BrokenTierError, TierFullError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.pending import Append, PendingQueue, TicketFifo
from cascade_aio.segments.writer import SHORTAGE_SECONDS_MAX, WriterLimits, _until_due
from cascade_aio.testing.memory import MemoryStorage, Operation
from cascade_aio.testing.world import fail_with, virtual_loop
from tests.segments.harness import Block, Process, running

LAZY = WriterLimits(segment_bytes=1 << 20, linger_bytes=1 << 20, tail_seconds_max=3600.0)
"""Nothing happens unless asked for; a segment takes some 30 blocks."""


def run(story: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
    """Tell ``story`` to a running writer, in virtual time."""

    async def world() -> None:
        async with running(MemoryStorage(), LAZY) as process:
            await story(process)

    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(world())


def append(process: Process, *numbers: int, nbytes: int = 30_000) -> list[Block]:
    blocks = [Block(number, nbytes) for number in numbers]
    for block in blocks:
        process.writer.append(block.pending())
    return blocks


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_no_space_for_an_older_segment_is_forgotten_when_the_active_one_takes_more() -> None:
    async def story(process: Process) -> None:
        warm = append(process, *range(1000, 1026))
        await process.writer.flush()
        first = process.table[warm[-1].locations[0].segment].path
        process.storage.hooks.append(fail_with(errno.ENOSPC, "sync", path_part=first))  # its next: when it is sealed
        blocks = append(process, *range(6))
        with_retry_s = now_s() + 2 * LAZY.retry_seconds
        while not all(block.durable for block in blocks):
            try:
                await process.writer.flush()
            except TierFullError:
                assert now_s() < with_retry_s
                await asyncio.sleep(LAZY.retry_seconds / 4)
        assert process.writer.statistics.no_space == 1
        for number in range(100, 110):
            append(process, number)
            assert not process.writer.full
            await process.writer.flush()

    run(story)


@pytest.mark.parametrize("turns", range(6))
def test_a_note_younger_than_the_flush_does_not_delay_it(turns: int) -> None:
    async def story(process: Process) -> None:
        append(process, 1, nbytes=3000)
        started_s = now_s()
        flushing = asyncio.ensure_future(process.writer.flush())
        for _ in range(turns):
            await asyncio.sleep(0)
        process.writer.append_note((), [fmt.Tombstone(bytes(16), 1)])
        append(process, 2, nbytes=3000)
        await flushing
        assert now_s() == started_s

    run(story)


def test_what_two_failed_segments_held_is_queued_by_ticket_in_either_order() -> None:
    for older_first in (True, False):
        queue = PendingQueue()
        appends = [Append(ticket, 0, 0.0, None if ticket % 3 else Block(ticket).pending()) for ticket in range(1, 25)]
        for pending in appends:
            queue.push(pending)
        queue.records.clear()
        queue.notes.clear()
        for pending in appends[20:]:
            (queue.notes if pending.record is None else queue.records).append(pending)
        orphans = [appends[:10], appends[10:20]]
        for some in orphans if older_first else reversed(orphans):
            queue.push_back(some)
        assert queue.first_queued is appends[0]
        assert list(queue.records) == [pending for pending in appends if pending.record is not None]
        assert list(queue.notes) == [pending for pending in appends if pending.record is None]


def test_the_smallest_ticket_of_a_line_is_known_whatever_their_order() -> None:
    line, fifo = [], TicketFifo()
    for number in range(500):
        ticket = number * 7919 % 31  # all orders, and equal ones
        line.append(ticket)
        fifo.push(ticket)
        assert fifo.smallest == min(line)
        if number % 3:
            fifo.pop(line.pop(0))
            assert fifo.smallest == min(line, default=None)


@pytest.mark.parametrize("operation", ["create", "write", "sync"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR])
def test_a_shortage_that_passes_is_waited_for(operation: str, code: int) -> None:
    async def story(process: Process) -> None:
        process.storage.hooks.append(fail_with(code, operation, times=3 * LAZY.failures_max))
        (block,) = append(process, 1)
        await process.writer.flush()
        assert block.durable
        assert not process.writer.broken

    run(story)


def test_a_shortage_that_lasts_is_told_and_its_end_is_noticed() -> None:
    async def story(process: Process) -> None:
        process.storage.hooks.append(fail_with(errno.EMFILE, "create", times=1 << 30))
        (block,) = append(process, 1)
        started_s = now_s()
        with pytest.raises(TierFullError, match="Too many open files"):
            await process.writer.flush()
        assert SHORTAGE_SECONDS_MAX <= now_s() - started_s <= SHORTAGE_SECONDS_MAX + 2 * LAZY.retry_seconds
        with pytest.raises(TierFullError, match="Too many open files"):
            await process.writer.flush()
        attempts = process.writer.statistics.failures
        await asyncio.sleep(1000 * LAZY.retry_seconds)
        assert process.writer.statistics.failures - attempts <= 1000
        process.storage.hooks.clear()
        await asyncio.sleep(2 * LAZY.retry_seconds)
        await process.writer.flush()
        assert block.durable
        assert not process.writer.full

    run(story)


def test_attempts_after_failures_are_spread_over_time() -> None:
    async def story(process: Process) -> None:
        times: list[float] = []

        def hook(operation: Operation) -> OSError | None:
            if operation.name != "create" or operation.after or not operation.path.endswith(".seg"):
                return None
            times.append(now_s())
            return OSError(errno.EIO, "injected", operation.path)

        process.storage.hooks.append(hook)
        append(process, 1)
        with pytest.raises(BrokenTierError, match="4 times in a row"):
            await process.writer.flush()
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert len(times) == LAZY.failures_max
        assert all(later >= 1.9 * earlier > 0 for earlier, later in itertools.pairwise(pauses))
        process.storage.hooks.clear()
        with pytest.raises(BrokenTierError):
            await process.writer.aclose()

    run(story)


def test_writes_that_fail_together_in_many_segments_are_one_failure() -> None:
    async def story(process: Process) -> None:
        held: set[str] = set()
        together = asyncio.Event()

        async def fail_together(path: str) -> None:
            held.add(path)
            if len(held) == 2 * LAZY.failures_max:
                together.set()
            await together.wait()
            raise OSError(errno.EIO, "injected", path)

        def hook(operation: Operation) -> Coroutine[Any, Any, None] | None:
            data = operation.name == "write" and operation.offset and not operation.after
            return fail_together(operation.path) if data and not together.is_set() else None

        process.storage.hooks.append(hook)
        blocks = append(process, *range(20), nbytes=600_000)  # one fits a segment
        await process.writer.flush()
        assert all(block.durable for block in blocks)
        assert process.writer.statistics.failures == 2 * LAZY.failures_max

    run(story)


def test_what_is_due_within_the_resolution_of_the_clock_is_due() -> None:
    """A timer of less than the clock can tell ends at once, and would be set again for ever."""

    async def story() -> None:
        asked = 0

        def due_in_s() -> float:
            nonlocal asked
            asked += 1
            assert asked < 10, "spinning"
            return 1e-12

        await _until_due(asyncio.Event(), due_in_s)

    loop = virtual_loop()
    try:
        loop.run_until_complete(story())
    finally:
        loop.close()
