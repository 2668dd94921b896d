"""Reads of one loop turn: neighbours become one, each run ends by itself, and nobody waits for what nobody wants."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from cascade_aio.abc.storage import PAGE_BYTES, Priority, Urgency
from cascade_aio.segments.facts import Location
from cascade_aio.segments.reader import RecordRead, SegmentReader
from cascade_aio.tiers.reading import AHEAD_BYTES_MAX, DEMAND_BYTES_MAX, TurnReads

MIB = 1 << 20


class _Reader:
    """Keeps what it is asked for; ends it when told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], Urgency]] = []
        self.gates: list[asyncio.Future[None]] = []
        self.cancelled: list[int] = []

    async def read(self, reads: Sequence[RecordRead], *, priority: Urgency) -> None:
        number = len(self.calls)
        self.calls.append(([read.location.page * PAGE_BYTES for read in reads], priority))
        self.gates.append(asyncio.get_running_loop().create_future())
        try:
            await self.gates[number]
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # the kernel gives the memory back
            self.cancelled.append(number)
            raise
        for read in reads:
            read.outcome = OSError("read")


def _record(offset: int, nbytes: int, segment: int = 1) -> RecordRead:
    return RecordRead(Location(segment, offset // PAGE_BYTES, 1), nbytes, memoryview(b""), b"", 0, 0)


def _start(reads: TurnReads, records: Sequence[RecordRead], urgencies: Sequence[Urgency]) -> list[asyncio.Task[None]]:
    return [
        asyncio.ensure_future(reads.read(record, urgency)) for record, urgency in zip(records, urgencies, strict=True)
    ]


def _made() -> tuple[_Reader, TurnReads]:
    reader = _Reader()
    return reader, TurnReads(cast("SegmentReader", reader))


async def _turns(count: int = 4) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_neighbours_ahead_of_need_are_read_together_and_each_run_ends_by_itself() -> None:
    reader, reads = _made()
    records = [_record(index * MIB, MIB) for index in range(8)]
    tasks = _start(reads, records, [Urgency(Priority.BACKGROUND) for _ in records])
    await _turns()
    assert [offsets for offsets, _ in reader.calls] == [[n * MIB for n in range(4)], [n * MIB for n in range(4, 8)]]
    reader.gates[1].set_result(None)
    await _turns()
    assert [task.done() for task in tasks] == [False] * 4 + [True] * 4
    reader.gates[0].set_result(None)
    await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("nbytes", "priority"),
    [(DEMAND_BYTES_MAX + PAGE_BYTES, Priority.DEMAND), (AHEAD_BYTES_MAX + PAGE_BYTES, Priority.BACKGROUND)],
)
async def test_large_records_go_alone_and_keep_their_own_urgency(nbytes: int, priority: Priority) -> None:
    reader, reads = _made()
    urgencies = [Urgency(priority), Urgency(priority)]
    tasks = _start(reads, [_record(0, nbytes), _record(nbytes, nbytes)], urgencies)
    await _turns()
    assert reader.calls == [([0], urgencies[0]), ([nbytes], urgencies[1])]
    for gate in reader.gates:
        gate.set_result(None)
    await asyncio.gather(*tasks)


async def test_classes_are_not_mixed_and_a_run_rises_with_any_of_its_members() -> None:
    reader, reads = _made()
    urgencies = [Urgency(Priority.BACKGROUND), Urgency(Priority.DEMAND), Urgency(Priority.BACKGROUND)]
    records = [_record(index * PAGE_BYTES, PAGE_BYTES) for index in range(3)]
    tasks = _start(reads, records, urgencies)
    await _turns()
    assert sorted((offsets, urgency.priority) for offsets, urgency in reader.calls) == [
        ([0], Priority.BACKGROUND),
        ([PAGE_BYTES], Priority.DEMAND),
        ([2 * PAGE_BYTES], Priority.BACKGROUND),
    ]
    joined = _start(reads, [_record(n * PAGE_BYTES, PAGE_BYTES, 2) for n in range(2)], [urgencies[0], urgencies[2]])
    await _turns()
    offsets, urgency = reader.calls[-1]
    assert (offsets, urgency.priority) == ([0, PAGE_BYTES], Priority.BACKGROUND)
    urgencies[2].rise(Priority.DEMAND)
    assert urgency.priority is Priority.DEMAND
    for gate in reader.gates:
        gate.set_result(None)
    await asyncio.gather(*tasks, *joined)


async def test_one_who_gives_up_waits_for_its_run_and_the_last_one_cancels_it() -> None:
    reader, reads = _made()
    tasks = _start(
        reads, [_record(n * PAGE_BYTES, PAGE_BYTES) for n in range(2)], [Urgency(Priority.BACKGROUND) for _ in range(2)]
    )
    await _turns()
    tasks[0].cancel()
    await _turns()
    assert not tasks[0].done(), "its extent may still be written to"
    assert not reader.cancelled
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert reader.cancelled == [0]
    assert all(task.cancelled() for task in tasks)


@pytest.mark.parametrize("turns", range(4))
async def test_giving_up_at_any_turn_leaves_the_others_their_read(turns: int) -> None:
    reader, reads = _made()
    tasks = _start(
        reads, [_record(n * PAGE_BYTES, PAGE_BYTES) for n in range(3)], [Urgency(Priority.DEMAND) for _ in range(3)]
    )
    await _turns(turns)
    tasks[1].cancel()
    await _turns(6)
    for gate in reader.gates:
        gate.set_result(None)
    await asyncio.wait(tasks)
    assert [task.cancelled() for task in tasks] == [False, True, False]
    assert not reads._pending


async def test_a_failure_nobody_foresaw_reaches_every_member() -> None:
    reader, reads = _made()
    tasks = _start(
        reads, [_record(n * PAGE_BYTES, PAGE_BYTES) for n in range(2)], [Urgency(Priority.DEMAND) for _ in range(2)]
    )
    await _turns()
    reader.gates[0].set_exception(RuntimeError("a defect"))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["a defect", "a defect"]
