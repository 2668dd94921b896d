"""How much is measured: the full run and the quick one that the tests make.

The two run the same code. The quick one shrinks blocks and rounds to a few MiB so that it can be
part of every test run; its numbers mean nothing and are never put into the README.
"""

from __future__ import annotations

import dataclasses

from bench.limits import DiskGrid

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
DISK_BYTES_MAX = 8 * GIB
"""Everything a run has on disk at any time."""
SHM_BYTES_MAX = 4 * GIB
REPEATS_MIN = 5
"""Fewer repetitions have no median worth printing; only quick runs may have fewer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of one kind of run. ``shrink`` divides block sizes, a power of two."""

    quick: bool
    shrink: int
    round_bytes: int
    """What each side moves in one repetition: short, so that pairs are next to each other."""
    disk_bytes: int
    """Budget of a figure's files, both sides together, preallocation aside."""
    repeats: int
    hot_operations: int
    """Single operations timed per repetition of a latency figure."""
    small_blocks: int
    lag_seconds: float
    """How long the lag of an idle and of a busy machine is observed; also the least for the store."""
    index_blocks: int
    grid: DiskGrid

    def block_bytes(self, nominal_bytes: int) -> int:
        """The block size to run for a nominal one; at least two pages."""
        return max(8 * KIB, nominal_bytes // self.shrink)

    def blocks(self, block_bytes: int, rounds: int, in_flight: int) -> int:
        """Blocks per round such that ``rounds`` of them fit the disk budget; at least ``in_flight``."""
        fits = min(self.round_bytes, self.disk_bytes // rounds) // block_bytes
        return max(fits, in_flight)


FULL = Scale(
    quick=False,
    shrink=1,
    round_bytes=2 * GIB,
    disk_bytes=DISK_BYTES_MAX - GIB,
    repeats=REPEATS_MIN,
    hot_operations=50_000,
    small_blocks=4096,
    lag_seconds=3.0,
    index_blocks=1_000_000,
    grid=DiskGrid(),
)
QUICK = Scale(
    quick=True,
    shrink=64,
    round_bytes=4 * MIB,
    disk_bytes=64 * MIB,
    repeats=2,
    hot_operations=200,
    small_blocks=128,
    lag_seconds=0.05,
    index_blocks=2_000,
    grid=DiskGrid(4 * MIB, (256 * KIB, MIB), (4,), (MIB,), (4,)),
)
