"""What a run will do, from its seed: settings, processes, and one list of steps. Pure.

The steps are in the order in which they are handed out; each names the client that does it, and a client does its
steps one after the other, beside the other clients. So a shorter plan is a prefix of the list, and a run of it
begins as the long one did.

What it must not know: the store, or what comes of any step.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

MIB = 1 << 20

CONTENTS = 72
"""Blocks that runs put: each is a number, see ``contents``."""
LARGE_FROM = 40
"""From this number on contents are large: what fills a disk budget."""
SHARED_NAMES = 4
"""Prefix keys that any block may be put under; every other name belongs to one block."""

INDEX_BLOCKS_SMALL = 12
"""Blocks of an index that some runs fill; a setting allows no fewer than 1024."""

STEPS_MIN = 60
STEPS_MAX = 150

TORN_BYTES = (512, 4096)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One thing to do. ``slot`` is the process it is done in; -1: to the world. ``pause_s``: virtual, before it."""

    number: int
    client: int
    slot: int
    kind: str
    pause_s: float = 0.0
    block: int = 0
    name: int | None = None
    amount: float = 0.0
    choice: int = 0

    def __str__(self) -> str:
        parts = [f"{self.number:4d}", f"client {self.client}", "world" if self.slot < 0 else f"process {self.slot}"]
        parts.append(self.kind)
        if self.name is not None:
            parts.append(f"name {self.name}")
        return " ".join(parts) + f" block {self.block} amount {self.amount:g} choice {self.choice}"


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A whole run. ``hosts[slot]`` is the machine of a process; ``shared``: the file system of several machines."""

    seed: int
    settings: dict[str, Any]
    hosts: tuple[int, ...]
    shared: bool
    skew_s: tuple[float, ...]
    torn_bytes: int
    clients: int
    faults: frozenset[str]
    clean_end: bool
    steps: tuple[Step, ...]

    @property
    def skewed(self) -> bool:
        return any(self.skew_s) or "clock" in self.faults

    @property
    def single(self) -> bool:
        return len(self.hosts) == 1


WEATHER = {
    "eio-read": 0.2,
    "eio-write": 0.2,
    "eio-sync": 0.3,
    "eio-call": 0.2,
    "no-space": 1.0,
    "short": 0.5,
    "again": 0.4,
    "slow": 0.5,
    "stuck": 0.1,
    "misread": 0.2,
}
"""Faults that come and go, with the share of requests that they hit while they last."""

DAMAGE = ("rot", "lost", "misdirected", "bad-sector")
"""What happens to the medium itself."""

_DAILY = {
    "put": 26,
    "put-cancelled": 3,
    "reserve": 4,
    "get": 16,
    "get-name": 7,
    "get-cancelled": 4,
    "get-prefix": 4,
    "read-into": 2,
    "stream": 2,
    "hold": 3,
    "let-go": 4,
    "delete": 8,
    "flush": 9,
    "prefetch": 4,
    "rest": 5,
    "look": 4,
    "flush-cancelled": 1.5,
    "adopt": 0.5,
    "adopt-cancelled": 0.5,
}
"""Weights of what clients do."""

_SELDOM = {
    "power-loss": 1.0,
    "kill": 1.0,
    "reopen": 1.0,
    "reopen-cancelled": 0.5,
    "verify": 0.3,
    "verify-cancelled": 0.3,
    "compact": 1.0,
    "compact-cancelled": 0.7,
}
"""Weights of what befalls the world, or is done seldom."""


def make_plan(seed: int) -> Plan:
    """The plan of ``seed``; the same at any time and place."""
    rng = random.Random(f"plan {seed}")
    processes = rng.choice((1, 1, 1, 2, 2, 3))
    shared = processes > 1 and rng.random() < 0.5
    hosts = tuple(rng.randrange(2) if shared else 0 for _ in range(processes))
    budget = rng.random() < 0.4
    faults = _faults(rng, processes)
    settings: dict[str, Any] = {
        "shm_bytes": rng.choice((1, 1, 2)) * MIB,
        "segment_bytes": MIB,
        "disk_bytes": 8 * MIB if budget else None,
        "tail_seconds_max": rng.choice((0.05, 0.5, 1.0)),
        "put_wait_seconds_max": 5.0,
        "request_bytes_max": rng.choice((64 << 10, 4 * MIB)),
        "requests_in_flight_max": rng.choice((2, 8, 64)),
        "bytes_in_flight_max": 8 * MIB,
        "read_seconds_max": rng.choice((None, None, 0.5)),
        "eviction": rng.choice(("prefix-lru", "prefix-lru", "hit-density")),
        "index_blocks_max": rng.choice((INDEX_BLOCKS_SMALL, *7 * [1024])),
        "stripe": "off",
    }
    clients = rng.randrange(1, 4)
    steps = _steps(rng, processes, clients, faults, budget=budget)
    return Plan(
        seed,
        settings,
        hosts,
        shared,
        tuple(rng.uniform(-3, 3) if "skew" in faults else 0.0 for _ in hosts),
        rng.choice(TORN_BYTES),
        clients,
        faults,
        rng.random() < 0.5,
        tuple(steps),
    )


def _faults(rng: random.Random, processes: int) -> frozenset[str]:
    """Which kinds of trouble this run has: many have one or two, some have none."""
    found = {kind for kind in WEATHER if rng.random() < 0.14}
    if rng.random() < 0.3:
        found.add(rng.choice(DAMAGE))
    if rng.random() < 0.15:
        found.add("clock")
    if processes > 1 and rng.random() < 0.3:
        found.add("skew")
    return frozenset(found)


def _weights(
    rng: random.Random, processes: int, faults: frozenset[str], *, budget: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """How often clients do what, and what befalls the world."""
    weights: dict[str, float] = dict(_DAILY)
    world: dict[str, float] = dict(_SELDOM)
    if processes > 1:
        world["host-loss"] = 0.7
        weights |= {"refresh": 8, "refresh-cancelled": 1.5}
    if budget:
        weights["put-large"] = 30
    elif rng.random() < 0.3:
        weights["put-large"] = 8
    if not faults.isdisjoint(WEATHER):
        world["weather"] = 4.0
    if not faults.isdisjoint(DAMAGE):
        world |= {"damage": 2.0, "repair": 1.0}
    elif rng.random() < 0.1:
        world["repair"] = 0.5
    if "clock" in faults:
        world["clock"] = 1.0
    return weights, world


def _steps(rng: random.Random, processes: int, clients: int, faults: frozenset[str], *, budget: bool) -> list[Step]:
    count = rng.randrange(STEPS_MIN, STEPS_MAX)
    weights, world = _weights(rng, processes, faults, budget=budget)
    weather = sorted(kind for kind in faults if kind in WEATHER)
    damage = sorted(kind for kind in faults if kind in DAMAGE)
    world_share = rng.uniform(0.03, 0.12)
    kinds, shares = list(weights), list(weights.values())
    big, big_shares = list(world), list(world.values())
    contents = rng.sample(range(LARGE_FROM), rng.randrange(4, 25))  # a few blocks meet each other more often
    steps = []
    for number in range(count):
        slot = rng.randrange(processes)
        client = rng.randrange(clients)
        pause_s = rng.choice((0.0, 0.0, 0.0, 0.001, 0.02, 0.3))
        block = rng.choice(contents)
        name = rng.randrange(-SHARED_NAMES, 2) if rng.random() < 0.5 else None
        step = Step(number, client, slot, "", pause_s, block, name, rng.random(), rng.randrange(1 << 30))
        if rng.random() < world_share:
            kind = rng.choices(big, big_shares)[0]
            if kind == "weather":
                kind = rng.choice(weather)
            elif kind == "damage":
                kind = rng.choice(damage)
        else:
            kind = rng.choices(kinds, shares)[0]
            if kind == "put-large":
                kind, step = "put", dataclasses.replace(step, block=rng.randrange(LARGE_FROM, CONTENTS))
        steps.append(dataclasses.replace(step, kind=kind))
    return steps
