"""Compaction: what it costs the foreground, what it writes, and what a crash costs at the next opening.

* Cold gets while a compaction of everything runs at the default bandwidth, against the same gets without.
* Write amplification in steady state, of a store without a budget in which blocks are replaced for ever
  and compaction keeps about 70 % of all bytes alive: bytes written to segments, headers, footers and
  copies included, per byte of new blocks. Replaced are hot and cold blocks as in the paper on log-structured
  file systems (nine of ten puts replace one tenth of the blocks), and, as the worst case, any alike.
* Opening a root whose writer was killed with one open segment, so that it has to be scanned and sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import cascade_aio as ca
from bench import machine
from bench.blocks import compare_and_release, in_flight, lease_all, put_all
from bench.data import Pool
from bench.figures import Case
from bench.machine import REPOSITORY
from bench.reopening import reopen
from bench.results import BenchError, Row, Target, make_series
from bench.scale import GIB, KIB, MIB, Scale
from bench.session import OURS, Line, Session
from bench.turns import Side, take_turns

IN_FLIGHT = 8
GB = 1e9
BANDWIDTH_BYTES = 256 * MIB
"""The default of ``compaction_bandwidth``."""
SEGMENT_BYTES = 256 * MIB
GET_SIZES_BYTES = (MIB, 16 * MIB)
CHURN_BLOCK_BYTES = 256 * KIB
CHURN_BLOCKS_PER_SEGMENT = 63
CHURN_SEGMENTS = 64
CHURN_TURNS = 12
"""The whole capacity is written so often; the last turns are the samples."""
LIVE_SHARE = 0.7
LAG_SHARE = 0.01
"""Puts wait while more than this is dead above the share at which compaction begins."""
HOT_SHARE, HOT_PUTS = 0.1, 0.9
CRASH_SIZES_BYTES = (64 * KIB, MIB)
SETTLED_SECONDS_MAX = 60.0
CHILD_SECONDS_MAX = 300.0


def cases(scale: Scale) -> list[Case]:
    """Rows "cold get during compaction", "write amplification" and "opening after a crash"."""
    get = Target("ratio", 0.7, at_least=True)
    title = "cold get, 8 in flight, during compaction / without"
    found = [
        Case((Line("compaction_get", title, scale.block_bytes(size), "", get),), _gets) for size in GET_SIZES_BYTES
    ]
    for kind, target in (("hot and cold blocks", Target("value", 1.5, at_least=False)), ("all alike", None)):
        title = "write amplification at 70 % live data, steady state"
        line = Line("write_amplification", title, scale.block_bytes(CHURN_BLOCK_BYTES), kind, target)
        found.append(Case((line,), functools.partial(_churn, hot=target is not None)))
    seconds = Target("value", 3.0, at_least=False)
    title = "opening after a crash with one open segment of 1 GiB"
    found += [
        Case((Line("open_after_crash", title, scale.block_bytes(size), "", seconds),), _crash)
        for size in (CRASH_SIZES_BYTES[:1] if scale.quick else CRASH_SIZES_BYTES)
    ]
    return found


# -- gets during compaction ------------------------------------------------------------------------------------


async def _gets(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    scale = session.scale
    count = scale.blocks(line.block_bytes, 6, IN_FLIGHT)
    arena_bytes = session.arena_bytes(line.block_bytes, 2 * count)
    verified = 0
    with session.root("compaction") as root, Pool(line.block_bytes, count, session.seed) as pool:
        segment_bytes = min(SEGMENT_BYTES, max(MIB, pool.total_bytes // MIB * MIB))
        async with session.open(root, shm_bytes=arena_bytes, segment_bytes=segment_bytes) as store:
            for stamp in (1, 2):
                pool.stamp(stamp)
                garbage = await put_all(store, pool, IN_FLIGHT)
                for block_id in garbage[::2]:
                    await store.delete(block_id)
            await store.flush()
            pool.stamp(0)
            measured = await put_all(store, pool, IN_FLIGHT)
            await store.flush()

        async def once(repetition: int, *, compacting: bool) -> float:
            nonlocal verified
            opened = session.open(root, shm_bytes=arena_bytes, segment_bytes=segment_bytes, compaction_bandwidth=0)
            async with opened as store, _compacting(store, scale, wanted=compacting) as still_at_it:
                read_before, started = machine.storage_read_bytes(), time.perf_counter()
                leases = await lease_all(store, measured, IN_FLIGHT)
                seconds = time.perf_counter() - started
                if machine.storage_read_bytes() - read_before < pool.total_bytes:
                    raise BenchError("not cold: less was read than was got")
                if not still_at_it():
                    raise BenchError("compaction was over before the gets: the figure is void")
                verified += compare_and_release(leases, pool)
            return pool.total_bytes / seconds / GB

        sides = [
            Side(OURS, functools.partial(once, compacting=True)),
            Side("without", functools.partial(once, compacting=False)),
        ]
        turns = await take_turns(sides, session.repeats)
    return [
        session.row(
            line,
            turns=turns,
            ours=make_series(OURS, "GB/s", turns.samples[OURS]),
            other=make_series("without compaction", "GB/s", turns.samples["without"]),
            temperature="cold",
            checked=(
                "new store per repetition; compaction of everything runs at the default bandwidth before the first and "
                "after the last get; O_DIRECT; every byte compared after the clock stopped"
            ),
            verified_bytes=verified,
        )
    ]


@contextlib.asynccontextmanager
async def _compacting(store: ca.Store, scale: Scale, *, wanted: bool) -> AsyncIterator[Callable[[], bool]]:
    """Within this scope everything is being compacted, if ``wanted``; yields whether it still is."""
    if not wanted:
        yield lambda: True
        return
    bandwidth = MIB // 2 if scale.quick else BANDWIDTH_BYTES  # a quick run has next to nothing to copy
    task = asyncio.ensure_future(store.compact(bandwidth=bandwidth))
    try:
        while not task.done() and not store.statistics()["disk"]["compaction"]["rounds"]:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        yield lambda: not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# -- write amplification ---------------------------------------------------------------------------------------


class _Churn:
    """A population of blocks that are replaced, one by one, for ever."""

    def __init__(self, store: ca.Store, block_bytes: int, blocks: int, seed: int, *, hot: bool) -> None:
        self._store = store
        self._rng = random.Random(seed)
        self._base = bytearray(random.Random(seed).randbytes(block_bytes))
        self._hot_blocks = max(1, int(HOT_SHARE * blocks)) if hot else 0
        self.ids: list[ca.BlockId | None] = [None] * blocks
        self.serials = [0] * blocks
        self._serial = 0

    def content(self, serial: int) -> tuple[bytes, memoryview]:
        self._base[:8] = serial.to_bytes(8, "little")
        return serial.to_bytes(8, "little"), memoryview(self._base)

    def pick(self) -> int:
        if self._hot_blocks and self._rng.random() < HOT_PUTS:
            return self._rng.randrange(self._hot_blocks)
        return self._rng.randrange(self._hot_blocks, len(self.ids))

    async def replace(self, index: int) -> None:
        self._serial += 1
        before, self.serials[index] = self.ids[index], self._serial
        self.ids[index] = await self._store.put(*self.content(self._serial))
        if before is not None:
            await self._store.delete(before)

    async def settle(self) -> None:
        """Until compaction has caught up. Raises ``BenchError`` if it does not."""
        await self._store.flush()
        until = time.monotonic() + SETTLED_SECONDS_MAX
        while True:
            disk = self._store.statistics()["disk"]
            if disk["dead_bytes"] <= (1 - LIVE_SHARE + LAG_SHARE) * disk["record_bytes"]:
                return
            if time.monotonic() > until:
                raise BenchError(
                    f"compaction does not keep up: {disk['dead_bytes']} of {disk['record_bytes']} are dead"
                )
            await asyncio.sleep(0.002)

    def written(self) -> tuple[int, int]:
        """(bytes written to segments, bytes of new blocks) since the store was opened."""
        statistics = self._store.statistics()
        writer, compaction = statistics["disk"]["writer"], statistics["disk"]["compaction"]
        written = writer["written_bytes"] + writer["footer_bytes"] + compaction["written_bytes"]
        return written, statistics["store"]["put_bytes"]

    async def verify(self) -> int:
        """Get every block and compare all of its bytes; how many."""
        for block_id, serial in zip(self.ids, self.serials, strict=True):
            assert block_id is not None, "replaced at least once"
            async with self._store.get(block_id) as block:
                if bytes(block.value) != bytes(self.content(serial)[1]):
                    raise BenchError(f"block {block_id} came back with other bytes than were put: the figure is void")
        return len(self.ids) * len(self._base)


async def _churn(session: Session, lines: tuple[Line, ...], *, hot: bool) -> list[Row]:
    (line,) = lines
    quick = session.scale.quick
    segments, turns = (8, session.repeats + 1) if quick else (CHURN_SEGMENTS, CHURN_TURNS)
    segment_bytes = max(MIB, (CHURN_BLOCKS_PER_SEGMENT + 1) * line.block_bytes)
    per_segment = segment_bytes // (line.block_bytes + 8 * KIB)
    capacity = segments * per_segment
    with session.root("churn") as root:
        settings = {"segment_bytes": segment_bytes, "compaction_bandwidth": 8 * GIB}
        async with session.open(
            root, shm_bytes=session.arena_bytes(line.block_bytes, 4 * per_segment), **settings
        ) as store:
            churn = _Churn(store, line.block_bytes, int(LIVE_SHARE * capacity), session.seed, hot=hot)
            for index in range(len(churn.ids)):
                await churn.replace(index)
            samples: list[float] = []
            shares: list[float] = []
            for _ in range(turns):
                before = churn.written()
                for number in range(capacity):
                    await churn.replace(churn.pick())
                    if number % per_segment == 0:
                        await churn.settle()
                await churn.settle()
                after = churn.written()
                disk = store.statistics()["disk"]
                samples.append((after[0] - before[0]) / (after[1] - before[1]))
                shares.append(disk["live_bytes"] / disk["record_bytes"])
            verified = await churn.verify()
    return [
        session.row(
            line,
            ours=make_series(OURS, "bytes per byte", samples[-session.repeats :]),
            extra=[make_series("live share", "", shares[-session.repeats :])],
            temperature="none",
            checked=(
                f"samples are the last turns of one run of {turns}, each of which writes the whole capacity of "
                f"{segments} segments once; puts wait for compaction; every live byte compared at the end"
            ),
            verified_bytes=verified,
            notes="any alike has a lower bound near 1.9 at 70 %" if not hot else "",
        )
    ]


# -- opening after a crash -------------------------------------------------------------------------------------


async def _crash(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    segment_bytes = 4 * MIB if session.scale.quick else GIB
    count = (segment_bytes - 2 * MIB) // (line.block_bytes + 8 * KIB)
    seconds: list[float] = []
    verified = 0
    with session.root("crash-empty") as empty:
        async with session.open(empty, shm_bytes=64 * MIB):
            pass  # tells the row which back end it is
        for repetition in range(session.repeats):
            with session.root("crash") as root:
                arena = session.new_arena_name()
                request: dict[str, Any] = {
                    "root": str(root), "arena": arena, "segment_bytes": segment_bytes, "io_backend": session.io_backend,
                    "block_bytes": line.block_bytes, "count": count, "seed": session.seed + repetition,
                }  # fmt: skip
                try:
                    _run_child(request)
                    _drop_page_cache(root)
                    given = {"arena": arena, "io_backend": session.io_backend, "shm_bytes": 64 * MIB}
                    opened = reopen(root, empty, given, traced=False)
                    if opened.blocks != count:
                        raise BenchError(f"of {count} blocks that were flushed {opened.blocks} are there: void")
                    seconds.append(opened.seconds)
                    verified += await _read_all(session, root, request)
                finally:
                    session.remove_arena(arena)
    return [
        session.row(
            line,
            ours=make_series(OURS, "s", seconds),
            temperature="cold",
            checked=(
                f"a process is killed after flushing {count} blocks into one segment; opened in a fresh process, page "
                "cache dropped before; every byte compared afterwards"
            ),
            verified_bytes=verified,
        )
    ]


def _value(request: dict[str, Any], index: int, base: bytearray) -> memoryview:
    base[:8] = (request["seed"] * 1_000_000 + index).to_bytes(8, "little")
    return memoryview(base)


async def _read_all(session: Session, root: pathlib.Path, request: dict[str, Any]) -> int:
    base = bytearray(random.Random(request["seed"]).randbytes(request["block_bytes"]))
    wanted = {
        ca.compute_block_id(index.to_bytes(8, "little"), _value(request, index, base)): index
        for index in range(request["count"])
    }
    async with session.open(root, shm_bytes=64 * MIB) as store:

        async def check(block_id: ca.BlockId) -> None:
            async with store.get(block_id) as block:
                if bytes(block.value) != bytes(_value(request, wanted[block_id], base)):
                    raise BenchError(f"block {block_id} came back with other bytes than were put: the figure is void")

        await in_flight(1, list(wanted), check)
    return int(request["count"]) * int(request["block_bytes"])


def _run_child(request: dict[str, Any]) -> None:
    """A process that writes one segment, flushes and is killed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.figures.compaction", json.dumps(request)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS_MAX,
    )
    if done.returncode != -signal.SIGKILL:
        raise BenchError(f"the process that was to be killed ended with {done.returncode}: {done.stderr[-2000:]}")


async def _write_and_die(request: dict[str, Any]) -> None:
    base = bytearray(random.Random(request["seed"]).randbytes(request["block_bytes"]))
    store = await ca.open_store(
        str(request["root"]),
        arena=str(request["arena"]),
        io_backend=request["io_backend"],
        segment_bytes=request["segment_bytes"],
        shm_bytes=min(256 * MIB, 8 * request["segment_bytes"]),
    )
    for index in range(request["count"]):
        await store.put(index.to_bytes(8, "little"), _value(request, index, base))
    await store.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _drop_page_cache(root: pathlib.Path) -> None:
    """Tell the kernel to forget what it caches of the root's files."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


if __name__ == "__main__":
    asyncio.run(_write_and_die(json.loads(sys.argv[1])))
