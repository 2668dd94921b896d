"""The result file of ``bench.eviction`` and the README table made from it.

Each row has the counts of one replay; rates and comparisons are computed from them when the table is
made. Between its two marker comments the README belongs to this module.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import msgspec

from bench.machine import REPOSITORY, describe
from bench.results import BenchError, now_text
from cascade_aio.cli.trace_files import read_trace
from cascade_aio.cli.trace_mix import MixPlan, mixed_trace
from cascade_aio.core.contest import OPTIMUM, OURS, POLICIES, REFERENCE, SHARES, SIMPLE, gap_closed, sweep
from cascade_aio.core.replay import ReplayTrace

BEGIN = "<!-- eviction:begin -->"
END = "<!-- eviction:end -->"
FORMAT = 1
MIXES = {
    "generated: chat with scans": MixPlan(),
    "generated: long chats": MixPlan(scan_share=0.0, turns=6, think_s=20, seed=1),
}


class Row(msgspec.Struct, frozen=True):
    """One replay."""

    policy: str
    share: float
    capacity_blocks: int
    blocks: int
    hit_blocks: int
    tokens: int
    hit_tokens: int
    hit_bytes: int

    @property
    def rate(self) -> float:
        return self.hit_blocks / self.blocks


class TraceRows(msgspec.Struct, frozen=True):
    trace: str
    requests: int
    blocks: int
    different_blocks: int
    cpu_s: float
    rows: list[Row]


class EvictionResult(msgspec.Struct, frozen=True):
    version: str
    commit: str
    dirty: bool
    date: str
    traces: list[TraceRows]
    format: int = FORMAT


def measure(paths: Sequence[pathlib.Path], limit: int | None, say: Callable[[str], None]) -> EvictionResult:
    """Replay the files and the generated mixes through all policies. Blocks for minutes."""
    where = describe(REPOSITORY)
    traces = [read_trace(path, limit=limit) for path in paths]
    for name, plan in MIXES.items():
        sessions = plan.sessions if limit is None else min(plan.sessions, limit)
        traces.append(mixed_trace(dataclasses.replace(plan, sessions=sessions), name))
    done = []
    for trace in traces:
        say(f"{trace.name}: {trace.events:,} block events")
        done.append(_measure(trace))
    return EvictionResult(where.version, where.commit, where.dirty, now_text(), done)


def load(path: pathlib.Path) -> EvictionResult:
    """Raises ``BenchError`` if ``path`` is not there, or no result file of this format."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=EvictionResult)
    except FileNotFoundError:
        raise BenchError(f"{path.name} is not there: run `python -m bench.eviction run` first") from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BenchError(f"{path.name} is not a result file of this suite: {error}") from error
    if result.format != FORMAT:
        raise BenchError(f"{path.name} has result format {result.format}, this suite writes {FORMAT}: measure anew")
    return result


def save(path: pathlib.Path, result: EvictionResult) -> None:
    """Replace ``path`` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    os.replace(temporary, path)


def update(readme: pathlib.Path, result: EvictionResult, *, full: bool = False, check: bool) -> None:
    """Write the table into ``readme``, or with ``check`` raise ``BenchError`` if that would change it."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{readme.name} has no {BEGIN} … {END}: put the two lines where the table belongs")
    made = f"{before}{BEGIN}\n{render(result, full=full)}\n{END}{after}"
    if not check:
        readme.write_text(made, encoding="utf-8")
    elif made != text:
        raise BenchError(f"{readme.name} is not in step with the result file: run `python -m bench.eviction table`")


def render(result: EvictionResult, *, full: bool = False) -> str:
    """What matters of all traces in one table, or with ``full`` a table of all policies for each."""
    parts = [_table(trace) for trace in result.traces] if full else [_summary(result.traces)]
    dirty = " with uncommitted changes" if result.dirty else ""
    parts.append(
        "Prefix-unbroken block hit rates in %, by capacity as a share of the trace's different blocks. "
        f"Measured {result.date[:10]}, cascade_aio {result.version} (commit {result.commit[:12]}{dirty}); token and "
        "byte counts are in `bench/results/`, what was tried in `docs/eviction.md`."
    )
    return "\n\n".join(parts)


def _measure(trace: ReplayTrace) -> TraceRows:
    started_s = time.process_time()
    rows = [
        Row(
            policy=score.policy,
            share=score.share,
            capacity_blocks=score.capacity_blocks,
            blocks=score.count.blocks,
            hit_blocks=score.count.hit_blocks,
            tokens=score.count.tokens,
            hit_tokens=score.count.hit_tokens,
            hit_bytes=score.count.hit_bytes,
        )
        for score in sweep(trace, POLICIES, SHARES)
    ]
    cpu_s = round(time.process_time() - started_s, 2)
    return TraceRows(trace.name, len(trace.chains), trace.events, trace.nodes, cpu_s, rows)


def _summary(traces: Sequence[TraceRows]) -> str:
    shares = list(dict.fromkeys(row.share for trace in traces for row in trace.rows))
    lines = [
        "| trace | policy | " + " | ".join(f"{share:.0%}" for share in shares) + " |",
        "| --- | --- |" + " ---: |" * len(shares),
    ]
    for trace in traces:
        rates = {(row.policy, row.share): 100 * row.rate for row in trace.rows}
        best = [max((rates[name, share], name) for name in SIMPLE) for share in shares]
        lines.append(_line(f"{trace.trace} | {REFERENCE}", [f"{rates[REFERENCE, s]:.1f}" for s in shares]))
        lines.append(_line(" | best simple one", [f"{rate:.1f} ({name})" for rate, name in best]))
        lines.append(_line(f" | **{OURS}**", [f"**{rates[OURS, s]:.1f}**" for s in shares]))
        lines.append(_line(f" | {OPTIMUM}", [f"{rates[OPTIMUM, s]:.1f}" for s in shares]))
    return "\n".join(lines)


def _table(trace: TraceRows) -> str:
    shares = list(dict.fromkeys(row.share for row in trace.rows))
    rates = {(row.policy, row.share): row.rate for row in trace.rows}
    per_s = trace.blocks * len(trace.rows) / max(trace.cpu_s, 1e-9)
    lines = [
        f"**{trace.trace}** ({trace.requests:,} requests, {trace.blocks:,} blocks, "
        f"{trace.different_blocks:,} different; replayed at {per_s:,.0f} blocks per CPU second)",
        "",
        "| policy | " + " | ".join(f"{share:.0%}" for share in shares) + " | mean |",
        "| --- |" + " ---: |" * (len(shares) + 1),
    ]
    for policy in dict.fromkeys(row.policy for row in trace.rows):
        values = [100 * rates[policy, share] for share in shares]
        name = f"**{policy}**" if policy == OURS else policy
        lines.append(_line(name, [f"{value:.2f}" for value in (*values, sum(values) / len(values))]))
    margins = [100 * (rates[OURS, s] - max(rates[name, s] for name in SIMPLE)) for s in shares]
    lines.append(_line("ours − best simple", [f"{value:+.2f}" for value in (*margins, sum(margins) / len(margins))]))
    closed = [gap_closed(rates[OURS, s], rates[REFERENCE, s], rates[OPTIMUM, s]) for s in shares]
    totals = [sum(rates[name, s] for s in shares) for name in (OURS, REFERENCE, OPTIMUM)]
    closed.append(gap_closed(*totals))
    lines.append(_line("gap LRU → clairvoyant closed", ["" if part is None else f"{part:.0%}" for part in closed]))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"
