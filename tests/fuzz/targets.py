"""What is fuzzed: one function per structure on disk. Each takes any bytes and raises for a broken promise only.

The promise: any bytes give data, ``CorruptionError``, ``ConfigError`` (another version) or the end of the log; never
another exception, an endless loop, or an allocation beyond the size of the file. The first byte decides whether
the rest is taken as it is or as decisions for mutating valid bytes; mutated structures mostly get right
checksums again, so that what lies behind a checksum is reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import posixpath
import struct
from collections.abc import Callable, Iterator
from unittest import mock

import crc32c

from cascade_aio.abc.storage import PAGE_BYTES, Platform
from cascade_aio.config import make_config
from cascade_aio.errors import BlockNotFoundError, ConfigError, CorruptionError, TierFullError
from cascade_aio.model import compute_block_id
from cascade_aio.segments import format as fmt
from cascade_aio.segments.checkpoint import Checkpoint, CheckpointFailure, read_checkpoint
from cascade_aio.segments.facts import BlockFact
from cascade_aio.segments.footer import decode_trailer, footer_facts
from cascade_aio.segments.hosts import Host
from cascade_aio.segments.layout import claim_writer, open_root
from cascade_aio.segments.reader import RecordRead, SegmentReader
from cascade_aio.segments.recovery import Recovery
from cascade_aio.segments.scan import SCAN_WINDOW_BYTES, VERIFY_BYTES
from cascade_aio.segments.table import SegmentTable
from cascade_aio.store.block import decode_meta
from cascade_aio.store.opening import open_with
from cascade_aio.testing.clock import ManualClock
from cascade_aio.testing.memory import MemoryDisk, MemoryEngine, MemoryStorage
from cascade_aio.tiers.arena import PrivateArena
from tests.fuzz.mutations import Decisions, mutated, mutated_json
from tests.fuzz.seeds import golden_seeds

Target = Callable[[bytes], None]

PATH = "fuzz.seg"
HOST = Host("fuzz", "boot")
FILE_BYTES_MAX = 1 << 18
"""Larger files are left out: they cost time and reach nothing else."""

_RAW = 64
"""First bytes below this: the rest is what is parsed."""


def _content(data: bytes, seeds: list[bytes], fix: Callable[[bytearray], None]) -> bytes:
    """Bytes to parse: as they come, or mutated from a seed with its checksums mostly mended."""
    if not data or data[0] < _RAW:
        return data[1:]
    content = mutated(seeds, Decisions(data[1:]))
    if data[0] % 8:
        fix(content)
    return bytes(content)


def _fix_page(content: bytearray) -> None:
    if len(content) >= PAGE_BYTES:
        fmt.seal_page(memoryview(content)[:PAGE_BYTES])


def _fix_record(content: bytearray) -> None:
    """The checksum of the header at the start, as long as it says it is."""
    if len(content) >= PAGE_BYTES:
        pages = int.from_bytes(content[12:14], "little")
        if 1 <= pages <= fmt.HEADER_PAGES_MAX and len(content) >= pages * PAGE_BYTES:
            fmt.seal_page(memoryview(content)[: pages * PAGE_BYTES])


def segment_header(data: bytes) -> None:
    """Page 0 of a segment."""
    seeds = [bytes(parts.content[:PAGE_BYTES]) for parts in golden_seeds().segments.values()]
    with contextlib.suppress(CorruptionError, ConfigError):
        fmt.decode_segment_header(memoryview(_content(data, seeds, _fix_page)), path=PATH)


def record_header(data: bytes) -> None:
    """The header of a record, blocks and notes with names and tombstones."""
    records = [(parts, record) for parts in golden_seeds().segments.values() for record in parts.records]
    seeds = [
        bytes(parts.content[record.offset : record.offset + record.header_pages * PAGE_BYTES])
        for parts, record in records
    ]
    content = memoryview(_content(data, seeds, _fix_record))
    for parts, record in records:
        with contextlib.suppress(CorruptionError, ConfigError):
            header = fmt.decode_record(content, parts.header.identity, path=PATH, offset=record.offset)
            if header is not None:
                assert header.end > header.offset
                assert header.record_bytes >= header.header_pages * PAGE_BYTES
                assert len(header.meta) + 72 * len(header.bindings) + 24 * len(header.tombstones) <= len(content)


def metadata(data: bytes) -> None:
    """What describes a block, behind all checksums."""
    seeds = [record.meta for parts in golden_seeds().segments.values() for record in parts.records if record.meta]
    with contextlib.suppress(ConfigError, CorruptionError):
        decode_meta(_content(data, seeds, lambda content: None))


_TRAILER_CRC_AT = 76
"""Of the footer, within the trailer."""


def _fix_footer(content: bytearray) -> None:
    if len(content) >= PAGE_BYTES:
        crc = crc32c.crc32c(bytes(content[:-PAGE_BYTES]))
        struct.pack_into("<I", content, len(content) - PAGE_BYTES + _TRAILER_CRC_AT, crc)
        fmt.seal_page(memoryview(content)[-PAGE_BYTES:])


def footer(data: bytes) -> None:
    """Footer and trailer."""
    sealed = [parts for parts in golden_seeds().segments.values() if parts.trailer is not None]
    seeds = [bytes(parts.content[parts.trailer.data_end :]) for parts in sealed if parts.trailer is not None]
    content = memoryview(_content(data, seeds, _fix_footer))
    if len(content) < PAGE_BYTES:
        return
    for parts in sealed:
        assert parts.trailer is not None
        with contextlib.suppress(CorruptionError, ConfigError):
            size = parts.trailer.data_end + len(content)
            trailer = decode_trailer(content[-PAGE_BYTES:], parts.header.identity, size, path=PATH)
            if trailer is not None:
                body = content[trailer.data_end - parts.trailer.data_end : -PAGE_BYTES]
                for fact in footer_facts(body, trailer, 0, PATH):
                    assert fact is not None


def _fix_checkpoint(content: bytearray) -> None:
    """The checksums of header and directory, and the directory's length."""
    if len(content) < 32:
        return
    nbytes = min(int.from_bytes(content[16:24], "little"), len(content) - 32)
    struct.pack_into("<QI", content, 16, nbytes, crc32c.crc32c(bytes(content[32 : 32 + nbytes])))
    struct.pack_into("<I", content, 28, crc32c.crc32c(bytes(content[:28])))


def _checkpoint_content(data: bytes) -> bytes:
    """Bytes as everywhere, or a checkpoint whose directory says something else."""
    if len(data) % 2:
        return _content(data, golden_seeds().of("checkpoint"), _fix_checkpoint)
    decisions = Decisions(data)
    seeds = golden_seeds().of("checkpoint")
    seed = seeds[decisions.below(len(seeds))]
    nbytes = int.from_bytes(seed[16:24], "little")
    directory = json.dumps(mutated_json(json.loads(seed[32 : 32 + nbytes]), decisions)).encode()
    content = bytearray(seed[:32] + directory + seed[32 + nbytes :])
    struct.pack_into("<Q", content, 16, len(directory))
    _fix_checkpoint(content)
    return bytes(content)


def checkpoint(data: bytes) -> None:
    """A checkpoint by itself."""
    asyncio.run(_checkpoint(_checkpoint_content(data)))


async def _checkpoint(content: bytes) -> None:
    disk = MemoryDisk()
    await _put_file(disk, "/checkpoint", content)
    found = await read_checkpoint(MemoryStorage(disk), MemoryEngine(), "/checkpoint", store=golden_seeds().store)
    assert isinstance(found, Checkpoint | CheckpointFailure)


def opening(data: bytes) -> None:
    """A whole store on a root with such a checkpoint: right bytes, a miss or damage, and it closes."""
    asyncio.run(_opening(_checkpoint_content(data)))


async def _opening(content: bytes) -> None:
    disk = await _golden_disk()
    for path in [path for path in disk.files if path.endswith("checkpoint")]:
        await _put_file(disk, path, content)
    config = make_config("/kv", shm_bytes=1 << 20, segment_bytes=1 << 20, stripe="off")
    platform = Platform(MemoryStorage(disk), MemoryEngine(), ManualClock(tick_ns=1000))
    store = await open_with(config, platform=platform, arena=PrivateArena(config.shm_bytes))
    try:
        for info in list(store.blocks()):
            with contextlib.suppress(CorruptionError, BlockNotFoundError, TierFullError):
                async with store.get(info.block_id) as block:
                    assert compute_block_id(block.key, block.value) == info.block_id
    finally:
        await store.aclose()


def small_files(data: bytes) -> None:
    """``cascade.json`` and ``writer.json``: what a directory says of itself."""
    seeds = golden_seeds()
    name = ("cascade.json", "writer.json")[len(data) % 2]
    content = _content(data, seeds.of(name), lambda content: None)
    asyncio.run(_small_files(name, content))


async def _small_files(name: str, content: bytes) -> None:
    disk = await _golden_disk()
    for path in [path for path in disk.files if path.endswith(name)]:
        await _put_file(disk, path, content)
    storage = MemoryStorage(disk)
    with contextlib.suppress(ConfigError):
        root = await open_root(storage, "/kv", golden_seeds().digest, clock=ManualClock())
        claim = await claim_writer(storage, root, HOST, ManualClock())
        claim.release()


def _fix_segment(content: bytearray) -> None:
    """Every page that begins like a header, and the trailer."""
    for at in range(0, len(content) - PAGE_BYTES + 1, PAGE_BYTES):
        page = memoryview(content)[at : at + PAGE_BYTES]
        if page[:8] == fmt.SEGMENT_MAGIC:
            fmt.seal_page(page)
        elif page[:8] == fmt.RECORD_MAGIC:
            pages = int.from_bytes(page[12:14], "little")
            if 1 <= pages <= fmt.HEADER_PAGES_MAX and at + pages * PAGE_BYTES <= len(content):
                fmt.seal_page(memoryview(content)[at : at + pages * PAGE_BYTES])
        page.release()
    if len(content) >= PAGE_BYTES and content[-PAGE_BYTES : -PAGE_BYTES + 8] == b"cscdTAIL":
        start = int.from_bytes(content[-PAGE_BYTES + 40 : -PAGE_BYTES + 48], "little")
        body = bytes(content[start:-PAGE_BYTES])
        struct.pack_into("<I", content, len(content) - PAGE_BYTES + _TRAILER_CRC_AT, crc32c.crc32c(body))
        fmt.seal_page(memoryview(content)[-PAGE_BYTES:])


def recovery(data: bytes) -> None:
    """A whole segment in a root: recovered as another writer's and as our own, read, sealed, recovered again."""
    paths = [
        path
        for path, content in golden_seeds().files.items()
        if path.endswith(".seg") and len(content) < FILE_BYTES_MAX
    ]
    path = paths[len(data) % len(paths)]
    content = _content(data, [golden_seeds().files[path]], _fix_segment)
    with contextlib.suppress(ConfigError):
        asyncio.run(_recovery("/kv/" + path, content))


async def _recovery(path: str, content: bytes) -> None:
    disk = await _golden_disk()
    await _put_file(disk, path, content)
    for adopt in (False, True, True):
        storage = MemoryStorage(disk)
        root = await open_root(storage, "/kv", golden_seeds().digest, clock=ManualClock())
        table, engine = SegmentTable(storage, "/kv"), MemoryEngine()
        claim = None
        if adopt:
            claim = await claim_writer(storage, root, HOST, ManualClock())
            claim.writer = bytes.fromhex(path.split("/")[3])
        try:
            with _bounded_pages(len(content)):
                facts = [fact async for fact in Recovery(storage, engine, root, table, claim).recover_root()]
            for fact in facts:
                if isinstance(fact, BlockFact) and table[fact.location.segment].path == path:
                    await _read(storage, engine, table, fact, len(content))
        finally:
            await table.aclose()
            if claim is not None:
                claim.release()


async def _read(
    storage: MemoryStorage, engine: MemoryEngine, table: SegmentTable, fact: BlockFact, file_bytes: int
) -> None:
    assert fact.record_bytes <= file_bytes, "an index that believes this would ask for as much memory"
    read = RecordRead(
        fact.location, fact.record_bytes, memoryview(bytearray(fact.record_bytes)), fact.digest,
        fact.key_bytes, fact.value_bytes,
    )  # fmt: skip
    await SegmentReader(storage, engine, table).read([read])
    assert isinstance(read.outcome, fmt.RecordHeader | CorruptionError | BlockNotFoundError), read.outcome


@contextlib.contextmanager
def _bounded_pages(file_bytes: int) -> Iterator[None]:
    """Page buffers are mapped, which no tracer of allocations sees: none is larger than the file or a fixed window."""
    limit = max(file_bytes + 2 * PAGE_BYTES, SCAN_WINDOW_BYTES, VERIFY_BYTES)
    plain = mmap.mmap

    def checked(descriptor: int, nbytes: int) -> object:
        assert nbytes <= limit, f"a buffer of {nbytes} bytes for a file of {file_bytes}"
        return plain(descriptor, nbytes)

    with mock.patch("cascade_aio.segments.buffers.mmap.mmap", checked):
        yield


async def _golden_disk() -> MemoryDisk:
    """The golden root, without its large segment."""
    disk = MemoryDisk()
    for name, content in golden_seeds().files.items():
        if len(content) < FILE_BYTES_MAX:
            await _put_file(disk, f"/kv/{name}", content)
    return disk


async def _put_file(disk: MemoryDisk, path: str, content: bytes) -> None:
    storage = MemoryStorage(disk)
    await storage.make_directory(posixpath.dirname(path))
    await storage.write_small(path, [content])


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (segment_header, record_header, metadata, footer, checkpoint, opening, small_files, recovery)
}
