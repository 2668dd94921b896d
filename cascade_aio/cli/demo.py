"""``demo``: real blocks stored, found again, read hot and cold, every byte compared, beside the raw limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cascade_aio.cli import demo_model
from cascade_aio.cli.demo_limits import measure_limits
from cascade_aio.cli.demo_phases import (
    DemoBlocks,
    LoopLag,
    Timed,
    cold_phase,
    dedup_phase,
    drop_segments,
    hot_get_phase,
    hot_read_phase,
    store_phase,
)
from cascade_aio.cli.demo_plan import (
    FULL_BLOCK_BYTES,
    FULL_BLOCKS,
    SMALL_BLOCK_BYTES,
    SMALL_BLOCKS,
    DemoPlan,
    Room,
    choose_plan,
    cut_requests,
    demo_requests,
)
from cascade_aio.cli.demo_report import DemoReport, print_report, with_limits
from cascade_aio.cli.options import Json, Settings, remove_arena, store_command
from cascade_aio.cli.output import UsageError, err, print_json, run
from cascade_aio.cli.root_checks import file_system_name, nearest_directory
from cascade_aio.config import StoreConfig, parse_size
from cascade_aio.errors import ConfigError
from cascade_aio.store import open_store
from cascade_aio.workload import Request, trace_requests


@store_command
def demo(
    settings: Settings,
    small: Annotated[bool, typer.Option("--small", help="A few seconds, less than 300 MiB.")] = False,
    model: Annotated[
        bool, typer.Option("--model", help="A language model answers from KV kept over a restart; needs torch.")
    ] = False,
    block_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of a block; default 80MiB (256 tokens of LLaMA-70B).")
    ] = None,
    blocks: Annotated[int | None, typer.Option(metavar="N", help="How many different blocks; default 16.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Play a request trace (JSON lines) instead of sessions.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Requests to take from the trace.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sessions.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the directory of the demo's root.")] = False,
    json: Json = False,
) -> None:
    """Store, deduplicate, read hot, reopen, read cold, compare every byte, and show the raw limits beside.

    Works in a directory of its own below --root (default: the current directory) and removes it.
    """
    if limit is not None and trace is None:
        raise UsageError("--limit is for --trace FILE")
    base = settings.config(default_root=".")
    if model:
        _play_model(base.root, small=small, json=json)
        return
    size = SMALL_BLOCK_BYTES if small else FULL_BLOCK_BYTES
    try:
        size = size if block_size is None else parse_size(block_size)
        plan = choose_plan(size, blocks or (SMALL_BLOCKS if small else FULL_BLOCKS), _room(base))
    except ConfigError as error:
        raise UsageError(str(error)) from None
    source = demo_requests(plan.blocks, seed) if trace is None else trace_requests(trace, limit=limit)
    requests = cut_requests(source, plan.blocks)
    if not requests:
        raise UsageError(f"{trace} has no request with a block")
    with _workplace(settings, base, plan, keep) as config:
        report = run(_play(config, plan, requests))
    if json:
        print_json(dataclasses.asdict(report))
    else:
        print_report(report)


def _play_model(root: str, *, small: bool, json: bool) -> None:
    rows = demo_model.play(root, demo_model.PROMPT_TOKENS_SMALL if small else demo_model.PROMPT_TOKENS)
    if json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        demo_model.print_rows(rows)
    demo_model.check(rows)


def _room(config: StoreConfig) -> Room:
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return Room(
        disk_bytes=shutil.disk_usage(nearest_directory(config.root)).free,
        shm_bytes=shutil.disk_usage(config.shm_dir).free,
        memory_bytes=int(meminfo["MemAvailable"].split()[0]) * 1024,
    )


@contextlib.contextmanager
def _workplace(settings: Settings, base: StoreConfig, plan: DemoPlan, keep: bool) -> Iterator[StoreConfig]:
    """A fresh directory below the root and an arena of our own; both are gone afterwards, whatever happens."""
    made_root = not os.path.isdir(base.root)
    os.makedirs(base.root, exist_ok=True)
    directory = tempfile.mkdtemp(prefix="cascade-demo-", dir=base.root)
    arena = f"cascade-demo-{os.getuid()}-{os.getpid()}"
    try:
        config = dataclasses.replace(base, root=os.path.join(directory, "root"), arena=arena)
        if settings.given["shm_bytes"] is None:
            config = dataclasses.replace(config, shm_bytes=plan.shm_bytes)
        if settings.given["segment_bytes"] is None:
            config = dataclasses.replace(config, segment_bytes=plan.segment_bytes)
        yield config
    finally:
        remove_arena(base.shm_dir, arena)
        if keep:
            err.print(f"kept: {directory}", markup=False)
        else:
            shutil.rmtree(directory)
            if made_root:
                os.rmdir(base.root)


async def _play(config: StoreConfig, plan: DemoPlan, requests: list[Request]) -> DemoReport:
    """All phases in order; a byte that differs is a ``CorruptionError``."""
    blocks, lag = DemoBlocks(plan), LoopLag()
    phases: list[Timed] = []
    async with open_store(config) as store:
        await store.wait_ready()
        async with lag.watched():
            stored, hits = await store_phase(store, blocks, requests)
        phases += [stored, await hot_get_phase(store, blocks), await hot_read_phase(store, blocks)]
        phases.append(await dedup_phase(store, blocks))
        await store.flush()
        statistics_warm = store.statistics()
    cache_note = await asyncio.to_thread(drop_segments, config.root)
    started = time.perf_counter()
    async with open_store(config) as store:
        phases.append(Timed("reopen", 0, time.perf_counter() - started, "", f"{len(store)} blocks found again"))
        await store.wait_ready()
        async with lag.watched():
            phases.append(await cold_phase(store, blocks))
        statistics_cold = store.statistics()
    limits = await measure_limits(
        os.path.dirname(config.root), plan.total_bytes, config.io_backend, config.digest, blocks.memory.reshape(-1)
    )
    return DemoReport(
        phases=with_limits(phases, limits),
        limits=limits,
        block_bytes=plan.block_bytes,
        blocks=len(blocks.names),
        requests=hits.requests,
        blocks_asked=hits.asked,
        blocks_cached=hits.cached,
        block_hit_rate=hits.block_hit_rate,
        request_hit_rate=hits.cached_requests / hits.requests,
        deduplicated_bytes=next(phase.nbytes for phase in phases if phase.phase.startswith("dedup")),
        loop_lag_p99_ms=lag.quantile_ms(0.99),
        loop_lag_max_ms=lag.quantile_ms(1.0),
        page_cache=cache_note,
        host=_describe_host(config, statistics_cold["io"]["backend"]),
        notes=[*plan.notes, *statistics_cold["io"]["notes"]],
        statistics={"warm": statistics_warm, "cold": statistics_cold},
    )


def _describe_host(config: StoreConfig, io_backend: str) -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "file_system": file_system_name(os.path.dirname(config.root)),
        "digest": config.digest,
        "io_backend": io_backend,
    }
