"""The result file of a comparison: one JSON document per run, every raw sample in it, valid after every turn.

The head has the fields that the issue of this suite asks for (``job_id`` … ``results``), so that files of several
machines can be laid side by side; ``rows`` is what it is computed from. A row is one line of one table: a workload, a
column (a medium and a promise), a system, a block size and a variant (such as ``4 clients``), with one sample per
repetition. Columns of different media or durability are never merged. A system that did not run is a ``NotRun``
under the same key. No host name and no absolute path is written. Knows no system and no workload.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from bench.results import BenchError, Calibration, Environment, now_text
from bench.samples import Spread, median, spread

FORMAT = "cascade-bench-suite-1"
GB = 1e9
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """What a number means: which medium, which promise, which unit."""

    title: str
    medium: Literal["memory", "disk", "both"]
    unit: str = "GB/s"
    better: Literal["higher", "lower"] = "higher"


COLUMNS = {
    "write_volatile": Column("write, readable (not durable)", "memory"),
    "write_durable": Column("write, durable", "disk"),
    "hot": Column("hot read, copied out", "memory"),
    "hot_lease": Column("hot read, leased (no copy)", "memory"),
    "remote": Column("read from other ranks' memory, leased", "memory"),
    "cold": Column("cold read, copied out", "disk"),
    "cold_lease": Column("cold read, leased (no copy)", "disk"),
    "mixed": Column("70 % hot reads, 30 % writes", "memory"),
    "overflow_put": Column("write of 2x the memory tier", "both"),
    "overflow_get": Column("random reads of 2x the memory tier", "both"),
    "restart": Column("opening until the first hit", "both", "s", "lower"),
    "sharing_stall": Column("50 sessions on one prompt: time in lookups, gets and puts", "both", "s", "lower"),
    "trace_stall": Column("trace: time in lookups, gets and puts", "both", "s", "lower"),
}
"""Every column there is. ``hot`` and ``cold`` never share one, nor do durable and volatile writes."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one system. Sizes in bytes."""

    repeat: int
    turn: int
    """Place of the system within the repetition, 0 first: systems run in random order."""
    value: float
    """In the column's unit."""
    seconds: float
    """Wall clock; of the slowest of several clients."""
    bytes: int
    operations: int
    cpu_s: float
    """User and system of all clients and servers of the system."""
    peak_bytes: int
    read_bytes: int
    """From storage, by the kernel's own count."""
    written_bytes: int
    verified_bytes: int
    latency_ms: dict[str, float] = {}
    """Quantile → milliseconds; empty where operations are not timed one by one."""
    extra: dict[str, float] = {}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """``samples`` of one key, and their summary (made by ``make_row``, never by hand)."""

    workload: str
    column: str
    system: str
    block_bytes: int
    variant: str = ""
    blocks: int
    """Per sample. A slow system may have fewer; the table says so."""
    in_flight: int
    clients: int = 1
    unit: str
    samples: list[Sample]
    summary: Spread
    cpu_s_per_gb: Spread | None
    """``None`` where no bytes were moved."""
    peak_bytes: int


class NotRun(msgspec.Struct, frozen=True, kw_only=True):
    """A row that is not there, and why. ``failed``: it should have run, and went wrong."""

    workload: str
    column: str
    system: str
    block_bytes: int
    variant: str = ""
    reason: str
    failed: bool = False


class SystemInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What ran under a system's name: the adapter's ``Description``, and how it was started."""

    title: str
    version: str
    server: str = ""
    module: str = ""
    tuning: str = ""
    durability: str = ""
    medium: str = ""
    configuration: dict[str, Any] = {}
    lacks: dict[str, str] = {}
    python: str = ""


class Cluster(msgspec.Struct, frozen=True):
    """``environment`` of the issue's format."""

    nodes: int = 1
    ranks_per_node: int = 1
    total_ranks: int = 1
    gpus_per_node: int = 0
    total_gpus: int = 0


class TestConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``test_config`` of the issue's format, and what else was asked for."""

    block_size_mb: float
    """Of ``results``: the first that was asked for, in MiB; ``block_sizes_mb`` has all of them."""
    num_blocks: int
    total_data_gb: float
    hot_or_cold: str
    page_cache_dropped: bool
    block_sizes_mb: list[float]
    workloads: list[str]
    repeats: int
    in_flight: int
    seed: int
    data: str
    """What the bytes are: ``kv-float16`` (``bench generate``) or ``random``."""


class SuiteFile(msgspec.Struct, kw_only=True):
    """Everything of one run; see the module's text."""

    job_id: str
    timestamp: str
    environment: Cluster
    test_config: TestConfig
    systems_tested: dict[str, str] = {}
    results: dict[str, dict[str, float | None]] = {}
    """System → median GB/s of each column at ``test_config.block_size_mb``; ``None``: not run."""
    results_by_block_size: dict[str, dict[str, dict[str, float | None]]] = {}
    versions: dict[str, str]
    host: dict[str, Any]
    """Cores, memory and device. Never a name."""
    kernel: str
    file_system: str
    cpu: str
    limits: list[Calibration] = []
    verified_bytes: int = 0
    command: list[str]
    commit: str
    dirty: bool
    systems: dict[str, SystemInfo] = {}
    rows: list[Row] = []
    not_run: list[NotRun] = []
    format: str = FORMAT


Key = tuple[str, str, str, int, str]


def key_of(one: Row | NotRun) -> Key:
    return (one.workload, one.column, one.system, one.block_bytes, one.variant)


def start(environment: Environment, test_config: TestConfig, command: Sequence[str]) -> SuiteFile:
    """A file without rows. ``job_id`` is Slurm's, or a new one."""
    return SuiteFile(
        job_id=os.environ.get("SLURM_JOB_ID") or uuid.uuid4().hex[:12],
        timestamp=now_text(),
        environment=Cluster(),
        test_config=test_config,
        versions={"cascade_aio": environment.version, "python": environment.python, **environment.packages},
        host={"cores": environment.cores, "memory_bytes": environment.memory_bytes, "device": environment.device},
        kernel=environment.kernel,
        file_system=environment.file_system,
        cpu=environment.cpu,
        command=list(command),
        commit=environment.commit,
        dirty=environment.dirty,
    )


def open_or_start(
    path: pathlib.Path, environment: Environment, test_config: TestConfig, command: Sequence[str]
) -> SuiteFile:
    """The file to go on with, or a new one. Raises ``BenchError`` if ``path`` is of another set-up."""
    fresh = start(environment, test_config, command)
    if not path.exists():
        return fresh
    found = load(path)
    names = ("test_config", "versions", "host", "kernel", "file_system", "cpu", "commit", "dirty")
    changed = [
        f"{name}: {getattr(found, name)} → {getattr(fresh, name)}"
        for name in names
        if getattr(found, name) != getattr(fresh, name)
    ]
    if changed:
        raise BenchError(
            f"{path.name} was measured with something else ({'; '.join(changed)}); two set-ups are not mixed: "
            "name another file with --out, or remove this one"
        )
    return found


def load(path: pathlib.Path) -> SuiteFile:
    """Read a result file. Raises ``BenchError`` if it is none of this suite."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=SuiteFile)
    except OSError as error:
        raise BenchError(f"{path.name} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BenchError(f"{path.name} is not a result file of `bench run --systems`: {error}") from error
    if found.format != FORMAT:
        raise BenchError(f"{path.name} has format {found.format}, this suite writes {FORMAT}: measure anew")
    return found


def save(path: pathlib.Path, result: SuiteFile) -> None:
    """Replace ``path`` as a whole, head computed from the rows: a reader and Ctrl-C always meet a valid file."""
    summarise(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    os.replace(temporary, path)


def summarise(result: SuiteFile) -> None:
    """Compute ``results``, ``systems_tested`` and ``verified_bytes`` from the rows."""
    result.verified_bytes = sum(sample.verified_bytes for row in result.rows for sample in row.samples)
    result.systems_tested = {
        name: "; ".join(text for text in (info.version, info.server) if text) for name, info in result.systems.items()
    }
    sizes = sorted({row.block_bytes for row in result.rows if row.workload in ("write", "hot", "cold", "remote")})
    result.results_by_block_size = {f"{size / MIB:g}": _rates(result, size) for size in sizes}
    result.results = result.results_by_block_size.get(f"{result.test_config.block_size_mb:g}", {})


def _rates(result: SuiteFile, block_bytes: int) -> dict[str, dict[str, float | None]]:
    """The issue's ``results`` for one block size. ``write_gbps`` is of durable writes: the others are named as such."""
    found: dict[str, dict[str, float | None]] = {}
    names = {
        "write_durable": "write_gbps",
        "write_volatile": "write_volatile_gbps",
        "hot": "hot_gbps",
        "hot_lease": "hot_lease_gbps",
        "remote": "remote_gbps",
        "cold": "cold_gbps",
        "cold_lease": "cold_lease_gbps",
    }
    for name in result.systems:
        found[name] = dict.fromkeys(names.values())
    for row in result.rows:
        if (
            row.block_bytes == block_bytes
            and row.workload in ("write", "hot", "cold", "remote")
            and row.column in names
        ):
            found.setdefault(row.system, dict.fromkeys(names.values()))[names[row.column]] = row.summary.median
    return found


def make_row(key: Key, samples: Iterable[Sample], *, blocks: int, in_flight: int, clients: int = 1) -> Row:
    """A row with its summary. ``samples`` must not be empty."""
    workload, column, system, block_bytes, variant = key
    ordered = sorted(samples, key=lambda sample: sample.repeat)
    costs = [sample.cpu_s / (sample.bytes / GB) for sample in ordered if sample.bytes]
    return Row(
        workload=workload,
        column=column,
        system=system,
        block_bytes=block_bytes,
        variant=variant,
        blocks=blocks,
        in_flight=in_flight,
        clients=clients,
        unit=COLUMNS[column].unit,
        samples=ordered,
        summary=spread([sample.value for sample in ordered]),
        cpu_s_per_gb=spread(costs) if costs else None,
        peak_bytes=round(median([sample.peak_bytes for sample in ordered])),
    )


def add_sample(result: SuiteFile, key: Key, sample: Sample, *, blocks: int, in_flight: int, clients: int = 1) -> None:
    """Put ``sample`` into its row, replacing one of the same repetition; a ``NotRun`` of the key is forgotten."""
    kept = [row for row in result.rows if key_of(row) != key]
    before = [old for row in result.rows if key_of(row) == key for old in row.samples if old.repeat != sample.repeat]
    result.rows = [*kept, make_row(key, [*before, sample], blocks=blocks, in_flight=in_flight, clients=clients)]
    result.not_run = [old for old in result.not_run if key_of(old) != key]


def put_not_run(result: SuiteFile, missing: NotRun) -> None:
    """Record that a row is not there. A failure voids the samples that the row had."""
    key = key_of(missing)
    if missing.failed:
        result.rows = [row for row in result.rows if key_of(row) != key]
    elif any(key_of(row) == key for row in result.rows):
        return
    result.not_run = [*(old for old in result.not_run if key_of(old) != key), missing]


def has_sample(result: SuiteFile, key: Key, repeat: int) -> bool:
    """Whether ``key`` is done for this repetition (measured, or known not to run)."""
    return any(key_of(old) == key for old in result.not_run) or any(
        sample.repeat == repeat for row in result.rows if key_of(row) == key for sample in row.samples
    )


def system_info(title: str, described: Mapping[str, Any], python: str) -> SystemInfo:
    """From an adapter's description as its process sent it."""
    return msgspec.convert({"title": title, "python": python, **described}, SystemInfo)
