"""What waits to become durable: appends in order, and the flushes that wait for them.

Synchronous bookkeeping of the segment writer. Every append gets a ticket, counting up. A flush waits
for all tickets up to the one that was newest when it was called; appends may become durable out of
order (a failed segment's are placed again), so the line of settled tickets advances only over gaps
that have closed.

Invariant: a name is not placed before the record of its block is durable. Notes and records take different ways to
the disk, and a name that arrives alone would lie in wait there: whoever puts the block later, after a crash, would
find it bound by a put that never happened.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Sequence

from cascade_aio.model import BLOCK_ID_BYTES
from cascade_aio.segments.facts import Location
from cascade_aio.segments.format import Binding, NoteBinding, Tombstone


@dataclasses.dataclass(slots=True, eq=False)
class PendingRecord:
    """A sealed block on its way to disk.

    ``extent`` is writable and page-aligned: ``header_pages`` pages that the writer fills, then the
    padded payload that it only reads. It belongs to the writer until one of the callbacks, which run
    on the loop: ``on_durable`` once the record is on stable storage (only then may the copy in
    memory be dropped), or ``on_failed`` when the writer has given up for good.
    """

    extent: memoryview
    header_pages: int
    stamp: int
    digest: bytes
    key_bytes: int
    value_bytes: int
    value_offset: int
    chunk_crcs: tuple[int, ...]
    meta: bytes
    bindings: tuple[Binding, ...]
    on_durable: Callable[[Location], None]
    on_failed: Callable[[BaseException], None]


@dataclasses.dataclass(slots=True, eq=False)
class Append:
    """One ticket: a record, or entries for the next NOTE."""

    ticket: int
    nbytes: int
    appended_s: float
    record: PendingRecord | None = None
    bindings: Sequence[NoteBinding] = ()
    tombstones: Sequence[Tombstone] = ()
    settled: bool = False


class TicketFifo:
    """The smallest of the tickets in a first-in first-out line, O(1) amortized, whatever their order.

    Only those that no later and smaller one outlives are kept.
    """

    def __init__(self) -> None:
        self._smallest: collections.deque[int] = collections.deque()

    @property
    def smallest(self) -> int | None:
        return self._smallest[0] if self._smallest else None

    def push(self, ticket: int) -> None:
        while self._smallest and self._smallest[-1] > ticket:
            self._smallest.pop()
        self._smallest.append(ticket)

    def pop(self, ticket: int) -> None:
        """The one that was pushed first leaves: it is ``ticket``."""
        if self._smallest[0] == ticket:
            self._smallest.popleft()

    def clear(self) -> None:
        self._smallest.clear()


class PendingQueue:
    """Tickets, the two queues to be placed (records, note entries), names that wait for records, and flushes."""

    def __init__(self) -> None:
        self.records: collections.deque[Append] = collections.deque()
        self.notes: collections.deque[Append] = collections.deque()
        self.last_ticket = 0
        self.settled_ticket = 0
        self.queued_bytes = 0
        self.backlog_bytes = 0
        self._line: collections.deque[Append] = collections.deque()
        self._records: dict[bytes, Append] = {}
        """By block id: the newest record that is not durable yet."""
        self._held: dict[int, list[Append]] = {}
        """By ticket of the record that they wait for: names."""
        self._waiters: collections.deque[tuple[int, asyncio.Future[None] | None]] = collections.deque()

    def push(self, append: Append) -> None:
        self.last_ticket = append.ticket
        if append.record is None:
            self._queue_notes((append,))
        else:
            self._records[_block_id_of(append.record)] = append
            self.records.append(append)
        self._line.append(append)
        self.queued_bytes += append.nbytes
        self.backlog_bytes += append.nbytes

    def _queue_notes(self, notes: Sequence[Append]) -> None:
        """Their turn comes once the blocks that they name are on disk."""
        ready = []
        for note in notes:
            records = (self._records.get(binding.block_id) for binding in note.bindings)
            record = next(filter(None, records), None)
            if record is None:
                ready.append(note)
            else:
                self._held.setdefault(record.ticket, []).append(note)
        in_order = not (ready and self.notes) or self.notes[-1].ticket < ready[0].ticket
        self.notes.extend(ready)
        if not in_order:
            self.notes = collections.deque(sorted(self.notes, key=_ticket_of))

    def take_queued(self) -> list[Append]:
        """Everything that has no place yet, names that wait for a record included: it leaves the queues, unsettled."""
        queued = [*self.records, *self.notes, *(note for notes in self._held.values() for note in notes)]
        self.records.clear()
        self.notes.clear()
        self._held.clear()
        self.queued_bytes = 0
        return queued

    def push_back(self, orphans: Sequence[Append]) -> None:
        """Queue appends of a failed segment again, in order of ticket with those of other failed segments."""
        for queue, wants_record in ((self.records, True), (self.notes, False)):
            mine = [append for append in orphans if (append.record is not None) is wants_record]
            self.queued_bytes += sum(append.nbytes for append in mine)
            newest = max((append.ticket for append in mine), default=0)
            while queue and queue[0].ticket < newest:
                mine.append(queue.popleft())
            mine.sort(key=_ticket_of)
            queue.extendleft(reversed(mine))

    @property
    def first_queued(self) -> Append | None:
        """The oldest append that has no place yet and waits for nothing but one."""
        heads = [queue[0] for queue in (self.records, self.notes) if queue]
        return min(heads, key=lambda append: append.ticket) if heads else None

    def settle(self, appends: Sequence[Append]) -> None:
        """These are durable: advance the line and answer flushes."""
        released: list[Append] = []
        for append in appends:
            append.settled = True
            self.backlog_bytes -= append.nbytes
            if append.record is not None:
                block_id = _block_id_of(append.record)
                if self._records.get(block_id) is append:
                    del self._records[block_id]
                released += self._held.pop(append.ticket, ())
        self._queue_notes(sorted(released, key=_ticket_of))
        while self._line and self._line[0].settled:
            self.settled_ticket = self._line.popleft().ticket
        while self._waiters and self._waiters[0][0] <= self.settled_ticket:
            _, future = self._waiters.popleft()
            if future is not None and not future.done():
                future.set_result(None)

    # -- flushes -------------------------------------------------------------------------------

    @property
    def first_wanted(self) -> int | None:
        """The ticket the oldest flush waits for."""
        return self._waiters[0][0] if self._waiters else None

    @property
    def last_wanted(self) -> int:
        """The newest ticket that anybody wants durable now."""
        return self._waiters[-1][0] if self._waiters else 0

    def want(self, future: asyncio.Future[None] | None) -> None:
        """Everything appended so far is wanted soon; ``future`` is told when, and if not, why."""
        if future is not None or self.last_wanted < self.last_ticket > self.settled_ticket:
            self._waiters.append((self.last_ticket, future))

    def refuse(self, error: Callable[[], BaseException], from_ticket: int = 0) -> None:
        """Answer the flushes that wait for ``from_ticket`` or later with an error."""
        kept: collections.deque[tuple[int, asyncio.Future[None] | None]] = collections.deque()
        for ticket, future in self._waiters:
            if ticket < from_ticket or future is None:
                kept.append((ticket, future))
            elif not future.done():
                future.set_exception(error())
        self._waiters = kept

    def abandon(self) -> list[Append]:
        """Everything unsettled, which is forgotten; the caller tells the owners."""
        rest = [append for append in self._line if not append.settled]
        self.take_queued()
        self._line.clear()
        self._records.clear()
        self.backlog_bytes = 0
        self.settled_ticket = self.last_ticket
        self._waiters.clear()
        return rest


def _ticket_of(append: Append) -> int:
    return append.ticket


def _block_id_of(record: PendingRecord) -> bytes:
    return record.digest[:BLOCK_ID_BYTES]
