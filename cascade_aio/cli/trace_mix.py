"""A generated trace: conversations that share system prompts, documents read once, in order of time.

Seeded; the same plan gives the same trace. What the numbers mean is at ``MixPlan``. Unlike
``workload.session_requests``, which makes work for the store, it varies lengths, pauses and numbers
of turns as traffic does, and has scans.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from cascade_aio.core.replay import ReplayTrace
from cascade_aio.errors import ConfigError
from cascade_aio.workload import LLAMA_70B, TRACE_BLOCK_TOKENS

TURNS_MAX = 64
BLOCKS_PER_TURN_MAX = 512

_TAIL_IDS = 1 << 62  # above all ids of system prompts and sessions


@dataclasses.dataclass(frozen=True, slots=True)
class MixPlan:
    """Parameters of ``mixed_trace``. Means; lengths are geometric, pauses log-normal (sigma 1)."""

    sessions: int = 1500
    session_gap_s: float = 1.0
    """Mean time between starts (exponential)."""
    turns: float = 4.0
    """Mean number of turns of a conversation."""
    think_s: float = 60.0
    """Median pause between turns: the answer is written, read, and replied to."""
    first_blocks: float = 8.0
    turn_blocks: float = 3.0
    system_prompts: int = 20
    """Shared beginnings, the n-th with weight 1 / n; 0: none."""
    system_blocks: int = 4
    scan_share: float = 0.2
    """Part of the sessions that are one long prompt and never return."""
    scan_blocks: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sessions", "turns", "first_blocks", "turn_blocks", "scan_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("session_gap_s", "think_s", "system_prompts", "system_blocks", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if not 0.0 <= self.scan_share <= 1.0:
            raise ConfigError(f"scan_share={self.scan_share} must be between 0 and 1")


def mixed_trace(plan: MixPlan, name: str = "mixed") -> ReplayTrace:
    """The requests of ``plan`` as blocks of 512 tokens, the last one of a prompt partly filled."""
    rng = np.random.default_rng(plan.seed)
    trace = ReplayTrace(name, token_bytes=LLAMA_70B.token_bytes)
    requests: list[tuple[float, int, int]] = []
    starts = np.cumsum(rng.exponential(plan.session_gap_s, plan.sessions))
    sessions = [_session(plan, rng, number, float(start), requests) for number, start in enumerate(starts)]
    heapq.heapify(requests)
    tail = _TAIL_IDS
    while requests:
        _, number, blocks = heapq.heappop(requests)
        tail += 1  # a partly filled end is a block of its own: the next turn has other bytes there
        ids = [*sessions[number][:blocks], tail]
        trace.add(ids, [TRACE_BLOCK_TOKENS] * blocks + [TRACE_BLOCK_TOKENS // 2])
    return trace


def _session(
    plan: MixPlan, rng: np.random.Generator, number: int, start_s: float, requests: list[tuple[float, int, int]]
) -> list[int]:
    """The ids of all full blocks of one session; its requests are added as (time, session, blocks)."""
    is_scan = rng.random() < plan.scan_share
    chain: list[int] = []
    if plan.system_prompts and not is_scan:
        weights = 1.0 / np.arange(1, plan.system_prompts + 1)
        prompt = int(rng.choice(plan.system_prompts, p=weights / weights.sum()))
        chain += range(prompt * plan.system_blocks, (prompt + 1) * plan.system_blocks)
    own = (number + 1) << 32
    now_s = start_s
    for turn in range(1 if is_scan else min(int(rng.geometric(1 / plan.turns)), TURNS_MAX)):
        mean = plan.scan_blocks if is_scan else plan.turn_blocks if turn else plan.first_blocks
        grown = min(int(rng.geometric(1 / mean)), BLOCKS_PER_TURN_MAX)
        chain += range(own, own + grown)
        own += grown
        requests.append((now_s, number, len(chain)))
        now_s += plan.think_s * float(rng.lognormal())
    return chain
