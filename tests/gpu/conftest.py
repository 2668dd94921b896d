"""Stores with a GPU tier on the fake device, which says at the end what was done wrong with it."""

from __future__ import annotations

import contextlib
import uuid
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cascade_aio as ca
from cascade_aio.config import make_config
from cascade_aio.store.opening import open_with
from cascade_aio.testing.gpu import FakeGpu

Opener = Callable[..., AbstractAsyncContextManager[ca.Store]]

SETTINGS: dict[str, Any] = {
    "shm_bytes": "16MiB",
    "gpu_bytes": "8MiB",
    "segment_bytes": "8MiB",
    "put_wait_seconds_max": 60.0,
    "adopt_seconds": None,
    "workers": 2,
}


def block_bytes(seed: int, key_bytes: int = 300_000, value_bytes: int = 290_000) -> tuple[bytes, bytes]:
    """Random bytes of a block, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return rng.bytes(key_bytes), rng.bytes(value_bytes)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> FakeGpu:
    """The device, in an order of events of the test's own. The store closes it, which fails if anything was wrong."""
    return FakeGpu(seed=zlib.crc32(request.node.name.encode()))


@pytest.fixture
def opened(tmp_path: Path, gpu: FakeGpu) -> Opener:
    """``opened(**settings)``: a scope of a store on ``tmp_path/kv``; device 0 is ``gpu``, or what ``on`` is."""
    arena = f"cascade-test-{uuid.uuid4().hex[:12]}"

    @contextlib.asynccontextmanager
    async def opener(on: FakeGpu = gpu, **settings: Any) -> AsyncIterator[ca.Store]:
        config = make_config(tmp_path / "kv", arena=arena, **{**SETTINGS, **settings})
        store = await open_with(config, open_driver=lambda ordinal: on)
        try:
            await store.wait_ready()  # before that nothing is page-locked, and copies are staged
            yield store
        finally:
            await store.aclose()

    return opener


@pytest.fixture
async def store(opened: Opener) -> AsyncIterator[ca.Store]:
    async with opened() as store:
        yield store
