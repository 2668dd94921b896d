"""The named workloads: what is put and read, in which order, and under which column it is kept.

Each is a function of a ``Turn`` that says beforehand which keys it will fill, so that a run can go on where it was
stopped and a system that cannot run is told under every key. All reads are compared byte by byte in the client.

* ``write``, ``hot``, ``cold`` share an opening: warm up; put, read from memory; delete; put, flush; read from disk.
* ``small``: the same at 64 KiB to 2 MiB. ``concurrency``: reads with 1 to 64 in flight.
* ``multi-process``: 1 to 4 clients. ``mixed``: 70 % hot gets, 30 % puts. ``overflow``: twice the memory tier.
* ``restart``: a new process until its first hit. ``prefix-sharing``: 50 sessions on one prompt. ``trace``: a
  recorded trace with scaled blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from bench.results import CannotRunError
from bench.suite.turn import WARM_UP_BYTES_MAX, Opened, Turn, require

VOLATILE, DURABLE = 1, 1001
"""First stamps of what is read hot and of what is read cold; stamp 0 warms up."""
CONCURRENCY = (1, 4, 16, 64)
CLIENTS = (1, 2, 4)
SMALL_BYTES = (64 << 10, 256 << 10, 1 << 20, 2 << 20)
SESSIONS, SHARED_BLOCKS, OWN_BLOCKS = 50, 12, 4
READ_SHARE = 0.7
READ_COLUMNS = ("hot", "hot_lease", "cold", "cold_lease")
BASIC_COLUMNS = ("write_volatile", "write_durable", *READ_COLUMNS)

Expected = list[tuple[str, str]]
"""(column, variant) that a workload fills."""


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """``run`` fills the keys of ``expected``; columns in ``names`` go under another workload's name."""

    run: Callable[[Turn], Awaitable[None]]
    expected: Expected


def _range(first: int, passes: int) -> list[int]:
    return list(range(first, first + passes))


async def _warm_up(turn: Turn, opened: Opened) -> None:
    """Put, get and delete once: threads started, memory touched, nothing left."""
    load = turn.load
    count = max(1, min(load.count // 2, WARM_UP_BYTES_MAX // load.block_bytes))
    await opened.put([0], count, load.in_flight, flush=not opened.lacks("durable"))
    await opened.get([0], count, load.in_flight, expect="any")
    await opened.delete([0], count)


async def _read(turn: Turn, opened: Opened, stamps: Sequence[int], temperature: str, **how: Any) -> None:
    """Read what is there, copied and leased; cold: dropping caches before each."""
    in_flight = how.get("in_flight", turn.load.in_flight)
    for column, via in ((temperature, "copy"), (f"{temperature}_lease", "lease")):
        reason = opened.lacks(temperature) or (opened.lacks("lease") if via == "lease" else "")
        if reason:
            turn.lack(column, reason, how.get("variant", ""))
            continue
        if temperature == "cold":
            await opened.drop_caches()
        measure = await opened.get(stamps, turn.load.count, in_flight, via=via, expect=temperature)
        turn.record(column, measure, **how)


async def basic(turn: Turn) -> None:
    """``write``, ``hot`` and ``cold`` in one opening."""
    load = turn.load
    with turn.folder() as folder:
        async with turn.opened(folder) as opened:
            await _warm_up(turn, opened)
            if "hot" in load.temperatures:
                await _hot_half(turn, opened)
            if "cold" in load.temperatures:
                stamps = _range(DURABLE, load.passes)
                if reason := opened.lacks("durable"):
                    turn.lack("write_durable", reason)
                    if not opened.lacks("cold"):  # on disk some time, with no promise when
                        await opened.put(stamps, load.count, load.in_flight, flush=False)
                else:
                    turn.record("write_durable", await opened.put(stamps, load.count, load.in_flight, flush=True))
                await _read(turn, opened, stamps, "cold")


async def _hot_half(turn: Turn, opened: Opened) -> None:
    """Volatile writes and what is read of them from memory; leaves nothing."""
    load = turn.load
    stamps = _range(VOLATILE, load.passes)
    written = None
    if not (opened.lacks("volatile") and opened.lacks("hot")):
        written = await opened.put(stamps, load.count, load.in_flight, flush=False)
    if reason := opened.lacks("volatile"):
        turn.lack("write_volatile", reason)
    elif written is not None:
        turn.record("write_volatile", written)
    if written is not None:
        await opened.settle()
    await _read(turn, opened, stamps, "hot")
    if written is not None:
        await opened.delete(stamps, load.count)


async def concurrency(turn: Turn) -> None:
    """Hot and cold reads of the same blocks with 1 to 64 operations in flight."""
    load = turn.load
    with turn.folder() as folder:
        async with turn.opened(folder, in_flight=max(CONCURRENCY)) as opened:
            await opened.put([VOLATILE], load.count, load.in_flight, flush=not opened.lacks("durable"))
            for in_flight in CONCURRENCY:
                how = {"variant": f"{in_flight} in flight", "in_flight": in_flight, "blocks": load.count}
                for temperature in sorted(load.temperatures, reverse=True):
                    await _read(turn, opened, [VOLATILE], temperature, **how)


async def mixed(turn: Turn) -> None:
    """Gets of blocks that are in memory and puts of new ones, evenly mixed, in random order."""
    load = turn.load
    half = load.count // 2
    with turn.folder() as folder:
        async with turn.opened(folder) as opened:
            require(opened.lacks("hot") or opened.lacks("volatile"))
            await _warm_up(turn, opened)
            await opened.put([VOLATILE], half, load.in_flight, flush=False)
            await opened.settle()
            chance = random.Random(load.seed)
            writes = load.count - half
            reads = max(1, min(load.count - writes, round(writes * READ_SHARE / (1 - READ_SHARE))))
            writes = max(1, round(reads * (1 - READ_SHARE) / READ_SHARE))
            measure = await opened.client.ask(
                "mix",
                stamp=VOLATILE,
                in_flight=load.in_flight,
                reads=[chance.randrange(half) for _ in range(reads)],
                writes=list(range(half, half + writes)),
            )
            turn.record("mixed", measure, blocks=reads + writes)


async def multi_process(turn: Turn) -> None:
    """1, 2 and 4 processes at once, each putting and reading blocks of its own; bytes over the slowest one's clock."""
    for clients in CLIENTS:
        await _with_clients(turn, clients)


async def _with_clients(turn: Turn, clients: int) -> None:
    load = turn.load
    count = max(2, load.count // clients)
    how: dict[str, Any] = {"variant": f"{clients} clients", "clients": clients, "blocks": count * clients}
    memory_bytes = 3 * clients * count * load.block_bytes
    with turn.folder() as folder:
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(
                turn.opened(folder, count=count, blocks_max=3 * clients * count, memory_bytes=memory_bytes)
            )
            reason = first.lacks("clients") if clients > 1 else ""
            if reason:
                for column in ("write_volatile", "hot"):
                    turn.lack(column, reason, how["variant"])
                return
            opened = [first]
            for _ in range(clients - 1):
                client = await stack.enter_async_context(turn.spawn())
                opened.append(
                    await stack.enter_async_context(
                        turn.opened(
                            folder,
                            client=client,
                            count=count,
                            blocks_max=3 * clients * count,
                            memory_bytes=memory_bytes,
                            endpoint=first.endpoint,
                        )
                    )
                )
            jobs = [
                one.put([VOLATILE + number], count, load.in_flight, flush=False) for number, one in enumerate(opened)
            ]
            measures = await asyncio.gather(*jobs)
            if reason := first.lacks("volatile"):
                turn.lack("write_volatile", reason, how["variant"])
            else:
                turn.record("write_volatile", together(measures), **how)
            for one in opened:
                await one.settle()
            if reason := first.lacks("hot"):
                turn.lack("hot", reason, how["variant"])
                return
            gets = [
                one.get([VOLATILE + number], count, load.in_flight, expect="hot") for number, one in enumerate(opened)
            ]
            turn.record("hot", together(await asyncio.gather(*gets)), **how)


def together(measures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One measure of several clients: everything added up, over the clock from the first start to the last end."""
    total: dict[str, Any] = {
        name: sum(measure[name] for measure in measures)
        for name in (
            "bytes",
            "operations",
            "cpu_s",
            "peak_bytes",
            "read_bytes",
            "written_bytes",
            "verified_bytes",
            "misses",
        )
    }
    total["began_s"] = min(measure["began_s"] for measure in measures)
    total["ended_s"] = max(measure["ended_s"] for measure in measures)
    total["seconds"] = total["ended_s"] - total["began_s"]
    total["latency_ms"] = dict(measures[0]["latency_ms"]) if len(measures) == 1 else {}
    total["extra"] = {}
    return total


async def overflow(turn: Turn) -> None:
    """A working set of twice the memory tier: put all of it, then read all of it in random order."""
    load = turn.load
    count, passes = max(2, load.count // 2), 2 * load.passes
    total = count * passes
    with turn.folder() as folder:
        memory_bytes = total * load.block_bytes // 2
        async with turn.opened(folder, count=count, memory_bytes=memory_bytes, blocks_max=2 * total) as opened:
            require(opened.lacks("overflow"))
            stamps = _range(VOLATILE, passes)
            durable = not opened.lacks("durable")
            turn.record("overflow_put", await opened.put(stamps, count, load.in_flight, flush=durable), blocks=total)
            if not opened.lacks("cold"):
                await opened.client.ask("bound_page_cache")
            random.Random(load.seed).shuffle(stamps)
            turn.record("overflow_get", await opened.get(stamps, count, load.in_flight, expect="any"), blocks=total)


async def restart(turn: Turn) -> None:
    """Flush and end; then the time from opening in a new process until the first block was got."""
    load = turn.load
    with turn.folder() as folder:
        async with turn.spawn() as before, turn.opened(folder, client=before) as opened:
            require(opened.lacks("restart"))
            await opened.put([VOLATILE], load.count, load.in_flight, flush=True)
        async with turn.spawn() as after, turn.opened(folder, client=after, settled=False) as opened:
            first = await opened.get([VOLATILE], 1, 1, expect="any")
            rest = await opened.get([VOLATILE], load.count, load.in_flight, expect="any")
            extra = {"opening_s": opened.opening_s, "first_get_s": first["seconds"], "import_s": opened.import_s}
            turn.record("restart", {**rest, "extra": extra}, value=opened.opening_s + first["seconds"])


async def prefix_sharing(turn: Turn) -> None:
    """Sessions that share a prompt: each gets the prefix that is there and puts the blocks that are missing."""
    shared = list(range(SHARED_BLOCKS))
    requests = [
        [*shared, *range(SHARED_BLOCKS + number * OWN_BLOCKS, SHARED_BLOCKS + (number + 1) * OWN_BLOCKS)]
        for number in range(SESSIONS)
    ]
    await replay(turn, requests, "sharing_stall")


async def replay(turn: Turn, requests: Sequence[Sequence[int]], column: str) -> None:
    """Requests, one after the other, each a chain of block numbers; memory and disk hold all of them."""
    load = turn.load
    different = len({block for request in requests for block in request})
    longest = max(len(request) for request in requests)
    with turn.folder() as folder:
        count = 2 * longest  # blocks to be made from, and room for one request
        memory_bytes = max(different, 2 * longest) * load.block_bytes * 5 // 4
        async with turn.opened(folder, count=count, blocks_max=different + 1, memory_bytes=memory_bytes) as opened:
            require(opened.lacks("volatile"))
            measure = await opened.client.ask("replay", requests=requests, in_flight=load.in_flight)
            turn.record(column, measure, value=measure["seconds"], blocks=different)


def keys(columns: Sequence[str], variants: Sequence[str] = ("",)) -> Expected:
    return [(column, variant) for variant in variants for column in columns]


def _columns(temperatures: frozenset[str]) -> list[str]:
    hot = ["write_volatile", "hot", "hot_lease"] if "hot" in temperatures else []
    return hot + (["write_durable", "cold", "cold_lease"] if "cold" in temperatures else [])


def workload(name: str, temperatures: frozenset[str], requests: Sequence[Sequence[int]] = ()) -> Workload:
    """The workload called ``name``; ``trace`` replays ``requests``. Raises ``KeyError`` for an unknown name."""

    async def trace(turn: Turn) -> None:
        if not requests:
            raise CannotRunError("no trace was given: --trace FILE")
        await replay(turn, requests, "trace_stall")

    reads = [column for column in READ_COLUMNS if column.removesuffix("_lease") in temperatures]
    known = {
        "basic": Workload(basic, keys(_columns(temperatures))),
        "small": Workload(basic, keys(_columns(temperatures))),
        "mixed": Workload(mixed, keys(["mixed"])),
        "concurrency": Workload(concurrency, keys(reads, [f"{number} in flight" for number in CONCURRENCY])),
        "multi-process": Workload(
            multi_process, keys(["write_volatile", "hot"], [f"{number} clients" for number in CLIENTS])
        ),
        "prefix-sharing": Workload(prefix_sharing, keys(["sharing_stall"])),
        "trace": Workload(trace, keys(["trace_stall"])),
        "restart": Workload(restart, keys(["restart"])),
        "overflow": Workload(overflow, keys(["overflow_put", "overflow_get"])),
    }
    return known[name]
