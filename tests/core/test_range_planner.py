"""The range planner: what joins, what does not, and that nothing is lost or read twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.core.ranges import ReadRequest, coalesce, split

PAGE = 4096


def ask(segment: int, page: int, pages: int = 1, token: object = None) -> ReadRequest:
    return ReadRequest(segment, page * PAGE, pages * PAGE, token)


def plan(
    requests: list[ReadRequest], gap_pages: int = 0, run_pages: int = 1 << 20, run_requests: int = 1 << 20
) -> list[tuple[int, int, int, int]]:
    """(segment, first page, pages, requests) of each run."""
    runs = coalesce(
        requests, gap_bytes_max=gap_pages * PAGE, run_bytes_max=run_pages * PAGE, run_requests_max=run_requests
    )
    return [(run.segment, run.offset // PAGE, run.nbytes // PAGE, len(run.requests)) for run in runs]


def test_neighbours_join_whatever_order_they_are_asked_in() -> None:
    assert plan([ask(1, 4, 2), ask(1, 0, 4), ask(1, 6)]) == [(1, 0, 7, 3)]


def test_segments_never_join() -> None:
    assert plan([ask(1, 0), ask(2, 1)]) == [(1, 0, 1, 1), (2, 1, 1, 1)]


def test_small_gaps_are_read_and_large_ones_are_not() -> None:
    requests = [ask(0, 0), ask(0, 3), ask(0, 7)]
    assert plan(requests, gap_pages=2) == [(0, 0, 4, 2), (0, 7, 1, 1)]
    (run, _) = coalesce(requests, gap_bytes_max=2 * PAGE, run_bytes_max=1 << 30, run_requests_max=10)
    assert run.gap_bytes == (0, 2 * PAGE)


def test_limits_of_bytes_and_of_requests_end_a_run() -> None:
    requests = [ask(0, page) for page in range(5)]
    assert plan(requests, run_pages=2) == [(0, 0, 2, 2), (0, 2, 2, 2), (0, 4, 1, 1)]
    assert plan(requests, run_requests=3) == [(0, 0, 3, 3), (0, 3, 2, 2)]
    assert plan([ask(0, 0, 10), ask(0, 10)], run_pages=4) == [(0, 0, 10, 1), (0, 10, 1, 1)]


def test_what_was_asked_first_is_read_first() -> None:
    assert plan([ask(9, 50), ask(1, 0), ask(9, 10), ask(1, 1)]) == [(9, 50, 1, 1), (1, 0, 2, 2), (9, 10, 1, 1)]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([ask(0, 5), ask(0, 5)], "overlaps"),
        ([ask(0, 0, 4), ask(0, 3)], "overlaps"),
        ([ReadRequest(0, 1, PAGE)], "whole pages"),
        ([ReadRequest(0, 0, 100)], "whole pages"),
        ([ReadRequest(0, 0, 0)], "empty"),
        ([ReadRequest(0, -PAGE, PAGE)], "before the file"),
    ],
)
def test_programmer_errors_are_assertions(requests: list[ReadRequest], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        plan(requests)


@given(
    layout=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 5)), max_size=30),
    rng=st.randoms(use_true_random=False),
    gap_pages=st.integers(0, 3),
    run_pages=st.integers(1, 12),
    run_requests=st.integers(1, 6),
)
def test_every_request_is_served_once_within_the_limits(
    layout: list[tuple[int, int, int]], rng: random.Random, gap_pages: int, run_pages: int, run_requests: int
) -> None:
    requests, ends = [], {0: 0, 1: 0, 2: 0}
    for token, (segment, hole, pages) in enumerate(layout):
        requests.append(ask(segment, ends[segment] + hole, pages, token))
        ends[segment] += hole + pages
    rng.shuffle(requests)
    runs = coalesce(
        requests, gap_bytes_max=gap_pages * PAGE, run_bytes_max=run_pages * PAGE, run_requests_max=run_requests
    )
    served = [request.token for run in runs for request in run.requests]
    assert len(served) == len(layout)
    assert set(served) == set(range(len(layout)))
    asked = [min(requests.index(request) for request in run.requests) for run in runs]
    assert asked == sorted(asked)
    for run in runs:
        assert len(run.requests) <= run_requests
        assert run.nbytes <= run_pages * PAGE or len(run.requests) == 1
        at = run.offset
        for gap, request in zip(run.gap_bytes, run.requests, strict=True):
            assert 0 <= gap <= gap_pages * PAGE
            assert request.segment == run.segment
            assert request.offset == at + gap
            at = request.end
        assert at == run.offset + run.nbytes


@given(nbytes=st.integers(0, 400 * PAGE), piece_pages=st.integers(1, 64))
def test_pieces_are_few_whole_and_even(nbytes: int, piece_pages: int) -> None:
    pieces = split(nbytes, piece_pages * PAGE)
    assert len(pieces) == -(-nbytes // (piece_pages * PAGE))
    at = 0
    for offset, size in pieces:
        assert offset == at
        assert offset % PAGE == 0
        assert 0 < size <= piece_pages * PAGE
        at += size
    assert at == nbytes
    in_pages = [-(-size // PAGE) for _, size in pieces]
    assert max(in_pages, default=0) - min(in_pages, default=0) <= 1
