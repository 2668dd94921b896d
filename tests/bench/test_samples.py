from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.samples import median, paired_ratios, quantile, spread

samples_strategy = st.lists(st.floats(0.001, 1e9), min_size=1, max_size=30)


@given(samples_strategy)
def test_median_is_that_of_the_standard_library(samples: list[float]) -> None:
    assert median(samples) == pytest.approx(statistics.median(samples))


@given(st.lists(st.floats(0.001, 1e9), min_size=2, max_size=30))
def test_quartiles_are_those_of_the_standard_library(samples: list[float]) -> None:
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    assert quantile(samples, 0.25) == pytest.approx(lower)
    assert quantile(samples, 0.75) == pytest.approx(upper)
    assert spread(samples).iqr == pytest.approx(upper - lower, abs=1e-6)


@given(samples_strategy)
def test_spread_ends_at_the_extremes(samples: list[float]) -> None:
    found = spread(samples)
    assert (found.minimum, found.maximum) == (min(samples), max(samples))
    assert found.minimum <= found.median <= found.maximum
    assert quantile(samples, 0.0) == found.minimum
    assert quantile(samples, 1.0) == found.maximum


def test_ratios_are_taken_within_pairs() -> None:
    # The device slowed down to a third between the pairs: pairs agree on 0.9, medians would say 0.3 or 2.7.
    ours, raw = [0.9, 2.7, 0.9], [1.0, 3.0, 1.0]
    assert paired_ratios(ours, raw) == pytest.approx([0.9, 0.9, 0.9])
    assert spread(paired_ratios([1.0, 4.0, 9.0], [2.0, 4.0, 6.0])).median == pytest.approx(1.0)


def test_unequal_or_empty_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        paired_ratios([1.0], [0.0])
    with pytest.raises(ValueError, match="at least one sample"):
        spread([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile([1.0], 1.1)
