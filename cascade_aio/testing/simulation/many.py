"""Many runs, in this process or in several."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import multiprocessing
from collections.abc import Iterable, Sequence

from cascade_aio.testing.simulation.report import Tally
from cascade_aio.testing.simulation.runner import Outcome, simulate

Piece = tuple[Tally, list[Outcome]]
"""The sums of some runs, and the runs that failed, without their histories."""


def run_piece(seeds: tuple[int, int]) -> Piece:
    """Run the seeds from the first up to, not including, the second."""
    gc.freeze()  # what is loaded by now is not looked through after each run
    tally, failed = Tally(seeds[0]), []
    for seed in range(*seeds):
        outcome = simulate(seed)
        tally.add(outcome)
        if outcome.failure is not None:
            outcome.events.clear()
            failed.append(outcome)
    return tally, failed


def map_pieces(pieces: Sequence[tuple[int, int]], workers: int, stack: contextlib.ExitStack) -> Iterable[Piece]:
    """``run_piece`` of each, in order; with more than one worker in processes that ``stack`` ends."""
    if workers == 1:
        return map(run_piece, pieces)
    context = multiprocessing.get_context("spawn")
    pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(workers, mp_context=context))
    return pool.map(run_piece, pieces)
