"""One measurement on all ranks of this job, gathered by rank 0 into one result file.

The file is that of a comparison (``bench.suite.results``: head, rows, samples), so that the same report prints it, with
``figures`` beside the rows: pairs with raw ``Rget``, lookups, loop lag, the skewed workload. Rates of all ranks are
total bytes over the slowest rank's wall clock. A rank that fails ends all of them.
"""

from __future__ import annotations

import os
import pathlib
import resource
import shutil
import tempfile
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec

import cascade_aio as ca
from bench.machine import describe
from bench.mpi import figures
from bench.mpi.figures import AllTaken, PairTaken, Setting
from bench.mpi.ranks import Ranks
from bench.results import BenchError, CannotRunError
from bench.samples import Spread, quantile, spread
from bench.suite import results
from bench.suite.results import Cluster, NotRun, Sample, SuiteFile, SystemInfo, TestConfig

MIB = 1 << 20
SYSTEM = "cascade-mpi"
BLOCK_BYTES = (MIB, 16 * MIB, 80 * MIB)
QUICK_BLOCK_BYTES = (MIB // 4,)
RATIO_MIN = {MIB: 0.7, 16 * MIB: 0.85, 80 * MIB: 0.85}
LOOKUP_MS_MAX = 2.0
LAG_MS_MAX = 3.0
ARENA_ROUNDS = 4
"""Rounds of bytes that an arena holds."""
DISK_BYTES = 4 << 30
"""Of each rank's segments; what was measured may go."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line: what was shown, its samples, and what it should be."""

    name: str
    title: str
    unit: str
    samples: list[float]
    value: float
    """What is held against the target: a median or a quantile, as the title says."""
    target: float | None = None
    at_least: bool = True
    ratios: Spread | None = None
    details: dict[str, Any] = {}

    @property
    def verdict(self) -> str:
        if self.target is None:
            return "shown"
        return "met" if (self.value >= self.target) == self.at_least else "missed"


class RemoteFile(SuiteFile, kw_only=True):
    """The result file."""

    figures: list[Figure] = msgspec.field(default_factory=list)
    library: str = ""


async def run(
    setting: Setting, block_bytes: Sequence[int], scratch: pathlib.Path, command: Sequence[str]
) -> RemoteFile | None:
    """Measure everything; collective. The file on rank 0, ``None`` on others. ``scratch`` must be shared by all."""
    ranks = Ranks()
    if ranks.size < 2:
        raise CannotRunError(
            "one rank has nobody to read from: mpiexec -n 4 python -m bench mpi run, or launch -n 4 run"
        )
    root = ranks.comm.bcast(tempfile.mkdtemp(prefix="cascade-mpi-", dir=scratch) if ranks.rank == 0 else None)
    try:
        found = await _measure(ranks, setting, block_bytes, root)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)  # the caller ends the whole job
        raise
    await ranks.meet()
    if ranks.rank == 0:
        shutil.rmtree(root)
    if ranks.rank:
        return None
    return _file(ranks, setting, block_bytes, scratch, command, found)


async def _measure(ranks: Ranks, setting: Setting, block_bytes: Sequence[int], root: str) -> dict[str, Any]:
    """Everybody's parts, by figure."""
    found: dict[str, Any] = {"hosts": ranks.hosts()}
    arena_bytes = ARENA_ROUNDS * max(
        setting.round_bytes, 2 * max(block_bytes), figures.HOT_BLOCKS * figures.HOT_BLOCK_BYTES
    )
    async with ca.open_store(root, comm=ranks.world, shm_bytes=arena_bytes, disk_bytes=DISK_BYTES) as store:
        await store.wait_ready()
        await ranks.meet()

        async def take(name: str, figure: Awaitable[Any]) -> None:
            found[name] = await ranks.gather(await figure)

        for nbytes in block_bytes:
            for at_once in (1, 4):
                await take(f"pair/{nbytes}/{at_once}", figures.pair(ranks, store, setting, nbytes, at_once))
        await take("lookup", figures.lookup(ranks, store, setting))
        await take("lag", figures.lag(ranks, store, setting, sorted(block_bytes)[len(block_bytes) // 2]))
        await take("skewed", figures.skewed(ranks, store, setting))
        for nbytes in block_bytes:
            for repeat in range(setting.repeats):
                await take(f"all/{nbytes}/{repeat}", figures.everybody(ranks, store, setting, nbytes, repeat))
        found["remote"] = await ranks.gather(store.statistics()["remote"])
        found["peak"] = await ranks.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return found


def _file(
    ranks: Ranks, setting: Setting, block_bytes: Sequence[int], scratch: pathlib.Path, command: Sequence[str],
    found: dict[str, Any],
) -> RemoteFile:  # fmt: skip
    largest = max(block_bytes)
    config = TestConfig(
        block_size_mb=largest / MIB,
        num_blocks=setting.blocks_of(largest),
        total_data_gb=setting.blocks_of(largest) * largest * ranks.size / 1e9,
        hot_or_cold="hot",
        page_cache_dropped=False,
        block_sizes_mb=[nbytes / MIB for nbytes in block_bytes],
        workloads=["write", "remote", "hot"],
        repeats=setting.repeats,
        in_flight=4,
        seed=setting.seed,
        data="random",
    )
    begun = results.start(describe(scratch), config, command)
    file = RemoteFile(**{name: getattr(begun, name) for name in begun.__struct_fields__}, library=ranks.library)
    hosts = found["hosts"]
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))  # none of them is used: the tier is host memory
    file.environment = Cluster(hosts, -(-ranks.size // hosts), ranks.size, gpus, gpus * hosts)
    file.systems[SYSTEM] = SystemInfo(
        title="cascade_aio, one rank's arena read by the others over MPI",
        version=file.versions["cascade_aio"],
        server=ranks.library,
        medium="memory",
        durability="write_durable: put and flush",
    )
    for nbytes in block_bytes:
        for repeat in range(setting.repeats):
            _add_rows(file, nbytes, repeat, found[f"all/{nbytes}/{repeat}"], found["peak"], setting)
        file.not_run.append(
            NotRun(
                workload="cold", column="cold", system=SYSTEM, block_bytes=nbytes,
                reason="the remote tier is memory; cold reads are those of one rank, and measured there",
            )
        )  # fmt: skip
    for key, parts in found.items():
        if key.startswith("pair/"):
            _, size, at_once = key.split("/")
            file.figures.append(_pair_figure(int(size), int(at_once), parts[figures.READER]))
    file.figures += [_lookup_figure(found["lookup"][figures.READER], ranks.size), *_lag_figures(found["lag"])]
    file.figures.append(_skewed_figure(found["skewed"]))
    results.summarise(file)
    file.verified_bytes += sum(
        part.verified_bytes for key, parts in found.items() if key.startswith("pair/") for part in parts if part
    )
    return file


def _add_rows(
    file: RemoteFile, nbytes: int, repeat: int, parts: list[dict[str, AllTaken]], peaks: list[int], setting: Setting
) -> None:
    for column, workload in (("write_durable", "write"), ("remote", "remote"), ("hot_lease", "hot")):
        each = [part[column] for part in parts]
        total, slowest_s = sum(one.nbytes for one in each), max(one.seconds for one in each)
        sample = Sample(
            repeat=repeat, turn=0, value=total / slowest_s / 1e9, seconds=slowest_s, bytes=total,
            operations=sum(one.operations for one in each), cpu_s=sum(one.cpu_s for one in each), peak_bytes=max(peaks),
            read_bytes=0, written_bytes=0, verified_bytes=0 if column == "write_durable" else total,
        )  # fmt: skip
        key = (workload, column, SYSTEM, nbytes, "")
        results.add_sample(file, key, sample, blocks=setting.blocks_of(nbytes), in_flight=4, clients=len(parts))


def _pair_figure(nbytes: int, at_once: int, taken: PairTaken) -> Figure:
    ratios = [raw / ours for ours, raw in zip(taken.ours_s, taken.raw_s, strict=True)]
    rates = [taken.bytes_per_side / seconds / 1e9 for seconds in taken.ours_s]
    raw = [taken.bytes_per_side / seconds / 1e9 for seconds in taken.raw_s]
    found = spread(ratios)
    return Figure(
        name=f"remote get {nbytes // 1024} KiB, {at_once} at once",
        title=f"verified get of {nbytes / MIB:g} MiB blocks of another rank over raw Rget of the same bytes and "
        f"pieces, {at_once} at once (median of {len(ratios)} pairs)",
        unit="ratio",
        samples=ratios,
        value=found.median,
        target=RATIO_MIN.get(nbytes),
        ratios=found,
        details={
            "block_bytes": nbytes,
            "at_once": at_once,
            "get_gb_per_s": rates,
            "raw_gb_per_s": raw,
            "order": taken.order,
        },
    )


def _lookup_figure(seconds: list[float], ranks: int) -> Figure:
    samples = [1e3 * one for one in seconds]
    return Figure(
        name="lookup",
        title=f"lookup of {figures.LOOKUP_NAMES} keys spread over {ranks} ranks (median)",
        unit="ms",
        samples=samples,
        value=quantile(samples, 0.5),
        target=LOOKUP_MS_MAX,
        at_least=False,
        details={"p99_ms": quantile(samples, 0.99)},
    )


def _lag_figures(parts: list[dict[str, Any]]) -> list[Figure]:
    made = []
    for rank, side in ((figures.READER, "origin"), (figures.HOLDER, "target")):
        part = parts[rank]
        made.append(
            Figure(
                name=f"loop lag, {side}",
                title=f"lateness of a 1 ms ticker on the loop of the {side} during transfers (p99)",
                unit="ms",
                samples=[round(late, 3) for late in part["busy_ms"]],
                value=quantile(part["busy_ms"], 0.99),
                target=LAG_MS_MAX,
                at_least=False,
                details={
                    "idle_p99_ms": quantile(part["idle_ms"], 0.99),
                    "loop_cpu_share_busy": part["busy_cpu_share"],
                    "loop_cpu_share_idle": part["idle_cpu_share"],
                    "blocks": part["blocks"],
                },
            )
        )
    return made


def _skewed_figure(parts: list[dict[str, Any]]) -> Figure:
    """How much of what the readers brought was served by the rank that put it."""
    home = sum(part["read_bytes_from"].get(figures.HOLDER, 0) for part in parts)
    total = sum(sum(part["read_bytes_from"].values()) for part in parts)
    return Figure(
        name="skewed",
        title=f"share of the bytes of {figures.HOT_BLOCKS} hot blocks (Zipf) that readers took from their first owner, "
        "the rest from each other's copies",
        unit="share",
        samples=[home / total],
        value=home / total,
        details={
            "gets": sum(part["gets"] for part in parts),
            "brought_bytes": total,
            "seconds": max(p["seconds"] for p in parts),
        },
    )


def abort() -> None:
    """End the whole job: this rank cannot go on, and the others would wait for it for ever."""
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)


def load(path: pathlib.Path) -> RemoteFile:
    """Raises ``BenchError`` for a file that is none of ``run``."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RemoteFile)
    except (OSError, msgspec.MsgspecError) as error:
        raise BenchError(f"{path.name} is no result of `python -m bench mpi run`: {error}") from error


def save(path: pathlib.Path, file: RemoteFile) -> None:
    """Replace ``path`` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")
    os.replace(temporary, path)
