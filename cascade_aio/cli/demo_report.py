"""What the demo found: one record for programs, one table for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from cascade_aio.cli.demo_limits import RawLimits
from cascade_aio.cli.demo_phases import Timed
from cascade_aio.cli.output import out
from cascade_aio.config import format_size


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseRow:
    """A phase beside its raw limit; GB/s are 10**9 bytes a second, ``None`` where bytes are not moved."""

    phase: str
    bytes: int
    seconds: float
    gb_per_s: float | None
    limit_gb_per_s: float | None
    limit: str
    ratio: float | None
    compared: str
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class DemoReport:
    """All figures of one run. Rates are parts of 1; lags are milliseconds."""

    phases: list[PhaseRow]
    limits: RawLimits
    block_bytes: int
    blocks: int
    requests: int
    blocks_asked: int
    blocks_cached: int
    block_hit_rate: float
    request_hit_rate: float
    deduplicated_bytes: int
    loop_lag_p99_ms: float
    loop_lag_max_ms: float
    page_cache: str
    host: dict[str, Any]
    notes: list[str]
    statistics: dict[str, Any]


def with_limits(phases: Sequence[Timed], limits: RawLimits) -> list[PhaseRow]:
    """Each phase with the raw limit that bounds it."""
    bounds = {
        "store": (limits.write, f"direct write + fdatasync, {limits.write_setting}"),
        "hot: read_into": (limits.copy, "best copy"),
        "dedup": (limits.digest, "digest alone, all cores"),
        "cold": (limits.read, f"direct read, {limits.read_setting}"),
    }
    rows = []
    for timed in phases:
        bound, name = next((b for prefix, b in bounds.items() if timed.phase.startswith(prefix)), (None, ""))
        rate = timed.gb_per_s
        ratio = rate / bound if rate is not None and bound else None
        seconds = timed.seconds
        rows.append(
            PhaseRow(timed.phase, timed.nbytes, seconds, rate, bound, name, ratio, timed.compared, timed.detail)
        )
    return rows


def print_report(report: DemoReport) -> None:
    """The table, and under it what was measured on what."""
    size = format_size(report.block_bytes)
    title = f"{report.blocks} blocks of {size}, {report.requests} requests"
    table = Table(title=title)
    for name in ("phase", "seconds", "GB/s", "raw limit", "ratio", "compared"):
        table.add_column(name, justify="right" if name in ("seconds", "GB/s", "raw limit", "ratio") else "left")
    for row in report.phases:
        numbers = ("" if n is None else f"{n:.2f}" for n in (row.gb_per_s, row.limit_gb_per_s, row.ratio))
        table.add_row(row.phase, f"{row.seconds:.3f}", *numbers, escape(row.compared))
    out.print(table, soft_wrap=False)
    for row in report.phases:
        remarks = [row.detail, f"raw limit: {row.limit}" if row.limit else ""]
        if any(remarks):
            out.print(f"{row.phase}: {'; '.join(filter(None, remarks))}", markup=False)
    host = report.host
    lines = [
        f"hits while storing: {report.block_hit_rate:.0%} of {report.blocks_asked} blocks, "
        f"{report.request_hit_rate:.0%} of requests found a prefix; "
        f"{format_size(report.deduplicated_bytes)} put again took no space",
        f"event loop lag while storing and reading: p99 {report.loop_lag_p99_ms:.2f} ms, "
        f"max {report.loop_lag_max_ms:.2f} ms",
        report.page_cache,
        f"I/O: {host['io_backend']}; kernel {host['kernel']}; {host['file_system']}; {host['cpus']} CPUs; "
        f"ids: {host['digest']}; Python {host['python']}",
        "Block bytes were generated before the clock started and compared after it had stopped; flush is timed.",
        *report.notes,
    ]
    for line in lines:
        out.print(line, markup=False)
