"""A trace through a whole store with real bytes has exactly the hits of the pure replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.eviction.whole_store import confirm
from cascade_aio.cli.trace_files import read_trace
from cascade_aio.cli.trace_mix import MixPlan, mixed_trace
from cascade_aio.core.contest import make_policy
from cascade_aio.core.replay import ReplayTrace, replay_as_store
from cascade_aio.errors import ConfigError

SYNTHETIC = Path(__file__).parents[2].parent / "shared" / "traces" / "synthetic_trace.jsonl"
CAPACITY_BLOCKS = 256


def _short_prompts(trace: ReplayTrace, requests: int) -> ReplayTrace:
    """The first requests whose blocks can all be leased at once, with room for what is being written."""
    short = ReplayTrace(trace.name, token_bytes=trace.token_bytes)
    for chain in trace.chains:
        if len(chain) <= CAPACITY_BLOCKS // 2 and len(short.chains) < requests:
            short.add(chain, [trace.tokens[node] for node in chain])
    return short


@pytest.mark.parametrize("policy", ["prefix-lru", "hit-density"])
async def test_generated(tmp_path: Path, policy: str) -> None:
    trace = _short_prompts(mixed_trace(MixPlan(sessions=90)), 150)
    result = await confirm(trace, policy, capacity_blocks=CAPACITY_BLOCKS, root=tmp_path / "kv", io_backend="threads")
    assert result.store_hits == result.replay_hits > 0
    assert result.disk_reads > 0
    assert result.blocks > 4 * CAPACITY_BLOCKS, "the arena was full most of the time"


async def test_real(tmp_path: Path) -> None:
    if not SYNTHETIC.exists():
        pytest.skip("../shared/traces is not here: it is not part of the repository")
    trace = _short_prompts(read_trace(SYNTHETIC, limit=200), 120)
    result = await confirm(trace, "hit-density", capacity_blocks=CAPACITY_BLOCKS, root=tmp_path / "kv")
    assert result.store_hits == result.replay_hits > 0


def test_a_prompt_that_cannot_be_leased_is_refused() -> None:
    trace = ReplayTrace("test")
    trace.add([1, 2, 3], [1, 1, 1])
    with pytest.raises(ConfigError, match="cannot be leased"):
        replay_as_store(trace, make_policy("hit-density"), capacity_blocks=2, identities=[0, 1, 2])
