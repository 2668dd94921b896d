"""The digest alone on all cores: the limit of anything that names blocks by their content."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cascade_aio.model import compute_digest


def digest_seconds(blocks: Sequence[tuple[memoryview, memoryview]], digest: str, threads: int) -> float:
    """Seconds to digest ``key ‖ value`` of every block, one thread per core, one block per call.

    The hash functions release the GIL for the whole of each call, so nothing but hashing is timed.
    """

    def run(block: tuple[memoryview, memoryview]) -> bytes:
        key, value = block
        return compute_digest(key, value, digest)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.0] * threads))  # threads are started before the clock is
        started = time.perf_counter()
        for found in pool.map(run, blocks):
            assert len(found) == 32
        return time.perf_counter() - started
