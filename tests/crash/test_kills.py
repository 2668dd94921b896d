"""Writers killed on real files; ``make crash KILLS=200`` runs more of the same."""

from __future__ import annotations

import os
from pathlib import Path

from cascade_aio.testing.crash import GENERATIONS_PER_SEED, run_campaign

KILLS = int(os.environ.get("CASCADE_TEST_KILLS", "20"))
"""Kills of the default run (about 2 s each on two cores)."""

FIRST_SEED = int(os.environ.get("CASCADE_TEST_SEED", "1"))


def test_what_was_acknowledged_survives_kills(tmp_path: Path) -> None:
    figures = run_campaign(range(FIRST_SEED, FIRST_SEED + KILLS), tmp_path, kills=KILLS)
    print(figures)
    assert figures.kills >= KILLS
    assert figures.seeds >= KILLS // GENERATIONS_PER_SEED
    assert figures.blocks_checked > 0
    assert figures.segments_sealed > 0
    assert figures.reader_reads > 0
