"""What every figure is handed: scratch folder, scale, limits, and the making of stores and rows.

A ``Session`` belongs to one run. It opens the stores under test, remembers how they were configured
and which I/O back end they took (a row cannot be made without), and hands finished rows on. It
must not know any single figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Literal

import cascade_aio as ca
from bench import machine
from bench.limits import DiskLimit
from bench.results import (
    BenchError,
    Calibration,
    Row,
    Scalar,
    Series,
    Target,
    now_text,
    pair_summary,
)
from bench.scale import SHM_BYTES_MAX, Scale
from bench.turns import Turns

OURS = "cascade"
EXTENT_OVERHEAD_BYTES = 2 * 4096
"""Header page of an extent and the padding of the two parts, per block, when arenas are sized."""
ARENA_FLOOR_BYTES = 8 << 20
SETTLE_SECONDS_MAX = 120.0
SETTLE_POLL_SECONDS = 0.02

_arena_numbers = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One row to be measured: its key, what it says, what it should reach."""

    figure: str
    title: str
    block_bytes: int
    variant: str = ""
    target: Target | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """How a store was opened: the part of a row that says what ran."""

    configuration: dict[str, Scalar]
    io_backend: str
    io_backend_reason: str


class Session:
    """See the module's text. ``folder`` is empty and ours; ``record`` keeps calibrations at once."""

    def __init__(
        self,
        folder: pathlib.Path,
        scale: Scale,
        *,
        repeats: int,
        seed: int,
        io_backend: str,
        calibrations: list[Calibration],
        record: Callable[[list[Calibration]], None],
    ) -> None:
        self.folder = folder
        self.scale = scale
        self.repeats = repeats
        self.seed = seed
        self.cores = machine.cores()
        self.record = record
        self.calibrations = calibrations
        self.disk = DiskLimit(folder, scale.grid, seed, calibrations, record)
        self.io_backend = io_backend
        self._opened: Opened | None = None

    @property
    def opened(self) -> Opened:
        """How the last store was opened."""
        assert self._opened is not None, "no store was opened yet"
        return self._opened

    def note_opened(self, statistics: Mapping[str, Any], settings: dict[str, Scalar]) -> None:
        """A service was started instead of a store opened: the rows that follow are about it."""
        self._opened = _describe(statistics, settings)

    def arena_bytes(self, block_bytes: int, blocks: int) -> int:
        """Arena for ``blocks`` blocks and a quarter more; raises ``BenchError`` above the limit."""
        wanted = max(ARENA_FLOOR_BYTES, (block_bytes + EXTENT_OVERHEAD_BYTES) * blocks * 5 // 4)
        if wanted > SHM_BYTES_MAX:
            raise BenchError(f"{wanted >> 20} MiB of shared memory are above the suite's limit of 4 GiB")
        return -(-wanted // (1 << 20)) << 20

    @staticmethod
    def new_arena_name() -> str:
        """A name that no other store of this machine uses; whoever takes it removes the arena."""
        return f"cascade-bench-{os.getpid()}-{next(_arena_numbers)}"

    @staticmethod
    def remove_arena(name: str) -> None:
        """Remove what a store left in shared memory under ``name``."""
        for left in pathlib.Path("/dev/shm").glob(f"{name}*"):
            left.unlink()

    @contextlib.contextmanager
    def root(self, name: str) -> Iterator[pathlib.Path]:
        """A root directory that is removed at the end, whatever happens."""
        path = self.folder / name
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)

    @contextlib.asynccontextmanager
    async def open(self, root: pathlib.Path, *, shm_bytes: int, **settings: Scalar) -> AsyncIterator[ca.Store]:
        """A store on ``root`` with an arena of its own, so that nothing an earlier store had in memory
        is found; the arena is removed at the end. What is yielded has all of its arena populated: the
        first touch of memory is a cost of starting, paid in the background, and not of any figure."""
        arena = self.new_arena_name()
        settings = {"shm_bytes": shm_bytes, "io_backend": self.io_backend, **settings}
        try:
            async with ca.open_store(root, arena=arena, **settings) as store:
                self._opened = _describe(store.statistics(), settings)
                await _settled(store)
                yield store
        finally:
            self.remove_arena(arena)

    def row(
        self,
        line: Line,
        *,
        ours: Series,
        turns: Turns | None = None,
        other: Series | None = None,
        extra: list[Series] | None = None,
        temperature: Literal["hot", "cold", "durable", "none"],
        checked: str,
        verified_bytes: int,
        notes: str = "",
    ) -> Row:
        """The row of ``line`` from its series; ratios are of ``ours`` to ``other``, pair by pair."""
        ratios, ratio = pair_summary(ours, other) if other is not None else ([], None)
        return Row(
            figure=line.figure,
            title=line.title,
            block_bytes=line.block_bytes,
            variant=line.variant,
            date=now_text(),
            system=OURS,
            temperature=temperature,
            checked=checked,
            verified_bytes=verified_bytes,
            io_backend=self.opened.io_backend,
            io_backend_reason=self.opened.io_backend_reason,
            configuration=self.opened.configuration,
            seed=self.seed,
            repeats=len(ours.samples),
            order=turns.order if turns is not None else [],
            ours=ours,
            other=other,
            extra=extra or [],
            ratios=ratios,
            ratio=ratio,
            target=line.target,
            notes=notes,
        )


async def _settled(store: ca.Store) -> None:
    """Wait until the arena is populated. Raises ``BenchError`` if that never comes to an end."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while (shm := store.statistics()["shm"])["ready_bytes"] < shm["capacity_bytes"]:
        if time.monotonic() > deadline:
            raise BenchError(
                f"after {SETTLE_SECONDS_MAX:.0f} s only {shm['ready_bytes']} of {shm['capacity_bytes']} bytes of the "
                "arena were populated: this machine is too short of memory, or too busy, to measure"
            )
        await asyncio.sleep(SETTLE_POLL_SECONDS)


def _describe(statistics: Mapping[str, Any], settings: dict[str, Scalar]) -> Opened:
    io = statistics["io"]
    return Opened(dict(settings), str(io["backend"]), "; ".join(io["notes"]) or f"as asked: {settings['io_backend']}")
