"""What many runs add up to: the figures of a result file, and what became of each kind of fault.

Pure but for ``provenance``. A fault that no call ended with an error for was *absorbed*: retried, written elsewhere,
served from memory, or of no consequence. Damage of the medium is told by the records that it hit: reported with their
place, or never met again (dead, overwritten, removed); and by the blocks that were missed for it.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from cascade_aio.testing.provenance import provenance
from cascade_aio.testing.simulation.plan import DAMAGE, WEATHER
from cascade_aio.testing.simulation.runner import Outcome

DEATHS = ("kill", "power-loss", "host-loss")
FAULT_WORDS = {
    "eio-read": "read fails (EIO)",
    "eio-write": "write fails (EIO)",
    "eio-sync": "fdatasync fails (EIO)",
    "eio-call": "open, create, list, unlink … fails (EIO)",
    "no-space": "file system full (ENOSPC)",
    "short": "short transfer",
    "again": "EAGAIN or EINTR",
    "slow": "late and reordered completion",
    "stuck": "request stuck for 20 to 90 s, not cancellable",
    "rot": "bit rot",
    "lost": "write acknowledged and never done",
    "misdirected": "write done in another place",
    "misread": "read gives wrong bytes once",
    "bad-sector": "page that cannot be read any more",
}
_FAILURES_LISTED_MAX = 100


@dataclasses.dataclass(slots=True)
class Tally:
    """Sums over runs."""

    first_seed: int
    seeds_run: int = 0
    virtual_s: float = 0.0
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    injected: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    broken: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, outcome: Outcome) -> None:
        self.seeds_run += 1
        self.virtual_s += outcome.virtual_s
        self.counts += outcome.counts
        self.injected += outcome.injected
        self.outcomes += outcome.outcomes
        if outcome.failure is not None:
            self.broken[outcome.promise] += 1
            if len(self.failures) < _FAILURES_LISTED_MAX:
                self.failures.append(
                    {
                        "seed": outcome.seed,
                        "promise": outcome.promise,
                        "what": outcome.failure[:500],
                        "command": outcome.command,
                    }
                )

    def merge(self, other: Tally) -> None:
        """Add what another process has run."""
        self.seeds_run += other.seeds_run
        self.virtual_s += other.virtual_s
        self.counts += other.counts
        self.injected += other.injected
        self.outcomes += other.outcomes
        self.broken += other.broken
        self.failures = sorted(self.failures + other.failures, key=lambda failure: failure["seed"])

    def result(self, wall_s: float) -> dict[str, Any]:
        """The result file, JSON-ready."""
        not_calls = {*DEATHS, *DAMAGE, *WEATHER, "clock", "opened", "bytes verified", "lost to damage"}
        calls = {kind: count for kind, count in sorted(self.counts.items()) if kind not in not_calls}
        return {
            "campaign": "simulation",
            **provenance(),
            "command": "python -m cascade_aio.testing.simulation run "
            f"--first {self.first_seed} --seeds {self.seeds_run}",
            "wall_seconds": round(wall_s, 1),
            "virtual_seconds": round(self.virtual_s, 1),
            "first_seed": self.first_seed,
            "seeds_run": self.seeds_run,
            "operations": sum(calls.values()),
            "operations_by_kind": calls,
            "crashes": sum(self.counts[kind] for kind in DEATHS) + self.seeds_run,
            "crashes_by_kind": {**{kind: self.counts[kind] for kind in DEATHS}, "at the end of a run": self.seeds_run},
            "reopens": self.counts["opened"],
            "bytes_verified": self.counts["bytes verified"],
            "faults": {kind: self._fate(kind) for kind in FAULT_WORDS},
            "blocks_lost_to_damage_reported": self.counts["lost to damage"],
            "blocks_lost": self.broken[2],
            "wrong_bytes": self.broken[1],
            "came_back": self.broken[3],
            "leaks": self.broken[4],
            "hangs": self.broken[5],
            "unexpected": self.broken[0],
            "failures": self.failures,
        }

    def _fate(self, kind: str) -> dict[str, Any]:
        met = {
            name.partition(": ")[2]: count
            for name, count in sorted(self.outcomes.items())
            if name.startswith(kind + ":")
        }
        injected = self.injected[kind]
        if kind not in DAMAGE:
            met["absorbed"] = max(0, injected - sum(met.values()))
        return {"what": FAULT_WORDS[kind], "injected": injected, "met": met}
