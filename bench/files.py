"""One file per block, one fsync each: what a sceptic would write in an hour, and a limit of it.

Blocks are written by a pool of as many threads as the store is given operations in flight, each
thread creating, writing, syncing and closing one file at a time. Buffered and O_DIRECT are both
offered; the better one counts. Directory entries are not synced, which favours this side.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def write_files(folder: pathlib.Path, blocks: Sequence[memoryview], threads: int, *, direct: bool) -> float:
    """Seconds until every block is in a file of its own and synced. Creates and removes ``folder``.

    ``direct`` needs page-aligned blocks of a multiple of 4096 bytes. Raises ``OSError``.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    folder.mkdir()
    base = str(folder)

    def write_one(index: int) -> None:
        fd = os.open(f"{base}/{index:08x}", flags, 0o600)
        try:
            rest = blocks[index]
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(time.sleep, [0.0] * threads))  # threads are started before the clock is
            started = time.perf_counter()
            for done in pool.map(write_one, range(len(blocks))):
                assert done is None
            return time.perf_counter() - started
    finally:
        shutil.rmtree(folder)
