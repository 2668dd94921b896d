"""``top``: a running node service, live in the terminal."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cascade_aio.cli.output import UsageError, out, run
from cascade_aio.cli.prefetch import RootOption, SocketOption, socket_path
from cascade_aio.config import format_size
from cascade_aio.daemon import connect
from cascade_aio.errors import ServiceUnavailableError

INTERVAL_SECONDS_MIN = 0.1
_RATES = (
    ("hits in shared memory", ("store", "shm_hits"), False),
    ("hits by clients without a message", ("service", "shared_hits"), False),
    ("hits on disk", ("store", "disk_hits"), False),
    ("misses", ("store", "misses"), False),
    ("puts", ("store", "puts"), False),
    ("put", ("store", "put_bytes"), True),
    ("read from disk", ("disk", "read_bytes"), True),
    ("not stored twice", ("store", "deduplicated_bytes"), True),
    ("evicted from shared memory", ("shm", "evicted_bytes"), True),
    ("messages", ("service", "requests"), False),
)


def top(
    socket: SocketOption = None,
    root: RootOption = None,
    interval: Annotated[float, typer.Option("--interval", metavar="SECONDS", help="Time between two looks.")] = 1.0,
    count: Annotated[int, typer.Option("--count", help="Looks before it ends; 0: until interrupted.")] = 0,
) -> None:
    """Watch a service: tiers, hits, bandwidth, clients."""
    if interval < INTERVAL_SECONDS_MIN:
        raise UsageError(f"--interval {interval:g} is too short; use at least {INTERVAL_SECONDS_MIN:g} seconds")
    run(_watch(socket_path(socket, root), interval, count))


async def _watch(path: str, interval: float, count: int) -> None:
    before: tuple[float, dict[str, Any]] | None = None
    looks = 0
    async with connect(path, client="cascade-aio top", reconnect_seconds_max=interval, wait_seconds=0) as store:
        with Live(console=out, auto_refresh=False) as live:
            while True:
                try:
                    now = time.monotonic(), await store.statistics()
                    live.update(_picture(now, before), refresh=True)
                    before = now
                except ServiceUnavailableError as error:
                    live.update(Text(str(error), style="bold red"), refresh=True)
                    before = None
                looks += 1
                if looks == count:
                    return
                await asyncio.sleep(interval)


def _picture(now: tuple[float, dict[str, Any]], before: tuple[float, dict[str, Any]] | None) -> Group:
    taken_s, statistics = now
    node, shm, disk = statistics["service"], statistics["shm"], statistics["disk"]
    head = Text.assemble(
        (str(statistics["root"]), "bold"),
        f"  {statistics['blocks']} blocks, {node['clients']} clients, {node['requests_in_flight']} requests in flight, "
        f"loop lag p99 {1e3 * node['loop_lag_p99_seconds']:g} ms, up {node['uptime_seconds']:.0f} s",
    )
    tiers = Table("tier", "fill", "used", "of", box=None)
    for name, used, limit in (
        ("shm", shm["allocated_bytes"], shm["capacity_bytes"]),
        ("disk", disk["used_bytes"], disk["budget_bytes"]),
    ):
        bar = ProgressBar(total=limit, completed=used, width=40) if limit else Text("no limit")
        tiers.add_row(name, bar, format_size(used), format_size(limit) if limit else "")
    rates = Table("", "per second", "in all", box=None)
    seconds = None if before is None else max(1e-6, taken_s - before[0])
    for title, place, is_bytes in _RATES:
        total = _at(statistics, place)
        show = format_size if is_bytes else "{:,}".format
        rate = "" if before is None or seconds is None else show(int((total - _at(before[1], place)) / seconds))
        rates.add_row(title, rate, show(total))
    return Group(head, tiers, rates, *(Text(line, style="red") for line in statistics["damage"][-3:]))


def _at(statistics: dict[str, Any], place: tuple[str, ...]) -> int:
    found: Any = statistics
    for name in place:
        found = found.get(name, 0) if isinstance(found, dict) else 0
    return int(found)
