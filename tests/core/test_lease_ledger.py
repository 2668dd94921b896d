"""LeaseLedger: counts, bytes, and what it says about leases released twice or never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.core.leases import LeaseLedger, LeaseRecord
from cascade_aio.errors import LeaseError


def test_a_row_is_pinned_once_and_until_its_last_lease() -> None:
    ledger = LeaseLedger()
    first, second = ledger.take(5, 4096), ledger.take(5, 4096, "app.py:12")
    third = ledger.take(6, 100)
    assert (len(ledger), ledger.pinned_rows, ledger.pinned_bytes, ledger.count(5)) == (3, 2, 4196, 2)
    assert ledger.oldest() == LeaseRecord(first, 5, 4096, None)
    assert ledger.release(first) == 5
    assert ledger.of_row(5) == [LeaseRecord(second, 5, 4096, "app.py:12")]
    assert (ledger.pinned_bytes, ledger.count(5)) == (4196, 1)
    assert ledger.release(second) == 5
    assert (ledger.pinned_bytes, ledger.count(5)) == (100, 0)
    assert ledger.release(third) == 6
    assert (len(ledger), ledger.pinned_rows, ledger.pinned_bytes, ledger.oldest()) == (0, 0, 0, None)


def test_a_second_release_and_an_unknown_number_are_told_apart() -> None:
    ledger = LeaseLedger()
    number = ledger.take(0, 1)
    ledger.release(number)
    with pytest.raises(LeaseError, match=f"lease {number} was released before"):
        ledger.release(number)
    with pytest.raises(LeaseError, match="lease 99 was never taken here"):
        ledger.release(99)
    assert len(ledger) == 0


def test_the_limit_names_the_oldest_lease() -> None:
    ledger = LeaseLedger(leases_max=2)
    first = ledger.take(0, 1, "server.py:7")
    ledger.take(1, 1)
    with pytest.raises(LeaseError, match=r"2 leases are outstanding.*oldest was taken at server\.py:7"):
        ledger.take(2, 1)
    assert ledger.count(2) == 0
    ledger.release(first)
    ledger.take(2, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=80))
def test_totals_follow_a_list_of_leases(events: list[tuple[bool, int]]) -> None:
    ledger, held = LeaseLedger(), list[tuple[int, int]]()
    for takes, row in events:
        if takes:
            held.append((ledger.take(row, 10 * row), row))
        elif held:
            number, expected = held.pop(row % len(held))
            assert ledger.release(number) == expected
        rows = {row for _, row in held}
        assert (len(ledger), ledger.pinned_rows) == (len(held), len(rows))
        assert ledger.pinned_bytes == sum(10 * row for row in rows)
        oldest = ledger.oldest()
        assert (oldest.number if oldest else None) == min((number for number, _ in held), default=None)
