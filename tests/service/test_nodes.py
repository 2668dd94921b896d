"""Services as if on nodes of their own: each with its own /dev/shm and its own network, and one root for both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import cascade_aio as ca
from cascade_aio.config import make_config
from cascade_aio.daemon.settings import arena_path
from cascade_aio.errors import BlockNotFoundError
from cascade_aio.testing.store import block_bytes, eventually
from tests.service.conftest import KEYS

START_SECONDS_MAX = 60.0
END_SECONDS_MAX = 60.0
ISOLATED = ["unshare", "--mount", "--net", "--propagation", "private", "--"]
OWN_SHM = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'


def isolated(*words: str) -> list[str]:
    """``words`` run with a network and a /dev/shm that nobody else sees."""
    return [*ISOLATED, "sh", "-c", OWN_SHM, "sh", *words]


def why_not() -> str | None:
    """Why there are no namespaces here; ``None`` if there are."""
    try:
        tried = subprocess.run(isolated("true"), capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no namespaces of our own: {error}"
    return f"no namespaces of our own (they take root): {tried.stderr.strip()}" if tried.returncode else None


@contextlib.asynccontextmanager
async def node(root: Path, socket: Path) -> AsyncIterator[ca.ServiceStore]:
    """A client of a service that is alone on its node."""
    words = [sys.executable, "-m", "cascade_aio", "serve", str(root), "--shm", "16MiB", "--socket", str(socket)]
    process = await asyncio.create_subprocess_exec(
        *isolated(*words), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with ca.connect(socket, wait_seconds=START_SECONDS_MAX) as store:
            yield store
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(END_SECONDS_MAX):
            _, told = await process.communicate()
        assert process.returncode == 0, told.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_what_one_node_flushed_another_reads(tmp_path: Path) -> None:
    reason = await asyncio.to_thread(why_not)
    if reason is not None:
        pytest.skip(reason)
    root = tmp_path / "kv"
    async with node(root, tmp_path / "a") as one, node(root, tmp_path / "b") as two:
        assert not os.path.exists(arena_path(make_config(root))), "neither arena is where everybody sees it"
        for number, (writer, reader) in enumerate([(one, two), (two, one)] * 2):
            name = await writer.put(*block_bytes(number), prefix=KEYS[number])
            await writer.flush()
            await eventually(lambda reader=reader, number=number: reader.contains(KEYS[number]))  # type: ignore[misc]
            async with reader.get(name) as block:
                assert (bytes(block.key), bytes(block.value)) == block_bytes(number)
        await one.delete(KEYS[0])
        await one.flush()

        async def forgotten() -> bool:
            await two.refresh()
            return not await two.contains(KEYS[0])

        await eventually(forgotten)
        with pytest.raises(BlockNotFoundError):
            await two.get(KEYS[0])
