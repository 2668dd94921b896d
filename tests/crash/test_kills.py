"""Writers killed on real file systems; ``make crash KILLS=200`` runs more of the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cascade_aio.testing.crashes import FILE_SYSTEMS, GENERATIONS_PER_SEED, missing_for, run_campaign
from cascade_aio.testing.crashes.disks import open_disk

KILLS = int(os.environ.get("CASCADE_TEST_KILLS", "20"))
"""Kills of the default run, on all file systems together (about a second each on two cores)."""

FIRST_SEED = int(os.environ.get("CASCADE_TEST_SEED", "1"))


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_what_was_acknowledged_survives_kills(tmp_path: Path, file_system: str) -> None:
    if (reason := missing_for(file_system)) is not None:
        pytest.skip(f"no {file_system} to crash on: {reason}")
    try:
        with open_disk(file_system, tmp_path / "tried"):
            pass
    except OSError as error:  # root of a container, perhaps
        pytest.skip(f"{file_system} cannot be mounted here: {error}")
    kills = -(-KILLS // len(FILE_SYSTEMS))
    seeds = range(FIRST_SEED, FIRST_SEED + kills)
    figures = run_campaign(seeds, tmp_path, kills=kills, file_system=file_system)
    print(figures)
    assert figures.kills >= kills
    assert figures.seeds >= 1
    assert figures.kills <= 3 * GENERATIONS_PER_SEED * figures.seeds
    assert figures.blocks_checked > 0
    assert figures.bytes_verified > 0
    assert figures.failures == []
    assert (file_system == "here") is (not figures.faults)
