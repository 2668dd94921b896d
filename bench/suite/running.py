"""The runner: which system does which workload when; goes on where it stopped; leaves a valid file at any time.

Within a repetition the systems take turns in random (seeded) order; a turn is one process of the system that does all
workloads one after the other. The file is replaced after each workload of each turn, so an interrupt loses one. What a
system cannot do is ``not run: reason``. What goes wrong in it voids its row, is recorded as failed and told in the
end; the other systems go on. Processes, files and shared memory of the systems are gone when ``run`` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.limits import MIB, DiskGrid, DiskLimit
from bench.peers.catalog import entries
from bench.peers.protocol import Scalar, System
from bench.results import BenchError, Calibration, CannotRunError
from bench.suite import generating, results, workloads
from bench.suite.client import Client, SystemFailedError
from bench.suite.environments import interpreter
from bench.suite.results import NotRun, Sample, SuiteFile, TestConfig
from bench.suite.turn import WINDOW_BYTES_MAX, Load, Taken, Turn
from bench.suite.workloads import SMALL_BYTES, Workload

ROUND_BYTES = 512 * MIB
"""Moved by each system in one repetition of one workload, where ``--blocks`` does not say otherwise."""
BLOCKS_MIN = 4
DISK_ROUNDS = 4
"""What a system may have on disk at a time, in rounds: volatile, durable, deleted and not yet given back, and data."""
REPLAY_BYTES = 512 * MIB
SMALL_ROUND_BYTES = 128 * MIB
LIMIT_SYSTEM = "limit-disk"
FULL_GRID = DiskGrid(512 * MIB, (2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB), (8, 16, 32), (), ())
QUICK_GRID = DiskGrid(4 * MIB, (MIB,), (4,), (), ())
MAIN = ("write", "hot", "cold")
OTHERS = ("mixed", "small", "concurrency", "multi-process", "prefix-sharing", "trace", "restart", "overflow")
WORKLOADS = (*MAIN, *OTHERS)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for. Sizes in bytes."""

    systems: tuple[str, ...]
    workloads: tuple[str, ...]
    block_bytes: tuple[int, ...]
    blocks: int | None
    temperatures: frozenset[str]
    repeats: int
    in_flight: int
    seed: int
    data: pathlib.Path | None
    """Folder of ``bench generate``; ``None``: generated in the scratch folder."""
    requests: tuple[tuple[int, ...], ...] = ()
    """Of the trace: block numbers."""
    quick: bool = False
    round_bytes: int = ROUND_BYTES
    seconds_max: float | None = None
    """No turn is started after so long; the same command goes on later."""

    def blocks_of(self, block_bytes: int) -> int:
        """Blocks of one round: as asked, or what fits ``round_bytes``, but a few in any case."""
        return self.blocks or max(BLOCKS_MIN, self.round_bytes // block_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """A workload at one block size, and the name its rows go under."""

    name: str
    load: Load
    workload: Workload

    def keys(self, system: str) -> list[results.Key]:
        return [
            (self.name_of(column), column, system, self.load.block_bytes, variant)
            for column, variant in self.workload.expected
        ]

    def name_of(self, column: str) -> str:
        """``write``, ``hot`` and ``cold`` are done in one, and kept apart."""
        return column.partition("_")[0] if self.name == "main" else self.name


def check(plan: Plan) -> None:
    """Raise ``BenchError`` for what cannot be meant."""
    for what, given, known in (
        ("system", plan.systems, tuple(entries())),
        ("workload", plan.workloads, WORKLOADS),
        ("temperature", tuple(plan.temperatures), ("hot", "cold")),
    ):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise BenchError(f"there is no {what} {', '.join(unknown) or '(none given)'}; there are {', '.join(known)}")
    if plan.in_flight < 1 or plan.repeats < 1:
        raise BenchError("at least one operation in flight and one repetition are needed")
    if not 0 <= plan.seed < 1 << 64:
        raise BenchError(f"seed {plan.seed} must be between 0 and 2**64 - 1")
    for size in plan.block_bytes:
        if size % 8192 or not 8192 <= size <= WINDOW_BYTES_MAX // 2:
            raise BenchError(f"a block of {size} bytes is no multiple of 8 KiB up to 512 MiB")


def works(plan: Plan, content: pathlib.Path | None) -> list[Work]:
    """What each system is to do, in order."""
    found: list[Work] = []

    def add(name: str, kind: str, block_bytes: int, blocks: int) -> None:
        load = Load(block_bytes, blocks, plan.in_flight, plan.seed, content, plan.temperatures)
        found.append(Work(name, load, workloads.workload(kind, plan.temperatures, plan.requests)))

    if set(MAIN) & set(plan.workloads):
        for size in plan.block_bytes:
            add("main", "basic", size, plan.blocks_of(size))
    for name in OTHERS:
        if name not in plan.workloads:
            continue
        if name == "small":
            for size in SMALL_BYTES:
                add(name, "small", size, plan.blocks or max(plan.in_flight, SMALL_ROUND_BYTES // size))
        elif name in ("trace", "prefix-sharing"):
            different = len({block for request in plan.requests for block in request}) if name == "trace" else 0
            size = plan.block_bytes[0] if plan.quick else _replayed_bytes(plan.block_bytes[0], different)
            add(name, name, size, different or workloads.SHARED_BLOCKS + workloads.SESSIONS * workloads.OWN_BLOCKS)
        else:
            add(name, name, plan.block_bytes[0], plan.blocks_of(plan.block_bytes[0]))
    return found


def _check_room(plan: Plan, scratch: pathlib.Path) -> None:
    """Raise ``BenchError`` if memory or disk cannot hold what the largest round needs."""
    loads = [job.load for job in works(plan, None)]
    memory = max(load.memory_bytes + 3 * load.count * load.block_bytes for load in loads)
    disk = DISK_ROUNDS * max(load.total_bytes for load in loads)
    for what, needed, free in (
        ("memory", memory, machine.available_bytes()),
        ("disk", disk, shutil.disk_usage(scratch).free),
    ):
        if needed > free:
            raise BenchError(
                f"rounds of this size need {needed >> 20} MiB of {what} and {free >> 20} MiB are free: fewer --blocks"
            )


def _replayed_bytes(block_bytes: int, different: int) -> int:
    """Blocks of a replay are scaled so that all different ones fit ``REPLAY_BYTES``; a multiple of 8 KiB."""
    different = different or workloads.SHARED_BLOCKS + workloads.SESSIONS * workloads.OWN_BLOCKS
    return max(8192, min(block_bytes, REPLAY_BYTES // different) // 8192 * 8192)


def run(*, plan: Plan, out: pathlib.Path, scratch: pathlib.Path, command: Sequence[str], console: Console) -> SuiteFile:
    """Do what of ``plan`` the file ``out`` does not have yet; everything in ``out`` afterwards.

    ``scratch`` is where the measured file system is; a folder made in it is removed at the end. Raises ``BenchError``.
    """
    check(plan)
    scratch.mkdir(parents=True, exist_ok=True)
    _check_room(plan, scratch)
    result = results.open_or_start(out, machine.describe(scratch), test_config(plan), command)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="cascade-bench-", dir=scratch)).resolve()
    try:
        asyncio.run(_run(plan, result, out, folder, console))
    finally:
        shutil.rmtree(folder)
    return result


def test_config(plan: Plan) -> TestConfig:
    first = plan.block_bytes[0]
    return TestConfig(
        block_size_mb=first / MIB,
        num_blocks=plan.blocks_of(first),
        total_data_gb=plan.blocks_of(first) * first / results.GB,
        hot_or_cold=",".join(sorted(plan.temperatures)),
        page_cache_dropped="cold" in plan.temperatures,
        block_sizes_mb=[size / MIB for size in plan.block_bytes],
        workloads=list(plan.workloads),
        repeats=plan.repeats,
        in_flight=plan.in_flight,
        seed=plan.seed,
        data="random" if plan.quick else "kv-float16",
    )


async def _run(plan: Plan, result: SuiteFile, out: pathlib.Path, folder: pathlib.Path, console: Console) -> None:
    started_s = time.monotonic()
    with Progress(console=console, transient=True) as progress:
        content = None if plan.quick else _content(plan, folder, progress)
        jobs = works(plan, content)
        runner = _Runner(plan, result, out, folder, console)
        task = progress.add_task("systems", total=plan.repeats * len(plan.systems) * len(jobs))
        for repeat in range(plan.repeats):
            order = list(plan.systems)
            random.Random(f"{plan.seed}/{repeat}").shuffle(order)
            for turn, name in enumerate(order):
                if plan.seconds_max is not None and time.monotonic() - started_s > plan.seconds_max:
                    console.print(f"stopped after {plan.seconds_max / 60:g} minutes: the same command goes on")
                    return
                await runner.turn(name, repeat, turn, jobs, lambda: progress.advance(task))
    results.save(out, result)


def _content(plan: Plan, folder: pathlib.Path, progress: Progress) -> pathlib.Path:
    """A file with at least the bytes that the largest client holds at a time."""
    sizes = [(size, min(plan.blocks_of(size) * size, WINDOW_BYTES_MAX)) for size in plan.block_bytes]
    needed = max([total for _, total in sizes] + [SMALL_ROUND_BYTES, _longest_replay(plan)])
    if plan.data is not None:
        return generating.find(plan.data, needed)
    block_bytes = 16 * MIB
    task = progress.add_task("generating KV data")
    return generating.generate(
        folder / "data",
        block_bytes,
        -(-needed // block_bytes),
        plan.seed,
        lambda done, total: progress.update(task, completed=done, total=total),
    )


def _longest_replay(plan: Plan) -> int:
    """Bytes that a client of the replays holds."""
    longest = max([len(request) for request in plan.requests] + [workloads.SHARED_BLOCKS + workloads.OWN_BLOCKS])
    size = _replayed_bytes(plan.block_bytes[0], 0)
    return 2 * longest * size if {"trace", "prefix-sharing"} & set(plan.workloads) else 0


class _Runner:
    """One run's state: where results go, and what was found out for the limit."""

    def __init__(
        self, plan: Plan, result: SuiteFile, out: pathlib.Path, folder: pathlib.Path, console: Console
    ) -> None:
        self._plan = plan
        self._result = result
        self._out = out
        self._folder = folder
        self._console = console

    async def turn(self, name: str, repeat: int, turn: int, jobs: Sequence[Work], advance: object) -> None:
        """All of ``jobs`` that system ``name`` has not done in this repetition."""
        assert callable(advance)
        system = entries()[name].system
        todo = [job for job in jobs if not self._done(job, name, repeat)]
        for _ in range(len(jobs) - len(todo)):
            advance()
        while todo:
            try:
                python = interpreter(name)
                async with Client.started(name, python, self._folder) as client:
                    while todo:
                        await self._job(system, client, python, todo[0], repeat, turn)
                        todo.pop(0)
                        results.save(self._out, self._result)
                        advance()
            except CannotRunError as error:
                for job in todo:
                    self._missing(job, name, str(error), failed=False)
                    advance()
                todo = []
            except SystemFailedError as error:
                self._missing(todo.pop(0), name, str(error), failed=True)
                advance()
            results.save(self._out, self._result)

    async def _job(
        self, system: System, client: Client, python: pathlib.Path, job: Work, repeat: int, place: int
    ) -> None:
        def took(taken: Taken) -> None:
            key = (job.name_of(taken.column), taken.column, system.name, job.load.block_bytes, taken.variant)
            results.add_sample(
                self._result,
                key,
                _sample(taken, repeat, place),
                blocks=taken.blocks,
                in_flight=taken.in_flight,
                clients=taken.clients,
            )
            self._console.print(f"{repeat} {_told(key, taken)}", highlight=False, markup=False, soft_wrap=True)

        def lacks(column: str, reason: str, variant: str) -> None:
            key = (job.name_of(column), column, system.name, job.load.block_bytes, variant)
            results.put_not_run(self._result, _not_run(key, reason))

        def describes(described: Mapping[str, object]) -> None:
            where = "own environment" if system.own_environment else "the suite's environment"
            self._result.systems[system.name] = results.system_info(system.title, described, where)

        @contextlib.asynccontextmanager
        async def spawn() -> AsyncIterator[Client]:
            async with Client.started(system.name, python, self._folder) as other:
                yield other

        turn = Turn(
            system,
            client,
            job.load,
            self._folder,
            spawn=spawn,
            took=took,
            lacks=lacks,
            describes=describes,
            options=self._options(system.name),
        )
        try:
            await job.workload.run(turn)
        except CannotRunError as error:
            self._missing(job, system.name, str(error), failed=False)

    def _done(self, job: Work, name: str, repeat: int) -> bool:
        return all(results.has_sample(self._result, key, repeat) for key in job.keys(name))

    def _missing(self, job: Work, name: str, reason: str, *, failed: bool) -> None:
        for key in job.keys(name):
            results.put_not_run(self._result, _not_run(key, reason, failed=failed))
        how = "failed" if failed else "not run"
        self._console.print(f"{job.name} {name}: {how}: {reason}", highlight=False, markup=False, soft_wrap=True)

    def _options(self, name: str) -> dict[str, Scalar]:
        """Request sizes and depths of the raw limit, found once per run and kept in the result file."""
        if name != LIMIT_SYSTEM:
            return {}

        def record(cells: list[Calibration]) -> None:
            self._result.limits += cells
            results.save(self._out, self._result)

        grid = QUICK_GRID if self._plan.quick else FULL_GRID
        limit = DiskLimit(self._folder, grid, self._plan.seed, self._result.limits, record)
        try:
            write, read = limit.setting(write=True), limit.setting(write=False)
        finally:
            limit.close()
        return {
            "write_request_bytes": write.request_bytes,
            "write_depth": write.depth,
            "read_request_bytes": read.request_bytes,
            "read_depth": read.depth,
        }


def _sample(taken: Taken, repeat: int, place: int) -> Sample:
    measure = taken.measure
    names = ("seconds", "bytes", "operations", "cpu_s", "peak_bytes", "read_bytes", "written_bytes", "verified_bytes")
    extra = {**measure["extra"], **({"misses": measure["misses"]} if measure["misses"] else {})}
    return Sample(
        repeat=repeat,
        turn=place,
        value=taken.value,
        latency_ms=measure["latency_ms"],
        extra=extra,
        **{name: measure[name] for name in names},
    )


def _not_run(key: results.Key, reason: str, *, failed: bool = False) -> NotRun:
    workload, column, system, block_bytes, variant = key
    return NotRun(
        workload=workload,
        column=column,
        system=system,
        block_bytes=block_bytes,
        variant=variant,
        reason=reason,
        failed=failed,
    )


def _told(key: results.Key, taken: Taken) -> str:
    """One line of progress."""
    _, column, system, block_bytes, variant = key
    gigabytes = taken.measure["bytes"] / results.GB
    cost = f", {taken.measure['cpu_s'] / gigabytes:.2f} CPU s/GB" if gigabytes else ""
    unit = results.COLUMNS[column].unit
    return f"{system} {column} {block_bytes >> 10} KiB {variant}: {taken.value:.3g} {unit}{cost}"
