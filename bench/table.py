"""The README table, made from a result file and never by hand.

Pure text in, text out. Every row of the file is a line, also one that misses its target and one
that could not run. Between two marker comments the README belongs to this module.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection

import msgspec

from bench import prefetch_table
from bench.results import BenchError, NotRun, ResultFile, Row
from bench.samples import Spread

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
GROUPS = {
    "prefetch": ("prefetch_",),
    "space": ("compaction_get", "write_amplification", "open_after_crash"),
    "service": ("service", "arena_"),
}
"""Figures with a table of their own where the README has the markers for it, by how their names begin. A result
file ``GROUP-<date>.json`` holds such figures only."""
_HEAD = (
    "| figure | block | measured | limit of the machine | reached (min–max) | target | |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)
_VERDICTS = {"met": "✓", "missed": "✗ missed", "shown": ""}


def render(result: ResultFile) -> str:
    """The table and one line on how it was measured, without the markers."""
    if result.rows and all(group_of(row.figure) == "prefetch" for row in result.rows):
        ahead = prefetch_table.render(
            result.rows,
            result.not_run,
            number=number_text,
            size=size_text,
            verdict=lambda row: _VERDICTS[row.verdict()],
        )
        return "\n".join([*ahead, "", _how(result)])
    lines = [*_HEAD]
    lines += [_row_text(row) for row in result.rows]
    lines += [_not_run_text(row) for row in result.not_run]
    return "\n".join([*lines, "", _how(result)])


def in_step(readme: str, result: ResultFile) -> bool:
    """Whether ``readme`` holds exactly the table of ``result``."""
    return replace(readme, result) == readme


def replace(readme: str, result: ResultFile) -> str:
    """``readme`` with the tables of ``result`` between their markers. Raises ``BenchError`` without them.

    A group that ``result`` has no rows of keeps the table that stands there.
    """
    if BEGIN not in readme:
        raise BenchError(f"README.md has no {BEGIN} … {END}: put the two lines where the table belongs")
    own = [group for group in GROUPS if marker(group) in readme]
    parts = {group: only(result, {group}) for group in own}
    parts["bench"] = only(result, {None, *GROUPS} - set(own))
    for group, part in parts.items():
        if part.rows or part.not_run or (group == "bench" and not own):
            readme = _put(readme, group, render(part))
    return readme


def marker(group: str) -> str:
    """The line of the README behind which a group's table begins."""
    return f"<!-- {group}:begin -->"


def _put(readme: str, group: str, text: str) -> str:
    before, begin, rest = readme.partition(marker(group))
    _, end, after = rest.partition(f"<!-- {group}:end -->")
    if not end:
        raise BenchError(f"README.md has {begin} and no <!-- {group}:end --> behind it")
    return f"{before}{begin}\n{text}\n{end}{after}"


def group_of(figure: str) -> str | None:
    """The group a figure belongs to, ``None`` for those of the engine."""
    return next((group for group, names in GROUPS.items() if figure.startswith(names)), None)


def only(result: ResultFile, groups: Collection[str | None]) -> ResultFile:
    """``result`` with the rows of these groups."""
    return msgspec.structs.replace(
        result,
        rows=[row for row in result.rows if group_of(row.figure) in groups],
        not_run=[row for row in result.not_run if group_of(row.figure) in groups],
    )


def update(readme: pathlib.Path, result: ResultFile, *, check: bool) -> None:
    """Write the table into ``readme``, or with ``check`` raise ``BenchError`` if that would change it."""
    text = readme.read_text(encoding="utf-8")
    if not check:
        readme.write_text(replace(text, result), encoding="utf-8")
    elif not in_step(text, result):
        raise BenchError("README.md is not in step with the newest result file: run `python -m bench table`")


def _row_text(row: Row) -> str:
    summary = row.ratio if row.ratio is not None and row.of_ratio() else row.ours.summary
    unit = "" if row.of_ratio() else f" {row.ours.unit}"
    reached = f"**{number_text(row.achieved())}**{unit} ({_range(summary)})"
    measured = f"{number_text(row.ours.summary.median)} {row.ours.unit}"
    if row.other is not None:
        limit = f"{number_text(row.other.summary.median)} {row.other.unit} ({row.other.name})"
    else:
        limit = ", ".join(f"{extra.name} {number_text(extra.summary.median)} {extra.unit}" for extra in row.extra)
    cells = [row.title, size_text(row.block_bytes), measured, limit, reached, _target(row), _VERDICTS[row.verdict()]]
    return "| " + " | ".join(cells) + " |"


def _not_run_text(row: NotRun) -> str:
    return f"| {row.title} | {size_text(row.block_bytes)} | not run: {row.reason} | | | | |"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    unit = "" if row.target.of == "ratio" else f" {row.ours.unit}"
    worst = ", worst" if row.target.use == "worst" else ""
    return f"{'≥' if row.target.at_least else '≤'} {number_text(row.target.limit)}{unit}{worst}"


def _how(result: ResultFile) -> str:
    where = result.environment
    back_ends = sorted({f"{row.io_backend}" for row in result.rows})
    repeats = sorted({row.repeats for row in result.rows})
    verified = sum(row.verified_bytes for row in result.rows) / 1e9
    dirty = " with uncommitted changes" if where.dirty else ""
    return (
        f"Measured {result.started[:10]}, kernel {where.kernel}, {where.cores} cores ({where.cpu}), "
        f"{where.memory_bytes / (1 << 30):.0f} GiB, {where.file_system} on {where.device}, I/O back end "
        f"{', '.join(back_ends) or 'none'}, cascade_aio {where.version} (commit {where.commit[:12]}{dirty}). "
        f"Medians of {', '.join(map(str, repeats)) or 'no'} interleaved repetitions, ratios within pairs, "
        f"{verified:.0f} GB compared byte by byte; raw samples and every setting are in `bench/results/`."
    )


def number_text(value: float) -> str:
    """About three significant digits, thousands separated, no exponent."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or value == 0 else 4
    return f"{value:,.{digits}f}"


def _range(summary: Spread) -> str:
    return f"{number_text(summary.minimum)}–{number_text(summary.maximum)}"


def size_text(block_bytes: int) -> str:
    if block_bytes == 0:
        return "any"
    for unit, unit_bytes in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if block_bytes >= unit_bytes:
            return f"{block_bytes / unit_bytes:g} {unit}"
    return f"{block_bytes} B"
