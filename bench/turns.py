"""Sides take turns: the one way in which anything is compared here.

Each repetition runs every side once, next to each other, and the order turns round from one
repetition to the next, so that neither a drifting device nor what one side leaves behind favours
anybody. Two sides are a pair (ours, the raw limit); more are peers in one field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """Something to be measured: ``run(repetition)`` does it once and returns one sample.

    ``run`` keeps its own clock, so that preparing and comparing bytes stay outside of the timing.
    """

    name: str
    run: Callable[[int], Awaitable[float]]


@dataclasses.dataclass(frozen=True, slots=True)
class Turns:
    """Samples by side, one per repetition, and the order in which the sides ran."""

    samples: dict[str, list[float]]
    order: list[str]


async def take_turns(sides: Sequence[Side], repeats: int) -> Turns:
    """Run all ``sides`` ``repeats`` times, first in order, then in reverse, and so on."""
    assert repeats > 0
    assert len({side.name for side in sides}) == len(sides), "sides are told apart by name"
    turns = Turns({side.name: [] for side in sides}, [])
    for repetition in range(repeats):
        ordered = list(sides) if repetition % 2 == 0 else list(reversed(sides))
        for side in ordered:
            turns.samples[side.name].append(await side.run(repetition))
        turns.order.append(",".join(side.name for side in ordered))
    return turns
