"""`read_into` of hot blocks, against the best copy of the same arena bytes to the same destination.

The destination is one buffer per part, written again and again, as an inference server's staging
buffer is; the sources are several blocks, so that they do not sit in the caches. The raw side
copies out of leases on the very same blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import cascade_aio as ca
from bench.blocks import put_all
from bench.copies import Pair, calibrate_copy, copy_gb_per_s
from bench.data import Pool, scratch_memory
from bench.figures import Case
from bench.results import BenchError, Row, Target, make_series
from bench.scale import MIB, Scale
from bench.session import OURS, Line, Session
from bench.turns import Side, take_turns

GB = 1e9
SIZES_BYTES = (16 * MIB, 80 * MIB)
BLOCKS = 12
PASSES = 4
"""Passes over the blocks per repetition, so that one repetition takes a few tenths of a second."""
CHECKED = (
    "hot: every block is in the arena; one at a time; the first pass of each repetition is repeated untimed with "
    "every byte compared"
)


def cases(scale: Scale) -> list[Case]:
    """Rows "read_into hot / best copy"."""
    target = Target("ratio", 0.90, at_least=True)
    title = "read_into, hot / best copy of the same bytes"
    return [Case((Line("read_into", title, scale.block_bytes(size), "", target),), _measure) for size in SIZES_BYTES]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    half = line.block_bytes // 2
    variant, threads = calibrate_copy(line.block_bytes, session.cores, session.record)
    verified = 0
    with session.root("read-into") as root, Pool(line.block_bytes, BLOCKS, session.seed) as pool:
        memory = scratch_memory(line.block_bytes)
        key, value = memory[:half], memory[half:]
        async with session.open(root, shm_bytes=session.arena_bytes(line.block_bytes, BLOCKS)) as store:
            ids = await put_all(store, pool, BLOCKS)
            await store.flush()

            async def ours(repetition: int) -> float:
                nonlocal verified
                started = time.perf_counter()
                for _ in range(PASSES):
                    for block_id in ids:
                        await store.read_into(block_id, key, value)
                seconds = time.perf_counter() - started
                for index, block_id in enumerate(ids):
                    await store.read_into(block_id, key, value)
                    if not pool.equals(index, key, value):
                        raise BenchError(f"block {index} was read with other bytes than were put: the figure is void")
                    verified += line.block_bytes
                return PASSES * pool.total_bytes / seconds / GB

            async def raw(repetition: int) -> float:
                blocks = [await store.get(block_id) for block_id in ids]
                try:
                    return copy_gb_per_s(_pairs(blocks, key, value) * PASSES, variant, threads)
                finally:
                    for block in blocks:
                        block.release()

            turns = await take_turns([Side(OURS, ours), Side("copy", raw)], session.repeats)
    return [
        session.row(
            line,
            turns=turns,
            ours=make_series(OURS, "GB/s", turns.samples[OURS]),
            other=make_series(f"{variant} copy, {threads} threads", "GB/s", turns.samples["copy"]),
            temperature="hot",
            checked=CHECKED,
            verified_bytes=verified,
        )
    ]


def _pairs(blocks: Sequence[ca.Block], key: memoryview, value: memoryview) -> list[Pair]:
    """(destination, source) of both parts of each block, sources in the arena."""
    return [pair for block in blocks for pair in ((key, memoryview(block.key)), (value, memoryview(block.value)))]
