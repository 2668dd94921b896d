"""A store with a communicator as its users meet it: all of its calls, and more than one communicator."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.conftest import RANKS, Launch

pytestmark = pytest.mark.mpi


def test_every_call_works_on_blocks_of_another_rank(launch: Launch, tmp_path: Path) -> None:
    results = launch("tests.mpi.user_jobs:every_call", root=str(tmp_path / "kv")).results(RANKS)
    expected = {
        "cached": 6,
        "read_into": [True, True],
        "get_prefix": [0, 1, 2],
        "stream": [0, 1, 2, 3, 4],
        "by_id": 5,
        "known_now": True,
        "unknown": "not found",
    }
    assert results == [{}, {**expected, "deleted": "not found", "put_again": "new"}, expected, expected]


@pytest.mark.parametrize("runtime", ["openmpi"], indirect=True)
def test_communicators_of_one_half_and_all_ranks_do_not_disturb_each_other(launch: Launch, tmp_path: Path) -> None:
    results = launch("tests.mpi.user_jobs:communicators", root=str(tmp_path / "kv")).results(RANKS)
    assert results == [{"alone": 5000, "half": ["half", True], "all": "all", "two roots": True}] * RANKS
