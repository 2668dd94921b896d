"""Replay of requests through an eviction policy: which blocks would have been hits. Pure, no bytes.

A ``ReplayTrace`` holds prompts as chains of nodes: equal prefixes are equal nodes, so the parent of a
node is always the same. ``replay`` serves one request after the other, as the store does:

1. the leading blocks of the chain that are resident are hits (*prefix-unbroken*: one behind a missing
   block cannot be used and is none);
2. every resident block of the chain is touched and every other one admitted, because the request
   computes what is missing. The chain cannot be evicted while it is served;
3. victims leave until the tier is within its capacity again.

Must not know: files, formats of traces, particular policies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.errors import ConfigError

CHAIN_BLOCKS_MAX = 1 << 16
TRACE_EVENTS_MAX = 1 << 28


class ReplayTrace:
    """Requests as chains of nodes. ``name`` is for reports; ``token_bytes`` makes tokens bytes.

    ``chains``, ``tokens`` (per node), ``parents`` (per node, -1 for none) and ``prompt_tokens`` (of a node and
    all before it in its prompt) are to be read only.
    """

    def __init__(self, name: str, *, token_bytes: int = 1) -> None:
        if token_bytes < 1:
            raise ConfigError(f"token_bytes={token_bytes} must be at least 1")
        self.name = name
        self.token_bytes = token_bytes
        self.chains: list[list[int]] = []
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.prompt_tokens: list[int] = []
        self._nodes: dict[tuple[int, int], int] = {}
        self._events = 0

    def add(self, ids: Sequence[int], tokens: Sequence[int]) -> None:
        """One request: what its blocks are called and how many tokens (at least 1) each holds.

        A block is the same as an earlier one if its id *and its whole prefix* are. Of a block that is
        there already, the tokens stay. An empty prompt is ignored. Raises ``ConfigError``.
        """
        if len(ids) != len(tokens) or len(ids) > CHAIN_BLOCKS_MAX or (tokens and min(tokens) < 1):
            raise ConfigError(f"a prompt needs as many token counts (≥ 1) as ids, at most {CHAIN_BLOCKS_MAX} of them")
        if self._events + len(ids) > TRACE_EVENTS_MAX:
            raise ConfigError(f"a trace has at most {TRACE_EVENTS_MAX} block events")
        chain: list[int] = []
        node = -1
        for block, count in zip(ids, tokens, strict=True):
            parent, node = node, self._nodes.setdefault((node, block), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(count)
                self.parents.append(parent)
                self.prompt_tokens.append(count + (self.prompt_tokens[parent] if parent >= 0 else 0))
            chain.append(node)
        if chain:
            self.chains.append(chain)
            self._events += len(chain)

    @property
    def events(self) -> int:
        """Blocks of all requests."""
        return self._events

    @property
    def nodes(self) -> int:
        """Different blocks: the capacity at which nothing is ever evicted."""
        return len(self.tokens)

    def capacity(self, share: float) -> int:
        """``share`` (0 to 1) of the different blocks, in whole blocks, at least one."""
        return max(1, int(self.nodes * share))


@dataclasses.dataclass(frozen=True, slots=True)
class ReplayCount:
    """What happened in one replay. Rates are prefix-unbroken; 0.0 for an empty trace."""

    requests: int
    blocks: int
    hit_blocks: int
    tokens: int
    hit_tokens: int
    evicted: int
    token_bytes: int = 1

    @property
    def block_hit_rate(self) -> float:
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def token_hit_rate(self) -> float:
        return self.hit_tokens / self.tokens if self.tokens else 0.0

    @property
    def hit_bytes(self) -> int:
        return self.hit_tokens * self.token_bytes

    @property
    def byte_hit_rate(self) -> float:
        """Equal to ``token_hit_rate`` while a trace has one geometry; kept apart because reports ask for it."""
        return self.token_hit_rate


def replay(
    trace: ReplayTrace,
    policy: EvictionPolicy,
    *,
    capacity_blocks: int | None = None,
    capacity_bytes: int | None = None,
    leaf_first: bool = True,
) -> ReplayCount:
    """Serve all requests of ``trace`` with an empty ``policy`` and count.

    Exactly one capacity is given. ``leaf_first`` touches a chain from its end, which the interface asks
    of callers; with False blocks are used in the order of the prompt, as a cache that knows no chains
    would see them. Raises ``ConfigError`` for a wrong capacity.
    """
    capacity, sizes = _budget(trace, capacity_blocks, capacity_bytes)
    node_bytes = [count * trace.token_bytes for count in trace.tokens]
    parents, prompt_tokens = trace.parents, trace.prompt_tokens
    resident = bytearray(trace.nodes)
    used = hit_blocks = hit_tokens = all_tokens = evicted = 0
    touch, admit, victim_of, remove = policy.touch, policy.admit, policy.victim, policy.remove
    for chain in trace.chains:
        missing = [node for node in chain if not resident[node]]
        hits = chain.index(missing[0]) if missing else len(chain)
        if hits:
            hit_blocks += hits
            hit_tokens += prompt_tokens[chain[hits - 1]]
        all_tokens += prompt_tokens[chain[-1]]
        if leaf_first:
            for node in reversed(chain):
                if resident[node]:
                    touch(node)
            for node in missing:
                admit(node, parent=parents[node], nbytes=node_bytes[node], identity=node)
        else:
            for node in chain:
                if resident[node]:
                    touch(node)
                else:
                    admit(node, parent=parents[node], nbytes=node_bytes[node], identity=node)
        for node in missing:
            resident[node] = 1
        used += sum([sizes[node] for node in missing]) if sizes else len(missing)
        while used > capacity:
            victim = victim_of()
            assert victim is not None, "nothing is pinned between requests: somebody may go"
            remove(victim)
            resident[victim] = 0
            used -= sizes[victim] if sizes else 1
            evicted += 1
    return ReplayCount(len(trace.chains), trace.events, hit_blocks, all_tokens, hit_tokens, evicted, trace.token_bytes)


def _budget(
    trace: ReplayTrace, capacity_blocks: int | None, capacity_bytes: int | None
) -> tuple[int, list[int] | None]:
    """The capacity and what each node takes of it; ``None`` for one each."""
    if (capacity_blocks is None) == (capacity_bytes is None):
        raise ConfigError("give either capacity_blocks or capacity_bytes")
    capacity = capacity_blocks if capacity_blocks is not None else capacity_bytes
    assert capacity is not None
    if capacity < 1:
        raise ConfigError(f"a capacity of {capacity} holds nothing; it must be at least 1")
    if capacity_blocks is not None:
        return capacity, None
    return capacity, [count * trace.token_bytes for count in trace.tokens]


def replay_as_store(
    trace: ReplayTrace, policy: EvictionPolicy, *, capacity_blocks: int, identities: Sequence[int]
) -> ReplayCount:
    """Like ``replay``, in the very order in which a store serves requests whose blocks stay leased meanwhile.

    A store makes room *before* each block and may not take what the request has leased, where ``replay``
    lets the chain in first and evicts afterwards; and leases are pins, given back from the end of the chain.
    So hits differ from ``replay`` (by half a point on short traces, either way), and not at all from a store
    that is asked for the trace request by request. ``identities`` are by node. Raises ``ConfigError`` for a
    prompt longer than the capacity.
    """
    resident = bytearray(trace.nodes)
    used = hit_blocks = hit_tokens = all_tokens = evicted = 0
    for chain in trace.chains:
        if len(chain) > capacity_blocks:
            raise ConfigError(f"a prompt of {len(chain)} blocks cannot be leased in {capacity_blocks}")
        hits = next((place for place, node in enumerate(chain) if not resident[node]), len(chain))
        hit_blocks += hits
        hit_tokens += sum(trace.tokens[node] for node in chain[:hits])
        all_tokens += sum(trace.tokens[node] for node in chain)
        for node in reversed(chain[:hits]):
            policy.touch(node)
        for node in chain[:hits]:
            policy.pin(node)
        for node in chain[hits:]:
            while used >= capacity_blocks:
                victim = policy.victim()
                assert victim is not None, "the request leases less than the capacity"
                policy.remove(victim)
                resident[victim] = 0
                used -= 1
                evicted += 1
            nbytes = trace.tokens[node] * trace.token_bytes
            policy.admit(node, parent=trace.parents[node], nbytes=nbytes, identity=identities[node])
            policy.pin(node)
            resident[node] = 1
            used += 1
        for node in reversed(chain):
            policy.unpin(node)
    return ReplayCount(len(trace.chains), trace.events, hit_blocks, all_tokens, hit_tokens, evicted, trace.token_bytes)
