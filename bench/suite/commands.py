"""The commands of the comparison: ``run --systems``, ``install``, ``conform`` and ``generate``. Errors are one line."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bench.machine import REPOSITORY
from bench.peers import conformance
from bench.peers.catalog import entries
from bench.results import BenchError, CannotRunError
from bench.scale import REPEATS_MIN
from bench.suite import environments, generating, running
from bench.suite.client import Client, SystemFailedError
from cascade_aio import CascadeError
from cascade_aio.config import format_size, parse_size
from cascade_aio.workload import block_bytes, trace_requests

RESULTS = REPOSITORY / "bench" / "results"
SEED = 20_240_229
QUICK_BLOCK_BYTES = 64 << 10
QUICK_BLOCKS = 8
IN_FLIGHT = 8
BLOCK_TOKENS = 256
TRACE_REQUESTS = 600
"""A replay takes the first so many requests of a trace …"""
TRACE_BLOCKS_MAX = 64
"""… and so many blocks of each (32,768 tokens)."""

console = Console(stderr=True)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Errors of the suite as one line and an exit code; Ctrl-C and SIGTERM as 130 (even where a shell, starting us in
    the background, had SIGINT ignored)."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (BenchError, CascadeError) as error:
        console.print(f"bench: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("bench: stopped; what was finished is kept, the same command goes on from there")
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_systems(
    *,
    systems: str,
    workloads: str,
    block_sizes: str,
    blocks: int | None,
    temperatures: str,
    repeats: int | None,
    in_flight: int,
    seed: int,
    data: pathlib.Path | None,
    trace: pathlib.Path | None,
    directory: pathlib.Path,
    out: pathlib.Path | None,
    quick: bool,
    round_size: str,
    minutes: float | None,
    command: list[str],
) -> None:
    """``python -m bench run --systems …``; exits with 1 if a system failed."""
    with told():
        if quick and out is None:
            raise BenchError("--quick needs --out: its numbers do not belong beside real ones")
        if not quick and repeats is not None and repeats < REPEATS_MIN and out is None:
            raise BenchError(f"--repeats {repeats} is below {REPEATS_MIN}: name a file of your own with --out")
        sizes = tuple(parse_size(size) for size in _words(block_sizes)) or (parse_size("80MiB"),)
        plan = running.Plan(
            systems=tuple(entries()) if systems == "all" else tuple(dict.fromkeys(_words(systems))),
            workloads=running.WORKLOADS if workloads == "all" else tuple(_words(workloads)),
            block_bytes=(QUICK_BLOCK_BYTES,) if quick else sizes,
            blocks=QUICK_BLOCKS if quick else blocks,
            temperatures=frozenset(_words(temperatures)),
            repeats=repeats or (1 if quick else REPEATS_MIN),
            in_flight=in_flight,
            seed=seed,
            data=data,
            requests=_requests(trace),
            quick=quick,
            round_bytes=parse_size(round_size),
            seconds_max=None if minutes is None else minutes * 60,
        )
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        result = running.run(
            plan=plan,
            out=out or RESULTS / f"systems-{today}.json",
            scratch=directory,
            command=command,
            console=console,
        )
        failed = [one for one in result.not_run if one.failed]
        if failed:
            names = ", ".join(sorted({f"{one.system} ({one.workload})" for one in failed}))
            raise BenchError(f"failed, and recorded as such: {names}; {failed[0].reason}")


def install(
    names: Annotated[list[str], typer.Argument(help="Peers, such as redis; `all` for all of them.")],
) -> None:
    """Make a peer's own virtual environment from its pinned requirements."""
    with told():
        chosen = environments.peers() if names == ["all"] else names
        failed = []
        for name in chosen:
            try:
                with console.status(f"installing {name}"):
                    environments.install(_peer_of(name))
                console.print(f"{name}: installed", highlight=False)
            except BenchError as error:
                if len(chosen) == 1:
                    raise
                failed.append(f"{name}: {error}")
        if failed:
            raise BenchError("\n".join(failed))


def conform(
    names: Annotated[list[str], typer.Argument(help="Systems, such as redis-unix.")],
    directory: Annotated[pathlib.Path, typer.Option("--dir", help="Where to put files.")] = pathlib.Path(),
) -> None:
    """Run the conformance suite over systems."""
    with told():
        if unknown := [name for name in names if name not in entries()]:
            raise BenchError(f"there is no system {', '.join(unknown)}; there are {', '.join(entries())}")
        failed = [name for name in names if not asyncio.run(_conform(name, directory))]
        if failed:
            raise BenchError(f"not conforming: {', '.join(failed)}")


async def _conform(name: str, directory: pathlib.Path) -> bool:
    """Whether ``name`` passes every check; says each outcome."""
    good = True
    with _scratch(directory) as folder:
        for number, check in enumerate(conformance.CHECKS):
            place = folder / str(number)
            place.mkdir()
            try:
                async with Client.started(name, environments.interpreter(name), folder) as client:
                    await client.ask("conform", check=check, folder=str(place))
                outcome = "ok"
            except CannotRunError as error:
                console.print(f"{name}: not run: {error}", markup=False, highlight=False)
                return good
            except SystemFailedError as error:
                outcome, good = f"FAILED: {error}", False
            console.print(f"{name}: {check}: {outcome}", markup=False, highlight=False)
    return good


@contextlib.contextmanager
def _scratch(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="cascade-bench-", dir=directory)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def generate(
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the data; made if it is not there.")],
    blocks: Annotated[int, typer.Option(min=1, help="How many blocks.")] = 50,
    block_size: Annotated[str, typer.Option(help="Size of a block; default: 256 tokens of LLaMA-70B, 80 MiB.")] = str(
        block_bytes(BLOCK_TOKENS)
    ),
    seed: Annotated[int, typer.Option(help="Seed of all values.")] = SEED,
) -> None:
    """Write realistic KV data (float16, a scale per layer) for `run --data`; goes on where it was stopped."""
    with told():
        size = parse_size(block_size)
        if size % 8192 or size < 8192:
            raise BenchError(f"--block-size {block_size} is no multiple of 8 KiB")
        room = shutil.disk_usage(out.parent if out.parent.exists() else ".").free
        if size * blocks > room:
            raise BenchError(f"{format_size(size * blocks)} do not fit the {format_size(room)} that are free there")
        columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("KV data", total=size * blocks)
            path = generating.generate(
                out,
                size,
                blocks,
                seed,
                lambda done, total: progress.update(task, completed=done * size, total=total * size),
            )
        console.print(f"{path.name}: {blocks} blocks of {format_size(size)}", highlight=False)


def _requests(trace: pathlib.Path | None) -> tuple[tuple[int, ...], ...]:
    """The first requests of a recorded trace as chains of block numbers."""
    if trace is None:
        return ()
    numbers: dict[bytes, int] = {}
    requests = trace_requests(trace, limit=TRACE_REQUESTS)
    chains = [tuple(numbers.setdefault(key, len(numbers)) for key in one.keys[:TRACE_BLOCKS_MAX]) for one in requests]
    return tuple(chain for chain in chains if chain)


def _peer_of(name: str) -> str:
    """The peer that a name means: itself, or the one of the system of this name."""
    return entries()[name].peer if name in entries() else name


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
