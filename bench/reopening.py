"""A fresh process that opens one root and says, in one line of JSON, what it cost.

``python -m bench.reopening '{"root": …, "empty": …, "settings": …, "traced": …}'``. A process of its
own, because memory and warm caches of an earlier opening would be counted. It first opens and closes
an empty root, so that imports and the first use of threads and ring are not counted either.
"""

from __future__ import annotations

import asyncio
import gc
import json
import pathlib
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import msgspec

import cascade_aio as ca
from bench.machine import REPOSITORY, resident_bytes
from bench.results import BenchError

REOPEN_SECONDS_MAX = 600.0


class Reopened(msgspec.Struct, frozen=True):
    """What opening a root cost. Memory in bytes, growth from before the opening to after it."""

    seconds: float
    blocks: int
    resident_bytes: int
    traced_bytes: int
    """By tracemalloc, NumPy included; 0 if the opening was not traced."""
    index_bytes: int
    """What the store itself says its index takes."""
    backend: str
    notes: str


def reopen(root: pathlib.Path, empty: pathlib.Path, settings: dict[str, Any], *, traced: bool) -> Reopened:
    """Open ``root`` in a new process. Raises ``BenchError`` with the child's words if it fails."""
    request = {"root": str(root), "empty": str(empty), "settings": settings, "traced": traced}
    done = subprocess.run(
        [sys.executable, "-m", "bench.reopening", json.dumps(request)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=REOPEN_SECONDS_MAX,
    )
    if done.returncode != 0:
        raise BenchError(f"the process that opens the root failed: {done.stderr.strip()[-2000:]}")
    return msgspec.json.decode(done.stdout, type=Reopened)


async def _measure(request: dict[str, Any]) -> Reopened:
    settings = request["settings"]
    async with ca.open_store(request["empty"], **settings):
        pass
    gc.collect()
    if request["traced"]:
        tracemalloc.start()
    before = resident_bytes()
    started = time.perf_counter()
    async with ca.open_store(request["root"], **settings) as store:
        seconds = time.perf_counter() - started
        gc.collect()
        resident = resident_bytes() - before
        traced = tracemalloc.get_traced_memory()[0] if request["traced"] else 0
        statistics = store.statistics()
        return Reopened(
            seconds=seconds,
            blocks=len(store),
            resident_bytes=resident,
            traced_bytes=traced,
            index_bytes=int(statistics["index_bytes"]),
            backend=str(statistics["io"]["backend"]),
            notes="; ".join(statistics["io"]["notes"]),
        )


def main() -> None:
    """Measure what the only argument asks for and print it."""
    measured = asyncio.run(_measure(json.loads(sys.argv[1])))
    print(msgspec.json.encode(measured).decode())


if __name__ == "__main__":
    main()
