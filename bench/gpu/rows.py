"""The result file of the GPU figures: what ran where, every raw sample, what it is held against.

As the engine's (``bench.results``), but a row also names the device and its driver, without which its numbers say
nothing. Written whole after each figure.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import msgspec

from bench.results import Environment, now_text
from bench.samples import Spread, median, spread

FORMAT = 1


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. ``achieved`` is held against ``target``: a ratio of medians taken in turns, or a value."""

    figure: str
    block_bytes: int
    date: str
    unit: str
    samples: dict[str, list[float]]
    """By side, one per repetition, in the order in which the repetitions ran."""
    spreads: dict[str, Spread]
    order: list[str]
    achieved: float
    target: float
    at_least: bool
    verified_bytes: int
    """Compared with their source, on the host and, where PyTorch is, on the device."""
    notes: str = ""

    @property
    def met(self) -> bool:
        return self.achieved >= self.target if self.at_least else self.achieved <= self.target


class NotRun(msgspec.Struct, frozen=True):
    figure: str
    reason: str


class GpuResult(msgspec.Struct):
    environment: Environment
    device: str
    """Name of the device and version of its driver; "a device of memory": of the fake, whose numbers mean nothing."""
    registration: str
    """What the arena's page-locking came to."""
    date: str
    rows: list[Row] = []
    not_run: list[NotRun] = []
    format: int = FORMAT

    def save(self, path: pathlib.Path) -> None:
        temporary = path.with_name(path.name + ".new")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        os.replace(temporary, path)


def make_row(
    figure: str,
    block_bytes: int,
    unit: str,
    samples: dict[str, list[float]],
    order: Sequence[str],
    achieved: float,
    target: float,
    *,
    at_least: bool,
    verified_bytes: int,
    notes: str = "",
) -> Row:
    return Row(
        figure=figure,
        block_bytes=block_bytes,
        date=now_text(),
        unit=unit,
        samples=samples,
        spreads={side: spread(taken) for side, taken in samples.items()},
        order=list(order),
        achieved=achieved,
        target=target,
        at_least=at_least,
        verified_bytes=verified_bytes,
        notes=notes,
    )


def median_ratio(ours: Sequence[float], limits: Sequence[float]) -> float:
    """Median of the ratios within each repetition."""
    return median([mine / limit for mine, limit in zip(ours, limits, strict=True)])
