"""A client process for tests of the node service: does one thing, says so on stdout, and waits to be killed.

``python -m cascade_aio.testing.service_child SOCKET DEED``; each line on stdout is one event.
"""

from __future__ import annotations

import asyncio
import os
import sys

import numpy as np

import cascade_aio as ca

HOLD_SECONDS = 120.0


async def hold_leases(store: ca.ServiceStore) -> None:
    """Lease every block there is."""
    names = [info.block_id async for info in store.blocks()]
    leases = [await store.get(name) for name in names]
    _say(f"holding {len(leases)}")
    await asyncio.sleep(HOLD_SECONDS)


async def hold_reservations(store: ca.ServiceStore) -> None:
    """Reserve twice, fill a little."""
    async with store.reserve(key_bytes=1 << 20, value_bytes=1 << 20) as one:
        one.key[:100] = 1
        async with store.reserve(key_bytes=100, value_bytes=100) as two:
            two.value[:] = 2
            _say("holding 2")
            await asyncio.sleep(HOLD_SECONDS)


async def put_for_ever(store: ca.ServiceStore) -> None:
    """Put random blocks, several at a time."""
    rng = np.random.default_rng(os.getpid())

    async def put() -> None:
        while True:
            await store.put(b"", rng.bytes(1 << 20))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(put())
        await asyncio.sleep(0.2)
        _say("putting")


async def stream_for_ever(store: ca.ServiceStore) -> None:
    """Be in the middle of a stream."""
    names = [info.block_id async for info in store.blocks()]
    async with store.stream(names) as blocks:
        await anext(blocks)
        _say("streaming")
        await asyncio.sleep(HOLD_SECONDS)


DEEDS = {deed.__name__: deed for deed in (hold_leases, hold_reservations, put_for_ever, stream_for_ever)}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def main(path: str, deed: str) -> None:
    """Connect and do it."""
    async with ca.connect(path, client=deed) as store:
        await DEEDS[deed](store)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
