"""The command line: ``python -m bench run``, ``table``, and those of the comparison (``bench.suite.commands``)."""

from __future__ import annotations

import datetime
import pathlib
import signal
import sys
from typing import Annotated

import typer
from rich.console import Console

from bench import results, runner, table
from bench.machine import REPOSITORY
from bench.mpi import app as mpi
from bench.report.command import report
from bench.results import BenchError
from bench.scale import FULL, QUICK, REPEATS_MIN
from bench.suite import commands

RESULTS = REPOSITORY / "bench" / "results"
SEED = 20_240_229
MAIN_WORKLOADS = "write,hot,cold"

FAMILY_GROUPS = {
    "prefetch": "prefetch",
    "compaction": "space",
    "service_hot": "service",
    "service_pairs": "service",
    "service_churn": "service",
    "arena_adoption": "service",
}
"""Families whose rows make up a group of ``table.GROUPS``."""

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
app.add_typer(mpi.app, name="mpi")
app.command()(commands.install)
app.command()(commands.conform)
app.command()(commands.generate)
app.command()(report)


@app.command()
def run(
    figures: Annotated[str, typer.Option(help="Families to measure, separated by commas; default: all.")] = "",
    directory: Annotated[
        pathlib.Path, typer.Option("--dir", help="Where to measure; a scratch folder in it is removed at the end.")
    ] = pathlib.Path(),
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Result file; default: engine-<date>.json, or GROUP-<date>.json for figures of one group."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Repetitions of each side of a pair; 5 or more.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all block bytes.")] = SEED,
    io_backend: Annotated[str, typer.Option(help="auto, uring or threads.")] = "auto",
    quick: Annotated[
        bool, typer.Option(help="A few MiB, in blocks of sizes of its own: numbers mean nothing; needs --out.")
    ] = False,
    systems: Annotated[
        str, typer.Option(help="Compare systems (bench/peers) instead: names separated by commas, or all.")
    ] = "",
    workloads: Annotated[str, typer.Option(help="With --systems: names separated by commas, or all.")] = MAIN_WORKLOADS,
    block_size: Annotated[str, typer.Option(help="With --systems: block sizes separated by commas.")] = "80MiB",
    blocks: Annotated[
        int | None, typer.Option(min=2, help="With --systems: blocks per repetition; default: see --round-size.")
    ] = None,
    round_size: Annotated[
        str, typer.Option(help="With --systems: bytes per repetition of a workload, four blocks at least.")
    ] = "512MiB",
    temperature: Annotated[str, typer.Option(help="With --systems: hot, cold or both.")] = "hot,cold",
    in_flight: Annotated[int, typer.Option(min=1, help="With --systems: operations at once.")] = commands.IN_FLIGHT,
    data: Annotated[pathlib.Path | None, typer.Option(help="With --systems: folder of `generate`.")] = None,
    trace: Annotated[pathlib.Path | None, typer.Option(help="With --systems: file of the workload trace.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="With --systems: start no turn after so long; run again to go on.")
    ] = None,
) -> None:
    """Measure, next to each other, the store and the limits of the machine; goes on where it was stopped."""
    if systems:
        commands.run_systems(
            systems=systems,
            workloads=workloads,
            block_sizes=block_size,
            blocks=blocks,
            temperatures=temperature,
            repeats=repeats,
            in_flight=in_flight,
            seed=seed,
            data=data,
            trace=trace,
            directory=directory,
            out=out,
            quick=quick,
            round_size=round_size,
            minutes=minutes,
            command=["python", "-m", "bench", *_published(sys.argv[1:])],
        )
        return
    console = Console(stderr=True)
    scale = QUICK if quick else FULL
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` and job systems end us like Ctrl-C
    try:
        if quick and out is None:
            raise BenchError("--quick needs --out: its numbers do not belong beside real ones")
        if not quick and repeats is not None and repeats < REPEATS_MIN:
            raise BenchError(f"--repeats {repeats} is below {REPEATS_MIN}: a median of fewer says nothing")
        names = [name for name in figures.split(",") if name]
        runner.run(
            out=out or RESULTS / f"{_kind(names)}-{datetime.datetime.now(datetime.UTC).date().isoformat()}.json",
            scratch=directory,
            scale=scale,
            names=names,
            repeats=repeats or scale.repeats,
            seed=seed,
            io_backend=io_backend,
            command=["python", "-m", "bench", *_published(sys.argv[1:])],
            console=console,
        )
    except BenchError as error:
        console.print(f"bench: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("bench: stopped; what was finished is in the result file, the same command goes on from there")
        raise typer.Exit(130) from None


@app.command(name="table")
def write_table(
    check: Annotated[bool, typer.Option(help="Change nothing; exit 1 if README.md is not in step.")] = False,
    result: Annotated[pathlib.Path | None, typer.Option(help="Result file; default: the newest of each kind.")] = None,
    readme: Annotated[pathlib.Path, typer.Option(help="File with the two marker comments.")] = REPOSITORY / "README.md",
) -> None:
    """Put the tables of the newest result files into README.md."""
    try:
        chosen = [results.load(result or results.newest(RESULTS))]
        patterns = {group: f"{group}-*.json" for group in table.GROUPS}
        own = [] if result else [group for group, pattern in patterns.items() if any(RESULTS.glob(pattern))]
        if own:  # a file of its own goes before rows of a whole run
            chosen = [table.only(chosen[0], {None, *table.GROUPS} - set(own))]
            chosen += [results.load(results.newest(RESULTS, patterns[group])) for group in own]
        for file in chosen:
            table.update(readme, file, check=check)
    except BenchError as error:
        Console(stderr=True).print(f"bench: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from error


def _kind(names: list[str]) -> str:
    """How the result file of these families is called."""
    kinds = {FAMILY_GROUPS.get(name, "engine") for name in names} or {"engine"}
    return kinds.pop() if len(kinds) == 1 else "engine"


def _published(arguments: list[str]) -> list[str]:
    """The command line without the paths of this machine."""
    return ["PATH" if pathlib.Path(argument.rpartition("=")[2]).is_absolute() else argument for argument in arguments]
