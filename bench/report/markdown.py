"""A report as Markdown: how it was measured, what it had to show, every table with every line, every system. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.claims import Verdict, verdicts
from bench.report.parts import MAIN_WORKLOADS, Line, Part, Table, tables
from bench.samples import median
from bench.suite.results import NotRun, Row, SuiteFile, SystemInfo
from bench.table import number_text, size_text

Figures = Sequence[tuple[str, str]]
"""Title and relative path of each picture."""
_MIB = 1 << 20


def render(parts: Sequence[Part], figures: Sequence[Figures]) -> str:
    """The whole report: a chapter for each part, with its figures."""
    lines = ["# Comparison with other systems", ""]
    for part, pictures in zip(parts, figures, strict=True):
        lines += [f"## {', '.join(f'`{name}`' for name in part.names)}", "", how(part.result), ""]
        lines += ["### What it has to show", "", *claim_lines(verdicts(part.result)), ""]
        for title, path in pictures:
            lines += [f"![{title}]({path})", ""]
        for table in tables(part.result):
            lines += [f"### {_capital(table.title)}", "", *table_lines(table), ""]
        lines += ["### Systems", "", *_system_lines(part.result), ""]
    return "\n".join(lines).rstrip() + "\n"


def how(result: SuiteFile) -> str:
    """One paragraph: where, when, how often, how fairly."""
    config, cluster = result.test_config, result.environment
    repeats = sorted({len(row.samples) for row in result.rows})
    dirty = " with uncommitted changes" if result.dirty else ""
    cold = (
        "cold means synced, dropped from the page cache, checked with mincore and by the kernel's counts"
        if config.page_cache_dropped
        else "the page cache was not dropped"
    )
    quick = "**A quick run: its numbers mean nothing.** " if config.data == "random" else ""
    return (
        f"{quick}Measured {result.timestamp[:10]} (job {result.job_id}), kernel {result.kernel}, "
        f"{result.host['cores']} cores ({result.cpu}), {result.host['memory_bytes'] / (1 << 30):.0f} GiB, "
        f"{result.file_system} on {result.host['device']}, {_count(cluster.nodes, 'node')}, "
        f"{_count(cluster.total_ranks, 'rank')}; cascade_aio {result.versions.get('cascade_aio', '?')} "
        f"(commit {result.commit[:12]}{dirty}). Data: {config.data}, seed "
        f"{config.seed}, {config.in_flight} in flight. Medians (with range) of {_range_text(repeats)} repetitions, "
        f"systems in random order; {result.verified_bytes / 1e9:.0f} GB compared byte by byte; {cold}. "
        "A miss or a wrong byte voids a row. CPU seconds are of clients and servers together."
    )


def claim_lines(found: Sequence[Verdict]) -> list[str]:
    """The claims as a table, in their order: block sizes across, in each cell the ratio and who was the best. Nothing
    where no claim concerns what was measured."""
    if not found:
        return []
    sizes = sorted({verdict.block_bytes for verdict in found})
    lines = [
        "| cascade's | against | target | " + " | ".join(size_text(size) for size in sizes) + " |",
        "| --- | --- | --- |" + " --- |" * len(sizes),
    ]
    cells = {(verdict.claim, verdict.block_bytes): _claim_cell(verdict) for verdict in found}
    for claim in dict.fromkeys(verdict.claim for verdict in found):
        what = {"write_durable": "durable write", "write_volatile": "readable write"}.get(
            claim.column, f"{claim.column} read"
        )
        unit = "GB per CPU second" if claim.of == "cpu" else "GB/s"
        row = [f"{what}, {unit}", claim.than, f"≥ {claim.factor:g} ×"]
        row += [cells.get((claim, size), "") for size in sizes]
        lines.append("| " + " | ".join(_safe(cell) for cell in row) + " |")
    return [*lines, "", "Ratios within repetitions: median (minimum–maximum), our value : theirs."]


def _claim_cell(verdict: Verdict) -> str:
    if verdict.ratio is None or verdict.ours is None or verdict.theirs is None:
        return verdict.reason
    ratio, mark = verdict.ratio, "✓" if verdict.met else "✗ lost"
    spread = f"**{number_text(ratio.median)}** ({number_text(ratio.minimum)}–{number_text(ratio.maximum)}) {mark}"
    return f"{spread}; {number_text(verdict.ours)} : {number_text(verdict.theirs)} {verdict.other}"


def table_lines(table: Table, *, brief: bool = False) -> list[str]:
    """A table; ``brief``: medians only, and what was not run in one line below."""
    with_medium = table.column.medium == "memory"
    head = ["system", *(["memory"] if with_medium else []), *table.heads]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * with_medium + " ---: |" * len(table.heads)]
    for line in table.lines:
        if brief and not line.ran():
            continue
        front = [line.title, *([line.medium] if with_medium else [])]
        lines.append("| " + " | ".join(_safe(cell) for cell in [*front, *_cells(table, line, brief)]) + " |")
    unit = f"{table.column.unit}, {table.column.better} is better"
    cost = "" if brief else "; behind it CPU seconds per GB and peak MiB"
    absent = _absent(table) if brief else ""
    return [*lines, "", f"{_capital(unit)}{cost}; the best system of each column in bold.{absent}"]


def _absent(table: Table) -> str:
    """Systems that did not run, by reason."""
    by_reason: dict[str, list[str]] = {}
    for line in table.lines:
        if not line.ran():
            by_reason.setdefault(line.reason(), []).append(line.title)
    told = "; ".join(f"{', '.join(titles)} ({reason})" for reason, titles in by_reason.items())
    return f" Not run: {_safe(told)}." if told else ""


def _cells(table: Table, line: Line, brief: bool) -> list[str]:
    if not line.ran():
        return [f"not run: {line.reason()}", *([""] * (len(table.heads) - 1))]
    most = [
        max((cell.blocks for other in table.lines if isinstance(cell := other.cells[at], Row)), default=0)
        for at in range(len(table.heads))
    ]
    return [_cell(cell, table.best(at), most[at], brief, line.is_limit) for at, cell in enumerate(line.cells)]


def _cell(cell: Row | NotRun | None, best: float | None, most_blocks: int, brief: bool, is_limit: bool) -> str:
    if cell is None:
        return ""
    if isinstance(cell, NotRun):
        return f"{'failed' if cell.failed else 'not run'}: {cell.reason}"
    summary = cell.summary
    shown = number_text(summary.median)
    text = f"**{shown}**" if not is_limit and summary.median == best else shown
    if not brief:
        text += f" ({number_text(summary.minimum)}–{number_text(summary.maximum)})"
        if cell.cpu_s_per_gb is not None:
            text += f"; {number_text(cell.cpu_s_per_gb.median)}; {cell.peak_bytes / _MIB:.0f}"
        for name in dict.fromkeys(name for sample in cell.samples for name in sample.extra):
            value = median([sample.extra[name] for sample in cell.samples if name in sample.extra])
            text += f"; {name.replace('_', ' ')} {number_text(value)}"
    return text if cell.blocks == most_blocks else f"{text}, {cell.blocks} blocks"


def _system_lines(result: SuiteFile) -> list[str]:
    lines = ["| system | version | module | durable means | set how | not |", "| --- | --- | --- | --- | --- | --- |"]
    for name, info in result.systems.items():
        version = "; server ".join(text for text in (info.version, info.server) if text)
        cells = [f"{info.title} (`{name}`)", version, f"`{info.module}`", info.durability, info.tuning, _lacks(info)]
        lines.append("| " + " | ".join(_safe(cell) for cell in cells) + " |")
    return lines


def _lacks(info: SystemInfo) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in info.lacks.items())


def brief_lines(part: Part) -> list[str]:
    """The claims and the main tables with medians only, for the README."""
    lines = [*claim_lines(verdicts(part.result)), ""]
    for table in tables(part.result, MAIN_WORKLOADS):
        lines += [f"**{_capital(table.title)}**", "", *table_lines(table, brief=True), ""]
    return [*lines, how(part.result)]


def _safe(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _range_text(counts: Sequence[int]) -> str:
    if not counts:
        return "no"
    return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
