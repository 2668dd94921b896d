"""The README's table of reading ahead: one line per block size and compute time, losing ones included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.results import NotRun, Row

_HEAD = (
    "| block | compute / read | ideal | with prefetch | of it stalled | without | of it stalled "
    "| with / ideal (min–max) | target | |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def render(
    rows: Sequence[Row],
    not_run: Sequence[NotRun],
    *,
    number: Callable[[float], str],
    size: Callable[[int], str],
    verdict: Callable[[Row], str],
) -> list[str]:
    """Lines: the decode loops as a table, then the first layer and what could not run, a sentence each."""
    from bench.figures.prefetch import DECODE, STALLED, WITHOUT, WITHOUT_STALLED

    lines = [*_HEAD]
    told: list[str] = []
    for row in rows:
        assert row.other is not None, row.figure
        assert row.ratio is not None, row.figure
        assert row.target is not None, row.figure
        reached = f"**{number(row.ratio.median)}** ({number(row.ratio.minimum)}–{number(row.ratio.maximum)})"
        target = f"≤ {number(row.target.limit)}"
        ours, other = number(row.ours.summary.median), number(row.other.summary.median)
        if row.figure != DECODE:
            what = f"{row.title}, {size(row.block_bytes)}"
            told.append(f"{what}: {ours} s of {other} s, {reached}, target {target} {verdict(row)}")
            continue
        extra = {series.name: number(series.summary.median) for series in row.extra}
        seconds = [other, ours, extra[STALLED], extra[WITHOUT], extra[WITHOUT_STALLED]]
        cells = [size(row.block_bytes), f"{row.variant} ×", *(f"{value} s" for value in seconds), reached, target]
        lines.append("| " + " | ".join([*cells, verdict(row)]) + " |")
    told += [f"{row.title}, {size(row.block_bytes)}: not run: {row.reason}" for row in not_run]
    return [*lines, *(line for text in told for line in ("", f"{text.strip()}."))]
