"""Helper processes of the service figures: ``python -m bench.service_child DEED SOCKET …``.

``read``: a client that reads blocks into its own buffers. ``churn``: starts clients that connect, take
leases and are killed; it forks, so that 1,000 processes do not cost 1,000 starts of Python.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

import cascade_aio as ca
from bench.data import scratch_memory

CLIENTS_AT_ONCE = 8


async def read(path: str, block_bytes: str, *names: str) -> None:
    """Each line is a number of passes over ``names``; the answer is begin and end on the machine's clock."""
    memory = scratch_memory(int(block_bytes))
    half = int(block_bytes) // 2
    async with ca.connect(path) as store:
        ids = [ca.BlockId.from_hex(name) for name in names]
        await _passes(store, ids, memory[:half], memory[half:], 1)
        _say("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            began_s = time.monotonic()
            await _passes(store, ids, memory[:half], memory[half:], int(line))
            _say(json.dumps([began_s, time.monotonic()]))


async def _passes(
    store: ca.ServiceStore, ids: list[ca.BlockId], key: memoryview, value: memoryview, passes: int
) -> None:
    for _ in range(passes):
        for name in ids:
            await store.read_into(name, key, value)


def churn(path: str, *names: str) -> None:
    """Each line is a number of clients; the answer is how many had their leases when they were killed."""
    _say("ready")
    for line in sys.stdin:
        left, running, armed = int(line), 0, 0
        while left or running:
            while left and running < CLIENTS_AT_ONCE:
                if os.fork() == 0:
                    asyncio.run(_lease_and_die(path, names))
                left, running = left - 1, running + 1
            _, status = os.wait()
            running -= 1
            armed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        _say(json.dumps([armed]))


async def _lease_and_die(path: str, names: tuple[str, ...]) -> None:
    store = await ca.connect(path, workers=1)
    leases = [await store.get(name) for name in names]
    assert all(len(lease.value) for lease in leases)
    os.kill(os.getpid(), signal.SIGKILL)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(deed: str, *words: str) -> None:
    """The command."""
    deeds: dict[str, Any] = {"read": read, "churn": churn}
    outcome = deeds[deed](*words)
    if outcome is not None:
        asyncio.run(outcome)


if __name__ == "__main__":
    main(*sys.argv[1:])
