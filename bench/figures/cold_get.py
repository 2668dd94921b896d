"""Cold get: blocks that are only on disk, read, verified and leased, against a raw direct read.

Each repetition opens a new store on the root with an empty arena, fills that arena with *other*
blocks of the root (so that its memory is warm and every timed get has to evict), and then gets the
measured blocks, each for the first time in this store, so that each checksum is computed inside the
timing. The leases are all kept until the clock has stopped; then every byte is compared.
"""

from __future__ import annotations

import pathlib
import time

import cascade_aio as ca
from bench import machine
from bench.blocks import compare_and_release, in_flight, lease_all, put_all
from bench.data import Pool
from bench.figures import Case
from bench.results import BenchError, Row, Target, make_series
from bench.scale import MIB, Scale
from bench.session import OURS, Line, Session
from bench.turns import Side, take_turns

IN_FLIGHT = 8
GB = 1e9
SIZES_BYTES = (MIB, 16 * MIB, 80 * MIB)
CPU_SIZE_BYTES = 16 * MIB
MEASURED, FILLERS = 0, (1, 2)
"""Stamps of the blocks that are timed, and of those that fill the arena before."""
CHECKED = (
    "cold: new store per repetition, arena full of other blocks, every lease says tier disk, read_bytes of "
    "/proc/self/io grew by at least the bytes got (O_DIRECT); all leases held, every byte compared after the clock "
    "stopped, in every repetition"
)


def cases(scale: Scale) -> list[Case]:
    """Rows "cold get / raw direct read", one per block size."""
    target = Target("ratio", 0.90, at_least=True)
    title = "cold get, 8 in flight, checksum verified / raw direct read"
    return [Case((Line("cold_get", title, scale.block_bytes(size), "", target),), _pairs) for size in SIZES_BYTES]


def cpu_cases(scale: Scale) -> list[Case]:
    """Row "CPU seconds per GB" of the same cold get."""
    line = Line(
        "cold_get_cpu",
        "CPU seconds per GB, cold get with verification",
        scale.block_bytes(CPU_SIZE_BYTES),
        "",
        Target("value", 0.4, at_least=False),
    )
    return [Case((line,), _cpu)]


class _ColdRoot:
    """A root with measured and filling blocks; ``once`` is one repetition."""

    def __init__(self, session: Session, root: pathlib.Path, pool: Pool) -> None:
        self._session = session
        self._root = root
        self._pool = pool
        self._arena_bytes = session.arena_bytes(pool.block_bytes, pool.count)
        self._ids: dict[int, list[ca.BlockId]] = {}
        self.verified_bytes = 0
        self.cpu_s_per_gb: list[float] = []
        self.cpu_s: list[float] = []

    async def fill(self) -> None:
        """Write all blocks of all stamps; leaves the pool stamped as measured."""
        async with self._session.open(self._root, shm_bytes=self._arena_bytes) as store:
            for stamp in (*FILLERS, MEASURED):
                self._pool.stamp(stamp)
                self._ids[stamp] = await put_all(store, self._pool, IN_FLIGHT)
                await store.flush()

    async def once(self, repetition: int) -> float:
        """GB/s of one cold pass over the measured blocks."""
        async with self._session.open(self._root, shm_bytes=self._arena_bytes) as store:

            async def touch(block_id: ca.BlockId) -> None:
                (await store.get(block_id)).release()

            await in_flight(IN_FLIGHT, [block_id for stamp in FILLERS for block_id in self._ids[stamp]], touch)
            read_before, cpu_before = machine.storage_read_bytes(), machine.cpu_s()
            started = time.perf_counter()
            leases = await lease_all(store, self._ids[MEASURED], IN_FLIGHT)
            seconds = time.perf_counter() - started
            cpu_s, read = machine.cpu_s() - cpu_before, machine.storage_read_bytes() - read_before
            warm = sum(block.tier is not ca.Tier.DISK for _, block in leases)
            self.verified_bytes += compare_and_release(leases, self._pool)
        if warm or read < self._pool.total_bytes:
            raise BenchError(f"not cold: {warm} blocks were in memory, {read} of {self._pool.total_bytes} bytes read")
        self.cpu_s.append(cpu_s)
        self.cpu_s_per_gb.append(cpu_s / (self._pool.total_bytes / GB))
        return self._pool.total_bytes / seconds / GB


async def _pairs(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    rounds = 1 + len(FILLERS) + 1  # the last one is the raw file
    count = session.scale.blocks(line.block_bytes, rounds, IN_FLIGHT)
    setting = session.disk.setting(write=False)
    with session.root("cold-get") as root, Pool(line.block_bytes, count, session.seed) as pool:
        cold = _ColdRoot(session, root, pool)
        await cold.fill()

        async def raw(repetition: int) -> float:
            return session.disk.read_gb_per_s(pool.total_bytes)

        session.disk.read_gb_per_s(pool.total_bytes)  # its file is written before the first pair
        turns = await take_turns([Side(OURS, cold.once), Side("raw", raw)], session.repeats)
    return [
        session.row(
            line,
            turns=turns,
            ours=make_series(OURS, "GB/s", turns.samples[OURS], cold.cpu_s),
            other=make_series(setting.text, "GB/s", turns.samples["raw"]),
            temperature="cold",
            checked=CHECKED,
            verified_bytes=cold.verified_bytes,
        )
    ]


async def _cpu(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    count = session.scale.blocks(line.block_bytes, 1 + len(FILLERS), IN_FLIGHT)
    with session.root("cold-get-cpu") as root, Pool(line.block_bytes, count, session.seed) as pool:
        cold = _ColdRoot(session, root, pool)
        await cold.fill()
        turns = await take_turns([Side(OURS, cold.once)], session.repeats)
    return [
        session.row(
            line,
            ours=make_series(OURS, "s/GB", cold.cpu_s_per_gb, cold.cpu_s),
            extra=[make_series("rate", "GB/s", turns.samples[OURS])],
            temperature="cold",
            checked=CHECKED + "; CPU is user + system of the whole process, io_uring's workers included",
            verified_bytes=cold.verified_bytes,
        )
    ]
