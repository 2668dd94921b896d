"""``python -m bench mpi …``: the remote tier under MPI, and the simulation of its protocol on many nodes."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import tempfile
import traceback
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from bench.machine import REPOSITORY
from bench.mpi import costs as costs_module
from bench.mpi import figures, running, scaling, stress, study
from bench.mpi import page as measured
from bench.mpi.cluster import Costs
from bench.results import BenchError, CannotRunError, newest
from cascade_aio.testing.mpi import MpiRuntime, find_runtimes, run_ranks

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.command(name="scaling")
def simulate(
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, separated by commas.")] = "4,16,64,256,1024",
    out: Annotated[pathlib.Path, typer.Option(help="Result file.")] = study.RESULT,
    block_mib: Annotated[int, typer.Option(min=1, max=1024, help="MiB of a block.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Simulations at once.")] = os.cpu_count() or 1,
    latency_us: Annotated[
        float | None, typer.Option(min=0, help="There and back; all four, or none: measured.")
    ] = None,
    origin_us: Annotated[float | None, typer.Option(min=0, help="Of the MPI thread, for a command.")] = None,
    target_us: Annotated[float | None, typer.Option(min=0, help="Of the target's link, for a command.")] = None,
    gb_per_s: Annotated[float | None, typer.Option(min=0.001, help="Of a link.")] = None,
) -> None:
    """Simulate the protocol on many nodes; some minutes for 1,024. A simulation, not a measurement."""
    console = Console(stderr=True)
    try:
        counts = _counts(nodes)
        if latency_us is None or origin_us is None or target_us is None or gb_per_s is None:
            if (latency_us, origin_us, target_us, gb_per_s) != (None,) * 4:
                raise BenchError("name all of --latency-us, --origin-us, --target-us and --gb-per-s, or none of them")
            costs, costs_from = costs_module.measure()
        else:
            costs = Costs(latency_us / 1e6, origin_us / 1e6, target_us / 1e6, gb_per_s * 1e9)
            costs_from = "given, not measured"
        done = study.run(
            costs, costs_from, nodes=counts, block_bytes=block_mib << 20, workers=workers, say=console.print
        )
        study.save(out, done)
    except BenchError as error:
        _fail(console, error)


@app.command(name="page")
def measured_page(
    check: Annotated[bool, typer.Option(help="Change nothing; exit 1 if the page is not in step.")] = False,
    result: Annotated[
        pathlib.Path | None, typer.Option(help="Result file; default: the newest remote-20*.json.")
    ] = None,
    page: Annotated[pathlib.Path, typer.Option(help="Where to.")] = REPOSITORY / "docs" / "remote-measured.md",
) -> None:
    """Write docs/remote-measured.md from a result of `run`."""
    try:
        chosen = result or newest(
            REPOSITORY / "bench" / "results", "remote-20*.json", lambda path: running.load(path).timestamp
        )
        measured.update(page, running.load(chosen), chosen.name, check=check)
    except BenchError as error:
        _fail(Console(stderr=True), error)


@app.command(name="scaling-page")
def scaling_page(
    check: Annotated[bool, typer.Option(help="Change nothing; exit 1 if the page is not in step.")] = False,
    result: Annotated[pathlib.Path, typer.Option(help="Result file.")] = study.RESULT,
    page: Annotated[pathlib.Path, typer.Option(help="Where to.")] = study.PAGE,
) -> None:
    """Write docs/remote-scaling.md from the result file."""
    try:
        study.update(page, study.load(result), check=check)
    except BenchError as error:
        _fail(Console(stderr=True), error)


@app.command()
def run(
    out: Annotated[pathlib.Path | None, typer.Option(help="Result file; default: remote-<date>.json.")] = None,
    directory: Annotated[
        pathlib.Path, typer.Option("--dir", help="Folder that all ranks share; a scratch folder in it is removed.")
    ] = pathlib.Path(),
    repeats: Annotated[int | None, typer.Option(min=2, help="Repetitions; 7 by default.")] = None,
    quick: Annotated[bool, typer.Option(help="A few MiB, for tests: numbers mean nothing; needs --out.")] = False,
) -> None:
    """Measure on all ranks of this MPI job: mpiexec -n 4 python -m bench mpi run, or launch -n 4 run."""
    console = Console(stderr=True)
    if quick and out is None:
        _fail(console, BenchError("--quick needs --out: its numbers do not belong beside real ones"))
    if not directory.is_dir():
        _fail(console, BenchError(f"--dir {directory} is no folder; name one that all ranks share"))
    setting = figures.QUICK if quick else figures.FULL
    if repeats is not None:
        setting = dataclasses.replace(setting, repeats=repeats)
    sizes = running.QUICK_BLOCK_BYTES if quick else running.BLOCK_BYTES
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        file = asyncio.run(running.run(setting, sizes, directory.resolve(), ["python", "-m", "bench", "mpi", "run"]))
    except CannotRunError as error:
        _fail(console, error)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        running.abort()
        raise
    if file is not None:
        running.save(out or REPOSITORY / "bench" / "results" / f"remote-{day}.json", file)
        for figure in file.figures:
            console.print(f"{figure.verdict:>6}  {figure.value:8.3f} {figure.unit:<6} {figure.title}", markup=False)
        for row in file.rows:
            console.print(
                f"        {row.summary.median:8.3f} GB/s   {row.column}, {row.block_bytes >> 10} KiB, all ranks"
            )


@app.command(name="stress")
def stress_ranks(
    minutes: Annotated[float, typer.Option(min=0.01, help="How long.")] = 10.0,
    ranks: Annotated[int, typer.Option(min=2, help="How many.")] = 4,
    mpi: Annotated[str, typer.Option(help="openmpi or mpich; default: the first that is here.")] = "",
    seed: Annotated[int, typer.Option(help="Of everything that ranks choose.")] = 1,
    kill: Annotated[bool, typer.Option(help="Kill the last rank when three quarters have passed.")] = True,
    directory: Annotated[
        pathlib.Path, typer.Option("--dir", help="Where the root is made and removed.")
    ] = pathlib.Path(),
) -> None:
    """Put, get, evict, delete and cancel on all ranks, comparing every byte; exit 1 if one was wrong or a rank hung."""
    console = Console(stderr=True)
    try:
        runtime = runtime_of(mpi)
        with tempfile.TemporaryDirectory(prefix="cascade-stress-", dir=directory) as root:
            arguments: dict[str, Any] = {
                "root": str(pathlib.Path(root).resolve()),
                "seconds": minutes * 60,
                "seed": seed,
            }
            arguments["victim"] = ranks - 1 if kill else None
            outcome = run_ranks(
                runtime, ranks, "bench.mpi.stress:rank", arguments, deadline_s=minutes * 60 + stress.SLACK_SECONDS,
                outlive=kill, path=[str(REPOSITORY)],
            )  # fmt: skip
        print(stress.summary(outcome, ranks - kill, runtime))
    except BenchError as error:
        _fail(console, error)


@app.command(name="stress-rank")
def stress_rank(
    directory: Annotated[pathlib.Path, typer.Option("--dir", help="Root of the store, one for all ranks.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="How long.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of everything that ranks choose.")] = 1,
    victim: Annotated[int | None, typer.Option(min=0, help="Rank that kills itself; default: none.")] = None,
) -> None:
    """One rank of a stress run that srun or mpiexec has started; prints what it did; exit 1 for a wrong byte."""
    try:
        done = asyncio.run(stress.rank(str(directory), minutes * 60, seed, victim))
        print(json.dumps(done), flush=True)
        status = 1 if done["wrong"] else 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    if status or victim is not None:
        os._exit(status)  # finalising MPI would wait for a rank that was killed


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    ranks: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 4,
    mpi: Annotated[str, typer.Option(help="openmpi or mpich; default: the first that is here.")] = "",
) -> None:
    """``mpiexec -n RANKS python -m bench mpi …`` as this machine needs it, such as: launch -n 4 run."""
    try:
        runtime = runtime_of(mpi)
    except BenchError as error:
        _fail(Console(stderr=True), error)
    command = runtime.command(ranks, [sys.executable, "-m", "bench", "mpi", *context.args])
    os.execvpe(command[0], command, os.environ | runtime.environment())


def runtime_of(name: str) -> MpiRuntime:
    """The MPI of that name, or the first there is. Raises ``BenchError`` without it."""
    runtimes, reason = find_runtimes()
    if not runtimes or (name and name not in runtimes):
        raise BenchError(f"MPI {name or '(any)'} is not here: {reason or 'there is ' + ', '.join(runtimes)}")
    return runtimes[name] if name else next(iter(runtimes.values()))


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise BenchError(f"--nodes {text!r}: write numbers separated by commas, such as 4,64,1024") from None
    if counts[0] < 2 or counts[-1] > scaling.NODES_MAX:
        raise BenchError(f"--nodes {text!r}: between 2 and {scaling.NODES_MAX} nodes")
    return counts


def _fail(console: Console, error: BenchError) -> NoReturn:
    console.print(f"bench mpi: {error}", markup=False, highlight=False)
    raise typer.Exit(1) from error
