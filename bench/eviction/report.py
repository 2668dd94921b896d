"""The result file of ``bench.eviction``: what is measured, and how it is kept and put into documents.

Each row has the counts of one replay; rates and comparisons are computed from them when the tables
(``tables``) are made. Between its two marker comments a document belongs to this module.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

import msgspec

from bench.eviction.rows import FORMAT, EvictionResult, Row, TraceRows
from bench.eviction.tables import render
from bench.eviction.whole_store import Confirmation, confirm
from bench.eviction.workloads import SUITE
from bench.machine import REPOSITORY, describe
from bench.results import BenchError, now_text
from cascade_aio.cli.trace_files import read_trace
from cascade_aio.core.contest import OURS, POLICIES, SHARES, sweep
from cascade_aio.core.replay import ReplayTrace

BEGIN = "<!-- eviction:begin -->"
END = "<!-- eviction:end -->"
CONFIRMED_REQUESTS = 1000
CONFIRMED_CAPACITY_BLOCKS = 1024
CONFIRMED_POLICIES = ("prefix-lru", OURS)


def measure(paths: Sequence[pathlib.Path], limit: int | None, say: Callable[[str], None]) -> EvictionResult:
    """Replay the files and the generated mixes through all policies. Blocks for minutes."""
    where = describe(REPOSITORY)
    traces = [read_trace(path, limit=limit) for path in paths]
    real = len(traces)
    traces += [workload.trace(limit) for workload in SUITE]
    done = []
    for trace in traces:
        say(f"{trace.name}: {trace.events:,} block events")
        done.append(_measure(trace))
    confirmed = [_confirm(trace, policy, limit, say) for trace in traces[: real or 1] for policy in CONFIRMED_POLICIES]
    whats = {workload.name: workload.what for workload in SUITE}
    return EvictionResult(where.version, where.commit, where.dirty, now_text(), whats, done, confirmed)


def _confirm(trace: ReplayTrace, policy: str, limit: int | None, say: Callable[[str], None]) -> Confirmation:
    """The first prompts of ``trace`` that can be leased at once, through a whole store."""
    say(f"{trace.name}: through a store with {policy}")
    short = ReplayTrace(trace.name, token_bytes=trace.token_bytes)
    for chain in trace.chains:
        if len(chain) <= CONFIRMED_CAPACITY_BLOCKS // 2 and len(short.chains) < (limit or CONFIRMED_REQUESTS):
            short.add(chain, [trace.tokens[node] for node in chain])
    with tempfile.TemporaryDirectory(prefix="cascade-eviction-") as folder:
        root = pathlib.Path(folder) / "kv"
        return asyncio.run(confirm(short, policy, capacity_blocks=CONFIRMED_CAPACITY_BLOCKS, root=root))


def load(path: pathlib.Path) -> EvictionResult:
    """Raises ``BenchError`` if ``path`` is not there, or no result file of this format."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=EvictionResult)
    except FileNotFoundError:
        raise BenchError(f"{path.name} is not there: run `python -m bench.eviction run` first") from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BenchError(f"{path.name} is not a result file of this suite: {error}") from error
    if result.format != FORMAT:
        raise BenchError(f"{path.name} has result format {result.format}, this suite writes {FORMAT}: measure anew")
    return result


def save(path: pathlib.Path, result: EvictionResult) -> None:
    """Replace ``path`` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    os.replace(temporary, path)


def update(readme: pathlib.Path, result: EvictionResult, *, full: bool = False, check: bool) -> None:
    """Write the table into ``readme``, or with ``check`` raise ``BenchError`` if that would change it."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{readme.name} has no {BEGIN} … {END}: put the two lines where the table belongs")
    made = f"{before}{BEGIN}\n{render(result, full=full)}\n{END}{after}"
    if not check:
        readme.write_text(made, encoding="utf-8")
    elif made != text:
        raise BenchError(f"{readme.name} is not in step with the result file: run `python -m bench.eviction table`")


def _measure(trace: ReplayTrace) -> TraceRows:
    started_s = time.process_time()
    rows = []
    last_s = started_s
    for score in sweep(trace, POLICIES, SHARES):
        now_s = time.process_time()
        rows.append(
            Row(
                policy=score.policy,
                share=score.share,
                capacity_blocks=score.capacity_blocks,
                blocks=score.count.blocks,
                hit_blocks=score.count.hit_blocks,
                tokens=score.count.tokens,
                hit_tokens=score.count.hit_tokens,
                hit_bytes=score.count.hit_bytes,
                cpu_s=round(now_s - last_s, 3),
            )
        )
        last_s = now_s
    cpu_s = round(time.process_time() - started_s, 2)
    return TraceRows(trace.name, len(trace.chains), trace.events, trace.nodes, cpu_s, rows)
