"""The typer application: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

from cascade_aio.cli.blocks import get, ls, put
from cascade_aio.cli.compacting import compact
from cascade_aio.cli.demo import demo
from cascade_aio.cli.doctor import doctor
from cascade_aio.cli.inspection import stat, verify, version
from cascade_aio.cli.prefetch import prefetch
from cascade_aio.cli.repairing import repair
from cascade_aio.cli.serve import serve
from cascade_aio.cli.top import top
from cascade_aio.cli.trace import trace

app = typer.Typer(
    name="cascade-aio",
    help="A tiered KV-cache store for LLM inference: shared memory above disk, io_uring beneath.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables cut the names of long options off at 80 columns, where nobody can look them up
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback(help=app.info.help)
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


for command in (demo, put, get, ls, stat, verify, repair, compact, doctor, trace, serve, prefetch, top, version):
    app.command()(command)
