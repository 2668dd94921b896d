"""Stores for tests: the real thing on both back ends, small, in a temporary root."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.errors import ConfigError
from cascade_aio.io.storage import open_storage

OpenStore = Callable[..., Any]


async def ring_reason() -> str | None:
    """Why there is no io_uring here, or ``None``."""
    try:
        storage = open_storage("uring")
    except ConfigError as error:
        return str(error)
    await storage.aclose()
    return None


@pytest.fixture(params=["uring", "threads"])
async def io_backend(request: pytest.FixtureRequest) -> str:
    if request.param == "uring" and (reason := await ring_reason()) is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def arena() -> str:
    return f"cascade-test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def open_small(tmp_path: Path, io_backend: str, arena: str) -> OpenStore:
    """``open_small(**settings)``: a store on ``tmp_path/kv`` with a 16 MiB arena and 8 MiB segments."""

    def opener(**settings: Any) -> Any:
        return ca.open_store(
            tmp_path / "kv",
            **{
                "shm_bytes": "16MiB",
                "segment_bytes": "8MiB",
                "io_backend": io_backend,
                "arena": arena,
                "put_wait_seconds_max": 60.0,
                **settings,
            },
        )

    return opener


def block_bytes(seed: int, key_bytes: int = 70_000, value_bytes: int = 65_536) -> tuple[bytes, bytes]:
    """Random bytes of a block, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return rng.bytes(key_bytes), rng.bytes(value_bytes)
