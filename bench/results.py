"""The result file: one JSON document per run, every raw sample in it, rewritten whole after each figure.

A ``ResultFile`` is an environment (what ran where), the calibrations of the raw limits, and rows.
A row is one line of the README table: the samples of our side and, for pairs, of the other, in the
order in which they were taken. Invariants: summaries are computed from the samples when a row is
made and never by hand; all rows of a file were measured in the *same* environment, so a file made
by another commit or on another kernel is refused and not mixed; no host name and no absolute path is
written. Must not know how anything is measured.
"""

from __future__ import annotations

import datetime
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from bench.samples import Spread, paired_ratios, spread

FORMAT = 1
"""Raised when the meaning of a field changes; files of another format are refused."""
RESULT_GLOB = "engine-*.json"

Scalar = str | int | float | bool | None


class BenchError(Exception):
    """The suite cannot go on as asked; the message says what to do."""


class CannotRunError(BenchError):
    """This machine lacks what a figure needs; the figure is reported as not run, with this reason."""


class Environment(msgspec.Struct, frozen=True):
    """What ran where. Two rows may stand in one file only if all of this agrees."""

    version: str
    commit: str
    dirty: bool
    """Tracked files differed from the commit (results and README aside)."""
    python: str
    packages: dict[str, str]
    kernel: str
    cpu: str
    cores: int
    memory_bytes: int
    file_system: str
    device: str
    """Kind of block device below the file system, such as "virtio disk" or "nvme"."""


class Calibration(msgspec.Struct, frozen=True):
    """One cell of a calibration table: a setting of a raw limit and the rate it reached, best first pass."""

    limit: str
    setting: dict[str, Scalar]
    gb_per_s: list[float]
    chosen: bool = False
    note: str = ""


class Series(msgspec.Struct, frozen=True):
    """One side of a figure: a sample per repetition, in order, and their summary."""

    name: str
    unit: str
    samples: list[float]
    summary: Spread
    cpu_s: list[float] = []
    """CPU seconds (user + system) of this process per repetition, where it was taken."""


class Target(msgspec.Struct, frozen=True):
    """What the figure should show: ``of`` the ratio of the pair or the value of our own series."""

    of: Literal["ratio", "value"]
    limit: float
    at_least: bool
    use: Literal["median", "worst"] = "median"
    """Which statistic is held against the limit: the median, or the worst of all repetitions."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measured line. ``figure``, ``block_bytes`` and ``variant`` together are its key."""

    figure: str
    title: str
    block_bytes: int
    variant: str = ""
    date: str
    system: str
    """What the row says something about; peers get their own rows."""
    temperature: Literal["hot", "cold", "durable", "none"]
    checked: str
    """How the temperature was made sure of, and how and when bytes were compared."""
    verified_bytes: int
    io_backend: str
    io_backend_reason: str
    configuration: dict[str, Scalar]
    seed: int
    repeats: int
    order: list[str]
    """Sides in the order in which they ran, one string such as "cascade,raw" per repetition."""
    ours: Series
    other: Series | None = None
    extra: list[Series] = []
    ratios: list[float] = []
    ratio: Spread | None = None
    target: Target | None = None
    notes: str = ""

    def of_ratio(self) -> bool:
        """Whether the row speaks about the ratio of its pair (as it does without a target) or about our value."""
        return self.target.of == "ratio" if self.target else self.ratio is not None

    def achieved(self) -> float:
        """The number that is held against the target."""
        summary = self.ratio if self.of_ratio() else self.ours.summary
        assert summary is not None, f"{self.figure} has a target for a ratio and no pair"
        if self.target is None or self.target.use == "median":
            return summary.median
        return summary.minimum if self.target.at_least else summary.maximum

    def verdict(self) -> Literal["met", "missed", "shown"]:
        """Whether the target was met; ``shown`` if there is none."""
        if self.target is None:
            return "shown"
        reached, limit = self.achieved(), self.target.limit
        return "met" if (reached >= limit if self.target.at_least else reached <= limit) else "missed"


class NotRun(msgspec.Struct, frozen=True):
    """A figure that could not be measured here, and why; printed like any other line."""

    figure: str
    title: str
    block_bytes: int
    variant: str
    date: str
    reason: str


class ResultFile(msgspec.Struct):
    """Everything of one run; see the module's text."""

    environment: Environment
    started: str
    command: list[str]
    rows: list[Row] = []
    not_run: list[NotRun] = []
    calibrations: list[Calibration] = []
    format: int = FORMAT


def row_key(row: Row | NotRun) -> tuple[str, int, str]:
    return (row.figure, row.block_bytes, row.variant)


def make_series(name: str, unit: str, samples: Sequence[float], cpu_s: Sequence[float] = ()) -> Series:
    return Series(name=name, unit=unit, samples=list(samples), summary=spread(samples), cpu_s=list(cpu_s))


def pair_summary(ours: Series, other: Series) -> tuple[list[float], Spread]:
    """Ratios within each pair and their summary. The two sides must have the same unit."""
    if ours.unit != other.unit:
        raise ValueError(f"a ratio of {ours.unit} and {other.unit} means nothing")
    ratios = paired_ratios(ours.samples, other.samples)
    return ratios, spread(ratios)


def now_text() -> str:
    """Now, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def load(path: pathlib.Path) -> ResultFile:
    """Read a result file. Raises ``BenchError`` if it is none, or of another format."""
    try:
        raw = msgspec.json.decode(path.read_bytes())
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise BenchError(
                f"{path.name} has result format {found}, this command writes {FORMAT}: measure anew, into another file"
            )
        return msgspec.convert(raw, ResultFile)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BenchError(f"{path.name} is not a result file of this suite: {error}") from error


def save(path: pathlib.Path, result: ResultFile) -> None:
    """Replace ``path`` as a whole, so that a reader (and Ctrl-C) always meets a valid file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    os.replace(temporary, path)


def open_or_start(path: pathlib.Path, environment: Environment, command: Sequence[str]) -> ResultFile:
    """The file to go on with, or a new one.

    Raises ``BenchError`` if ``path`` was measured in another environment: its rows could not stand
    beside ours.
    """
    if not path.exists():
        return ResultFile(environment=environment, started=now_text(), command=list(command))
    found = load(path)
    if found.environment != environment:
        before, after = msgspec.to_builtins(found.environment), msgspec.to_builtins(environment)
        changed = "; ".join(f"{name}: {before[name]} → {after[name]}" for name in after if before[name] != after[name])
        raise BenchError(
            f"{path.name} was measured in another environment ({changed}); rows of two environments are not mixed: "
            "name another file with --out, or remove this one"
        )
    return found


def put_row(result: ResultFile, row: Row | NotRun) -> None:
    """Add ``row``, replacing what the file had under its key."""
    result.rows = [old for old in result.rows if row_key(old) != row_key(row)]
    result.not_run = [old for old in result.not_run if row_key(old) != row_key(row)]
    if isinstance(row, Row):
        result.rows.append(row)
    else:
        result.not_run.append(row)


def _started(path: pathlib.Path) -> str:
    return load(path).started


def newest(
    folder: pathlib.Path, pattern: str = RESULT_GLOB, when: Callable[[pathlib.Path], str] = _started
) -> pathlib.Path:
    """The result file started last; ``when`` tells of files of another kind. Raises ``BenchError`` if there is none."""
    files = sorted(folder.glob(pattern), key=when)
    if not files:
        raise BenchError(f"no {pattern} in {folder.name}/: nothing of that kind was measured yet: python -m bench run")
    return files[-1]


__all__ = [
    "BenchError",
    "Calibration",
    "CannotRunError",
    "Environment",
    "NotRun",
    "ResultFile",
    "Row",
    "Series",
    "Target",
    "load",
    "make_series",
    "newest",
    "now_text",
    "open_or_start",
    "pair_summary",
    "put_row",
    "row_key",
    "save",
]
