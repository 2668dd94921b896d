"""Small durable puts: 64 KiB, each one flushed by itself, against one file per block with one fsync.

64 operations are in flight on either side, and on either side an operation is over when *its* block
is on stable storage. That is where group commit shows: one fdatasync serves all waiting flushes.
"""

from __future__ import annotations

import time

import cascade_aio as ca
from bench.blocks import in_flight, verify_rounds
from bench.data import Pool
from bench.figures import Case
from bench.files import write_files
from bench.results import Calibration, Row, Target, make_series
from bench.scale import KIB, Scale
from bench.session import OURS, Line, Session
from bench.turns import Side, take_turns

GB = 1e9
SIZE_BYTES = 64 * KIB
IN_FLIGHT = 64
CHECKED = (
    "durable: each operation is a put and its own flush(); new content in every repetition; after the last one every "
    "byte of all of them was read back cold by a new store and compared"
)


def cases(scale: Scale) -> list[Case]:
    """The row "put + flush, 64 in flight / one file per block with one fsync each"."""
    line = Line(
        "small_put",
        "put + flush each, 64 in flight / one file per block, one fsync each, 64 threads",
        SIZE_BYTES,
        "",
        Target("ratio", 5.0, at_least=True),
    )
    return [Case((line,), _measure)]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    count = session.scale.small_blocks
    ids: dict[int, list[ca.BlockId]] = {}
    with session.root("small-put") as root, Pool(line.block_bytes, count, session.seed) as pool:
        whole = [pool.view[index * SIZE_BYTES : (index + 1) * SIZE_BYTES] for index in range(count)]
        files = session.folder / "small-files"
        direct = _better_files(session, whole)
        shm_bytes = session.arena_bytes(line.block_bytes, count)
        async with session.open(root, shm_bytes=shm_bytes) as store:

            async def ours(repetition: int) -> float:
                pool.stamp(repetition)
                named: list[ca.BlockId | None] = [None] * count

                async def put(index: int) -> None:
                    named[index] = await store.put(*pool.parts(index))
                    await store.flush()

                started = time.perf_counter()
                await in_flight(IN_FLIGHT, range(count), put)
                seconds = time.perf_counter() - started
                ids[repetition] = [block_id for block_id in named if block_id is not None]
                return pool.total_bytes / seconds / GB

            async def one_file_each(repetition: int) -> float:
                return pool.total_bytes / write_files(files, whole, IN_FLIGHT, direct=direct) / GB

            await ours(session.repeats)  # warm-up: arena, segment file, threads
            del ids[session.repeats]
            turns = await take_turns([Side(OURS, ours), Side("files", one_file_each)], session.repeats)
        async with session.open(root, shm_bytes=shm_bytes) as store:
            verified = await verify_rounds(store, pool, ids, IN_FLIGHT)
    return [
        session.row(
            line,
            turns=turns,
            ours=make_series(OURS, "GB/s", turns.samples[OURS]),
            other=make_series(f"files, {'O_DIRECT' if direct else 'buffered'}", "GB/s", turns.samples["files"]),
            temperature="durable",
            checked=CHECKED,
            verified_bytes=verified,
        )
    ]


def _better_files(session: Session, blocks: list[memoryview]) -> bool:
    """Whether O_DIRECT files are faster than buffered ones here: best of two passes over a quarter."""
    part = blocks[: max(IN_FLIGHT, len(blocks) // 4)]
    total = sum(len(block) for block in part)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for direct in (False, True, True, False):
        seconds = write_files(session.folder / "small-files", part, IN_FLIGHT, direct=direct)
        rates[direct].append(total / seconds / GB)
    better = max(rates[True]) > max(rates[False])
    session.record(
        [
            Calibration("file per block", {"direct": direct, "threads": IN_FLIGHT}, rates[direct], direct == better)
            for direct in (False, True)
        ]
    )
    return better
