"""``python -m bench.eviction``: replay all policies, write the result file, put its table into README.md."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer
from rich.console import Console

from bench.eviction import report
from bench.machine import REPOSITORY
from bench.results import BenchError
from cascade_aio.errors import ConfigError

RESULT = REPOSITORY / "bench" / "results" / "eviction.json"
NOTES = REPOSITORY / "docs" / "eviction.md"
TRACES = REPOSITORY.parent / "shared" / "traces"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.command()
def run(
    traces: Annotated[pathlib.Path, typer.Option(help="Folder of *.jsonl traces.")] = TRACES,
    out: Annotated[pathlib.Path, typer.Option(help="Result file.")] = RESULT,
    limit: Annotated[int | None, typer.Option(min=1, help="Requests per trace, for tests.")] = None,
) -> None:
    """Replay the traces of the folder (if it is there) and the generated ones; about seven minutes."""
    console = Console(stderr=True)
    try:
        report.save(out, report.measure(sorted(traces.glob("*.jsonl")), limit, console.print))
    except (BenchError, ConfigError) as error:
        console.print(f"bench.eviction: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from error


@app.command()
def table(
    check: Annotated[bool, typer.Option(help="Change nothing; exit 1 if README.md is not in step.")] = False,
    result: Annotated[pathlib.Path, typer.Option(help="Result file.")] = RESULT,
    readme: Annotated[pathlib.Path, typer.Option(help="File with the two marker comments.")] = REPOSITORY / "README.md",
) -> None:
    """Put the table of the result file into README.md, and the full ones into docs/eviction.md."""
    try:
        report.update(readme, report.load(result), check=check)
        report.update(NOTES, report.load(result), full=True, check=check)
    except BenchError as error:
        Console(stderr=True).print(f"bench.eviction: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
