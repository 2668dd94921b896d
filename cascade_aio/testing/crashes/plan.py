"""What a seed decides: settings, companions, and how each generation of writers dies. Pure."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from cascade_aio.config import MIB
from cascade_aio.testing.crashes.check import arena_of
from cascade_aio.testing.crashes.child import ChildPlan
from cascade_aio.testing.crashes.dying import PHASES

RUN_SECONDS_MAX = 0.8
"""A timed kill comes at most so long after the store was opened."""

FAULT_SECONDS_MIN = 0.05
FAULT_SECONDS_MAX = 0.4
"""So long a writer lives on a file system that fails."""

CALLS_MAX = 300
"""A counted kill comes at one of so many changing calls."""

UNIVERSE_BLOCKS = 128
UNIVERSE_STEP = 1024
"""Blocks of one writer, and numbers between those of two. A multiple of the chain, so that prompts are not shared."""


@dataclasses.dataclass(frozen=True, slots=True)
class Death:
    """How the writers of one generation end: killed by ``phase``, at a call or after ``seconds``.

    ``fault``: what the file system suffers first, ``fault_seconds`` before they are killed.
    """

    phase: str
    seconds: float
    fault: str | None = None
    fault_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class SeedPlan:
    """What one seed decides for all of its generations. ``faults``: what its file system can suffer."""

    seed: int
    io_backend: str
    segment_bytes: int
    request_bytes_max: int
    disk_bytes: int | None
    with_reader: bool
    writers: int
    faults: tuple[str, ...]

    @classmethod
    def of(cls, seed: int, faults: Sequence[str] = ()) -> SeedPlan:
        """Every fourth seed has a disk budget, every third a reader, every other one the thread back end.

        Of those without a budget, one in five has two and one in five three writers.
        """
        rng = random.Random(seed)
        disk_bytes = 16 * MIB if seed % 4 == 2 else None
        return cls(
            seed,
            io_backend="threads" if seed % 2 else "auto",
            segment_bytes=rng.choice((1, 2, 4)) * MIB,
            request_bytes_max=rng.choice((64 << 10, MIB)),
            disk_bytes=disk_bytes,
            with_reader=seed % 3 == 0,
            writers=1 if disk_bytes else {3: 2, 4: 3}.get(seed % 5, 1),
            faults=tuple(faults),
        )

    def first_block(self, writer: int, generation: int) -> int:
        """The blocks of a writer: each generation takes over those that another writer had before."""
        return (writer + generation) % self.writers * UNIVERSE_STEP

    def death(self, generation: int) -> Death:
        """How this generation ends. Where the file system can be made to fail, every other one meets that."""
        rng = self._rng(generation)
        if self.faults and rng.random() < 0.5:
            fault = rng.choice(self.faults)
            return Death(
                fault, rng.random() * RUN_SECONDS_MAX, fault, rng.uniform(FAULT_SECONDS_MIN, FAULT_SECONDS_MAX)
            )
        return Death(rng.choice(("time", "time", "time", "opening", *PHASES)), rng.random() * RUN_SECONDS_MAX)

    def child(self, root: Path, shm_dir: Path, generation: int, writer: int) -> ChildPlan:
        """One writer of one generation. Only the first dies by itself."""
        rng = self._rng(generation)
        death = self.death(generation)
        counted = writer == 0 and death.phase in PHASES
        die_at = int(CALLS_MAX ** rng.random())
        rng = random.Random(rng.getrandbits(32) + writer)
        return ChildPlan(
            str(root),
            str(shm_dir),
            arena_of(writer),
            seed=rng.getrandbits(32),
            io_backend=self.io_backend,
            first_block=self.first_block(writer, generation),
            universe=UNIVERSE_BLOCKS,
            segment_bytes=self.segment_bytes,
            request_bytes_max=self.request_bytes_max,
            disk_bytes=self.disk_bytes,
            tail_seconds_max=rng.choice((0.02, 0.2, 5.0)),
            adopt_seconds=rng.choice((0.05, 60.0)),
            die_at=die_at if counted else 0,
            phase=death.phase if counted else "before",
            may_fail=death.fault is not None,
        )

    def _rng(self, generation: int) -> random.Random:
        return random.Random(self.seed * 1009 + generation)
