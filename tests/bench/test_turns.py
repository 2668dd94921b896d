from __future__ import annotations

import asyncio
import time

from bench.ticker import TICK_S, Ticker
from bench.turns import Side, take_turns


async def test_sides_alternate_and_the_order_turns_round() -> None:
    seen: list[str] = []

    def side(name: str) -> Side:
        async def run(repetition: int) -> float:
            seen.append(f"{name}{repetition}")
            return float(repetition)

        return Side(name, run)

    turns = await take_turns([side("a"), side("b")], 3)
    assert seen == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert turns.order == ["a,b", "b,a", "a,b"]
    assert turns.samples == {"a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0]}


async def test_a_blocked_loop_shows_in_the_ticker() -> None:
    async with Ticker() as ticker:
        await asyncio.sleep(5 * TICK_S)
        time.sleep(0.05)
        await asyncio.sleep(5 * TICK_S)
    assert max(ticker.late_ms) >= 50 - 1e3 * TICK_S
    count = len(ticker.late_ms)
    await asyncio.sleep(5 * TICK_S)
    assert len(ticker.late_ms) == count, "the ticker goes on after its scope"
