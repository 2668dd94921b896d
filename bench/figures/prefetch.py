"""Prefetch: a decode loop that computes on one block after the other, with and without reading ahead.

One repetition is a group, its parts next to each other: the raw read of the same bytes; the accelerator
alone; the loop over cold blocks with ``stream``; the raw read and the accelerator again; the loop with plain
``get``. Each loop runs on a store of its own with an empty arena. The accelerator is a timer that is
awaited: a GPU that decodes leaves the CPU free. The compute of a block is asked for as ``ratio`` times the
raw read time of a block *as just measured*; what counts is what the accelerator alone then takes for it,
so that the granularity of the timer is in the ideal and not charged as a stall. What the loop does between
two computations is charged: the event loop's other work delays the next launch.

The ideal is one block of the faster side (the first read, or the last computation, overlaps with
nothing) and then the slower side alone: ``min + n * max(compute, read)``. The raw read is the fastest that
the calibration found, of any request size and depth, not one limited to the block size.

Stall time is what the loop waited for blocks, the first one included. Bytes are compared at the end with
the clock stopped: the arena holds all blocks by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import AsyncIterator

import cascade_aio as ca
from bench.blocks import compare_and_release, put_all
from bench.data import Pool
from bench.figures import Case
from bench.fine_timer import FineTimer
from bench.results import BenchError, Row, Target, make_series
from bench.scale import MIB, Scale
from bench.session import OURS, Line, Session
from bench.turns import Turns

SIZES_BYTES = (MIB, 16 * MIB, 80 * MIB)
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Compute time of a block over its raw read time."""
LAYERS = 80
DECODE, FIRST_LAYER = "prefetch_decode", "prefetch_first_layer"
STALLED, WITHOUT, WITHOUT_STALLED = "stalled", "without prefetch", "without prefetch, stalled"
"""Names of series that the table looks up."""
PUTS_AT_ONCE = 8
ROUND_BYTES = 384 * MIB
"""What a loop reads: 0.15 s and more, so that all cells together stay within four minutes."""
BLOCKS_MIN = 8
ALONE_S = 0.1
"""How long computations are timed on the idle accelerator on each side of a loop …"""
ALONE_BLOCKS_MIN = 4
"""… and how many of them at least."""
CHECKED = (
    "cold: new store per repetition with an empty, populated arena, every block from disk for the first time; "
    "every byte compared after the clock stopped, in every repetition"
)


def cases(scale: Scale) -> list[Case]:
    """Rows "decode loop / ideal" by block size and compute ratio, and "first layer / whole block"."""
    loops = [
        Case(
            tuple(
                Line(
                    DECODE,
                    f"decode loop with prefetch / ideal, compute {ratio:g} × read",
                    scale.block_bytes(size),
                    f"{ratio:g}",
                    Target("ratio", 1.05, at_least=False),
                )
                for ratio in RATIOS
            ),
            _decode,
        )
        for size in SIZES_BYTES
    ]
    size = scale.block_bytes(80 * MIB)
    title = f"first of {LAYERS} layers readable / whole block"
    line = Line(FIRST_LAYER, title, size, "", Target("ratio", 0.2, at_least=False))
    return [*loops, Case((line,), _first_layer)]


class _Root:
    """Cold blocks, and stores on them."""

    def __init__(self, session: Session, root: pathlib.Path, pool: Pool) -> None:
        self._session = session
        self._root = root
        self.pool = pool
        self.ids: list[ca.BlockId] = []
        self.verified_bytes = 0

    async def fill(self) -> None:
        async with self.open() as store:
            self.ids = await put_all(store, self.pool, PUTS_AT_ONCE)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[ca.Store]:
        arena_bytes = self._session.arena_bytes(self.pool.block_bytes, self.pool.count)
        async with self._session.open(self._root, shm_bytes=arena_bytes) as store:
            await store.wait_ready()
            yield store

    async def compare(self, store: ca.Store) -> None:
        """Every byte of every block; all are in the arena by now."""
        for index, block_id in enumerate(self.ids):
            self.verified_bytes += compare_and_release([(index, await store.get(block_id))], self.pool)

    async def loop_s(self, compute_s: float, *, ahead: bool) -> tuple[float, float]:
        """Seconds of one decode loop over all blocks, and how many of them it waited for blocks."""
        async with self.open() as store:
            with FineTimer() as timer:
                started = asked = time.perf_counter()
                stall_s = 0.0
                if ahead:
                    async with store.stream(self.ids) as stream:
                        async for block in stream:
                            stall_s += time.perf_counter() - asked
                            self._cold(block, hot=ca.Tier.SHM)
                            await timer.sleep(compute_s)
                            asked = time.perf_counter()
                else:
                    for block_id in self.ids:
                        async with store.get(block_id) as block:
                            stall_s += time.perf_counter() - asked
                            self._cold(block)
                            await timer.sleep(compute_s)
                        asked = time.perf_counter()
                seconds = time.perf_counter() - started
            await self.compare(store)
        return seconds, stall_s

    def _cold(self, block: ca.Block, hot: ca.Tier = ca.Tier.DISK) -> None:
        if block.tier not in (ca.Tier.DISK, hot):
            raise BenchError(f"not cold: a block came from {block.tier}")


async def _alone_s(compute_s: float, count: int) -> float:
    """Seconds that a computation of ``compute_s`` really takes on the idle accelerator."""
    with FineTimer() as timer:
        started = time.perf_counter()
        for _ in range(count):
            await timer.sleep(compute_s)
        return (time.perf_counter() - started) / count


@dataclasses.dataclass(slots=True)
class _Samples:
    """Seconds of one cell, one number per repetition."""

    ahead: list[float] = dataclasses.field(default_factory=list)
    ahead_stall: list[float] = dataclasses.field(default_factory=list)
    without: list[float] = dataclasses.field(default_factory=list)
    without_stall: list[float] = dataclasses.field(default_factory=list)
    ideal: list[float] = dataclasses.field(default_factory=list)
    read: list[float] = dataclasses.field(default_factory=list)
    compute: list[float] = dataclasses.field(default_factory=list)


async def _repeat(session: Session, root: _Root, ratio: float, samples: _Samples) -> None:
    count, total_bytes = root.pool.count, root.pool.total_bytes

    def raw_s() -> float:
        return total_bytes / (session.disk.read_gb_per_s(total_bytes) * 1e9) / count

    # Raw read and accelerator on both sides of our loop: device and machine drift within a second.
    first_read_s = raw_s()
    asked_s = ratio * first_read_s
    alone = max(ALONE_BLOCKS_MIN, min(count, int(ALONE_S / asked_s)))
    first_compute_s = await _alone_s(asked_s, alone)
    ahead_s, ahead_stall_s = await root.loop_s(asked_s, ahead=True)
    read_s = (first_read_s + raw_s()) / 2
    compute_s = (first_compute_s + await _alone_s(asked_s, alone)) / 2
    without_s, without_stall_s = await root.loop_s(asked_s, ahead=False)
    samples.ahead.append(ahead_s)
    samples.ahead_stall.append(ahead_stall_s)
    samples.without.append(without_s)
    samples.without_stall.append(without_stall_s)
    samples.ideal.append(min(read_s, compute_s) + count * max(read_s, compute_s))
    samples.read.append(count * read_s)
    samples.compute.append(count * compute_s)


async def _decode(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    size = lines[0].block_bytes
    count = max(4 if session.scale.quick else BLOCKS_MIN, min(ROUND_BYTES, session.scale.round_bytes // 2) // size)
    setting = session.disk.setting(write=False)
    rows: list[Row] = []
    with session.root("prefetch") as folder, Pool(size, count, session.seed) as pool:
        root = _Root(session, folder, pool)
        await root.fill()
        session.disk.read_gb_per_s(pool.total_bytes)  # its file is written before the clock runs
        for line in lines:
            samples = _Samples()
            before = root.verified_bytes
            for _ in range(session.repeats):
                await _repeat(session, root, float(line.variant), samples)
            rows.append(
                session.row(
                    line,
                    turns=Turns({}, ["raw,alone,ahead,raw,alone,without"] * session.repeats),
                    ours=make_series(OURS, "s", samples.ahead),
                    other=make_series("ideal", "s", samples.ideal),
                    extra=[
                        make_series(STALLED, "s", samples.ahead_stall),
                        make_series(WITHOUT, "s", samples.without),
                        make_series(WITHOUT_STALLED, "s", samples.without_stall),
                        make_series(f"raw read, {setting.text}", "s", samples.read),
                        make_series("compute alone", "s", samples.compute),
                    ],
                    temperature="cold",
                    checked=CHECKED,
                    verified_bytes=root.verified_bytes - before,
                    notes=f"{count} blocks; ideal is min + n * max(compute, read)",
                )
            )
    return rows


async def _first_layer(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    size = line.block_bytes
    first_s: list[float] = []
    whole_s: list[float] = []
    plain_s: list[float] = []
    with session.root("prefetch-layers") as folder, Pool(size, 2, session.seed) as pool:
        root = _Root(session, folder, pool)
        await root.fill()
        for _ in range(session.repeats):
            async with root.open() as store:
                started = time.perf_counter()
                block = await store.get(root.ids[0], ready="first-bytes")
                async for _layer in block.layers(LAYERS):
                    first_s.append(time.perf_counter() - started)
                    break
                del _layer
                await block.ready()
                whole_s.append(time.perf_counter() - started)
                block.release()
                started = time.perf_counter()
                block = await store.get(root.ids[1])
                plain_s.append(time.perf_counter() - started)
                block.release()
                await asyncio.sleep(0)
                await root.compare(store)
    return [
        session.row(
            line,
            turns=Turns({}, ["layered,plain"] * session.repeats),
            ours=make_series("first layer", "s", first_s),
            other=make_series("whole block, plain get", "s", plain_s),
            extra=[make_series("whole block, layered", "s", whole_s)],
            temperature="cold",
            checked=CHECKED,
            verified_bytes=root.verified_bytes,
        )
    ]
