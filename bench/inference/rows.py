"""The result file of ``bench.inference``: who answered how fast, every sample; and its table in the README.

Invariants: summaries are computed from samples here and nowhere written by hand; what did not run is a row with
its reason. Knows nothing of how anything is measured.
"""

from __future__ import annotations

import pathlib
import statistics

import msgspec

from bench.results import BenchError, Environment

FORMAT = 1
BEGIN, END = "<!-- inference:begin -->", "<!-- inference:end -->"


class Way(msgspec.Struct, frozen=True):
    """One way to a first token, or of storing and loading: samples in the order in which they were taken."""

    name: str
    unit: str
    samples: list[float] = []
    share_served: float | None = None
    """Smallest share of a prompt's tokens that was loaded; ``None`` where nothing is."""
    same_tokens: bool | None = None
    """Whether all answers were those of the recomputation."""
    not_run: str | None = None
    """Why there are no samples."""


class Part(msgspec.Struct):
    """One table: what was measured how, and the ways, the reference first."""

    title: str
    how: str
    better: str
    """``lower`` or ``higher``."""
    ways: list[Way]


class Result(msgspec.Struct):
    format: int
    made: str
    command: str
    environment: Environment
    versions: dict[str, str]
    parts: list[Part]


def save(path: pathlib.Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def load(path: pathlib.Path) -> Result:
    """Raises ``BenchError`` for a file of another format."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=Result)
    except msgspec.ValidationError as error:
        raise BenchError(f"{path} is no result file of bench.inference ({error}); measure again") from error
    if result.format != FORMAT:
        raise BenchError(f"{path} has format {result.format}, this is format {FORMAT}; measure again")
    return result


def render(result: Result) -> str:
    """The tables as Markdown."""
    lines: list[str] = []
    for part in result.parts:
        lines += [part.how, "", f"| {part.title} | median (min–max) | against the first | served | same tokens |"]
        lines += ["| --- | --- | --- | --- | --- |", *(_line(way, part) for way in part.ways), ""]
    where = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    note = f"{where.cpu}, {where.cores} cores, kernel {where.kernel}, {where.file_system} on {where.device}; {versions}"
    changed = " with changes" if where.dirty else ""
    return "\n".join([*lines, f"{note}; commit {where.commit[:12]}{changed}. `{result.command}`"])


def _line(way: Way, part: Part) -> str:
    if way.not_run is not None:
        return f"| {way.name} | not run: {way.not_run} | | | |"
    median = statistics.median(way.samples)
    spread = f"{median:.3g} {way.unit} ({min(way.samples):.3g}–{max(way.samples):.3g}, n = {len(way.samples)})"
    served = "" if way.share_served is None else f"{way.share_served:.0%}"
    same = "" if way.same_tokens is None else ("yes" if way.same_tokens else "**NO**")
    return f"| {way.name} | {spread} | {_against(median, part)} | {served} | {same} |"


def _against(median: float, part: Part) -> str:
    reference = part.ways[0]
    if reference.not_run is not None:
        return ""
    first = statistics.median(reference.samples)
    return f"{first / median if part.better == 'lower' else median / first:.2f} ×"


def replace(readme: str, result: Result) -> str:
    """``readme`` with the tables between the markers. Raises ``BenchError`` where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"README.md has no {BEGIN} … {END} for the tables of bench.inference")
    return f"{before}{BEGIN}\n{render(result)}\n{END}{after}"
