"""An owner of an arena that is killed, and the next one: a process each, for the figure ``arena_adoption``.

``python -m bench.adopting '{"deed": "fill" | "adopt", "root": …, "settings": …, …}'`` answers with one line of JSON.
``fill`` puts blocks, makes them durable and kills itself; ``adopt`` opens what is left and compares every byte.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import msgspec

import cascade_aio as ca
from bench.blocks import compare_and_release, lease_all, put_all
from bench.data import Pool
from bench.machine import REPOSITORY
from bench.results import BenchError

SECONDS_MAX = 600.0
AT_ONCE = 4
POOL_BLOCKS = 64
"""Blocks of one round: content is the same but for the stamp, so that memory is not."""


class Adopted(msgspec.Struct, frozen=True):
    """What the next owner found. ``seconds``: from the call of ``open_store`` to the first block in hand."""

    seconds: float
    blocks: int
    served_from_disk: int
    verified_bytes: int
    statistics: dict[str, Any]


def fill(root: pathlib.Path, settings: dict[str, Any], *, block_bytes: int, rounds: int, seed: int) -> None:
    """Let a process fill the arena ``settings`` names and die by SIGKILL. Raises ``BenchError``."""
    _child({"deed": "fill", "root": str(root), "settings": settings, "block_bytes": block_bytes, "rounds": rounds,
            "seed": seed}, -signal.SIGKILL)  # fmt: skip


def adopt(root: pathlib.Path, settings: dict[str, Any], *, block_bytes: int, rounds: int, seed: int) -> Adopted:
    """Open it again in another process. Raises ``BenchError``."""
    answer = _child({"deed": "adopt", "root": str(root), "settings": settings, "block_bytes": block_bytes,
                     "rounds": rounds, "seed": seed}, 0)  # fmt: skip
    return msgspec.json.decode(answer, type=Adopted)


def _child(request: dict[str, Any], code: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bench.adopting", json.dumps(request)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_MAX,
    )
    if done.returncode != code:
        raise BenchError(f"the process that was to {request['deed']} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


async def _fill(request: dict[str, Any]) -> None:
    store = await ca.open_store(request["root"], **request["settings"])
    await store.wait_ready()
    with Pool(request["block_bytes"], POOL_BLOCKS, request["seed"]) as pool:
        for number in range(request["rounds"]):
            pool.stamp(number)
            await put_all(store, pool, AT_ONCE)
    await store.flush()
    os.kill(os.getpid(), signal.SIGKILL)


async def _adopt(request: dict[str, Any]) -> Adopted:
    rounds = range(request["rounds"])
    with Pool(request["block_bytes"], POOL_BLOCKS, request["seed"]) as pool:
        ids: list[list[ca.BlockId]] = []
        for number in rounds:
            pool.stamp(number)
            ids.append([ca.compute_block_id(*pool.parts(index)) for index in range(pool.count)])
        started = time.perf_counter()
        async with ca.open_store(request["root"], **request["settings"]) as store:
            (await store.get(ids[0][0])).release()
            seconds = time.perf_counter() - started
            verified = 0
            for number in rounds:
                pool.stamp(number)
                verified += compare_and_release(await lease_all(store, ids[number], AT_ONCE), pool)
            statistics = store.statistics()
            read = statistics["disk"]["records_read"]
            return Adopted(seconds, len(store), read, verified, dict(statistics))


def main() -> None:
    """Do what the only argument asks for."""
    request = json.loads(sys.argv[1])
    if request["deed"] == "fill":
        asyncio.run(_fill(request))
    print(msgspec.json.encode(asyncio.run(_adopt(request))).decode())


if __name__ == "__main__":
    main()
