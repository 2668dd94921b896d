"""``trace``: replay of request logs through every eviction policy; hit rates by capacity, no bytes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cascade_aio.cli.options import Json
from cascade_aio.cli.output import UsageError, err, out, print_json
from cascade_aio.cli.trace_figure import draw
from cascade_aio.cli.trace_files import CHAT_BLOCK_TOKENS, load_tokenizer, read_trace
from cascade_aio.cli.trace_mix import MixPlan, mixed_trace
from cascade_aio.core.contest import OPTIMUM, OURS, POLICIES, REFERENCE, SHARES, SIMPLE, Score, gap_closed, sweep
from cascade_aio.core.replay import ReplayTrace
from cascade_aio.errors import ConfigError

UNITS = ("blocks", "tokens", "bytes")
"""What a hit rate may be of."""
DEFAULT_CAPACITIES = ",".join(f"{share:.0%}" for share in SHARES)


@dataclasses.dataclass(frozen=True, slots=True)
class _Timed:
    scores: list[Score]
    cpu_s: float


def trace(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]…", help="Block-hash traces or chat logs, JSON lines; none: a generated mix."),
    ] = None,
    policies: Annotated[str, typer.Option(metavar="NAME,…", help=f"Of {', '.join(POLICIES)}.")] = ",".join(POLICIES),
    capacities: Annotated[
        str, typer.Option(metavar="SHARE,…", help="Shares of the trace's different blocks, such as 1%,5%.")
    ] = DEFAULT_CAPACITIES,
    unit: Annotated[str, typer.Option(help="Print hit rates of blocks, tokens or bytes.")] = "blocks",
    limit: Annotated[int | None, typer.Option(min=1, help="Requests to take from each trace.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json for chat logs; without one, by bytes.")
    ] = None,
    block_tokens: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Tokens per block of a chat log (4 bytes stand in for one).")
    ] = CHAT_BLOCK_TOKENS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated mix.")] = 0,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw hit rate against capacity, such as out.png.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay request traces through eviction policies and compare their hit rates.

    A hit is a block that is resident together with everything before it. `clairvoyant` knows the
    future: no policy can do better by much.
    """
    names = _names(policies)
    shares = [_share(text) for text in capacities.split(",") if text]
    if unit not in UNITS:
        raise UsageError(f"--unit {unit} is none of {', '.join(UNITS)}")
    if not shares:
        raise UsageError("--capacities names none; give shares such as 1%,5%")
    encode = None if tokenizer is None else load_tokenizer(tokenizer)
    read = functools.partial(read_trace, limit=limit, encode=encode, block_tokens=block_tokens)
    traces = [read(path) for path in files or ()] or [mixed_trace(MixPlan(seed=seed))]
    results: list[tuple[ReplayTrace, _Timed]] = []
    for requests in traces:
        results.append((requests, _replay(requests, names, shares)))
        if not json:
            out.print(_table(requests, results[-1][1], names, shares, unit))
    if json:
        print_json([_record(requests, timed) for requests, timed in results])
    if figure is not None:
        draw(figure, [score for _, timed in results for score in timed.scores])
        err.print(f"drew {figure}")


def _replay(requests: ReplayTrace, names: Sequence[str], shares: Sequence[float]) -> _Timed:
    started = time.process_time()
    try:
        scores = list(sweep(requests, names, shares))
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return _Timed(scores, time.process_time() - started)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        raise UsageError(f"--policies: {', '.join(unknown) or 'none given'}; there are {', '.join(POLICIES)}")
    return names


def _share(text: str) -> float:
    """``5%`` or ``0.05``."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--capacities: {text!r} is no share such as 5% or 0.05") from None


def rate(score: Score, unit: str) -> float:
    """The hit rate of ``score`` in ``unit``, one of ``UNITS``."""
    count = score.count
    rates = {"blocks": count.block_hit_rate, "tokens": count.token_hit_rate, "bytes": count.byte_hit_rate}
    return rates[unit]


def _table(requests: ReplayTrace, timed: _Timed, names: Sequence[str], shares: Sequence[float], unit: str) -> Table:
    events_per_s = requests.events * len(timed.scores) / max(timed.cpu_s, 1e-9)
    table = Table(
        title=f"{requests.name}: {unit} found with their whole prefix",
        caption=f"{len(requests.chains):,} requests, {requests.events:,} blocks, {requests.nodes:,} different; "
        f"{events_per_s:,.0f} block events per CPU second",
    )
    table.add_column("policy")
    for share in shares:
        table.add_column(f"{share:.3g}" if share < 0.001 else f"{share:.1%}", justify="right")
    rates = {(score.policy, score.share): rate(score, unit) for score in timed.scores}
    for name in names:
        style = "bold" if name == OURS else None
        table.add_row(name, *(f"{rates[name, share]:.4f}" for share in shares), style=style)
    _add_comparison(table, rates, names, shares)
    return table


def _add_comparison(
    table: Table, rates: dict[tuple[str, float], float], names: Sequence[str], shares: Sequence[float]
) -> None:
    """Two lines below the policies: ours against the best simple one, and the gap to the optimum closed."""
    simple = [name for name in names if name in SIMPLE]
    if OURS not in names:
        return
    table.add_section()
    if simple:
        margins = [rates[OURS, share] - max(rates[name, share] for name in simple) for share in shares]
        table.add_row("ours − best simple", *(f"{margin:+.4f}" for margin in margins))
    if REFERENCE in names and OPTIMUM in names:
        closed = [gap_closed(rates[OURS, s], rates[REFERENCE, s], rates[OPTIMUM, s]) for s in shares]
        table.add_row("gap closed", *("-" if part is None else f"{part:.0%}" for part in closed))


def _record(requests: ReplayTrace, timed: _Timed) -> dict[str, Any]:
    return {
        "trace": requests.name,
        "requests": len(requests.chains),
        "blocks": requests.events,
        "different_blocks": requests.nodes,
        "cpu_s": round(timed.cpu_s, 3),
        "block_events_per_cpu_s": round(requests.events * len(timed.scores) / max(timed.cpu_s, 1e-9)),
        "scores": [
            {
                "policy": score.policy,
                "share": score.share,
                "capacity_blocks": score.capacity_blocks,
                **dataclasses.asdict(score.count),
                "hit_bytes": score.count.hit_bytes,
                **{f"{unit.removesuffix('s')}_hit_rate": rate(score, unit) for unit in UNITS},
            }
            for score in timed.scores
        ],
    }
