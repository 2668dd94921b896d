"""The best streaming copy of this machine: every variant of the native copy, on one thread and on all.

The store's own copy is one of the variants, so what is compared is what the store adds to it. Each
thread copies its share of all pairs in one go: no hand-over between threads is in the timing. The
choice of the variant is a setting of the whole process; it is put back after every use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.data import scratch_memory
from bench.results import BenchError, Calibration
from bench.samples import median
from cascade_aio import _native

VARIANTS = ("avx512", "avx2", "sse2", "memcpy")
GB = 1e9
PASSES = 5

Pair = tuple[memoryview, memoryview]


def copy_gb_per_s(pairs: Sequence[Pair], variant: str, threads: int) -> float:
    """Rate of copying each source to its destination, ``(destination, source)``, split over ``threads``.

    Raises ``BenchError`` if this CPU does not have ``variant``.
    """
    shares = [[_share(pair, index, threads) for pair in pairs] for index in range(threads)]

    def run(share: list[Pair]) -> None:
        for destination, source in share:
            _native.copy(destination, source)

    total = sum(len(source) for _, source in pairs)
    before = _native.copy_variant()
    try:
        _native.select_copy(variant)
    except (OSError, ValueError) as error:
        raise BenchError(f"this CPU has no {variant} copy ({error})") from error
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(time.sleep, [0.0] * threads))  # threads are started before the clock is
            started = time.perf_counter()
            list(pool.map(run, shares))
            return total / (time.perf_counter() - started) / GB
    finally:
        _native.select_copy(before)


def calibrate_copy(block_bytes: int, cores: int, record: Callable[[list[Calibration]], None]) -> tuple[str, int]:
    """The fastest (variant, threads) for blocks of this size into a hot destination; median of 5 passes."""
    source, destination = scratch_memory(4 * block_bytes), scratch_memory(block_bytes)
    pairs = [(destination, source[i * block_bytes : (i + 1) * block_bytes]) for i in range(4)]
    cells: dict[tuple[str, int], list[float]] = {}
    notes: dict[tuple[str, int], str] = {}
    for variant in VARIANTS:
        for threads in sorted({1, cores}):
            try:
                cells[variant, threads] = [copy_gb_per_s(pairs, variant, threads) for _ in range(PASSES)]
            except BenchError as error:
                notes[variant, threads] = str(error)
    best = max(cells, key=lambda cell: median(cells[cell]))
    record(
        [
            Calibration(
                "copy",
                {"block_bytes": block_bytes, "variant": variant, "threads": threads},
                cells.get((variant, threads), []),
                (variant, threads) == best,
                notes.get((variant, threads), ""),
            )
            for variant, threads in [*cells, *notes]
        ]
    )
    return best


def _share(pair: Pair, index: int, threads: int) -> Pair:
    """Part ``index`` of ``threads`` of a copy, cut at pages."""
    destination, source = pair
    part = -(-len(source) // threads // 4096) * 4096
    start, stop = index * part, min((index + 1) * part, len(source))
    return destination[start:stop], source[start:stop]
