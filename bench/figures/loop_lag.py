"""Event-loop lag while 8 puts and 8 gets of 80 MiB run at the same time.

An inference server lives on this loop. The lag is measured by a 1 ms ticker; next to each repetition
the same ticker runs on an idle loop, and beside as many threads as there are cores that hash without
the GIL: that is what the machine itself does to a loop that has nothing to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading

import cascade_aio as ca
from bench.blocks import compare_and_release, lease_all, put_all
from bench.data import Pool
from bench.figures import Case
from bench.results import Row, Target, make_series
from bench.samples import quantile
from bench.scale import MIB, Scale
from bench.session import OURS, Line, Session
from bench.ticker import Ticker
from bench.turns import Side, take_turns

SIZE_BYTES = 80 * MIB
PUTS, GETS = 8, 8
BUSY_PIECE_BYTES = 4 * MIB
ROUNDS = 3
"""Rounds of puts per repetition, each of new content; the clock rests while bytes are compared."""
CHECKED = (
    "mixed: new store per repetition; gets alternate between two sets of blocks that do not fit the arena with "
    "the puts, so most come from disk; every got byte compared after each round, while no tick is counted"
)


def cases(scale: Scale) -> list[Case]:
    """Rows "event-loop lag": 99th percentile, and maximum over all repetitions."""
    size = scale.block_bytes(SIZE_BYTES)
    title = "event-loop lag, 8 puts and 8 gets of 80 MiB running"
    return [
        Case(
            (
                Line("loop_lag", f"{title}, p99", size, "p99", Target("value", 3.0, at_least=False)),
                Line("loop_lag", f"{title}, max", size, "max", Target("value", 15.0, at_least=False, use="worst")),
            ),
            _measure,
        )
    ]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    size = lines[0].block_bytes
    lags: dict[str, list[list[float]]] = {OURS: [], "idle": [], "busy": []}
    with Pool(size, PUTS, session.seed) as puts, Pool(size, GETS, session.seed + 1) as gets:
        load = _Load(puts, gets)

        async def ours(repetition: int) -> float:
            with session.root("loop-lag") as root:
                async with session.open(root, shm_bytes=session.arena_bytes(size, PUTS + GETS)) as store:
                    await load.fill(store)
                    return _keep(lags[OURS], await load.run(store))

        async def idle(repetition: int) -> float:
            async with Ticker() as ticker:
                await asyncio.sleep(session.scale.lag_seconds)
            return _keep(lags["idle"], ticker.late_ms)

        async def busy(repetition: int) -> float:
            async with Ticker() as ticker:
                await _hash_beside(session.cores, session.scale.lag_seconds)
            return _keep(lags["busy"], ticker.late_ms)

        turns = await take_turns([Side(OURS, ours), Side("idle", idle), Side("busy", busy)], session.repeats)
    notes = (
        f"{sum(len(run) for run in lags[OURS])} ticks of 1 ms; idle: a loop with nothing to do; "
        f"busy: one beside {session.cores} threads that hash without the GIL"
    )
    rows = []
    for line, fraction in zip(lines, (0.99, 1.0), strict=True):
        series = {
            name: make_series(name, "ms", [quantile(late_ms, fraction) for late_ms in runs])
            for name, runs in lags.items()
        }
        rows.append(
            session.row(
                line,
                turns=turns,
                ours=series[OURS],
                extra=[series["idle"], series["busy"]],
                temperature="none",
                checked=CHECKED,
                verified_bytes=load.verified_bytes,
                notes=notes,
            )
        )
    return rows


def _keep(runs: list[list[float]], late_ms: list[float]) -> float:
    runs.append(late_ms)
    return quantile(late_ms, 0.99)


class _Load:
    """Puts of new content and gets of old blocks, side by side."""

    def __init__(self, puts: Pool, gets: Pool) -> None:
        self._puts = puts
        self._gets = gets
        self._sets: dict[int, list[ca.BlockId]] = {}
        self._round = 0
        self.verified_bytes = 0

    async def fill(self, store: ca.Store) -> None:
        """Two sets of blocks to get, and a warm arena."""
        for stamp in (0, 1):
            self._gets.stamp(stamp)
            self._sets[stamp] = await put_all(store, self._gets, GETS)
            await store.flush()
        self._puts.stamp(self._round)
        await put_all(store, self._puts, PUTS)
        await store.flush()

    async def run(self, store: ca.Store) -> list[float]:
        """Lateness of the ticks while ``ROUNDS`` rounds of 8 puts and 8 gets run."""
        late_ms: list[float] = []
        for _ in range(ROUNDS):
            self._round += 1
            wanted = self._round % 2
            self._puts.stamp(self._round)
            async with Ticker() as ticker, asyncio.TaskGroup() as group:
                group.create_task(put_all(store, self._puts, PUTS))
                getting = group.create_task(lease_all(store, self._sets[wanted], GETS))
            late_ms += ticker.late_ms
            self._gets.stamp(wanted)
            self.verified_bytes += compare_and_release(getting.result(), self._gets)
            await store.flush()
        return late_ms


async def _hash_beside(threads: int, seconds: float) -> None:
    """Keep ``threads`` threads hashing for ``seconds``; the GIL is free nearly all of the time."""
    stop = threading.Event()
    piece = bytes(BUSY_PIECE_BYTES)

    def spin() -> None:
        while not stop.is_set():
            hashlib.sha256(piece).digest()

    workers = [threading.Thread(target=spin, name=f"bench-busy-{index}") for index in range(threads)]
    for worker in workers:
        worker.start()
    try:
        await asyncio.sleep(seconds)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
