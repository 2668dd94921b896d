"""The scaling study as a whole: all sizes and workloads, its result file, and keeping its page in step."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Sequence

import msgspec

from bench.machine import REPOSITORY, describe
from bench.mpi import scaling
from bench.mpi.cluster import Costs
from bench.mpi.scaling import Point, Study, Workload
from bench.mpi.study_page import render
from bench.results import BenchError

RESULT = REPOSITORY / "bench" / "results" / "remote-scaling.json"
PAGE = REPOSITORY / "docs" / "remote-scaling.md"
SEED = 8


def run(
    costs: Costs, costs_from: str, *, nodes: Sequence[int], block_bytes: int, workers: int, say: Callable[[str], None]
) -> Study:
    """Simulate everything; minutes for 1,024 nodes. Deterministic besides the processor times in ``Size``."""
    where = describe(REPOSITORY)
    sizes = [scaling.size_of(count, SEED) for count in nodes]  # before the machine is busy
    jobs = sorted(itertools.product(nodes, scaling.WORKLOADS), key=lambda job: -job[0])
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(_simulate, count, workload, costs, block_bytes): (count, workload.name)
            for count, workload in jobs
        }
        for future in concurrent.futures.as_completed(futures):
            say(f"{futures[future][0]} nodes, {futures[future][1]}: {future.result().gets:,} gets")
    points = [future.result() for future in futures]
    names = [workload.name for workload in scaling.WORKLOADS]
    points.sort(key=lambda point: (names.index(point.workload), point.nodes))
    return Study(
        costs=dataclasses.asdict(costs),
        costs_from=costs_from,
        seed=SEED,
        parameters={
            "block_bytes": block_bytes,
            "prompt_blocks": scaling.PROMPT_BLOCKS,
            "prompts_per_node": scaling.PROMPTS_PER_NODE,
            "requests_per_node": scaling.REQUESTS_PER_NODE,
            "link_load": scaling.LINK_LOAD,
            "arena_bytes": scaling.ARENA_BYTES,
            "zipf_exponent": scaling.ZIPF_EXPONENT,
        },
        machine={"cpu": where.cpu, "kernel": where.kernel, "python": where.python},
        commit=where.commit,
        sizes=sizes,
        points=points,
    )


def _simulate(count: int, workload: Workload, costs: Costs, block_bytes: int) -> Point:
    return scaling.simulate(count, workload, costs, block_bytes=block_bytes, seed=SEED)


def load(path: pathlib.Path) -> Study:
    """Raises ``BenchError`` for a file that is no such study."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Study)
    except (OSError, msgspec.MsgspecError) as error:
        raise BenchError(f"{path.name} is no result of `python -m bench mpi scaling`: {error}") from error


def save(path: pathlib.Path, study: Study) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(study), indent=1) + b"\n")
    os.replace(temporary, path)


def update(page: pathlib.Path, study: Study, *, check: bool) -> None:
    """Write the page, or with ``check`` raise ``BenchError`` if it differs."""
    text = render(study)
    if check:
        if not page.exists() or page.read_text() != text:
            raise BenchError(f"{page.name} is not that of its result file: run `python -m bench mpi scaling-page`")
        return
    page.write_text(text)
