"""What an honest client does, however awkward the moment: it keeps its connection, its bytes and its order."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from cascade_aio.daemon import Service, connect
from cascade_aio.errors import ServiceUnavailableError
from cascade_aio.testing.store import eventually
from tests.service.conftest import forget_arena, running


def fenced(service: Service) -> int:
    """Extents that nobody uses because a client of the service before may write into them."""
    return int(service.node.statistics()["shm"]["directory"]["fenced_extents"])


async def test_who_fills_an_extent_while_the_service_is_started_anew_writes_over_nobody(tmp_path: Path) -> None:
    arena = f"cascade-test-{uuid.uuid4().hex[:12]}"
    try:
        async with running(tmp_path / "kv", arena=arena) as service:
            slow = await connect(service.socket_path)
            filling = slow.reserve(key_bytes=0, value_bytes=6 << 20)
            slot = await filling.__aenter__()
        async with running(tmp_path / "kv", arena=arena) as service, connect(service.socket_path) as other:
            await eventually(lambda: service.clients == 2)
            names = [await other.put(b"", np.full(3 << 20, 50 + i, np.uint8)) for i in range(4)]
            slot.value[:] = 1
            for i, name in enumerate(names):
                async with other.get(name) as block:
                    assert set(np.unique(block.value)) == {50 + i}
            assert fenced(service) == 1
            with pytest.raises(ServiceUnavailableError, match="lost"):
                await filling.__aexit__(None, None, None)
            await eventually(lambda: not fenced(service))
            await slow.aclose()
    finally:
        forget_arena(arena)
