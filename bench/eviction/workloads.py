"""Generated request traces of many kinds: is a policy good beyond the traces it was made on?

Each maker draws from its own seed and gives the same trace for ever. A *request* is a list of block
ids; ids name content, and equal ids after equal prefixes are equal blocks. ``SUITE`` holds what the
robustness table is made of, with the parameters that its reader needs.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from cascade_aio.cli.trace_mix import MixPlan, mixed_trace
from cascade_aio.core.replay import ReplayTrace
from cascade_aio.workload import LLAMA_70B, TRACE_BLOCK_TOKENS

Request = list[int]
Timed = tuple[float, int, Request]
"""When, a number that orders equal times, and what."""

_UNIQUE = 1 << 40
"""Ids from here on are given once each (per maker, counted up)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    name: str
    what: str
    """Its parameters, for the reader of the table."""
    make: Callable[[], Iterable[Request]]

    def trace(self, requests_max: int | None = None) -> ReplayTrace:
        """The requests, at most ``requests_max``, as full blocks of ``TRACE_BLOCK_TOKENS`` tokens."""
        trace = ReplayTrace(self.name, token_bytes=LLAMA_70B.token_bytes)
        for ids in itertools.islice(self.make(), requests_max):
            trace.add(ids, [TRACE_BLOCK_TOKENS] * len(ids))
        return trace


class _Ids:
    """Fresh ids, and the content of things that are shared (``of(kind, number, blocks)``)."""

    def __init__(self) -> None:
        self._fresh = itertools.count(_UNIQUE)

    def fresh(self, blocks: int) -> Request:
        return list(itertools.islice(self._fresh, blocks))

    def of(self, kind: int, number: int, blocks: int) -> Request:
        start = (kind << 32) + number * 1024
        return list(range(start, start + blocks))


def _zipf(count: int, exponent: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    cumulated: np.ndarray[tuple[int], np.dtype[np.float64]] = np.cumsum(weights / weights.sum())
    return cumulated


def _draw(rng: np.random.Generator, cumulated: np.ndarray[tuple[int], np.dtype[np.float64]]) -> int:
    return min(int(np.searchsorted(cumulated, rng.random())), len(cumulated) - 1)


def _in_time(timed: list[Timed]) -> Iterator[Request]:
    heapq.heapify(timed)
    while timed:
        yield heapq.heappop(timed)[2]


def agents(*, tasks: int = 500, tools: int = 12, seed: int = 11) -> Iterator[Request]:
    """Tasks of 1 … 30 steps over a long shared tool prompt; each step appends what the tool said."""
    rng, ids = np.random.default_rng(seed), _Ids()
    popular, prompt_blocks = _zipf(tools, 1.0), rng.integers(12, 30, tools)
    timed: list[Timed] = []
    now_s, number = 0.0, 0
    for _ in range(tasks):
        now_s += float(rng.exponential(5.0))
        tool = _draw(rng, popular)
        chain = ids.of(1, tool, int(prompt_blocks[tool])) + ids.fresh(int(rng.geometric(0.5)))
        at_s = now_s
        for _ in range(min(int(rng.geometric(1 / 7)), 30)):
            number += 1
            timed.append((at_s, number, list(chain)))
            chain += ids.fresh(int(rng.geometric(0.5)))
            at_s += 2.0 + float(rng.exponential(8.0))
    return _in_time(timed)


def retrieval(
    *, requests: int = 6000, documents: int = 3000, exponent: float = 0.8, seed: int = 12
) -> Iterator[Request]:
    """A system prompt, one or two popular documents, a question of its own."""
    rng, ids = np.random.default_rng(seed), _Ids()
    popular, lengths = _zipf(documents, exponent), rng.integers(3, 12, documents)
    for _ in range(requests):
        chain = ids.of(1, 0, 2)
        for _ in range(int(rng.integers(1, 3))):
            document = _draw(rng, popular)
            chain = chain + ids.of(2, document, int(lengths[document]))
        yield chain + ids.fresh(1)


def one_shot(*, requests: int = 5000, prompts: int = 200, seed: int = 13) -> Iterator[Request]:
    """Half of the requests are long prompts that never return, half single turns below 200 system prompts."""
    rng, ids = np.random.default_rng(seed), _Ids()
    popular = _zipf(prompts, 1.0)
    for _ in range(requests):
        if rng.random() < 0.5:
            yield ids.fresh(int(rng.geometric(1 / 24)))
        else:
            yield ids.of(1, _draw(rng, popular), 8) + ids.fresh(int(rng.geometric(1 / 3)))


def drift(*, requests: int = 6000, alive: int = 150, seed: int = 14) -> Iterator[Request]:
    """As one_shot without scans, and every 20 requests the most popular system prompt is replaced by a new one."""
    rng, ids = np.random.default_rng(seed), _Ids()
    popular = _zipf(alive, 0.9)
    current = list(range(alive))
    for number in range(requests):
        if number % 20 == 19:
            current[_draw(rng, popular)] = alive + number
        yield ids.of(1, current[_draw(rng, popular)], 10) + ids.fresh(int(rng.geometric(1 / 4)))


def phases(*, seed: int = 15) -> Iterator[Request]:
    """Chats, then agents, then retrieval, then chats again: nothing of one phase is used in the next."""
    plan = MixPlan(sessions=350, scan_share=0.0, turns=5, think_s=30)
    parts = (
        _requests(mixed_trace(plan)),
        agents(tasks=150, seed=seed),
        retrieval(requests=1500, documents=800, seed=seed),
        _requests(mixed_trace(dataclasses.replace(plan, seed=1))),
    )
    for number, part in enumerate(parts):
        for ids in part:
            yield [block + (number << 48) for block in ids]


def loop(*, prompts: int = 1200, rounds: int = 6) -> Iterator[Request]:
    """A test set of 12-block prompts below one system prompt, run again and again in the same order."""
    ids = _Ids()
    for _ in range(rounds):
        for number in range(prompts):
            yield ids.of(1, 0, 2) + ids.of(2, number, 12)


def popularity(
    *, requests: int = 12_000, prompts: int = 4000, exponent: float = 0.9, seed: int = 17
) -> Iterator[Request]:
    """Independent draws of whole prompts (2 … 10 blocks) by Zipf's law: what LFU is made for."""
    rng, ids = np.random.default_rng(seed), _Ids()
    popular, lengths = _zipf(prompts, exponent), rng.integers(2, 11, prompts)
    for _ in range(requests):
        prompt = _draw(rng, popular)
        yield ids.of(1, prompt, int(lengths[prompt]))


def few_shot(*, tasks: int = 40, questions: int = 100, at_once: int = 4, seed: int = 18) -> Iterator[Request]:
    """Benchmarks with 20-block example prompts, four at a time, each until its questions are done."""
    rng, ids = np.random.default_rng(seed), _Ids()
    waiting = list(range(tasks))
    running: list[list[int]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append([waiting.pop(), questions])
        job = running[int(rng.integers(len(running)))]
        job[1] -= 1
        yield ids.of(1, job[0], 20) + ids.fresh(int(rng.geometric(0.6)))
        if not job[1]:
            running.remove(job)


def search_tree(*, roots: int = 250, steps: int = 24, seed: int = 19) -> Iterator[Request]:
    """Problems that are searched: each step continues a recent branch by 1 … 3 blocks; then the tree is dead."""
    rng, ids = np.random.default_rng(seed), _Ids()
    timed: list[Timed] = []
    number, now_s = 0, 0.0
    for _ in range(roots):
        now_s += float(rng.exponential(10.0))
        branches = [ids.fresh(int(rng.integers(4, 20)))]
        at_s = now_s
        for _ in range(steps):
            recent = branches[-6:]
            grown = recent[int(rng.integers(len(recent)))] + ids.fresh(int(rng.integers(1, 4)))
            branches.append(grown)
            number += 1
            timed.append((at_s, number, grown))
            at_s += float(rng.exponential(4.0))
    return _in_time(timed)


def editors(*, users: int = 120, seed: int = 20) -> Iterator[Request]:
    """Completions over a 30-block context; each edit renews all blocks behind a place near the end."""
    rng, ids = np.random.default_rng(seed), _Ids()
    timed: list[Timed] = []
    number = 0
    for _ in range(users):
        at_s = float(rng.uniform(0.0, 3600.0))
        context = ids.of(1, 0, 3) + ids.fresh(int(rng.integers(15, 40)))
        for _ in range(min(int(rng.geometric(1 / 25)), 120)):
            number += 1
            timed.append((at_s, number, list(context)))
            kept = len(context) - min(int(rng.geometric(0.25)), len(context) - 3)
            context = context[:kept] + ids.fresh(len(context) - kept + int(rng.random() < 0.3))
            at_s += float(rng.exponential(20.0)) if rng.random() < 0.9 else float(rng.exponential(900.0))
    return _in_time(timed)


def day(*, days: int = 3, seed: int = 21) -> Iterator[Request]:
    """Chats whose rate swings by a factor of ten over a day, and which are taken up again the next day."""
    rng, ids = np.random.default_rng(seed), _Ids()
    timed: list[Timed] = []
    number = 0
    for today in range(days):
        for _ in range(350):
            at_s = 86_400.0 * (today + float(np.clip(rng.normal(0.6, 0.12), 0.0, 0.99)))
            chain = ids.of(1, _draw(rng, _zipf(10, 1.0)), 4) + ids.fresh(int(rng.geometric(1 / 6)))
            for _ in range(min(int(rng.geometric(1 / 4)), 20)):
                number += 1
                timed.append((at_s, number, list(chain)))
                chain += ids.fresh(int(rng.geometric(1 / 3)))
                at_s += 86_400.0 if rng.random() < 0.15 else 60.0 * float(rng.lognormal())
    return _in_time(timed)


def _requests(trace: ReplayTrace) -> Iterator[Request]:
    yield from trace.chains


def _mix(plan: MixPlan) -> Callable[[], Iterable[Request]]:
    return lambda: _requests(mixed_trace(plan))


SUITE = (
    Workload("chat with scans", "1,500 sessions of 4 turns, a pause of 60 s, 20 % scans of 60 blocks", _mix(MixPlan())),
    Workload(
        "long chats",
        "1,500 sessions of 6 turns, a pause of 20 s, 20 system prompts of 4 blocks",
        _mix(MixPlan(scan_share=0.0, turns=6, think_s=20, seed=1)),
    ),
    Workload(
        "short trace",
        "300 sessions of 3 turns: over before much can be learnt",
        _mix(MixPlan(sessions=300, turns=3, seed=2)),
    ),
    Workload("agents", "500 tasks of 7 steps over 12 tool prompts of 12 to 30 blocks, 10 s a step", agents),
    Workload("retrieval", "3,000 documents of 3 to 12 blocks, Zipf 0.8, one or two a request", retrieval),
    Workload("one-shot", "half scans of 24 blocks, half single turns below 200 system prompts of 8, Zipf 1", one_shot),
    Workload("drift", "150 prompts of 10 blocks, Zipf 0.9, one replaced every 20 requests", drift),
    Workload("phases", "chats, agents, retrieval, other chats, one after the other", phases),
    Workload("loop", "1,200 prompts of 12 blocks in the same order six times", loop),
    Workload("popularity", "4,000 prompts of 2 to 10 blocks drawn by Zipf 0.9", popularity),
    Workload("few-shot", "40 tasks of 100 questions below 20 blocks of examples, four at a time", few_shot),
    Workload("search tree", "250 trees of 24 steps that branch off one of the last six branches", search_tree),
    Workload("editors", "120 users, contexts of 15 to 40 blocks renewed behind an edit near the end", editors),
    Workload("day", "chats over three days, rate by the hour, 15 % of turns only the next day", day),
)
