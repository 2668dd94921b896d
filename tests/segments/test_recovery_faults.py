"""Recovery on a file system that fails: what could not be read is told, and left exactly as it is."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from typing import Any

import crc32c
import pytest

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import BlockNotFoundError, CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.checkpoint import Cover, covers_of
from cascade_aio.segments.facts import BlockFact, LostFact, VanishedFact
from cascade_aio.segments.scan import verify_records
from cascade_aio.testing.memory import MemoryStorage, Operation
from tests.segments.harness import QUIET, Block, Process, blocks_of, damages, running, start

Hook = Callable[[Operation], OSError | None]
COUNT = 6


async def crashed(*, sealed_sessions: int = 0, count: int = COUNT) -> tuple[MemoryStorage, list[Block]]:
    """A killed process: ``count`` acknowledged blocks in each sealed segment and in an open one."""
    storage = MemoryStorage()
    blocks: list[Block] = []
    for session in range(sealed_sessions + 1):
        seal = session < sealed_sessions
        async with running(storage, QUIET, seal=seal) as process:
            await process.facts([])
            for _ in range(count):
                block = Block(len(blocks), 20_000, bindings=1)
                blocks.append(block)
                process.writer.append(block.pending())
                await process.writer.flush()
    return MemoryStorage(storage.disk), blocks


def failing(matches: Callable[[Operation], bool], *, times: int = 1 << 30) -> Hook:
    left = times

    def hook(operation: Operation) -> OSError | None:
        nonlocal left
        concerned = operation.name in ("read", "open") and operation.path.endswith(".seg") and not operation.after
        if left and concerned and matches(operation):
            left -= 1
            return OSError(errno.EIO, os.strerror(errno.EIO), operation.path)
        return None

    return hook


def bytes_of(storage: MemoryStorage) -> dict[str, bytes]:
    return {path: storage.disk.content(path) for path in storage.disk.files if path.endswith(".seg")}


async def look(storage: MemoryStorage, hook: Hook | None = None) -> tuple[Process, set[bytes], int]:
    """Open and recover once, not closing cleanly: the process, the blocks told and how much damage."""
    again = MemoryStorage(storage.disk)
    again.hooks += [hook] if hook is not None else []
    process = await start(again)
    facts = await process.facts()
    await process.table.aclose()
    process.claim.release()
    return process, set(blocks_of(facts)), len(damages(facts))


def walked(content: bytes, identity: fmt.SegmentIdentity, path: str) -> list[fmt.RecordHeader]:
    """Records of a segment in order, without the help of a scan."""
    view, found, position = memoryview(content), [], PAGE_BYTES
    while bytes(view[position : position + 8]) == fmt.RECORD_MAGIC:
        header = fmt.decode_record(view[position:], identity, path=path, offset=position)
        assert header is not None
        found.append(header)
        position = header.end
    return found


@pytest.mark.parametrize("sealed_sessions", [0, 3])
async def test_a_storm_of_read_errors_at_opening_changes_no_segment(sealed_sessions: int) -> None:
    storage, blocks = await crashed(sealed_sessions=sealed_sessions)
    before = bytes_of(storage)
    process, found, reported = await look(storage, failing(lambda operation: operation.name == "read"))
    assert bytes_of(storage) == before
    assert not found
    assert reported >= len(before), "nothing vanishes without a word"
    assert process.recovery.report.unreadable == len(before)
    assert all(entry.unreadable for entry in process.table)
    assert covers_of(process.table) == ([], {}), "no checkpoint says that it knows these segments"
    process, found, reported = await look(storage)
    assert (found, reported) == ({block.block_id for block in blocks}, 0)
    assert not any(entry.unreadable for entry in process.table)
    assert process.recovery.report.sealed == 1


@pytest.mark.parametrize("empty", [True, False])
async def test_a_header_of_zeros_is_no_damage_while_what_follows_cannot_be_read(empty: bool) -> None:
    """A creation that a kill cut short looks the same (seed 3530): the next look that can read tells."""
    storage, _ = await crashed(count=1)
    ((path, content),) = bytes_of(storage).items()
    storage.disk.poke(path, 0, bytes(len(content) if empty else PAGE_BYTES))
    process = await start(again := MemoryStorage(storage.disk))
    again.hooks.append(failing(lambda operation: operation.name == "read" and operation.offset > 0))
    told = damages(await process.facts())
    assert told
    assert all(fact.unreadable for fact in told)
    await process.table.aclose()
    process.claim.release()
    process = await start(MemoryStorage(storage.disk))
    told = damages(await process.facts())
    assert [fact.reason for fact in told] == ([] if empty else ["no segment header, only zeros"])
    await process.table.aclose()
    process.claim.release()


async def test_a_checkpoint_does_not_cover_what_a_seal_that_failed_has_cut_off() -> None:
    """Seed 6432: the next opening took the file for damaged, and names noted in other segments went with its blocks."""
    storage, blocks = await crashed(count=3)
    ((path, content),) = bytes_of(storage).items()
    process, _, _ = await look(MemoryStorage(storage.kill().disk))
    (known,), _ = covers_of(process.table)
    last = blocks[-1].record_bytes
    end = max(record.end for record in walked(content, known.identity, path))
    storage.disk.poke(path, end - last, bytes(last))  # a write that never came, which its writer knew of
    process = await start(again := MemoryStorage(storage.disk))
    cut = False

    def fail_once_cut(operation: Operation) -> OSError | None:
        nonlocal cut
        cut |= operation.name == "truncate"
        return OSError(errno.EIO, "failed", path) if cut and operation.name == "sync" else None

    again.hooks.append(fail_once_cut)
    facts = await process.facts([Cover(known.identity, end, sealed=False)])
    assert process.recovery.report.seal_failures == 1
    assert damages(facts) == []
    (cover,), _ = covers_of(process.table)
    assert cover.upto <= storage.disk.inode(path).size < end
    await process.table.aclose()
    process.claim.release()
    process = await start(MemoryStorage(storage.disk))
    facts = await process.facts([cover])
    assert not [fact for fact in facts if isinstance(fact, LostFact | VanishedFact)]
    await process.table.aclose()
    process.claim.release()


async def test_each_single_read_error_at_opening_loses_nothing() -> None:
    """The n-th read of a segment fails, for every n, whatever it was for."""
    for sealed_sessions in (0, 1):
        pristine, blocks = await crashed(sealed_sessions=sealed_sessions)
        n, reached = 0, True
        while reached:
            storage = pristine.kill()
            before = bytes_of(storage)
            count = 0

            def is_nth(_: Operation, n: int = n) -> bool:
                nonlocal count
                count += 1
                return count == n + 1

            process, _, reported = await look(storage, failing(is_nth))
            reached = count > n
            unreadable = [entry for entry in process.table if entry.unreadable]
            assert bool(unreadable) <= bool(reported), n
            for entry in unreadable:
                assert storage.disk.content(entry.path) == before[entry.path], n
            _, found, reported = await look(storage)
            assert (found, reported) == ({block.block_id for block in blocks}, 0), n
            n += 1
        assert n > COUNT


async def test_one_unreadable_payload_of_an_open_segment_neither_cuts_nor_seals_it() -> None:
    storage, blocks = await crashed()
    before = bytes_of(storage)
    (path,) = before
    payload = blocks[-1].locations[0].page * PAGE_BYTES + PAGE_BYTES

    def covers_payload(operation: Operation) -> bool:
        return operation.name == "read" and operation.offset == payload

    process, found, reported = await look(storage, failing(covers_payload, times=1))
    assert bytes_of(storage) == before
    assert (len(found), reported) == (COUNT, 1), "its header was read: it is told, and reading decides"
    assert [entry.unreadable for entry in process.table] == [True]
    assert process.table[0].record_bytes == sum(block.record_bytes for block in blocks)
    _, found, reported = await look(storage)
    assert (len(found), reported) == (COUNT, 0)
    assert len(bytes_of(storage)[path]) != len(before[path]), "sealed by an opening that could read everything"


async def test_a_torn_record_that_could_not_be_verified_at_opening_is_a_miss_and_no_damage() -> None:
    """Seeds 5045, 5464: its payload could not be read when the tail was to be verified, and later it could."""
    storage, blocks = await crashed()
    (path,) = bytes_of(storage)
    first, last = (block.locations[0].page * PAGE_BYTES for block in (blocks[0], blocks[-1]))
    storage.disk.poke(path, last + PAGE_BYTES, bytes(PAGE_BYTES))
    again = MemoryStorage(storage.disk)
    again.hooks.append(failing(lambda operation: operation.offset == last + PAGE_BYTES, times=1))
    process = await start(again)
    found = blocks_of(await process.facts())
    entry = process.table[0]
    assert (len(found), entry.own, entry.unreadable, entry.firm_end) == (COUNT, True, True, last)
    (read,) = await process.read(blocks[-1].read(found[blocks[-1].block_id].location))
    assert isinstance(read.outcome, BlockNotFoundError)
    storage.disk.poke(path, first + PAGE_BYTES, bytes(PAGE_BYTES))
    async with process.table.opened(0) as file:
        walk = verify_records(again, process.engine, file, entry, end=entry.data_end)
        wrong = [(item.offset, error.unreadable) async for item, error in walk if error is not None]
    assert wrong == [(first, False)], "what was acknowledged is damage as before"
    await process.table.aclose()
    process.claim.release()
    process, found_again, _ = await look(storage)
    assert len(found_again) == COUNT - 1
    assert process.recovery.report.torn_records == 1


async def test_an_unreadable_page_behind_the_records_is_not_cut_off() -> None:
    storage, blocks = await crashed()
    before = bytes_of(storage)
    end = blocks[-1].locations[0].page * PAGE_BYTES + blocks[-1].record_bytes
    bad = end + 40 * PAGE_BYTES

    def covers_bad(operation: Operation) -> bool:
        return operation.offset <= bad < operation.offset + operation.nbytes

    process, found, reported = await look(storage, failing(covers_bad))
    assert bytes_of(storage) == before
    assert (len(found), reported) == (COUNT, 1)
    assert process.table[0].unreadable
    assert process.table[0].record_bytes == end - PAGE_BYTES, "the unreadable rest is no record"


async def test_a_segment_that_cannot_be_opened_is_not_taken_for_an_empty_one() -> None:
    storage, _ = await crashed(sealed_sessions=1)
    process, found, reported = await look(storage, failing(lambda operation: operation.name == "open"))
    assert not found
    assert reported == 2
    assert [entry.unreadable for entry in process.table] == [True, True]
    assert all(entry.size_bytes == len(storage.disk.content(entry.path)) for entry in process.table)


async def test_a_lost_segment_header_does_not_cost_the_records_below() -> None:
    storage, blocks = await crashed()
    (path,) = bytes_of(storage)
    storage.disk.poke(path, 0, bytes(PAGE_BYTES))
    _, found, reported = await look(storage)
    assert (found, reported) == ({block.block_id for block in blocks}, 1)


async def test_another_writers_unreadable_segment_is_read_again_by_refresh() -> None:
    storage, blocks = await crashed(sealed_sessions=1)
    again = MemoryStorage(storage.disk)
    hook = failing(lambda operation: operation.name == "read")
    again.hooks.append(hook)
    process = await start(again, host="elsewhere")
    assert not blocks_of(await process.facts())
    again.hooks.remove(hook)
    assert set(blocks_of(await process.refresh())) == {block.block_id for block in blocks}
    assert not any(entry.unreadable for entry in process.table)
    await process.table.aclose()


async def test_a_footer_is_no_damage_to_a_look_that_cannot_read_the_trailer() -> None:
    """Its segment is known to be sealed, from an earlier look that could not read the footer."""
    storage, blocks = await crashed(sealed_sessions=1)
    again = MemoryStorage(storage.disk)
    process = await start(again, host="elsewhere")
    path = min(bytes_of(storage))
    size = len(storage.disk.content(path))
    end = blocks[COUNT - 1].locations[0].page * PAGE_BYTES + blocks[COUNT - 1].record_bytes
    told: set[bytes] = set()
    looks = ((end, process.facts), (size - PAGE_BYTES, process.refresh), (size - PAGE_BYTES, process.refresh))
    for bad, facts_of in looks:

        def covers_bad(operation: Operation, bad: int = bad) -> bool:
            return operation.path == path and operation.offset <= bad < operation.offset + operation.nbytes

        again.hooks = [failing(covers_bad)]
        facts = await facts_of()
        told |= set(blocks_of(facts))
        assert [(fact.offset, fact.unreadable) for fact in damages(facts)] == [(bad, True)]
        entry = next(entry for entry in process.table if entry.path == path)
        assert (entry.sealed, entry.unreadable, entry.data_end, entry.size_bytes) == (True, True, end, size)
    again.hooks.clear()
    assert told == {block.block_id for block in blocks}
    assert not damages(await process.refresh())
    assert not any(entry.unreadable for entry in process.table)
    await process.table.aclose()


async def test_a_sealed_segment_is_as_long_as_it_is_when_its_last_record_and_its_footer_are_lost() -> None:
    storage, blocks = await crashed(sealed_sessions=1)
    path = min(bytes_of(storage))
    size = len(storage.disk.content(path))
    last = blocks[COUNT - 1].locations[0].page * PAGE_BYTES
    end = last + blocks[COUNT - 1].record_bytes
    storage.disk.poke(path, last, b"no record")
    storage.disk.poke(path, end, b"no footer")
    process, found, reported = await look(storage)
    assert (len(found), reported) == (2 * COUNT - 1, 2)
    assert (process.table[0].data_end, process.table[0].size_bytes) == (end, size)


async def test_the_facts_of_a_segment_that_is_to_be_removed_are_all_of_them_or_an_error() -> None:
    storage, blocks = await crashed(sealed_sessions=1)
    process, _, _ = await look(storage)
    entry = process.table[0]
    assert {f.block_id async for f in process.recovery.facts_of(0) if isinstance(f, BlockFact)} == {
        block.block_id for block in blocks[:COUNT]
    }
    for matches in (
        lambda operation: operation.name == "open",
        lambda operation: operation.offset == entry.data_end,
        lambda operation: operation.offset == entry.size_bytes - PAGE_BYTES,
        lambda operation: operation.name == "read" and operation.offset == 0,
    ):
        await process.table.aclose()
        hook = failing(matches)
        process.storage.hooks.append(hook)
        with pytest.raises(OSError, match=r"unreadable|Input/output"):
            [fact async for fact in process.recovery.facts_of(0)]
        process.storage.hooks.remove(hook)
    bad = blocks[2].locations[0].page * PAGE_BYTES
    process.storage.disk.poke(entry.path, entry.data_end, b"no footer")
    process.storage.disk.poke(entry.path, bad, bytes(PAGE_BYTES))
    with pytest.raises(CorruptionError):
        [fact async for fact in process.recovery.facts_of(0)]
    await process.table.aclose()


async def test_a_rotten_payload_of_the_last_acknowledged_group_is_named() -> None:
    storage, blocks = await crashed()
    (path,) = bytes_of(storage)
    offset = blocks[-1].locations[0].page * PAGE_BYTES
    storage.disk.flip_bit(path, 8 * (offset + PAGE_BYTES + 100))
    process, found, _ = await look(storage)
    assert len(found) == COUNT - 1
    assert process.recovery.report.torn_records == 1
    assert [(torn.path, torn.offset, torn.record_bytes) for torn in process.recovery.report.torn] == [
        (path, offset, blocks[-1].record_bytes)
    ]


FORGERIES: dict[str, Callable[[list[list[Any]]], None]] = {
    "overlap": lambda rows: rows[2].__setitem__(3, rows[1][3] + 1),
    "twice": lambda rows: rows[2].__setitem__(slice(3, 5), rows[1][3:5]),
    "backwards": lambda rows: rows.reverse(),
    "header page": lambda rows: rows[0].__setitem__(3, 0),
    "behind the end": lambda rows: rows[-1].__setitem__(3, 1 << 31),
    "endless": lambda rows: rows[-1].__setitem__(4, 1 << 63),
    "empty": lambda rows: rows[0].__setitem__(4, 0),
    "value of 4 GiB": lambda rows: rows[0].__setitem__(6, 1 << 32),
    "longer value": lambda rows: rows[0].__setitem__(6, rows[0][6] + PAGE_BYTES),
    "no header": lambda rows: rows[0].__setitem__(1, 0),
    "unknown kind": lambda rows: rows[0].__setitem__(0, 9),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_footer_that_says_what_cannot_be_is_damage_and_the_records_are_scanned(forgery: str) -> None:
    """Its checksum is right: a writer with a bug has written it."""
    storage, blocks = await crashed(sealed_sessions=1)
    path = min(bytes_of(storage))
    entry = (await look(storage))[0].table[0]
    content = storage.disk.content(path)
    row = struct.Struct("<BBHIQQQQ32s")
    rows = [list(row.unpack_from(content, entry.data_end + row.size * number)) for number in range(COUNT)]
    FORGERIES[forgery](rows)
    forged = b"".join(row.pack(*fields) for fields in rows)
    footer = bytearray(content[entry.data_end :])
    footer[: len(forged)] = forged
    trailer = memoryview(footer)[-PAGE_BYTES:]
    crc_at = struct.calcsize("<8sHHI16sQQQIII")
    struct.pack_into("<I", trailer, crc_at, crc32c.crc32c(bytes(footer[:-PAGE_BYTES])))
    fmt.seal_page(trailer)
    storage.disk.poke(path, entry.data_end, bytes(footer))
    process, found, reported = await look(storage)
    assert (found, reported) == ({block.block_id for block in blocks}, 1)
    assert process.recovery.report.unreadable == 0


async def test_a_record_of_a_block_that_no_index_can_hold_is_no_record() -> None:
    storage, blocks = await crashed(count=1)
    (path,) = bytes_of(storage)
    identity = (await look(storage.kill()))[0].table[0].identity
    end = blocks[0].locations[0].page * PAGE_BYTES + blocks[0].record_bytes
    nbytes = 1 << 32
    pages = fmt.header_pages_for(nbytes, 0, 0)
    header = fmt.RecordHeader(
        fmt.BLOCK, pages, pages * PAGE_BYTES + nbytes, end, 9, end, "sha256", bytes(32), 0, nbytes, 0,
        (0,) * (nbytes // fmt.CHUNK_BYTES), fmt.CHUNK_BYTES,
    )  # fmt: skip
    page = memoryview(bytearray(pages * PAGE_BYTES))
    fmt.encode_record(page, header, identity)
    storage.disk.poke(path, end, bytes(page))
    storage.disk.inode(path).truncate(header.end)
    again = MemoryStorage(storage.disk)
    process = await start(again, host="elsewhere")
    assert set(blocks_of(await process.facts())) == {blocks[0].block_id}
    await process.table.aclose()
