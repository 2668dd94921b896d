"""``doctor``: what this machine offers the store, what that means, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from cascade_aio.cli import host_checks, root_checks
from cascade_aio.cli.blocks import PositionalRoot
from cascade_aio.cli.findings import Finding
from cascade_aio.cli.options import Json, Settings, store_command
from cascade_aio.cli.output import out, print_json
from cascade_aio.config import StoreConfig

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "fatal": "bold red"}


def examine(config: StoreConfig) -> Iterator[Finding]:
    """All checks, in the order of the report."""
    yield host_checks.check_python()
    yield host_checks.check_kernel()
    yield host_checks.check_native()
    yield host_checks.check_uring()
    yield host_checks.check_memlock(config)
    yield host_checks.check_huge_pages()
    yield host_checks.check_shm(config)
    yield root_checks.check_root(config)
    yield root_checks.check_direct_io(config)
    yield root_checks.check_lustre(config)
    yield host_checks.check_cpu()
    yield host_checks.check_gpu()
    yield host_checks.check_mpi()


@store_command
def doctor(settings: Settings, directory: PositionalRoot = None, json: Json = False) -> None:
    """Check this machine; exit code 1 if a store cannot work here. ROOT defaults to the settings' or 'kv' here."""
    config = settings.config(directory, default_root="kv")
    findings = list(examine(config))
    usable = all(finding.level != "fatal" for finding in findings)
    if json:
        print_json({"usable": usable, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        table = Table(box=None, pad_edge=False)
        for name in ("check", "", "found", "meaning and cure"):
            table.add_column(name, overflow="fold")  # a cure that is cut off cannot be copied
        for finding in findings:
            advice = escape(finding.meaning) + (f"\n[italic]→ {escape(finding.cure)}[/]" if finding.cure else "")
            level = f"[{_COLOURS[finding.level]}]{finding.level}[/]"
            table.add_row(finding.check, level, escape(finding.found), advice)
        out.print(table, soft_wrap=False)
        out.print("A store works here." if usable else "[bold red]A store cannot work here.[/]")
    if not usable:
        raise SystemExit(1)
