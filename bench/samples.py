"""Statistics of a handful of samples: median, spread, ratio of pairs, percentiles.

Pure. With five or so samples there is nothing to be said about distributions, so the spread is
given as it is (minimum, maximum, interquartile range) and ratios are taken within each pair: a
device whose speed drifts disturbs both sides of a pair alike, and the median of the ratios is then
steadier than the ratio of the medians.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """Summary of samples in their own unit. ``iqr`` is the distance between the quartiles."""

    median: float
    minimum: float
    maximum: float
    iqr: float


def quantile(samples: Sequence[float], fraction: float) -> float:
    """Quantile by linear interpolation between the sorted samples (Hyndman and Fan's type 7).

    Raises ``ValueError`` without samples or for a ``fraction`` outside 0..1.
    """
    if not samples:
        raise ValueError("a quantile needs at least one sample")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction={fraction} must be between 0 and 1")
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(samples: Sequence[float]) -> float:
    return quantile(samples, 0.5)


def spread(samples: Sequence[float]) -> Spread:
    """Median, extremes and interquartile range. Raises ``ValueError`` without samples."""
    return Spread(
        median=median(samples),
        minimum=min(samples),
        maximum=max(samples),
        iqr=quantile(samples, 0.75) - quantile(samples, 0.25),
    )


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """``ours[i] / theirs[i]``; the two were measured next to each other.

    Raises ``ValueError`` if the lengths differ or a denominator is not positive.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} samples cannot be paired with {len(theirs)}")
    if any(sample <= 0 for sample in theirs):
        raise ValueError("a paired ratio needs positive samples to divide by")
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]
