"""Ranks of the benchmark's own test."""

from __future__ import annotations

import pathlib

from bench.mpi import figures, running


async def measure(scratch: str, out: str) -> list[str]:
    """A quick run; rank 0 writes the file and tells the names of its figures."""
    command = ["python", "-m", "bench", "mpi", "run", "--quick"]
    file = await running.run(figures.QUICK, running.QUICK_BLOCK_BYTES, pathlib.Path(scratch), command)
    if file is None:
        return []
    running.save(pathlib.Path(out), file)
    return [figure.name for figure in file.figures]
