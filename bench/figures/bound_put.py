"""Put of a prefix key that is bound already: no byte may be touched, so any size costs the same."""

from __future__ import annotations

import time

import cascade_aio as ca
from bench.data import Pool
from bench.figures import Case
from bench.results import BenchError, Row, Target, make_series
from bench.samples import quantile
from bench.scale import MIB, Scale
from bench.session import OURS, Line, Session

SIZES_BYTES = (MIB, 80 * MIB)
BLOCKS = 4
NS_PER_US = 1e3
CHECKED = "hot: bound before; one at a time; every put returned the id of the first writer; blocks compared at the end"


def cases(scale: Scale) -> list[Case]:
    """The row "put of a bound prefix key", for a small and a large block."""
    target = Target("value", 10.0, at_least=False)
    title = "put of a bound prefix key, p50"
    return [Case((Line("bound_put", title, scale.block_bytes(size), "", target),), _measure) for size in SIZES_BYTES]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    clock = time.perf_counter_ns
    p50_us: list[float] = []
    p99_us: list[float] = []
    verified = 0
    with session.root("bound-put") as root, Pool(line.block_bytes, BLOCKS, session.seed) as pool:
        async with session.open(root, shm_bytes=session.arena_bytes(line.block_bytes, BLOCKS)) as store:
            names = ca.prefix_keys(range(BLOCKS), block_tokens=1, namespace="bench")
            jobs = [(*pool.parts(index), names[index]) for index in range(BLOCKS)]
            ids = [await store.put(key, value, prefix=name) for key, value, name in jobs]
            for _ in range(session.repeats):
                taken = [0.0] * session.scale.hot_operations
                for operation in range(len(taken)):
                    key, value, name = jobs[operation % BLOCKS]
                    started = clock()
                    block_id = await store.put(key, value, prefix=name)
                    taken[operation] = clock() - started
                    if block_id != ids[operation % BLOCKS]:
                        raise BenchError("a bound prefix key gave another block: the figure is void")
                p50_us.append(quantile(taken, 0.50) / NS_PER_US)
                p99_us.append(quantile(taken, 0.99) / NS_PER_US)
            for index, block_id in enumerate(ids):
                async with store.get(block_id) as block:
                    if not pool.equals(index, block.key, block.value):
                        raise BenchError(f"block {index} came back with other bytes than were put: the figure is void")
                    verified += line.block_bytes
            del jobs, key, value
    return [
        session.row(
            line,
            ours=make_series(OURS, "µs", p50_us),
            extra=[make_series("p99", "µs", p99_us)],
            temperature="hot",
            checked=CHECKED,
            verified_bytes=verified,
        )
    ]
