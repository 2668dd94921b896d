"""How a client comes to a service: by its socket, or by the root that it serves; what is said where there is none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import cascade_aio as ca
from cascade_aio.config import make_config
from cascade_aio.daemon.settings import arena_path
from cascade_aio.errors import ConfigError, ServiceUnavailableError
from cascade_aio.tiers.arena import remove_arena
from tests.service.conftest import running


async def test_a_root_leads_to_its_service(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    try:
        async with running(root, arena=None) as service:
            assert ca.socket_path_of(root) == service.socket_path
            async with ca.connect(root=root) as store:
                name = await store.put(b"key", b"value")
                assert await store.contains(name)
    finally:
        remove_arena(arena_path(make_config(root)))


async def test_a_root_that_nobody_serves(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory"):
        ca.connect(root=tmp_path / "nowhere")
    with pytest.raises(ServiceUnavailableError, match="cascade-aio serve"):
        await ca.connect(root=tmp_path, wait_seconds=0)


@pytest.mark.parametrize(("kind", "complaint"), [("file", "is a file and no socket"), ("directory", r"connect\(root=")])
async def test_what_is_no_socket_is_named_at_once(tmp_path: Path, kind: str, complaint: str) -> None:
    path = tmp_path / "there"
    path.touch() if kind == "file" else path.mkdir()
    async with asyncio.timeout(60):
        with pytest.raises(ConfigError, match=complaint):
            await ca.connect(path, wait_seconds=3600)


def test_a_service_is_named_once() -> None:
    with pytest.raises(ConfigError, match="name the service"):
        ca.connect()
    with pytest.raises(ConfigError, match="name the service"):
        ca.connect("/x", root="/y")
