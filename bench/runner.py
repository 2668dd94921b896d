"""Runs figures one after the other, keeps each as soon as it is there, and can go on where it stopped.

One case is measured at a time, in an event loop of its own, in a scratch folder that is removed at
the end. After each case the result file is replaced as a whole, so that an interrupt loses one case.
A case that cannot run here (no io_uring, no fio …) is recorded as not run, with the reason; a case that
*fails* stops the run: a broken figure is not a missing one.
"""

from __future__ import annotations

import asyncio
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence

from rich.console import Console

from bench import machine, results
from bench.figures import Case, families
from bench.results import BenchError, Calibration, CannotRunError, NotRun, ResultFile
from bench.scale import Scale
from bench.session import Line, Session


def run(
    *,
    out: pathlib.Path,
    scratch: pathlib.Path,
    scale: Scale,
    names: Sequence[str],
    repeats: int,
    seed: int,
    io_backend: str,
    command: Sequence[str],
    console: Console,
) -> ResultFile:
    """Measure the families ``names`` that ``out`` does not have yet; returns everything in ``out``.

    ``scratch`` is where the measured file system is; a folder made in it is removed at the end.
    Raises ``BenchError`` for unknown names or if ``out`` is of another environment.
    """
    known = families()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BenchError(f"there is no figure {', '.join(unknown)}; there are {', '.join(known)}")
    scratch.mkdir(parents=True, exist_ok=True)
    result = results.open_or_start(out, machine.describe(scratch), command)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="cascade-bench-", dir=scratch))

    def record(cells: list[Calibration]) -> None:
        result.calibrations += cells
        results.save(out, result)

    session = Session(
        folder,
        scale,
        repeats=repeats,
        seed=seed,
        io_backend=io_backend,
        calibrations=result.calibrations,
        record=record,
    )
    try:
        cases = [case for name in (names or known) for case in known[name](scale)]
        _run_cases(session, cases, result, out, console)
    finally:
        shutil.rmtree(folder)
    return result


def _run_cases(
    session: Session, cases: Iterable[Case], result: ResultFile, out: pathlib.Path, console: Console
) -> None:
    have = {results.row_key(row) for row in result.rows}
    todo = [case for case in cases if any(_key(line) not in have for line in case.lines)]
    for number, case in enumerate(todo, start=1):
        line = case.lines[0]
        name = f"[{number}/{len(todo)}] {line.title} {line.variant} ({line.block_bytes >> 10} KiB)"
        started = time.monotonic()
        with console.status(name):
            try:
                rows: list[results.Row | NotRun] = [*asyncio.run(case.measure(session, case.lines))]
            except CannotRunError as error:
                rows = [
                    NotRun(line.figure, line.title, line.block_bytes, line.variant, results.now_text(), str(error))
                    for line in case.lines
                ]
        for row in rows:
            results.put_row(result, row)
            console.print(
                f"{_told(row)} [{time.monotonic() - started:.0f} s]", highlight=False, markup=False, soft_wrap=True
            )
        results.save(out, result)


def _key(line: Line) -> tuple[str, int, str]:
    return (line.figure, line.block_bytes, line.variant)


def _told(row: results.Row | NotRun) -> str:
    """One line of progress for a finished row."""
    what = f"{row.figure} {row.block_bytes >> 10} KiB {row.variant}".rstrip()
    if isinstance(row, NotRun):
        return f"{what}: not run: {row.reason}"
    unit = "" if row.of_ratio() else f" {row.ours.unit}"
    ours, other = row.ours.summary.median, row.other
    against = f", {other.name} {other.summary.median:.3g} {other.unit}" if other else ""
    return f"{what}: {row.achieved():.3g}{unit} ({row.verdict()}); ours {ours:.3g} {row.ours.unit}{against}"
