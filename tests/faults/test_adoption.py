"""A writer process is killed under load; two other processes try to adopt what it left, at the same moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.faults.harness import make_block, open_at

_VICTIM = """
import asyncio, sys
import cascade_aio as ca
from tests.faults.harness import make_block

async def work():
    settings = dict(shm_dir=sys.argv[2], arena="victim", shm_bytes="8MiB", segment_bytes="1MiB")
    async with ca.open_store(sys.argv[1], **settings) as store:
        for seed in range(20):
            block = make_block(seed, 50_000, 100_000)
            await store.put(block.key, block.value)
        await store.flush()
        print("flushed", flush=True)
        for seed in range(1000, 100_000):
            block = make_block(seed, 50_000, 100_000)
            await store.put(block.key, block.value)

asyncio.run(work())
"""

_ADOPTER = """
import asyncio, json, sys
import cascade_aio as ca
from tests.faults.harness import make_block

async def work():
    settings = dict(shm_dir=sys.argv[2], arena=sys.argv[3], shm_bytes="8MiB", adopt_seconds=None)
    async with ca.open_store(sys.argv[1], **settings) as store:
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        report = await store.adopt()
        await store.refresh()
        for seed in range(20):
            block = make_block(seed, 50_000, 100_000)
            async with store.get(block.block_id) as found:
                assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)
        own = sum(entry.own for entry in store._context.disk.table)
        print(json.dumps([list(report.writers), report.segments, own, store.statistics()["damage"]]), flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(work())
"""


async def test_two_processes_race_for_the_segments_of_a_dead_one(tmp_path: Path) -> None:
    root, shm = str(tmp_path / "kv"), tmp_path / "shm"
    shm.mkdir()

    def start(code: str, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, root, str(shm), name]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    children: list[subprocess.Popen[str]] = []
    try:
        for code, name in ((_ADOPTER, "one"), (_ADOPTER, "two"), (_VICTIM, "victim")):
            child = start(code, name)
            children.append(child)
            assert child.stdout is not None
            assert child.stdout.readline() in ("open\n", "flushed\n")
        victim = children.pop()
        victim.kill()
        victim.communicate()
        for child in children:
            _tell(child)
        found = []
        for child in children:
            assert child.stdout is not None
            found.append(json.loads(child.stdout.readline()))
        for child in children:
            _tell(child)
            assert child.wait(60) == 0
    finally:
        for child in children:
            child.kill()
            child.communicate()
    writers = [one for one in found if one[0]]
    assert len(writers) == 1, "exactly one adopted"
    assert writers[0][1] == writers[0][2] >= 3
    assert sorted(one[2] for one in found)[0] == 0
    assert all(one[3] == [] for one in found)
    async with open_at(Path(root)) as store:
        assert (await store.verify()).damage == ()
        assert all(make_block(seed, 50_000, 100_000).block_id in store for seed in range(20))


def _tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()
