"""The index at a million blocks: memory per block, and the time to open such a root again.

On a synthetic root (``bench.synthetic``), each opening in a fresh process. The first opening of all
reads every segment's footer and leaves a checkpoint when it closes; the measured ones start from
that. The page cache of the root's files is dropped before each.
"""

from __future__ import annotations

import functools
import os
import pathlib

from bench.figures import Case
from bench.reopening import Reopened, reopen
from bench.results import BenchError, Row, Scalar, Target, make_series
from bench.scale import Scale
from bench.session import OURS, Line, Session
from bench.synthetic import BLOCK_BYTES, make_root

SHM_BYTES = 16 << 20
NAMED = {"one prefix key per block": True, "no prefix keys": False}
CHECKED = (
    "fresh process per repetition; synthetic root: real headers and footers, payloads are holes; number of blocks "
    "checked, no bytes to compare; page cache of its files dropped before each opening"
)


def cases(scale: Scale) -> list[Case]:
    """Rows "index memory per block" and "reopening a root", with and without prefix keys."""
    memory = Target("value", 250.0, at_least=False)
    seconds = Target("value", 5.0, at_least=False)
    blocks = f"{scale.index_blocks:,} blocks"
    return [
        Case(
            (
                Line("index_memory", f"index memory per block, {blocks}, {kind}", BLOCK_BYTES, kind, memory),
                Line("reopen", f"reopening a root of {blocks} with checkpoint, {kind}", BLOCK_BYTES, kind, seconds),
            ),
            functools.partial(_measure, named=named),
        )
        for kind, named in NAMED.items()
    ]


async def _measure(session: Session, lines: tuple[Line, ...], *, named: bool) -> list[Row]:
    memory_line, reopen_line = lines
    blocks = session.scale.index_blocks
    settings: dict[str, Scalar] = {"shm_bytes": SHM_BYTES, "disk_bytes": 8 * blocks * BLOCK_BYTES}
    with session.root("index") as root, session.root("index-empty") as empty:
        async with session.open(empty, shm_bytes=SHM_BYTES):
            pass  # tells the rows which back end it is
        arena = session.new_arena_name()
        given = {**settings, "arena": arena, "io_backend": session.io_backend}
        try:
            await make_root(root, blocks, named=named, **given)
            first = reopen(root, empty, given, traced=False)
            traced = reopen(root, empty, given, traced=True)
            runs: list[Reopened] = []
            for _ in range(session.repeats):
                _drop_page_cache(root)
                runs.append(reopen(root, empty, given, traced=False))
        finally:
            session.remove_arena(arena)
    wrong = [run.blocks for run in (first, traced, *runs) if run.blocks != blocks]
    if wrong:
        raise BenchError(f"a root of {blocks} blocks was opened with {wrong[0]}: the figure is void")
    kept = "index as the store counts it"
    return [
        session.row(
            memory_line,
            ours=make_series(OURS, "bytes", [run.resident_bytes / blocks for run in runs]),
            extra=[
                make_series("traced", "bytes", [traced.traced_bytes / blocks]),
                make_series(kept, "bytes", [run.index_bytes / blocks for run in runs]),
            ],
            temperature="none",
            checked=CHECKED,
            verified_bytes=0,
            notes="growth of the process's private resident memory while opening; traced: tracemalloc",
        ),
        session.row(
            reopen_line,
            ours=make_series(OURS, "s", [run.seconds for run in runs]),
            extra=[make_series("without checkpoint", "s", [first.seconds])],
            temperature="cold",
            checked=CHECKED,
            verified_bytes=0,
        ),
    ]


def _drop_page_cache(root: pathlib.Path) -> None:
    """Tell the kernel to forget what it caches of the root's files; they were synced when written."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
