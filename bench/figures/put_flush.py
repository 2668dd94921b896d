"""Put + flush: blocks named, copied, written and synced, against a raw direct write + fdatasync.

Each repetition has a root of its own. An untimed round of other blocks fills the arena first, so that
timed puts evict like those of a server that has run for a while. After the timing the store is
closed, a new one is opened with an empty arena, and every byte is read back from disk and compared.
"""

from __future__ import annotations

import functools
import time

from bench import machine
from bench.blocks import put_all, verify_rounds
from bench.data import Pool
from bench.figures import Case
from bench.results import Row, Target, make_series
from bench.scale import MIB, Scale
from bench.session import OURS, Line, Session
from bench.turns import Side, take_turns

GB = 1e9
IN_FLIGHT = {MIB: 32, 16 * MIB: 8, 80 * MIB: 8}
"""Puts in flight by nominal block size."""
TARGETS = {"sha256": 0.85, "blake3": 0.95}
WARM_UP, MEASURED = 0, 1
"""Stamps of the blocks that fill the arena, and (plus the repetition) of those that are timed."""
ROUNDS = 3
"""On disk at a time: both rounds of one root and the raw file."""
CHECKED = (
    "durable: flush() returned inside the timing; arena filled by an untimed round, so puts evict; new content in "
    "every repetition; after each, every byte was read back cold by a new store and compared"
)


def cases(scale: Scale) -> list[Case]:
    """Rows "put + flush / raw direct write + fdatasync" by digest and block size."""
    return [
        Case(
            (
                Line(
                    "put_flush",
                    f"put + flush, {digest} ids, {limit} in flight / raw direct write + fdatasync",
                    scale.block_bytes(size),
                    digest,
                    Target("ratio", target, at_least=True),
                ),
            ),
            functools.partial(_measure, in_flight=limit),
        )
        for digest, target in TARGETS.items()
        for size, limit in IN_FLIGHT.items()
    ]


async def _measure(session: Session, lines: tuple[Line, ...], *, in_flight: int) -> list[Row]:
    (line,) = lines
    count = session.scale.blocks(line.block_bytes, ROUNDS, in_flight)
    arena_blocks = max(2 * in_flight, session.scale.round_bytes // 2 // line.block_bytes)
    shm_bytes = session.arena_bytes(line.block_bytes, arena_blocks)
    setting = session.disk.setting(write=True)
    session.disk.close()  # the file that reads use makes room on the disk
    cpu_s: list[float] = []
    verified = 0
    with Pool(line.block_bytes, count, session.seed) as pool:

        async def ours(repetition: int) -> float:
            nonlocal verified
            with session.root("put-flush") as root:
                async with session.open(root, shm_bytes=shm_bytes, digest=line.variant) as store:
                    pool.stamp(WARM_UP)
                    await put_all(store, pool, in_flight)
                    await store.flush()
                    pool.stamp(MEASURED + repetition)
                    cpu_before, started = machine.cpu_s(), time.perf_counter()
                    ids = await put_all(store, pool, in_flight)
                    await store.flush()
                    seconds = time.perf_counter() - started
                    cpu_s.append(machine.cpu_s() - cpu_before)
                async with session.open(root, shm_bytes=shm_bytes, digest=line.variant) as store:
                    verified += await verify_rounds(store, pool, {MEASURED + repetition: ids}, in_flight)
            return pool.total_bytes / seconds / GB

        async def raw(repetition: int) -> float:
            return session.disk.write_gb_per_s(pool.view)

        turns = await take_turns([Side(OURS, ours), Side("raw", raw)], session.repeats)
    return [
        session.row(
            line,
            turns=turns,
            ours=make_series(OURS, "GB/s", turns.samples[OURS], cpu_s),
            other=make_series(setting.text, "GB/s", turns.samples["raw"]),
            temperature="durable",
            checked=CHECKED,
            verified_bytes=verified,
        )
    ]
