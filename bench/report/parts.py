"""From result files to tables: files of one set-up lie together, a table is one column of one workload.

A table never holds two columns, so durable writes never stand beside volatile ones, nor memory beside disk; where what
a "hot" read reads differs between systems, each line says its medium. Lines: the machine's limits first, then the
systems by their median at the last head, then those that did not run. Pure.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import msgspec

from bench.peers.catalog import entries
from bench.results import BenchError
from bench.suite.results import COLUMNS, Column, NotRun, Row, SuiteFile, key_of, load
from bench.table import size_text

LIMIT = "limit-"
"""How the names of the systems begin that are no systems but what the machine can do at best."""
MAIN_WORKLOADS = ("write", "hot", "cold")
_SET_UP = ("environment", "commit", "dirty", "versions", "host", "kernel", "file_system", "cpu")
_SET_UP_CONFIG = ("in_flight", "seed", "data", "page_cache_dropped")


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What was measured in one set-up: the names of its files, and one file with all their rows."""

    names: tuple[str, ...]
    result: SuiteFile


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One system in a table: a cell per head, ``None`` where nothing was asked for."""

    system: str
    title: str
    medium: str
    cells: tuple[Row | NotRun | None, ...]

    @property
    def is_limit(self) -> bool:
        return self.system.startswith(LIMIT)

    def ran(self) -> bool:
        return any(isinstance(cell, Row) for cell in self.cells)

    def reason(self) -> str:
        """Why it did not run at all; the first reason, if there are several."""
        missing = [cell for cell in self.cells if isinstance(cell, NotRun)]
        return missing[0].reason if missing else "not asked for"


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """One column of one workload."""

    workload: str
    name: str
    column: Column
    what: str
    """What all heads have in common, such as ``16 MiB``; empty if the heads are the block sizes."""
    heads: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        title = self.column.title
        named = title if title.startswith(self.workload) else f"{self.workload}: {title}"
        return f"{named}, {self.what}" if self.what else named

    def best(self, position: int) -> float | None:
        """The best median of a system (not of a limit) under head ``position``."""
        found = [
            cell.summary.median
            for line in self.lines
            if not line.is_limit and isinstance(cell := line.cells[position], Row)
        ]
        if not found:
            return None
        return max(found) if self.column.better == "higher" else min(found)


def load_parts(paths: Sequence[pathlib.Path]) -> list[Part]:
    """The files by set-up, in the order in which they are named.

    Raises ``BenchError`` for a file that is none, and if two files of one set-up have the same row.
    """
    found: list[Part] = []
    for path in paths:
        one = load(path)
        for number, part in enumerate(found):
            if set_up(part.result) == set_up(one):
                found[number] = Part((*part.names, path.name), _merged(part, one, path.name))
                break
        else:
            found.append(Part((path.name,), one))
    return found


def set_up(result: SuiteFile) -> tuple[object, ...]:
    """What must agree for rows to be compared."""
    config = result.test_config
    return (*(getattr(result, name) for name in _SET_UP), *(getattr(config, name) for name in _SET_UP_CONFIG))


def _merged(part: Part, one: SuiteFile, name: str) -> SuiteFile:
    rows = {key_of(row): row for row in part.result.rows}
    for row in one.rows:
        if key_of(row) in rows:
            raise BenchError(f"{name} and {', '.join(part.names)} both have {'/'.join(map(str, key_of(row)))}")
    rows |= {key_of(row): row for row in one.rows}
    missing = {key_of(old): old for old in (*part.result.not_run, *one.not_run) if key_of(old) not in rows}
    return msgspec.structs.replace(
        part.result,
        rows=list(rows.values()),
        not_run=list(missing.values()),
        systems={**one.systems, **part.result.systems},
        verified_bytes=part.result.verified_bytes + one.verified_bytes,
    )


def tables(result: SuiteFile, workloads: Sequence[str] | None = None) -> list[Table]:
    """All tables, or those of some workloads: workloads in the file's order, columns in that of ``COLUMNS``."""
    everything: list[Row | NotRun] = [*result.rows, *result.not_run]
    asked = list(dict.fromkeys(one.workload for one in everything))
    # The three that share one opening are always told in this order.
    asked.sort(key=lambda name: MAIN_WORKLOADS.index(name) if name in MAIN_WORKLOADS else len(MAIN_WORKLOADS))
    found: list[Table] = []
    for workload in asked:
        if workloads is None or workload in workloads:
            for name in COLUMNS:
                here = [one for one in everything if (one.workload, one.column) == (workload, name)]
                found += _tables(result, workload, name, here)
    return found


def _tables(result: SuiteFile, workload: str, name: str, here: Sequence[Row | NotRun]) -> list[Table]:
    """Block sizes across; a workload with variants has a table for each size, its variants across."""
    if not any(isinstance(one, Row) for one in here):
        return []
    sizes = sorted({one.block_bytes for one in here})
    variants = list(dict.fromkeys(one.variant for one in here))
    if variants == [""]:
        heads = [(size, "") for size in sizes]
        return [_table(result, workload, name, here, heads, "", [size_text(size) for size in sizes])]
    variants.sort(key=lambda variant: (leading_number(variant) is None, leading_number(variant) or 0, variant))
    return [
        _table(result, workload, name, here, [(size, variant) for variant in variants], size_text(size), variants)
        for size in sizes
    ]


def _table(
    result: SuiteFile,
    workload: str,
    name: str,
    here: Sequence[Row | NotRun],
    heads: Sequence[tuple[int, str]],
    what: str,
    texts: Sequence[str],
) -> Table:
    cells = {(one.system, one.block_bytes, one.variant): one for one in here}
    lines = [
        Line(
            system,
            title_of(result, system),
            result.systems[system].medium if system in result.systems else "",
            tuple(cells.get((system, size, variant)) for size, variant in heads),
        )
        for system in dict.fromkeys(one.system for one in here)
    ]
    higher = COLUMNS[name].better == "higher"

    def place(line: Line) -> tuple[bool, bool, float]:
        medians = [cell.summary.median for cell in line.cells if isinstance(cell, Row)]
        return (not line.is_limit, not medians, (-medians[-1] if higher else medians[-1]) if medians else 0.0)

    # A limit of the other medium is no system that failed to run.
    told = sorted((line for line in lines if line.ran() or not line.is_limit), key=place)
    return Table(workload, name, COLUMNS[name], what, tuple(texts), tuple(told))


def title_of(result: SuiteFile, system: str) -> str:
    """What tables print for a system: of the run, else of the catalogue (it never opened), else its name."""
    if system in result.systems:
        return result.systems[system].title
    entry = entries().get(system)
    return entry.system.title if entry is not None else system


def leading_number(variant: str) -> int | None:
    """``16`` of ``16 in flight``; ``None`` without a number."""
    first = variant.split(" ", 1)[0]
    return int(first) if first.isdecimal() else None
