"""Put until readable: what a caller waits for, against the digest of the same bytes on all cores.

The digest names the block, so nothing that names blocks by content can be faster; the copy into the
arena, the checksum and the write-behind that starts meanwhile are what the store adds. Flushing is
outside the timing. Every byte is compared in the arena after each repetition.
"""

from __future__ import annotations

import time

from bench import machine
from bench.blocks import compare_and_release, lease_all, put_all
from bench.data import Pool
from bench.digests import digest_seconds
from bench.figures import Case
from bench.results import Row, Target, make_series
from bench.scale import MIB, Scale
from bench.session import OURS, Line, Session
from bench.turns import Side, take_turns

GB = 1e9
IN_FLIGHT = 8
SIZE_BYTES = 80 * MIB
WARM_UP_ROUNDS = 2
CHECKED = (
    "hot: readable in the arena when the clock stops, written behind and flushed outside the timing; arena filled by "
    "two untimed rounds, so puts evict; new content in every repetition, every byte compared after each"
)


def cases(scale: Scale) -> list[Case]:
    """The row "put until readable / digest alone on all cores", and BLAKE3 for information."""
    title = "put until readable, 8 in flight, {} ids / digest alone on all cores"
    targets = {"sha256": Target("ratio", 0.90, at_least=True), "blake3": None}
    size = scale.block_bytes(SIZE_BYTES)
    return [
        Case((Line("put_readable", title.format(digest), size, digest, target),), _measure)
        for digest, target in targets.items()
    ]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    digest = line.variant
    count = session.scale.blocks(line.block_bytes, WARM_UP_ROUNDS + session.repeats, IN_FLIGHT)
    cpu_s: list[float] = []
    verified = 0
    with session.root("put-readable") as root, Pool(line.block_bytes, count, session.seed) as pool:
        shm_bytes = session.arena_bytes(line.block_bytes, count)
        async with session.open(root, shm_bytes=shm_bytes, digest=digest) as store:

            async def ours(repetition: int) -> float:
                nonlocal verified
                pool.stamp(repetition)
                cpu_before, started = machine.cpu_s(), time.perf_counter()
                ids = await put_all(store, pool, IN_FLIGHT)
                seconds = time.perf_counter() - started
                cpu_s.append(machine.cpu_s() - cpu_before)
                verified += compare_and_release(await lease_all(store, ids, IN_FLIGHT), pool)
                await store.flush()
                return pool.total_bytes / seconds / GB

            async def alone(repetition: int) -> float:
                blocks = [pool.parts(index) for index in range(count)]
                return pool.total_bytes / digest_seconds(blocks, digest, session.cores) / GB

            for warm_up in range(WARM_UP_ROUNDS):
                pool.stamp(session.repeats + warm_up)
                await put_all(store, pool, IN_FLIGHT)
                await store.flush()
            turns = await take_turns([Side(OURS, ours), Side("digest", alone)], session.repeats)
    return [
        session.row(
            line,
            turns=turns,
            ours=make_series(OURS, "GB/s", turns.samples[OURS], cpu_s),
            other=make_series(f"{digest} alone, {session.cores} threads", "GB/s", turns.samples["digest"]),
            temperature="hot",
            checked=CHECKED,
            verified_bytes=verified,
        )
    ]
