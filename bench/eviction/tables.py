"""Tables of ``bench.eviction`` in Markdown, made from its result file."""

from __future__ import annotations

from collections.abc import Sequence

from bench.eviction.rows import EvictionResult, TraceRows
from bench.eviction.whole_store import Confirmation
from cascade_aio.core.contest import OPTIMUM, OURS, REFERENCE, SIMPLE, gap_closed

TOLERANCE = 0.3
"""Points by which ours may be below the best simple policy."""


def render(result: EvictionResult, *, full: bool = False) -> str:
    """What matters of all traces, or with ``full`` also a table of all policies for each."""
    real = [trace for trace in result.traces if trace.trace not in result.workloads]
    parts = [_summary(real)] if real and not full else []
    parts += [_margins(result), _losing(result.traces)]
    if full:
        parts += [_speeds(result.traces), _confirmed(result.confirmed), _workloads(result.workloads)]
        parts += [_table(trace) for trace in result.traces]
    dirty = " with uncommitted changes" if result.dirty else ""
    parts.append(
        "Prefix-unbroken block hit rates in %, and differences of them in points, by capacity as a share of the "
        "trace's different blocks. "
        f"Measured {result.date[:10]}, cascade_aio {result.version} (commit {result.commit[:12]}{dirty}); token and "
        "byte counts are in `bench/results/`, what was tried in `docs/eviction.md`."
    )
    return "\n\n".join(parts)


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


def _comparison(trace: TraceRows) -> tuple[list[float], float | None]:
    """(Ours less the best simple policy by capacity, in points; which part of the gap LRU to clairvoyant is closed)."""
    shares = list(dict.fromkeys(row.share for row in trace.rows))
    rates = {(row.policy, row.share): 100 * row.rate for row in trace.rows}
    margins = [rates[OURS, share] - max(rates[name, share] for name in SIMPLE) for share in shares]
    ours, reference, optimum = (sum(rates[name, share] for share in shares) for name in (OURS, REFERENCE, OPTIMUM))
    return margins, gap_closed(ours, reference, optimum)


def _margins(result: EvictionResult) -> str:
    shares = list(dict.fromkeys(row.share for trace in result.traces for row in trace.rows))
    lines = [
        f"| {OURS} − best simple policy | " + " | ".join(f"{share:.0%}" for share in shares) + " | mean | gap closed |",
        "| --- |" + " ---: |" * (len(shares) + 2),
    ]
    for trace in result.traces:
        margins, closed = _comparison(trace)
        cells = [f"**{margin:+.2f}**" if margin < -TOLERANCE else f"{margin:+.2f}" for margin in margins]
        mean = f"{sum(margins) / len(margins):+.2f}"
        lines.append(_line(trace.trace, [*cells, mean, "" if closed is None else f"{closed:.0%}"]))
    return "\n".join(lines)


def _losing(traces: Sequence[TraceRows]) -> str:
    margins = [margin for trace in traces for margin in _comparison(trace)[0]]
    losing = [margin for margin in margins if margin < -TOLERANCE]
    return (
        f"In {len(losing)} of {len(margins)} cells (bold) the best simple policy (another one in each) is more "
        f"than {TOLERANCE} points better, in the worst {min(margins):+.2f}; the mean of all cells is "
        f"{sum(margins) / len(margins):+.2f}."
    )


def _speeds(traces: Sequence[TraceRows]) -> str:
    spent: dict[str, float] = {}
    events: dict[str, int] = {}
    for trace in traces:
        for row in trace.rows:
            spent[row.policy] = spent.get(row.policy, 0.0) + row.cpu_s
            events[row.policy] = events.get(row.policy, 0) + row.blocks
    lines = ["| policy | block events per CPU second |", "| --- | ---: |"]
    lines += [_line(policy, [f"{events[policy] / max(spent[policy], 1e-9):,.0f}"]) for policy in spent]
    lines.append(_line("all", [f"{sum(events.values()) / max(sum(spent.values()), 1e-9):,.0f}"]))
    return "\n".join(lines)


def _confirmed(confirmed: Sequence[Confirmation]) -> str:
    lines = [
        "| through a whole store | policy | arena (blocks) | requests | blocks | hits | replayed in the store's order "
        "| replayed |",
        "| --- | --- |" + " ---: |" * 6,
    ]
    for one in confirmed:
        counts = (one.capacity_blocks, one.requests, one.blocks, one.store_hits, one.replay_hits, one.pure_hits)
        lines.append(_line(f"{one.trace} | {one.policy}", [f"{count:,}" for count in counts]))
    return "\n".join(lines)


def _workloads(workloads: dict[str, str]) -> str:
    lines = ["| generated trace | what |", "| --- | --- |"]
    return "\n".join([*lines, *(_line(name, [what]) for name, what in workloads.items())])
