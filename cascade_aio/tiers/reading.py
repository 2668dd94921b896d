"""Which reads of the disk tier go together: those of one loop turn, joined where they are neighbours.

For small records a request, a wake-up and a verification each cost more than the bytes; even at 1 MiB
they take as long as the device. Reads that one loop turn asks for are therefore planned together and
cut into *runs* of neighbouring records; a run is one read, one verification, one wake-up, and ends by itself.

Invariants: a run owns the extents of all of its members until its end; it is as urgent as the most
urgent of them, and it is cancelled when the last of them has given up. Belongs to one event loop. Must
not know: who wants a record, or how it is checked.
"""

from __future__ import annotations

import asyncio

from cascade_aio.abc.storage import PAGE_BYTES, Priority, Urgency
from cascade_aio.core.ranges import ReadRequest, Run, coalesce
from cascade_aio.io.waiting import Completion
from cascade_aio.segments.reader import RUN_BYTES_MAX, RUN_REQUESTS_MAX, RecordRead, SegmentReader

DEMAND_BYTES_MAX = 512 << 10
"""Records that somebody waits for are joined up to this size; larger ones end as soon as they can."""

AHEAD_BYTES_MAX = 4 << 20
"""Records that nobody waits for yet are joined up to this size: from there on they fill a request."""

RUNS_AT_LEAST = 4
"""What one turn asks for is cut into so many runs, so that one is verified while others are read …"""

RUN_BYTES_MIN = 512 << 10
"""… but none shorter than this is made for that reason …"""

RUN_AHEAD_BYTES_MIN = 4 << 20
"""… and for reads ahead none shorter than this: other work goes on beside them."""


class _Member(Completion):
    """One read, awaited by one task. ``run`` is set when the turn is planned."""

    __slots__ = ("read", "run", "urgency")

    def __init__(self, read: RecordRead, urgency: Urgency) -> None:
        super().__init__(asyncio.get_running_loop())
        self.read = read
        self.urgency = urgency
        self.run: _Run | None = None

    def rise(self, priority: Priority) -> None:
        if self.run is not None:
            self.run.urgency.rise(priority)


class _Run:
    __slots__ = ("members", "task", "urgency", "wanted")

    def __init__(self, members: list[_Member], priority: Priority) -> None:
        self.members = members
        self.urgency = Urgency(priority)
        self.wanted = len(members)
        self.task: asyncio.Task[None] | None = None


class TurnReads:
    """Reads through ``reader``, those of one loop turn together. Nothing is left when nobody awaits a read."""

    def __init__(self, reader: SegmentReader) -> None:
        self._reader = reader
        self._pending: list[_Member] = []

    async def read(self, read: RecordRead, urgency: Urgency) -> None:
        """Set ``read.outcome``. Once this has returned or raised, cancelled too, nobody touches the extent any more."""
        if read.layered or read.record_bytes > _joined_bytes_max(urgency.priority):
            await self._reader.read([read], priority=urgency)
            return
        member = _Member(read, urgency)
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._plan)
        self._pending.append(member)
        with urgency.watched(member.rise):
            await member.wait(self._leave)
        if member.run is not None and member.run.task is not None:
            member.run.task.result()

    def _leave(self, member: _Member) -> None:
        """The member's task was cancelled: it waits on until its extent is its own again."""
        run = member.run
        if run is None:
            self._pending.remove(member)
            member.finish()
            return
        run.wanted -= 1
        if not run.wanted and run.task is not None:
            run.task.cancel()

    def _plan(self) -> None:
        pending, self._pending = self._pending, []
        by_class: dict[Priority, list[_Member]] = {}
        for member in pending:
            by_class.setdefault(member.urgency.priority, []).append(member)
        for priority, members in by_class.items():
            for run in _runs(members, priority):
                self._start(_Run([_member_of(request) for request in run.requests], priority))

    def _start(self, run: _Run) -> None:
        reads = [member.read for member in run.members]
        for member in run.members:
            member.run = run

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                task.exception()  # raised by each member that still waits
            for member in run.members:
                member.finish()

        run.task = asyncio.get_running_loop().create_task(self._reader.read(reads, priority=run.urgency))
        run.task.add_done_callback(ended)


def _joined_bytes_max(priority: Priority) -> int:
    return DEMAND_BYTES_MAX if priority is Priority.DEMAND else AHEAD_BYTES_MAX


def _runs(members: list[_Member], priority: Priority) -> list[Run]:
    least = RUN_BYTES_MIN if priority is Priority.DEMAND else RUN_AHEAD_BYTES_MIN
    share = sum(member.read.record_bytes for member in members) // RUNS_AT_LEAST
    wanted = [
        ReadRequest(
            member.read.location.segment, member.read.location.page * PAGE_BYTES, member.read.record_bytes, member
        )
        for member in members
    ]
    run_bytes_max = min(max(share, least), RUN_BYTES_MAX)
    return coalesce(wanted, gap_bytes_max=0, run_bytes_max=run_bytes_max, run_requests_max=RUN_REQUESTS_MAX)


def _member_of(request: ReadRequest) -> _Member:
    assert isinstance(request.token, _Member), request
    return request.token
