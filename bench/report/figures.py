"""Pictures of a comparison with matplotlib (the ``bench`` extra): SVG and PNG, the same bytes for the same results.

Throughput: a picture per block size, a panel per column (so that no two promises or media share an axis), a bar per
system with its range, the limit of the machine as a line. Scaling: a line per system over clients, operations in flight
or ranks. Latency: quantiles of single operations. Systems that did not run are named under the axis, not left out.
"""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from bench.report.parts import LIMIT, MAIN_WORKLOADS, Line, Part, Table, leading_number, tables, title_of
from bench.results import CannotRunError
from bench.suite.results import Row, SuiteFile
from bench.table import size_text

OURS_COLOUR, OTHERS_COLOUR, LIMIT_COLOUR = "#b3311f", "#7a8793", "#222222"
OTHER_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
    "#3b4cc0",
    "#f4a582",
    "#66a61e",
    "#7570b3",
    "#a6761d",
    "#e7298a",
    "#1b9e77",
    "#666666",
    "#377eb8",
)
OUR_STYLES = ("-", "--", ":", "-.")
"""Of lines: all of ours have our colour."""
BAR_INCHES = 0.26
PANEL_INCHES = 4.6
PANEL_LETTERS = 78
"""Width of small print below a panel."""
BARS_MIN = 6
"""So that a panel of few systems has no giant bars."""
PNG_DPI = 100
QUANTILES_MIN = 5
"""Fewer say nothing about a distribution."""
COLUMNS_OF_LATENCY = ("write_volatile", "write_durable", "hot", "cold")


def draw(part: Part, folder: pathlib.Path, stem: str) -> list[tuple[str, pathlib.Path]]:
    """All pictures that the rows of ``part`` allow, as ``folder/stem-….svg`` and ``.png``; title and SVG of each.

    Raises ``CannotRunError`` without matplotlib.
    """
    plot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    found: list[tuple[str, pathlib.Path]] = []
    for name, title, figure in _figures(plot, part.result):
        path = folder / f"{stem}-{name}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        figure.savefig(path.with_suffix(".png"), dpi=PNG_DPI, metadata={"Software": None})
        plot.close(figure)
        found.append((title, path))
    return found


def names(result: SuiteFile) -> list[tuple[str, str]]:
    """Name and title of the pictures that ``draw`` makes, without drawing them."""
    main = tables(result, MAIN_WORKLOADS)
    heads = list(dict.fromkeys(head for table in main for head in table.heads))
    found = [(f"throughput-{_slug(head)}", f"Throughput at {head}, every column an axis of its own") for head in heads]
    found += [(f"scaling-{_slug(name)}", title) for name, title, _ in _scalings(result)]
    if _latencies(result):
        found.append(("latency", "Latency of single operations"))
    return found


def _figures(plot: Any, result: SuiteFile) -> Iterator[tuple[str, str, Any]]:
    main = tables(result, MAIN_WORKLOADS)
    scalings = {f"scaling-{_slug(name)}": shown for name, _, shown in _scalings(result)}
    for name, title in names(result):
        if name.startswith("throughput-"):
            yield name, title, _throughput(plot, main, name.removeprefix("throughput-"))
        elif name in scalings:
            yield name, title, _scaling(plot, result, scalings[name])
        else:
            yield name, title, _latency(plot, result, _latencies(result))


def _throughput(plot: Any, main: Sequence[Table], slug: str) -> Any:
    shown = [(table, at) for table in main for at, head in enumerate(table.heads) if _slug(head) == slug]
    shown = [(table, at) for table, at in shown if any(isinstance(line.cells[at], Row) for line in table.lines)]
    left = [one for one in shown if one[0].column.medium == "memory"]
    right = [one for one in shown if one[0].column.medium != "memory"]
    across = [half for half in (left, right) if half]  # a column of panels for each medium
    down = max(len(half) for half in across)
    bars = [max([BARS_MIN, *(len(_ran(*half[row])) for half in across if row < len(half))]) for row in range(down)]
    size = (PANEL_INCHES * 1.6 * len(across), sum(1.2 + BAR_INCHES * count for count in bars))
    ratios = {"height_ratios": [4 + count for count in bars]}
    figure, panels = plot.subplots(
        down, len(across), figsize=size, squeeze=False, layout="constrained", gridspec_kw=ratios
    )
    for row, line in enumerate(panels):
        for panel, half in zip(line, across, strict=True):
            if row < len(half):
                _bars(panel, *half[row])
            else:
                panel.set_visible(False)
    return figure


def _ran(table: Table, at: int) -> list[Line]:
    """The systems with a bar."""
    return [line for line in table.lines if not line.is_limit and isinstance(line.cells[at], Row)]


def _bars(panel: Any, table: Table, at: int) -> None:
    ran = sorted(_ran(table, at), key=lambda line: _median(line, at))
    for place, line in enumerate(ran):
        cell = line.cells[at]
        assert isinstance(cell, Row)
        median = cell.summary.median
        ends = [[median - cell.summary.minimum], [cell.summary.maximum - median]]
        panel.barh(place, median, xerr=ends, color=_colour(line.system), height=0.72, error_kw={"lw": 0.8})
    with_medium = table.column.medium == "memory"
    panel.set_yticks(range(len(ran)), [f"{line.title} – {line.medium}" if with_medium else line.title for line in ran])
    for line in table.lines:
        if line.is_limit and isinstance(line.cells[at], Row):
            panel.axvline(_median(line, at), color=LIMIT_COLOUR, linestyle="--", linewidth=1.0, label=line.title)
            panel.legend(loc="lower right", fontsize="x-small", frameon=False)
    panel.set_ylim(-0.6, max(len(ran), BARS_MIN) - 0.4)
    panel.set_title(table.column.title, fontsize="medium")
    panel.tick_params(labelsize="x-small")
    panel.set_xlim(left=0)
    missing = [line.title for line in table.lines if not line.is_limit and not isinstance(line.cells[at], Row)]
    absent = "\n" + _wrapped("not run: ", missing, PANEL_LETTERS) if missing else ""
    panel.set_xlabel(f"{table.column.unit}, median and range{absent}", fontsize="xx-small")


def _scalings(result: SuiteFile) -> list[tuple[str, str, list[Table]]]:
    """Workloads whose variants are numbers of something: name, title, tables."""
    found: dict[str, list[Table]] = {}
    for table in tables(result):
        counted = [leading_number(head) for head in table.heads]
        if table.what and len(counted) > 1 and all(count is not None for count in counted):
            found.setdefault(table.workload, []).append(table)
    return [(name, f"Scaling: {name}", shown) for name, shown in found.items()]


def _scaling(plot: Any, result: SuiteFile, shown: Sequence[Table]) -> Any:
    figure, panels = _grid(plot, len(shown), 2)
    for panel, table in zip(panels, shown, strict=False):
        counts = [leading_number(head) or 0 for head in table.heads]
        for line in table.lines:
            points = [(count, _median(line, at)) for at, count in enumerate(counts) if isinstance(line.cells[at], Row)]
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, marker="o", markersize=3, label=line.title, **_style(result, line.system))
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_ylim(bottom=0)
        panel.set_title(f"{table.column.title}, {table.what}", fontsize="small")
        panel.set_xlabel(table.heads[0].partition(" ")[2], fontsize="x-small")
        panel.set_ylabel(table.column.unit, fontsize="x-small")
        panel.tick_params(labelsize="x-small")
    _legend(figure, panels)
    return figure


def _grid(plot: Any, count: int, across: int) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels, at most ``across`` in a row."""
    across = min(across, count)
    down = -(-count // across)
    size = (PANEL_INCHES * 1.1 * across, PANEL_INCHES * 0.8 * down + 0.8)
    figure, panels = plot.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for panel in list(panels.flat)[count:]:
        panel.set_visible(False)
    return figure, list(panels.flat)[:count]


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    """One legend for all panels: a system looks the same in each."""
    found: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in found}
    ordered = sorted(found)
    figure.legend(
        [found[label] for label in ordered],
        ordered,
        loc="outside lower center",
        ncols=3,
        fontsize="x-small",
        frameon=False,
    )


def _style(result: SuiteFile, system: str) -> dict[str, Any]:
    """The look of a system's line, the same in every panel."""
    if system.startswith(LIMIT):
        return {"color": LIMIT_COLOUR, "linestyle": "--", "linewidth": 1.0}
    ours = [name for name in result.systems if name.startswith("cascade")]
    if system in ours:
        return {"color": OURS_COLOUR, "linestyle": OUR_STYLES[ours.index(system) % len(OUR_STYLES)], "linewidth": 2.0}
    others = [name for name in result.systems if name not in ours and not name.startswith(LIMIT)]
    place = others.index(system) if system in others else len(others)
    return {"color": OTHER_COLOURS[place % len(OTHER_COLOURS)], "linewidth": 1.1}


def _latencies(result: SuiteFile) -> list[tuple[str, int]]:
    """Columns and block sizes at which at least one system timed single operations."""
    found = {
        (row.column, row.block_bytes)
        for row in result.rows
        if row.workload in MAIN_WORKLOADS and row.column in COLUMNS_OF_LATENCY and _quantiles(row)
    }
    return sorted(found, key=lambda one: (COLUMNS_OF_LATENCY.index(one[0]), one[1]))


def _latency(plot: Any, result: SuiteFile, shown: Sequence[tuple[str, int]]) -> Any:
    figure, panels = _grid(plot, len(shown), 3)
    silent: dict[str, None] = {}
    for panel, (column, block_bytes) in zip(panels, shown, strict=True):
        for row in result.rows:
            if (row.column, row.block_bytes) == (column, block_bytes) and row.workload in MAIN_WORKLOADS:
                if points := _quantiles(row):
                    shares, ms = zip(*points, strict=True)
                    panel.plot(ms, shares, label=title_of(result, row.system), **_style(result, row.system))
                else:
                    silent[title_of(result, row.system)] = None
        panel.set_xscale("log")
        panel.set_title(f"{column.replace('_', ' ')}, {size_text(block_bytes)}", fontsize="small")
        panel.set_xlabel("milliseconds", fontsize="x-small")
        panel.set_ylabel("share of operations", fontsize="x-small")
        panel.tick_params(which="both", labelsize="xx-small")
    if silent:
        width = PANEL_LETTERS * min(3, len(shown))
        figure.suptitle(_wrapped("Driven in batches, not timed one by one: ", list(silent), width), fontsize="x-small")
    _legend(figure, panels)
    return figure


def _quantiles(row: Row) -> list[tuple[float, float]]:
    """(share, milliseconds): the median over the repetitions of each quantile; empty if there are too few."""
    shares = sorted({float(share) for sample in row.samples for share in sample.latency_ms})
    if len(shares) < QUANTILES_MIN:
        return []
    found: list[tuple[float, float]] = []
    for share in shares:
        values = sorted(sample.latency_ms[f"{share:g}"] for sample in row.samples if f"{share:g}" in sample.latency_ms)
        found.append((share, values[len(values) // 2]))
    return found


def _median(line: Line, at: int) -> float:
    cell = line.cells[at]
    assert isinstance(cell, Row)
    return cell.summary.median


def _colour(system: str) -> str:
    return OURS_COLOUR if system.startswith("cascade") else OTHERS_COLOUR


def _wrapped(before: str, titles: Sequence[str], width: int) -> str:
    return "\n".join(textwrap.wrap(before + ", ".join(titles), width))


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower()).strip("-")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise CannotRunError("figures need matplotlib: pip install 'cascade_aio[bench]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cascade"  # else identifiers in the file are random
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a fifth of the bytes, and it can be searched
    from matplotlib import pyplot

    return pyplot
