"""Prefetch: a decode loop that computes on one block after the other, with and without reading ahead.

One repetition is a group: the raw read time of the same bytes, then the loop over cold blocks with
``stream`` and the loop with plain ``get``, each on a store of its own with an empty arena. The compute
of a block takes ``ratio`` times the raw read time of a block *as just measured*, so that a drifting
device disturbs both sides alike; a timer with microseconds stands for the accelerator. The ideal is
one block of the faster side (the first read, or the last computation, overlaps with nothing) and then
the slower side alone: ``min + n * max(compute, read)``.

Bytes are compared at the end with the clock stopped: the stream leaves its last blocks in the arena, the
rest is got again.
"""

from __future__ import annotations

import asyncio
import contextlib
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
PUTS_AT_ONCE = 8
BLOCKS_MIN = 12
BLOCKS_MAX = 512
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
                    "prefetch_decode",
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
    line = Line("prefetch_first_layer", title, size, "", Target("ratio", 0.2, at_least=False))
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

    async def loop_s(self, compute_s: float, *, ahead: bool) -> tuple[float, int]:
        """Seconds of one decode loop over all blocks, and how often it had to wait for a block."""
        async with self.open() as store:
            with FineTimer() as timer:
                started = time.perf_counter()
                if ahead:
                    async with store.stream(self.ids) as stream:
                        async for block in stream:
                            self._cold(block, hot=ca.Tier.SHM)
                            await timer.sleep(compute_s)
                        stalls = stream.stalls
                else:
                    stalls = len(self.ids)
                    for block_id in self.ids:
                        async with store.get(block_id) as block:
                            self._cold(block)
                            await timer.sleep(compute_s)
                seconds = time.perf_counter() - started
            await self.compare(store)
        return seconds, stalls

    def _cold(self, block: ca.Block, hot: ca.Tier = ca.Tier.DISK) -> None:
        if block.tier not in (ca.Tier.DISK, hot):
            raise BenchError(f"not cold: a block came from {block.tier}")


async def _decode(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    size = lines[0].block_bytes
    budget = min(session.scale.round_bytes // 2, session.scale.disk_bytes // 2)
    count = max(4 if session.scale.quick else BLOCKS_MIN, min(BLOCKS_MAX, budget // size))
    setting = session.disk.setting(write=False)
    rows: list[Row] = []
    with session.root("prefetch") as folder, Pool(size, count, session.seed) as pool:
        root = _Root(session, folder, pool)
        await root.fill()
        session.disk.read_gb_per_s(pool.total_bytes)  # its file is written before the clock runs
        for line in lines:
            ratio = float(line.variant)
            series: dict[str, list[float]] = {"ours": [], "ideal": [], "without": [], "stalls": [], "read": []}
            before = root.verified_bytes
            for _ in range(session.repeats):
                # The raw read on both sides of our loop: the device drifts within a second.
                first_s = pool.total_bytes / (session.disk.read_gb_per_s(pool.total_bytes) * 1e9)
                compute_s = ratio * first_s / count
                ours_s, stalls = await root.loop_s(compute_s, ahead=True)
                second_s = pool.total_bytes / (session.disk.read_gb_per_s(pool.total_bytes) * 1e9)
                read_s = (first_s + second_s) / 2 / count
                without_s, _ = await root.loop_s(compute_s, ahead=False)
                series["ours"].append(ours_s)
                series["ideal"].append(min(read_s, compute_s) + count * max(read_s, compute_s))
                series["without"].append(without_s)
                series["stalls"].append(float(stalls))
                series["read"].append(count * read_s)
            rows.append(
                session.row(
                    line,
                    turns=Turns({}, ["raw,cascade,raw,without"] * session.repeats),
                    ours=make_series(OURS, "s", series["ours"]),
                    other=make_series("ideal", "s", series["ideal"]),
                    extra=[
                        make_series("without prefetch", "s", series["without"]),
                        make_series("waits", "blocks", series["stalls"]),
                        make_series(f"raw read, {setting.text}", "s", series["read"]),
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
