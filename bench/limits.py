"""The raw limit of the device: io_uring with O_DIRECT and no store around it, at its best setting.

One fixed setting understates a fast device by half, so each direction is calibrated first: every
request size times every depth, registered and plain memory, fio where installed; the best few run
again in turns and the best median is taken. Every cell is kept in the result file. What is taken is
then used for the pairs, next to our side, because the device drifts within a minute.

Writes go to a fresh, preallocated file, as a store's do, and include the fdatasync; creating and
removing the file is outside the timing. Reads are of a file written the same way.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from bench import fio
from bench.data import Pool, scratch_memory
from bench.raw_ring import RawRing
from bench.results import Calibration, CannotRunError
from bench.samples import median

MIB = 1 << 20
GB = 1e9
FINALISTS = 4
"""How many of the first pass run again …"""
FINAL_PASSES = 3
"""… this many times, in turns; the device is too noisy for one pass to decide."""


@dataclasses.dataclass(frozen=True, slots=True)
class DiskGrid:
    """What the calibration tries. Every request size divides ``total_bytes``."""

    total_bytes: int = 512 * MIB
    request_bytes: tuple[int, ...] = (MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB)
    depths: tuple[int, ...] = (8, 16, 32)
    fio_request_bytes: tuple[int, ...] = (MIB, 4 * MIB, 8 * MIB)
    fio_depths: tuple[int, ...] = (16, 32)


@dataclasses.dataclass(frozen=True, slots=True)
class DiskSetting:
    tool: str
    """``io_uring`` (our loop) or ``fio``."""
    request_bytes: int
    depth: int
    registered: bool = False

    @property
    def text(self) -> str:
        memory = ", registered" if self.registered else ""
        return f"{self.tool} O_DIRECT, {self.request_bytes >> 10} KiB x {self.depth}{memory}"


class DiskLimit:
    """Raw reads and writes in ``folder`` at the best setting, calibrated when first needed.

    ``known`` are calibrations of an earlier part of the same run, ``record`` is told new ones.
    Blocks while it measures. Raises ``CannotRunError`` where io_uring is not available.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        grid: DiskGrid,
        seed: int,
        known: Sequence[Calibration],
        record: Callable[[list[Calibration]], None],
    ) -> None:
        self._folder = folder
        self._grid = grid
        self._seed = seed
        self._record = record
        self._chosen: dict[str, DiskSetting] = {}
        for cell in known:
            if cell.chosen and cell.limit in ("disk write", "disk read"):
                self._chosen[cell.limit] = DiskSetting(**cell.setting)  # type: ignore[arg-type]
        self._reading = folder / "raw-read"
        self._readable_bytes = 0

    def setting(self, *, write: bool) -> DiskSetting:
        """The best setting of one direction; calibrates first if that has not been done."""
        limit = "disk write" if write else "disk read"
        if limit not in self._chosen:
            self._chosen[limit] = self._calibrate(limit, write=write)
        return self._chosen[limit]

    def write_gb_per_s(self, source: memoryview) -> float:
        """Rate of writing ``source`` (page-aligned) to a fresh preallocated file, fdatasync included."""
        return self._write(source, self.setting(write=True))

    def read_gb_per_s(self, total_bytes: int) -> float:
        """Rate of reading ``total_bytes`` of a file that was written before (outside the timing)."""
        setting = self.setting(write=False)
        self._prepare(total_bytes)
        return self._read(total_bytes, setting)

    def close(self) -> None:
        """Remove the file that reads use."""
        self._reading.unlink(missing_ok=True)
        self._readable_bytes = 0

    def _write(self, source: memoryview, setting: DiskSetting) -> float:
        path = self._folder / "raw-write"
        try:
            if setting.tool == "fio":
                return fio.fio_gb_per_s(path, len(source), setting.request_bytes, setting.depth, write=True)
            with RawRing(setting.depth) as ring:
                seconds = ring.write_file(path, source, setting.request_bytes, registered=setting.registered)
            return len(source) / seconds / GB
        finally:
            path.unlink(missing_ok=True)

    def _read(self, total_bytes: int, setting: DiskSetting) -> float:
        if setting.tool == "fio":
            return fio.fio_gb_per_s(self._reading, total_bytes, setting.request_bytes, setting.depth, write=False)
        buffers = scratch_memory(setting.request_bytes * setting.depth)
        with RawRing(setting.depth) as ring:
            seconds = ring.read_file(
                self._reading, total_bytes, buffers, setting.request_bytes, registered=setting.registered
            )
        return total_bytes / seconds / GB

    def _prepare(self, total_bytes: int) -> None:
        if self._readable_bytes >= total_bytes:
            return
        self._reading.unlink(missing_ok=True)
        with Pool(2 * 4096, -(-total_bytes // (2 * 4096)), self._seed) as pool, RawRing(8) as ring:
            ring.write_file(self._reading, pool.view, MIB, registered=False)
        self._readable_bytes = total_bytes

    def _candidates(self) -> list[DiskSetting]:
        grid = self._grid
        ours = [
            DiskSetting("io_uring", request_bytes, depth, registered)
            for request_bytes in grid.request_bytes
            for depth in grid.depths
            for registered in (False, True)
        ]
        theirs = [
            DiskSetting("fio", request_bytes, depth)
            for request_bytes in grid.fio_request_bytes
            for depth in grid.fio_depths
        ]
        return ours + (theirs if fio.available() else [])

    def _calibrate(self, limit: str, *, write: bool) -> DiskSetting:
        total = self._grid.total_bytes
        rates: dict[DiskSetting, list[float]] = {}
        refused: dict[DiskSetting, str] = {}
        with Pool(2 * 4096, total // (2 * 4096), self._seed) as pool:
            if not write:
                self._prepare(total)

            def once(setting: DiskSetting) -> float:
                return self._write(pool.view, setting) if write else self._read(total, setting)

            for setting in self._candidates():
                try:
                    rates[setting] = [once(setting)]
                except CannotRunError as error:
                    refused[setting] = str(error)
            if not rates:
                raise CannotRunError(f"no setting of the raw {limit} works: {next(iter(refused.values()))}")
            ranked = sorted(rates, key=lambda setting: rates[setting][0], reverse=True)
            finalists = _finalists(ranked)
            for turn in range(FINAL_PASSES):
                for setting in finalists if turn % 2 == 0 else reversed(finalists):
                    rates[setting].append(once(setting))
        best = max(finalists, key=lambda setting: median(rates[setting][1:]))
        self._record(
            [
                Calibration(
                    limit,
                    dataclasses.asdict(setting),
                    rates.get(setting, []),
                    setting == best,
                    refused.get(setting, ""),
                )
                for setting in [*rates, *refused]
            ]
        )
        return best


def _finalists(ranked: Sequence[DiskSetting]) -> list[DiskSetting]:
    """The best few, and always the best of fio: whether it beats us is a question the table answers."""
    chosen = list(ranked[:FINALISTS])
    best_fio = next((setting for setting in ranked if setting.tool == "fio"), None)
    if best_fio is not None and best_fio not in chosen:
        chosen.append(best_fio)
    return chosen
