"""A small world for segment tests: one process with writer, table and recovery on a memory disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections.abc import AsyncIterator, Sequence

import crc32c

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments import format as fmt
from cascade_aio.segments.checkpoint import Cover
from cascade_aio.segments.facts import BindingFact, BlockFact, DamageFact, Fact, Location, TombstoneFact
from cascade_aio.segments.hosts import Host
from cascade_aio.segments.layout import Root, WriterClaim, claim_writer, open_root
from cascade_aio.segments.pending import PendingRecord
from cascade_aio.segments.reader import RecordRead, SegmentReader
from cascade_aio.segments.recovery import Recovery
from cascade_aio.segments.table import SegmentTable
from cascade_aio.segments.writer import SegmentWriter, WriterLimits
from cascade_aio.testing.clock import ManualClock
from cascade_aio.testing.memory import MemoryEngine, MemoryStorage

ROOT = "/kv"
SMALL = WriterLimits(
    segment_bytes=32 * PAGE_BYTES * 4,
    write_bytes_max=16 * PAGE_BYTES,
    inflight_bytes_max=64 * PAGE_BYTES,
    linger_bytes=8 * PAGE_BYTES,
    sync_bytes=256 * PAGE_BYTES,
    tail_seconds_max=0.05,
    retry_seconds=0.01,
)
QUIET = WriterLimits(segment_bytes=1 << 22, linger_bytes=1 << 20, tail_seconds_max=3600.0)
"""Nothing happens unless asked for."""


class Block:
    """A block and what became of it. Bytes come from its number."""

    def __init__(self, number: int, nbytes: int = 3000, stamp: int | None = None, bindings: int = 0) -> None:
        self.number = number
        self.key = hashlib.shake_128(b"k%d" % number).digest(nbytes // 3)
        self.value = hashlib.shake_128(b"v%d" % number).digest(nbytes - nbytes // 3)
        self.digest = hashlib.sha256(self.key + self.value).digest()
        self.stamp = number + 1 if stamp is None else stamp
        self.bindings = tuple(
            fmt.Binding(hashlib.sha256(b"p%d.%d" % (number, i)).digest(), None, self.stamp) for i in range(bindings)
        )
        self.payload_bytes = fmt.payload_bytes_of(len(self.key), len(self.value))
        self.header_pages = fmt.header_pages_for(self.payload_bytes, 4, len(self.bindings))
        self.record_bytes = self.header_pages * PAGE_BYTES + self.payload_bytes
        self.locations: list[Location] = []
        self.failures: list[BaseException] = []
        self.extent = memoryview(bytearray(b"\xee" * self.record_bytes))
        start, offset = self.header_pages * PAGE_BYTES, fmt.value_offset_of(len(self.key))
        payload = self.extent[start:]
        payload[:] = bytes(len(payload))
        payload[: len(self.key)] = self.key
        payload[offset : offset + len(self.value)] = self.value
        self.crcs = tuple(
            crc32c.crc32c(payload[i : i + fmt.CHUNK_BYTES]) for i in range(0, len(payload), fmt.CHUNK_BYTES)
        )

    @property
    def block_id(self) -> bytes:
        return self.digest[:16]

    @property
    def durable(self) -> bool:
        return bool(self.locations)

    def pending(self) -> PendingRecord:
        return PendingRecord(
            self.extent, self.header_pages, self.stamp, self.digest, len(self.key), len(self.value),
            fmt.value_offset_of(len(self.key)), self.crcs, b"meta", self.bindings,
            self.locations.append, self.failures.append,
        )  # fmt: skip

    def read(self, location: Location | None = None) -> RecordRead:
        extent = memoryview(bytearray(self.record_bytes))
        where = self.locations[-1] if location is None else location
        return RecordRead(where, self.record_bytes, extent, self.digest, len(self.key), len(self.value))

    def matches(self, read: RecordRead) -> bool:
        """Whether a read gave exactly this block's bytes."""
        if not isinstance(read.outcome, fmt.RecordHeader):
            return False
        payload = read.extent[self.header_pages * PAGE_BYTES :]
        offset = read.outcome.value_offset
        return (
            payload[: len(self.key)] == self.key
            and payload[offset : offset + len(self.value)] == self.value
            and read.outcome.meta == b"meta"
            and read.outcome.bindings == self.bindings
        )


class Process:
    """One opened root."""

    def __init__(self, storage: MemoryStorage, root: Root, claim: WriterClaim, limits: WriterLimits) -> None:
        self.storage = storage
        self.root = root
        self.claim = claim
        self.engine = MemoryEngine()
        self.table = SegmentTable(storage, root.path)
        self.stamps = itertools.count(1_000_000)
        self.writer = SegmentWriter(storage, root, claim, self.table, lambda: next(self.stamps), limits)
        self.reader = SegmentReader(storage, self.engine, self.table)
        self.recovery = Recovery(storage, self.engine, root, self.table, claim)

    async def facts(self, covers: Sequence[Cover] = ()) -> list[Fact]:
        return [fact async for fact in self.recovery.recover_root(covers)]

    async def refresh(self) -> list[Fact]:
        return [fact async for fact in self.recovery.refresh_root()]

    async def read(self, *reads: RecordRead) -> Sequence[RecordRead]:
        await self.reader.read(reads)
        return reads

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


async def start(storage: MemoryStorage, limits: WriterLimits = QUIET, host: str = "node") -> Process:
    """Open the root without running the writer."""
    root = await open_root(storage, ROOT, "sha256", clock=ManualClock())
    return Process(storage, root, await claim_writer(storage, root, Host(host, f"boot of {host}")), limits)


@contextlib.asynccontextmanager
async def running(
    storage: MemoryStorage, limits: WriterLimits = QUIET, host: str = "node", *, seal: bool = True
) -> AsyncIterator[Process]:
    """Open the root, run the writer, close it at the end."""
    process = await start(storage, limits, host)
    run = asyncio.create_task(process.writer.run())
    try:
        yield process
        await process.writer.aclose(seal=seal)
        await run
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await process.table.aclose()
        process.claim.release()


def blocks_of(facts: Sequence[Fact]) -> dict[bytes, BlockFact]:
    return {fact.block_id: fact for fact in facts if isinstance(fact, BlockFact)}


def said(facts: Sequence[Fact]) -> set[tuple[object, ...]]:
    """What facts say, whatever the segment numbers and the source."""
    result: set[tuple[object, ...]] = set()
    for fact in facts:
        if isinstance(fact, BlockFact):
            result.add(("block", fact.location.page, fact.location.header_pages, *fact[1:6]))
        elif isinstance(fact, BindingFact):
            result.add(("binding", fact.location.page, *fact[1:5]))
        elif isinstance(fact, TombstoneFact):
            result.add(("tombstone", fact.location.page, *fact[1:3]))
    return result


def damages(facts: Sequence[Fact]) -> list[DamageFact]:
    return [fact for fact in facts if isinstance(fact, DamageFact)]
