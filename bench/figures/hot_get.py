"""Hot get: what it costs to be handed a block that is in the arena, and to give it back.

The latency is ``perf_counter_ns`` around ``await store.get(id)`` and ``release()``, nothing
subtracted; the rate is a loop without clocks in it. Whether the path suspends is watched too: a
callback that the loop would run at the first suspension must not have run.
"""

from __future__ import annotations

import asyncio

import cascade_aio as ca
from bench.blocks import compare_and_release, hot_gets_per_second, lease_all, put_all, time_hot_gets_ns
from bench.data import Pool
from bench.figures import Case
from bench.results import Row, Target, make_series
from bench.samples import quantile
from bench.scale import MIB, Scale
from bench.session import OURS, Line, Session

SIZE_BYTES = MIB
BLOCKS = 64
IN_FLIGHT = 8
NS_PER_US = 1e3
CHECKED = "hot: every block is in the arena; one at a time; after each repetition every block compared byte by byte"


def cases(scale: Scale) -> list[Case]:
    """Rows "hot get + release": latency and rate, from the same repetitions."""
    size = scale.block_bytes(SIZE_BYTES)
    latency = Target("value", 10.0, at_least=False)
    rate = Target("value", 80_000.0, at_least=True)
    return [
        Case(
            (
                Line("hot_get", "hot get + release, no copy, p50", size, "latency", latency),
                Line("hot_get", "hot get + release, no copy, rate", size, "rate", rate),
            ),
            _measure,
        )
    ]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    latency_line, rate_line = lines
    operations = session.scale.hot_operations
    p50_us: list[float] = []
    p99_us: list[float] = []
    rates: list[float] = []
    suspended: list[float] = []
    verified = 0
    with session.root("hot-get") as root, Pool(latency_line.block_bytes, BLOCKS, session.seed) as pool:
        shm_bytes = session.arena_bytes(latency_line.block_bytes, BLOCKS)
        async with session.open(root, shm_bytes=shm_bytes) as store:
            ids = await put_all(store, pool, IN_FLIGHT)
            await store.flush()
            asked = [ids[index % len(ids)] for index in range(operations)]
            for _ in range(session.repeats):
                taken_ns = await time_hot_gets_ns(store, asked)
                p50_us.append(quantile(taken_ns, 0.50) / NS_PER_US)
                p99_us.append(quantile(taken_ns, 0.99) / NS_PER_US)
                rates.append(await hot_gets_per_second(store, asked))
                suspended.append(float(await _suspensions(store, ids)))
                verified += compare_and_release(await lease_all(store, ids, IN_FLIGHT), pool)
    notes = f"{sum(suspended):.0f} of {len(ids) * session.repeats} gets suspended"
    return [
        session.row(
            latency_line,
            ours=make_series(OURS, "µs", p50_us),
            extra=[make_series("p99", "µs", p99_us), make_series("suspended", "gets", suspended)],
            temperature="hot",
            checked=CHECKED,
            verified_bytes=verified,
            notes=notes,
        ),
        session.row(
            rate_line,
            ours=make_series(OURS, "1/s", rates),
            temperature="hot",
            checked=CHECKED,
            verified_bytes=verified,
            notes=notes,
        ),
    ]


async def _suspensions(store: ca.Store, ids: list[ca.BlockId]) -> int:
    """How many of ``ids`` could not be had without giving the loop a turn."""
    loop = asyncio.get_running_loop()
    count = 0
    for block_id in ids:
        turned: list[bool] = []
        handle = loop.call_soon(turned.append, True)
        (await store.get(block_id)).release()
        count += bool(turned)
        handle.cancel()
    return count
