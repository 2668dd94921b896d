"""What a campaign did and what it found: counts that add up, and the ways in which a promise can be broken."""

from __future__ import annotations

import dataclasses
from typing import Any

FAILURES = ("wrong", "lost", "resurrected", "damage", "leak", "hang", "error")
"""Kinds of broken promises: other bytes or names; acknowledged and gone; deleted and back; damage without a
cause; something left behind; no end; a process or a call that failed by itself."""


class CampaignError(AssertionError):
    """A promise was broken; the message has the seed and the command that replays it. ``kind``: of ``FAILURES``."""

    def __init__(self, kind: str, message: str) -> None:
        assert kind in FAILURES, kind
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclasses.dataclass(slots=True)
class Figures:
    """Counts of a campaign on one kind of file system.

    ``checks``: openings after which everything was compared.
    ``kills``: processes that died by SIGKILL while they wrote to the store, ``kills_by_phase`` says how;
    ``clean_ends``: those that were quicker. ``kills_beside_reader`` were watched by a reading process and
    ``kills_beside_writers`` happened together with those of further writers of the root. ``faults``: file systems
    made to fail under a writer, by kind. ``blocks_lost`` and the like count failures, which ``failures`` tells.
    """

    seeds: int = 0
    kills: int = 0
    kills_beside_reader: int = 0
    kills_beside_writers: int = 0
    clean_ends: int = 0
    operations: int = 0
    operations_in_doubt: int = 0
    checks: int = 0
    blocks_checked: int = 0
    bytes_checked: int = 0
    bytes_verified: int = 0
    names_checked: int = 0
    torn_records: int = 0
    segments_sealed: int = 0
    segments_removed: int = 0
    writers_adopted: int = 0
    reader_reads: int = 0
    reader_bytes: int = 0
    seconds: float = 0.0
    kills_by_phase: dict[str, int] = dataclasses.field(default_factory=dict)
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    broken: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FAILURES, 0))
    failures: list[str] = dataclasses.field(default_factory=list)

    def failed(self, error: CampaignError) -> None:
        """Remember a broken promise."""
        self.broken[error.kind] += 1
        self.failures.append(str(error))

    def add(self, other: Figures) -> None:
        """Sum up."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, _sum(mine, theirs))

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def count(counts: dict[str, int], key: str) -> None:
    """One more of ``key``."""
    counts[key] = counts.get(key, 0) + 1


def _sum(mine: Any, theirs: Any) -> Any:
    if isinstance(mine, dict):
        return {key: mine.get(key, 0) + theirs.get(key, 0) for key in {**mine, **theirs}}
    return round(mine + theirs, 1) if isinstance(mine, float) else mine + theirs
