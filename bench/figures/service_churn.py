"""1,000 clients that connect, take leases and are killed: is anything left behind, is anybody slower for it?

A witness gets a block by message before and after each campaign; the figure is the ratio of the medians.
What the service still holds afterwards is looked at, and anything voids the figure.
"""

from __future__ import annotations

import asyncio
import time

import cascade_aio as ca
from bench.blocks import compare_and_release, lease_all, put_all
from bench.data import Pool
from bench.figures import Case
from bench.results import BenchError, Row, Target, make_series
from bench.samples import quantile
from bench.scale import MIB, Scale
from bench.service import Helper, serving, socket_of
from bench.session import OURS, Line, Session
from bench.turns import Turns

CLIENTS = 1000
CLIENTS_QUICK = 16
LEASED_BLOCKS = 4
BLOCKS = 8
SETTLE_SECONDS_MAX = 30.0
NS_PER_US = 1e3
LONG_META = ca.BlockMeta(extra=bytes(800))


def cases(scale: Scale) -> list[Case]:
    """Row "1,000 killed clients"."""
    size = scale.block_bytes(MIB)
    title = "service: get by message, p50, after / before 1,000 clients with leases were killed"
    return [Case((Line("service_churn", title, size, "", Target("ratio", 1.25, at_least=False)),), _measure)]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    scale = session.scale
    clients = CLIENTS_QUICK if scale.quick else -(-CLIENTS // session.repeats)
    before: list[float] = []
    after: list[float] = []
    verified = killed = 0
    with session.root("service-churn") as root, Pool(line.block_bytes, BLOCKS, session.seed) as pool:
        async with serving(session, root, shm_bytes=session.arena_bytes(line.block_bytes, 2 * BLOCKS)) as store:
            ids = await put_all(store, pool, BLOCKS)
            unlisted = await store.put(b"not", b"listed", meta=LONG_META)
            await store.flush()
            names = [str(name) for name in (unlisted, *ids[:LEASED_BLOCKS])]
            idle = await _held(store)
            async with Helper.started("churn", socket_of(store), *names) as churn:
                for _ in range(session.repeats):
                    before.append(await _p50_us(store, unlisted, scale.hot_operations // 10))
                    (armed,) = await churn.ask(str(clients))
                    if armed != clients:
                        raise BenchError(f"{clients - armed:.0f} of {clients} clients had no lease when they died")
                    killed += clients
                    await _given_back(store, idle)
                    after.append(await _p50_us(store, unlisted, scale.hot_operations // 10))
            verified += session.repeats * compare_and_release(await lease_all(store, ids, BLOCKS), pool)
    return [
        session.row(
            line,
            turns=Turns({OURS: after, "before": before}, [f"before,{OURS}"] * session.repeats),
            ours=make_series(OURS, "µs", after),
            other=make_series("before", "µs", before),
            temperature="hot",
            checked=f"{killed} clients killed with {len(names)} leases each; nothing held afterwards; bytes compared",
            verified_bytes=verified,
        )
    ]


async def _p50_us(store: ca.ServiceStore, name: ca.BlockId, operations: int) -> float:
    taken: list[float] = []
    for _ in range(max(20, operations)):
        started = time.perf_counter_ns()
        (await store.get(name)).release()
        taken.append(time.perf_counter_ns() - started)
    return quantile(taken, 0.50) / NS_PER_US


async def _held(store: ca.ServiceStore) -> dict[str, int]:
    statistics = await store.statistics()
    shm, service = statistics["shm"], statistics["service"]
    return {
        "clients": service["clients"],
        "leases": shm["leases"],
        "pinned": shm["pinned_bytes"],
        "lingering": service["lingering"],
        "extents": shm["allocated_bytes"] - shm["copy_bytes"],
    }


async def _given_back(store: ca.ServiceStore, idle: dict[str, int]) -> None:
    """Raises ``BenchError`` if something stays."""
    try:
        async with asyncio.timeout(SETTLE_SECONDS_MAX):
            held = await _held(store)
            while held != idle:
                await asyncio.sleep(0.05)
                held = await _held(store)
    except TimeoutError:
        raise BenchError(f"killed clients left something behind: {held} instead of {idle}") from None
