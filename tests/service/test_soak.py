"""The soak in its small form: kills of clients and of the service, every byte compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_aio.testing.soak import Soak, memory_growth


@pytest.mark.shm(192)
async def test_a_short_soak_keeps_every_promise(tmp_path: Path) -> None:
    soak = Soak(tmp_path, clients=2, seconds=8.0, service_seconds=3.0, seed=3)
    report = await soak.run()
    assert report.faults == []
    assert report.operations
    assert report.compared_bytes
    assert report.services_killed
    assert report.clients_killed


def test_growth_is_noticed() -> None:
    flat = [100 << 20] * 90
    assert memory_growth(flat) == 0
    assert memory_growth([*flat[:60], *[200 << 20] * 30]) > 0
