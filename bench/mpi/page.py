# ruff: noqa: E501 (paragraphs of Markdown with numbers in them)
"""The page ``docs/remote-measured.md``: the newest result of ``bench mpi run``, every number from its file."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from bench.mpi.running import MIB, Figure, RemoteFile
from bench.results import BenchError
from bench.samples import Spread, spread
from bench.suite.results import COLUMNS


def update(page: pathlib.Path, file: RemoteFile, name: str, *, check: bool) -> None:
    """Write the page, or with ``check`` raise ``BenchError`` if it differs."""
    text = render(file, name)
    if check:
        if not page.exists() or page.read_text() != text:
            raise BenchError(f"{page.name} is not that of {name}: run `python -m bench mpi page`")
        return
    page.write_text(text)


def render(file: RemoteFile, name: str) -> str:
    """The whole page."""
    where = file.environment
    return f"""# The remote tier, measured

From [`{name}`](../bench/results/{name}) (`{" ".join(file.command)}`, commit {file.commit[:12]}): {where.total_ranks} ranks on
{where.nodes} machine{"s" * (where.nodes > 1)}, {file.library}, {file.cpu}, {file.host["cores"]} cores, Linux {file.kernel}. Every byte was
compared: {file.verified_bytes / 1e9:.1f} GB. {_caveat(file)}

| figure | value | target | |
| --- | ---: | ---: | --- |
{_lines(_figure(figure) for figure in file.figures)}

Pairs in detail, GB/s, median (smallest to largest):

| block | at once | verified get | raw `Rget` | ratio |
| ---: | ---: | ---: | ---: | ---: |
{_lines(_pair(figure) for figure in file.figures if "raw_gb_per_s" in figure.details)}

All ranks at once, total bytes over the slowest rank's wall clock:

| block | what | GB/s, median (smallest to largest) | CPU s per GB |
| ---: | --- | ---: | ---: |
{_lines(_row(file, number) for number in range(len(file.rows)))}
"""


def _caveat(file: RemoteFile) -> str:
    if file.environment.nodes > 1:
        return ""
    return (
        "All ranks share this machine: raw `Rget` is a copy in memory, and readers, holders and their MPI threads share "
        "its cores. That is the protocol's overhead, not a network."
    )


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _figure(figure: Figure) -> str:
    target = "" if figure.target is None else f"{'≥' if figure.at_least else '≤'} {figure.target:g}"
    return f"| {figure.title} | {figure.value:.3g} {_unit(figure)} | {target} | {figure.verdict} |"


def _unit(figure: Figure) -> str:
    return figure.unit if figure.unit == "ms" else ""


def _pair(figure: Figure) -> str:
    ours, raw = (spread(figure.details[side]) for side in ("get_gb_per_s", "raw_gb_per_s"))
    assert figure.ratios is not None
    return (
        f"| {figure.details['block_bytes'] / MIB:g} MiB | {figure.details['at_once']} | {_range(ours)} | {_range(raw)} | "
        f"{_range(figure.ratios)} |"
    )


def _range(found: Spread) -> str:
    return f"{found.median:.2f} ({found.minimum:.2f} to {found.maximum:.2f})"


def _row(file: RemoteFile, number: int) -> str:
    row = file.rows[number]
    cpu = "" if row.cpu_s_per_gb is None else f"{row.cpu_s_per_gb.median:.2f}"
    return f"| {row.block_bytes / MIB:g} MiB | {COLUMNS[row.column].title} | {_range(row.summary)} | {cpu} |"
