"""Hot calls of a client: what shared memory answers without a round trip, and what a message costs.

Latencies are ``perf_counter_ns`` around single calls, nothing subtracted; the rate is a loop without
clocks in it. The gets by message are of blocks whose metadata is too long for the shared directory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import cascade_aio as ca
from bench.blocks import compare_and_release, hot_gets_per_second, in_flight, lease_all, time_hot_gets_ns
from bench.data import Pool
from bench.figures import Case
from bench.results import BenchError, Row, Target, make_series
from bench.samples import quantile
from bench.scale import MIB, Scale
from bench.service import serving
from bench.session import OURS, Line, Session

SIZE_BYTES = MIB
BLOCKS = 64
IN_FLIGHT = 8
NS_PER_US = 1e3
LONG_META = ca.BlockMeta(extra=bytes(800))
KEYS = ca.prefix_keys(range(BLOCKS), block_tokens=1, namespace="bench")
CHECKED = "hot: a service in a process of its own; after each repetition every block compared byte by byte"


def cases(scale: Scale) -> list[Case]:
    """Rows of one client: look-up, get + release (latency, rate), get by message."""
    size = scale.block_bytes(SIZE_BYTES)

    def line(title: str, variant: str, target: float, *, at_least: bool = False) -> Line:
        return Line("service_hot", title, size, variant, Target("value", target, at_least=at_least))

    return [
        Case(
            (
                line("service: hot lookup of one key by a client, p50", "lookup", 5.0),
                line("service: hot get + release by a client, p50", "latency", 30.0),
                line("service: hot get + release by a client, rate", "rate", 25_000.0, at_least=True),
                line("service: hot get + release by message, p50", "message", 150.0),
            ),
            _measure,
        )
    ]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    size, operations = lines[0].block_bytes, session.scale.hot_operations
    samples: dict[str, list[float]] = {line.variant: [] for line in lines}
    tails: dict[str, list[float]] = {line.variant: [] for line in lines}
    verified = 0
    with session.root("service-hot") as root, Pool(size, BLOCKS, session.seed) as pool:
        async with serving(session, root, shm_bytes=session.arena_bytes(size, 2 * BLOCKS)) as store:
            ids = await _put(store, pool, None)
            shared = store.statistics()["shared_gets"]
            asked = [ids[index % BLOCKS] for index in range(operations)]
            _must_be_shared(store)
            for repetition in range(session.repeats):
                _note(samples, tails, "lookup", _lookups_ns(store, operations))
                _note(samples, tails, "latency", await time_hot_gets_ns(store, asked))
                samples["rate"].append(await hot_gets_per_second(store, asked))
                verified += compare_and_release(await lease_all(store, ids, IN_FLIGHT), pool)
                if repetition == 0 and store.statistics()["shared_gets"] - shared < 2 * operations:
                    raise BenchError("hot gets went by message: the figure is void")
            pool.stamp(1)
            unlisted = await _put(store, pool, LONG_META)
            by_message = [unlisted[index % BLOCKS] for index in range(max(BLOCKS, operations // 10))]
            before = store.statistics()["gets"]
            for _ in range(session.repeats):
                _note(samples, tails, "message", await time_hot_gets_ns(store, by_message))
                verified += compare_and_release(await lease_all(store, unlisted, IN_FLIGHT), pool)
            if store.statistics()["gets"] - before < session.repeats * len(by_message):
                raise BenchError("gets by message did not go by message: the figure is void")
    return [
        session.row(
            line,
            ours=make_series(OURS, "1/s" if line.variant == "rate" else "µs", samples[line.variant]),
            extra=[make_series("p99", "µs", tails[line.variant])] if tails[line.variant] else [],
            temperature="hot",
            checked=CHECKED,
            verified_bytes=verified,
        )
        for line in lines
    ]


async def _put(store: ca.ServiceStore, pool: Pool, meta: ca.BlockMeta | None) -> list[ca.BlockId]:
    ids: dict[int, ca.BlockId] = {}

    async def put(index: int) -> None:
        prefix = KEYS[index] if meta is None else None
        ids[index] = await store.put(*pool.parts(index), prefix=prefix, meta=meta)

    await in_flight(IN_FLIGHT, range(pool.count), put)
    await store.flush()
    return [ids[index] for index in range(pool.count)]


def _must_be_shared(store: ca.ServiceStore) -> None:
    if len(store.lookup(KEYS)) != BLOCKS:
        raise BenchError("the shared directory does not list what was put: the figure is void")


def _note(samples: dict[str, list[float]], tails: dict[str, list[float]], name: str, taken_ns: Sequence[float]) -> None:
    samples[name].append(quantile(taken_ns, 0.50) / NS_PER_US)
    tails[name].append(quantile(taken_ns, 0.99) / NS_PER_US)


def _lookups_ns(store: ca.ServiceStore, operations: int) -> list[float]:
    asked = [[KEYS[index % BLOCKS]] for index in range(operations)]
    taken = [0.0] * operations
    clock = time.perf_counter_ns
    for index, keys in enumerate(asked):
        started = clock()
        store.lookup(keys)
        taken[index] = clock() - started
    return taken
