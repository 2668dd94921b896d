"""A real file system that does not answer: ext4 on a loop device, frozen, as a hung server would leave it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import cascade_aio as ca
from tests.faults.harness import make_block, open_at, put

STALL_SECONDS = 2.0
"""More than a healthy disk takes for one request while others use it."""


@contextlib.contextmanager
def frozen(point: Path) -> Iterator[None]:
    """Writes to the file system at ``point`` hang within this scope."""
    if shutil.which("fsfreeze") is None:
        pytest.skip("fsfreeze is missing: install util-linux")
    done = subprocess.run(["fsfreeze", "-f", str(point)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be frozen here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(point)], check=True)


@pytest.mark.parametrize("io_backend", ["auto", "threads"])
async def test_a_frozen_file_system_hangs_nobody_and_is_written_when_it_thaws(
    small_disk: Path, io_backend: str
) -> None:
    settings = {
        "io_backend": io_backend,
        "shm_bytes": "8MiB",
        "segment_bytes": "4MiB",
        "stall_seconds_max": STALL_SECONDS,
    }
    some = [make_block(seed, 50_000, 100_000) for seed in range(12)]
    async with open_at(small_disk / "kv", **settings) as store:
        for block in some[:4]:
            await put(store, block)
        await store.flush()
        with frozen(small_disk):
            for block in some[4:]:
                await put(store, block)
            async with asyncio.timeout(120):
                with pytest.raises(ca.TierStalledError, match="not answered"):
                    await store.flush()
                with pytest.raises(ca.TierStalledError):
                    await store.flush()
            for block in some:
                async with store.get(block.block_id) as found:
                    assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)
            assert store.statistics()["disk"]["stalled"]
        async with asyncio.timeout(120):
            while store.statistics()["disk"]["stalled"]:  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0.01)
            await store.flush()
    async with open_at(small_disk / "kv", **settings) as store:
        for block in some:
            async with store.get(block.block_id) as found:
                assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)


_PROCESS = """
import asyncio, sys
import cascade_aio as ca
from tests.faults.harness import make_block

async def work():
    store = await ca.open_store(sys.argv[1], arena=sys.argv[2], shm_bytes="8MiB", stall_seconds_max=float(sys.argv[3]))
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    block = make_block(1, 50_000, 100_000)
    await store.put(block.key, block.value)
    await asyncio.sleep(0.1)
    try:
        await store.aclose()
    except ca.TierStalledError:
        print("given up", flush=True)

asyncio.run(work())
print("loop ended", flush=True)
"""


def test_a_process_whose_storage_hangs_comes_to_its_end(small_disk: Path) -> None:
    """The store closes and the event loop ends while the file system is frozen; the process goes when it thaws."""
    arena = f"cascade-test-{uuid.uuid4().hex[:12]}"
    command = [sys.executable, "-c", _PROCESS, str(small_disk / "kv"), arena, str(STALL_SECONDS)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with frozen(small_disk):
            begun_s = time.monotonic()
            child.stdin.write("go\n")
            child.stdin.flush()
            assert [child.stdout.readline() for _ in range(2)] == ["given up\n", "loop ended\n"]
            assert time.monotonic() - begun_s < 120
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.communicate()
