"""HybridClock: order, nearness to the wall clock, and distrust of absurd stamps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.core.clock import HybridClock

SKEW_NS = 100


def test_stamps_increase_while_the_wall_clock_stands_or_goes_back() -> None:
    clock = HybridClock()
    assert [clock.next(1000), clock.next(1000), clock.next(10), clock.next(2000)] == [1000, 1001, 1002, 2000]


def test_a_stamp_after_an_observed_one_is_larger() -> None:
    clock = HybridClock(skew_ns_max=SKEW_NS)
    assert clock.observe(1100, wall_ns=1000)
    assert clock.next(1000) == 1101
    assert clock.observe(5, wall_ns=1000)
    assert clock.next(1000) == 1102


def test_a_stamp_from_the_far_future_is_counted_and_not_followed() -> None:
    clock = HybridClock(skew_ns_max=SKEW_NS)
    assert not clock.observe(1101, wall_ns=1000)
    assert (clock.refused, clock.last) == (1, 0)
    assert clock.next(1000) == 1000


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000), st.integers(0, 1000)), max_size=60))
def test_always_ahead_of_everything_accepted_and_never_far_from_the_wall(
    events: list[tuple[bool, int, int]],
) -> None:
    clock = HybridClock(skew_ns_max=SKEW_NS)
    seen, made, wall_max = 0, 0, 0
    for makes, wall_ns, stamp in events:
        wall_max = max(wall_max, wall_ns)
        if makes:
            new = clock.next(wall_ns)
            made += 1
            assert new > seen
            assert new >= wall_ns
            seen = new
        elif clock.observe(stamp, wall_ns):
            assert stamp <= wall_ns + SKEW_NS
            seen = max(seen, stamp)
        else:
            assert stamp > wall_ns + SKEW_NS
        assert clock.last == seen <= wall_max + SKEW_NS + made
