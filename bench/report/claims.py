"""What the comparison must show, held against what was measured: a line per claim and block size, won or lost.

A claim is about one column. The other side is the best of the named systems by its median; ratios are taken within each
repetition, in which all systems took turns, and their median decides. Of CPU time, what counts is the bytes that a
second of it moved, so that more is better everywhere. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from bench.report.parts import LIMIT
from bench.samples import Spread, spread
from bench.suite.results import GB, NotRun, Row, Sample, SuiteFile

OURS = "cascade"
OUR_FAMILY = "cascade"
"""Systems whose names begin so are ours too; they are nobody's peers."""
REDIS = ("redis-",)
GZIP = ("hdf5-gzip",)
CONTIGUOUS = ("hdf5-contiguous",)
PDC = ("pdc",)


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """Our value of ``workload``/``column`` is at least ``factor`` times as good as that of the best of ``others``."""

    workload: str
    column: str
    others: tuple[str, ...]
    """Names of systems, or their beginnings where they end with a dash; none: every other system."""
    factor: float
    than: str
    of: Literal["value", "cpu"] = "value"


_EVERYONE: tuple[str, ...] = ()
_BASIC = (("write", "write_durable"), ("write", "write_volatile"), ("hot", "hot"), ("cold", "cold"))
CLAIMS = (
    Claim("write", "write_durable", _EVERYONE, 1.0, "the fastest disk peer"),
    Claim("cold", "cold", _EVERYONE, 1.0, "the fastest disk peer"),
    Claim("hot", "hot", _EVERYONE, 1.0, "the fastest memory peer"),
    Claim("write", "write_durable", ("lmcache-disk",), 3.0, "LMCache's default disk"),
    Claim("hot", "hot", REDIS, 6.0, "Redis"),
    Claim("write", "write_volatile", REDIS, 2.0, "Redis"),
    Claim("write", "write_durable", REDIS, 2.0, "Redis"),
    Claim("write", "write_durable", GZIP, 6.0, "HDF5 with gzip"),
    Claim("write", "write_volatile", GZIP, 6.0, "HDF5 with gzip"),
    Claim("hot", "hot", GZIP, 6.0, "HDF5 with gzip"),
    Claim("cold", "cold", GZIP, 2.5, "HDF5 with gzip"),
    *(Claim(workload, column, CONTIGUOUS, 1.0, "contiguous HDF5") for workload, column in _BASIC),
    Claim("hot", "hot", PDC, 2.5, "PDC"),
    Claim("cold", "cold", PDC, 2.5, "PDC"),
    Claim("write", "write_durable", PDC, 1.0, "PDC"),
    *(Claim(workload, column, _EVERYONE, 1.0, "the thriftiest peer", of="cpu") for workload, column in _BASIC),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A claim at one block size. Without ``ratio`` it could not be held against anything: ``reason``."""

    claim: Claim
    block_bytes: int
    ours: float | None = None
    other: str = ""
    theirs: float | None = None
    ratio: Spread | None = None
    reason: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio.median >= self.claim.factor


def verdicts(result: SuiteFile, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Every claim at every block size that its workload was measured at."""
    found: list[Verdict] = []
    for claim in claims:
        sizes = sorted({row.block_bytes for row in result.rows if row.workload == claim.workload})
        found += [_verdict(result, claim, size) for size in sizes]
    return found


def _verdict(result: SuiteFile, claim: Claim, block_bytes: int) -> Verdict:
    rows = {row.system: row for row in result.rows if _is_of(row, claim, block_bytes)}
    ours = rows.get(OURS)
    if ours is None:
        return Verdict(claim, block_bytes, reason=_why(result, claim, block_bytes, (OURS,)))
    peers = [row for name, row in rows.items() if _is_peer(name, claim)]
    usable = [row for row in peers if _pairs(ours, row, claim)]
    if not usable:
        return Verdict(claim, block_bytes, reason=_why(result, claim, block_bytes, claim.others))
    best = max(usable, key=lambda row: _goodness(row.samples, claim))
    return Verdict(
        claim,
        block_bytes,
        ours=_goodness(ours.samples, claim),
        other=best.system,
        theirs=_goodness(best.samples, claim),
        ratio=spread(_pairs(ours, best, claim)),
    )


def _is_of(one: Row | NotRun, claim: Claim, block_bytes: int) -> bool:
    return (one.workload, one.column, one.block_bytes, one.variant) == (claim.workload, claim.column, block_bytes, "")


def _is_peer(name: str, claim: Claim) -> bool:
    if name.startswith((LIMIT, OUR_FAMILY)):
        return False
    return not claim.others or _named(name, claim.others)


def _named(name: str, others: Sequence[str]) -> bool:
    return any(name.startswith(other) if other.endswith("-") else name == other for other in others)


def _measured(sample: Sample, claim: Claim) -> float:
    if claim.of == "cpu":
        return (sample.bytes / GB) / sample.cpu_s if sample.cpu_s > 0 else 0.0
    return sample.value


def _goodness(samples: Sequence[Sample], claim: Claim) -> float:
    """GB/s, or GB per CPU second; the median."""
    return spread([_measured(sample, claim) for sample in samples]).median


def _pairs(ours: Row, other: Row, claim: Claim) -> list[float]:
    """Ours over theirs within each repetition that both have."""
    theirs = {sample.repeat: _measured(sample, claim) for sample in other.samples}
    return [
        _measured(sample, claim) / theirs[sample.repeat]
        for sample in ours.samples
        if theirs.get(sample.repeat, 0.0) > 0
    ]


def _why(result: SuiteFile, claim: Claim, block_bytes: int, names: Sequence[str]) -> str:
    missing = [old for old in result.not_run if _is_of(old, claim, block_bytes)]
    told = [old.reason for old in missing if _named(old.system, names)]
    return f"not run: {told[0]}" if told else "not run: not among the systems of this run"
