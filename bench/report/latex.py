"""The main tables as LaTeX (``booktabs``), one float per column: medians and ranges, nothing left out. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.parts import Line, Part, Table, tables
from bench.suite.results import NotRun, Row
from bench.table import number_text

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "µ": r"$\mu$",
}


def render(parts: Sequence[Part]) -> str:
    """All tables of all parts. To be read with ``\\input``; needs the package ``booktabs``."""
    lines = ["% Made by `python -m bench report`; needs \\usepackage{booktabs}."]
    for number, part in enumerate(parts):
        for table in tables(part.result):
            lines += ["", *_float(table, f"{number}-" if number else "")]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def _float(table: Table, prefix: str) -> list[str]:
    label = f"{prefix}{table.workload}-{table.name}-{table.what}".rstrip("-").replace(" ", "").replace("_", "-").lower()
    caption = f"{table.title} ({table.column.unit}, {table.column.better} is better; median, minimum--maximum)"
    heads = " & ".join(escape(head) for head in table.heads)
    return [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption.replace('--', '–'))}}}",
        rf"\label{{tab:bench-{label}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.heads)}}}",
        r"\toprule",
        rf"System & {heads} \\",
        r"\midrule",
        *_lines(table),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def _lines(table: Table) -> list[str]:
    lines: list[str] = []
    for at, line in enumerate(table.lines):
        if at and table.lines[at - 1].is_limit and not line.is_limit:
            lines.append(r"\midrule")
        title = f"{line.title} ({line.medium})" if table.column.medium == "memory" and line.medium else line.title
        lines.append(rf"{escape(title)} & {_cells(table, line)} \\")
    return lines


def _cells(table: Table, line: Line) -> str:
    if not line.ran():
        return rf"\multicolumn{{{len(table.heads)}}}{{l}}{{\footnotesize not run: {escape(line.reason())}}}"
    return " & ".join(_cell(cell, table.best(at), line.is_limit) for at, cell in enumerate(line.cells))


def _cell(cell: Row | NotRun | None, best: float | None, is_limit: bool) -> str:
    if cell is None:
        return ""
    if isinstance(cell, NotRun):
        return r"\footnotesize failed" if cell.failed else r"\footnotesize not run"
    median = number_text(cell.summary.median)
    shown = rf"\textbf{{{median}}}" if not is_limit and cell.summary.median == best else median
    return rf"{shown} {{\footnotesize ({number_text(cell.summary.minimum)}--{number_text(cell.summary.maximum)})}}"
