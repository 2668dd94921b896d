"""What the result file of ``bench.eviction`` holds."""

from __future__ import annotations

import msgspec

from bench.eviction.whole_store import Confirmation

FORMAT = 2


class Row(msgspec.Struct, frozen=True):
    """One replay."""

    policy: str
    share: float
    capacity_blocks: int
    blocks: int
    hit_blocks: int
    tokens: int
    hit_tokens: int
    hit_bytes: int
    cpu_s: float

    @property
    def rate(self) -> float:
        return self.hit_blocks / self.blocks


class TraceRows(msgspec.Struct, frozen=True):
    trace: str
    requests: int
    blocks: int
    different_blocks: int
    cpu_s: float
    rows: list[Row]


class EvictionResult(msgspec.Struct, frozen=True):
    version: str
    commit: str
    dirty: bool
    date: str
    workloads: dict[str, str]
    """What the generated traces are, by name."""
    traces: list[TraceRows]
    confirmed: list[Confirmation]
    format: int = FORMAT
