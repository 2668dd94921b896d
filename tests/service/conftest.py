"""Services for tests: in this process, small, on a root and an arena of their own."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cascade_aio as ca
from cascade_aio.config import make_config
from cascade_aio.daemon import Service, ServiceConfig, ServiceStore, connect, serve
from cascade_aio.tiers.arena import remove_arena


@contextlib.asynccontextmanager
async def running(root: Path, *, service: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[Service]:
    """A service on ``root`` with a small arena."""
    defaults = {"shm_bytes": "16MiB", "segment_bytes": "8MiB", "arena": f"cascade-test-{uuid.uuid4().hex[:12]}"}
    config = make_config(root, **{**defaults, **settings})
    try:
        async with serve(config, ServiceConfig(**(service or {}))) as made:
            yield made
    finally:
        if "arena" not in settings:
            forget_arena(str(config.arena))


def forget_arena(name: str) -> None:
    """A service keeps its arena for the next one; there is none."""
    remove_arena(f"/dev/shm/{name}")


@contextlib.asynccontextmanager
async def served(root: Path, **settings: Any) -> AsyncIterator[ServiceStore]:
    """A client of a service of its own."""
    async with running(root, **settings) as service, connect(service.socket_path) as store:
        yield store


KEYS = ca.prefix_keys(range(64), block_tokens=8, namespace="service")
