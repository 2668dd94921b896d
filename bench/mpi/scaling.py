"""The scaling study: the same work per node on 4 to 1,024 simulated nodes, and what it costs there.

Prompts of ``PROMPT_BLOCKS`` blocks, as many per node at every size, each first put by one node. Then all nodes
ask for prompts, at any time, evenly or with Zipf's weights: one lookup for the blocks that the node does not hold, then
a verified read of each block found, after which the copy is the node's own and listed like any other. Memory is
bounded: the oldest copy is withdrawn first. Lookups, reads and entries are the tier's own code (``cluster``).

Everything that comes out is a simulation, except the times of the pure core in ``Point.place_lookup_s``, which are
processor times of this machine. Costs are parameters; ``costs.measure`` takes them from a two-rank job here.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence

import msgspec

from bench.mpi.cluster import Cluster, Costs, Script
from cascade_aio.core.remote_directory import PAGE_BYTES, Geometry, Listing, geometry_of, new_token
from cascade_aio.core.remote_operations import (
    Found,
    Membership,
    Placed,
    Published,
    ReadEnd,
    in_turn,
    lookup,
    publish,
    read,
    withdraw,
)
from cascade_aio.tiers.remote.reading import remote_pieces

NODES_MAX = 4096
"""A simulation of more takes hours and gigabytes."""

PROMPT_BLOCKS = 64
PROMPTS_PER_NODE = 1
REQUESTS_PER_NODE = 4
LINK_LOAD = 0.3
"""Requests arrive at any time, so that they would occupy this share of the nodes' links if spread evenly."""


ARENA_BYTES = 64 << 30
"""For the memory of the directory; the simulated arena is as large as the work needs."""

HEADER_PAGES = 1
ZIPF_EXPONENT = 1.0
TIMED_NAMES = 64
TIMINGS = 15


class Spread(msgspec.Struct, frozen=True):
    """Over nodes or events."""

    mean: float
    p50: float
    p99: float
    maximum: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """Which prompts are asked for, and what becomes of a copy that was read."""

    name: str
    says: str
    zipf: bool = False
    replicate: bool = True
    """A reader's copy is listed for others."""
    spare_prompts: int = REQUESTS_PER_NODE
    """Room in a node's arena beside its own prompts: for everything it asks for, or less."""

    @property
    def capacity_blocks(self) -> int:
        return PROMPT_BLOCKS * (PROMPTS_PER_NODE + self.spare_prompts)


WORKLOADS = (
    Workload("even", "every prompt is asked for equally often"),
    Workload("skewed", "Zipf: the n-th prompt 1/n as often as the first", zipf=True),
    Workload("skewed, unshared", "the same, but a reader's copy serves nobody else", zipf=True, replicate=False),
    Workload("churn", "even, in arenas with room for one foreign prompt: every read evicts", spare_prompts=1),
)


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated run."""

    nodes: int
    workload: str
    block_bytes: int
    gets: int
    local: int
    remote: int
    stale: int
    missed: int
    messages_per_get: dict[str, float]
    """Per block asked for and not held: by kind of command."""
    bytes_per_get: dict[str, float]
    messages_per_publication: float
    messages_per_lookup: float
    directory_entries: Spread
    directory_messages: Spread
    served_bytes: Spread
    """Per node."""
    unlisted: int
    """Names that got no entry: full bucket, or enough copies listed."""
    lookup_s: Spread
    """Of a prompt's lookup, in virtual time."""
    get_s: Spread
    """Of one block that another node had, in virtual time."""
    bytes_per_s_per_node: float
    virtual_s: float
    busiest_link: float
    """Share of the time in which the busiest node's link was busy."""


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What a number of nodes costs each of them, whatever the workload."""

    nodes: int
    directory_bytes: int
    """Control region of a node with an arena of ``ARENA_BYTES``: does not depend on the number of nodes."""
    membership_bytes: int
    opening_bytes: int
    """What a node hears of all others when the store is opened."""
    place_lookup_s: float
    """Processor time, measured: which buckets ``TIMED_NAMES`` names are in, as every lookup asks on the event loop."""
    shards_of_lookup: float
    """Nodes that a lookup of ``TIMED_NAMES`` names asks, on average."""


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    kind: str = "simulation of the protocol"
    costs: dict[str, float]
    costs_from: str
    seed: int
    parameters: dict[str, int | float]
    machine: dict[str, str]
    commit: str
    sizes: list[Size]
    points: list[Point]


@dataclasses.dataclass(slots=True)
class _Held:
    """A copy in a node's arena."""

    slot: int
    generation: int
    entries: list[Placed]


class _Node:
    """One node's arena and its part in the protocol."""

    def __init__(self, rank: int, cluster: Cluster, record_bytes: int, workload: Workload) -> None:
        self.rank = rank
        self.cluster = cluster
        self.record_bytes = record_bytes
        self.replicate = workload.replicate
        self.capacity_blocks = workload.capacity_blocks
        self.held: dict[bytes, _Held] = {}
        self.unlisted = 0
        self.local = self.remote = self.stale = self.missed = 0
        self.lookups_s: list[float] = []
        self.gets_s: list[float] = []
        self._free_slots = list(range(self.capacity_blocks + REQUESTS_PER_NODE + PROMPTS_PER_NODE))
        self._generation = itertools.count(1)
        self._token = itertools.count(1)

    def put(self, name: bytes, *, listed: bool) -> Script:
        """The block is in this arena from now on; the oldest makes room."""
        if name in self.held:
            return
        while len(self.held) >= self.capacity_blocks:
            yield from self._evict(next(iter(self.held)))
        if name in self.held:  # another request of this node was faster
            return
        held = _Held(self._free_slots.pop(), next(self._generation), [])
        self.held[name] = held
        self.cluster.generations[self.rank][held.slot] = held.generation
        if listed:
            listings = [self._listing(each, name, held) for each in names_of(name)]
            tokens = [new_token(self.rank, next(self._token)) for _ in listings]
            published: Published = yield publish(self.cluster.membership, listings, tokens)
            placed = [entry for entry in published.entries if isinstance(entry, Placed)]
            self.unlisted += len(listings) - len(placed)
            if self.held.get(name) is held:
                held.entries = placed
            else:
                yield withdraw(placed)

    def _evict(self, name: bytes) -> Script:
        held = self.held.pop(name)
        self.cluster.generations[self.rank].pop(held.slot)
        self._free_slots.append(held.slot)
        if held.entries:
            yield withdraw(held.entries)

    def _listing(self, name: bytes, block: bytes, held: _Held) -> Listing:
        pages = self.record_bytes // PAGE_BYTES
        return Listing(name, block, self.rank, held.slot, held.generation, held.slot * pages, pages, HEADER_PAGES)

    def ask(self, blocks: Sequence[bytes]) -> Script:
        """One request: look up what is not here, then read it block by block."""
        wanted = [block for block in blocks if block not in self.held]
        self.local += len(blocks) - len(wanted)
        if wanted:
            started_s = self.cluster.now_s
            names = [names_of(block)[1] for block in wanted]
            found: Found = yield lookup(self.cluster.membership, names)
            self.lookups_s.append(self.cluster.now_s - started_s)
            for name, block, listings in zip(names, wanted, found.listings, strict=True):
                yield from self._get(name, block, listings)

    def _get(self, name: bytes, block: bytes, listings: Sequence[Listing]) -> Script:
        started_s = self.cluster.now_s
        into = _scratch(self.record_bytes)
        pieces = remote_pieces(HEADER_PAGES * PAGE_BYTES, self.record_bytes)
        for listing in in_turn(self.rank, name, [each for each in listings if each.rank != self.rank])[:2]:
            end: ReadEnd = yield read(listing, into, pieces, _heard)
            if end is ReadEnd.VALID:
                self.remote += 1
                self.gets_s.append(self.cluster.now_s - started_s)
                yield from self.put(block, listed=self.replicate)
                return
            self.stale += 1
        self.missed += 1
        yield from self.put(block, listed=True)  # the disk had it


def names_of(block: bytes) -> tuple[bytes, bytes]:
    """The two names of a copy, as the tier lists them: block id and prefix key."""
    return block, hashlib.blake2b(block, digest_size=16).digest()


def _heard(first: int, end: int) -> None:
    """Pieces that arrive tell nobody here."""


_buffers: dict[int, memoryview] = {}


def _scratch(nbytes: int) -> memoryview:
    """Payload is not moved, so all reads may name the same memory."""
    if nbytes not in _buffers:
        _buffers[nbytes] = memoryview(bytearray(nbytes))
    return _buffers[nbytes]


def simulate(nodes: int, workload: Workload, costs: Costs, *, block_bytes: int, seed: int) -> Point:
    """One run: fill, list, then ``REQUESTS_PER_NODE`` prompts for each node."""
    chance = random.Random(seed)
    cluster = Cluster(nodes, geometry_of(ARENA_BYTES), costs)
    record_bytes = block_bytes + HEADER_PAGES * PAGE_BYTES
    members = [_Node(rank, cluster, record_bytes, workload) for rank in range(nodes)]
    prompts = [[chance.randbytes(16) for _ in range(PROMPT_BLOCKS)] for _ in range(PROMPTS_PER_NODE * nodes)]
    for number, blocks in enumerate(prompts):
        node = members[number % nodes]
        cluster.start(node.rank, _fill(node, blocks))
    cluster.run()
    entries = [cluster.entries(rank) for rank in range(nodes)]
    publication_messages = cluster.messages.total() / (len(prompts) * PROMPT_BLOCKS)
    start_s = _forget(cluster)
    period_s = REQUESTS_PER_NODE * PROMPT_BLOCKS * block_bytes / costs.bytes_per_s / LINK_LOAD
    for node in members:
        for _ in range(REQUESTS_PER_NODE):
            blocks = prompts[_chosen(chance, len(prompts), zipf=workload.zipf)]
            cluster.start(node.rank, node.ask(blocks), start_s + chance.random() * period_s)
    cluster.run()
    duration_s = cluster.now_s - start_s
    gets = nodes * REQUESTS_PER_NODE * PROMPT_BLOCKS
    asked = sum(node.remote + node.missed for node in members)
    lookups = sum(len(node.lookups_s) for node in members)
    remote = sum(node.remote for node in members)
    return Point(
        nodes=nodes,
        workload=workload.name,
        block_bytes=block_bytes,
        gets=gets,
        local=sum(node.local for node in members),
        remote=remote,
        stale=sum(node.stale for node in members),
        missed=sum(node.missed for node in members),
        messages_per_get={kind: count / asked for kind, count in sorted(cluster.messages.items())},
        bytes_per_get={kind: count / asked for kind, count in sorted(cluster.bytes.items())},
        messages_per_publication=publication_messages,
        messages_per_lookup=_lookup_messages(cluster.membership, prompts),
        directory_entries=_spread(entries),
        directory_messages=_spread([load.directory_messages for load in cluster.loads]),
        served_bytes=_spread([load.served_bytes for load in cluster.loads]),
        unlisted=sum(node.unlisted for node in members),
        lookup_s=_spread([each for node in members for each in node.lookups_s] if lookups else [0.0]),
        get_s=_spread([each for node in members for each in node.gets_s] if remote else [0.0]),
        bytes_per_s_per_node=remote * block_bytes / duration_s / nodes,
        virtual_s=duration_s,
        busiest_link=max(load.busy_s for load in cluster.loads) / duration_s,
    )


def _fill(node: _Node, blocks: Sequence[bytes]) -> Script:
    for block in blocks:
        yield from node.put(block, listed=True)


def _forget(cluster: Cluster) -> float:
    """Nothing so far was part of the measurement. Returns when that begins."""
    cluster.messages.clear()
    cluster.bytes.clear()
    for load in cluster.loads:
        load.directory_messages = load.served_messages = load.served_bytes = 0
        load.busy_s = 0.0
    return cluster.now_s


def _lookup_messages(membership: Membership, prompts: Sequence[Sequence[bytes]]) -> float:
    """Commands of a whole prompt's lookup: one per bucket."""
    some = prompts[:50]
    return statistics.mean(len(set(membership.places_of([names_of(block)[1] for block in blocks]))) for blocks in some)


def _chosen(chance: random.Random, count: int, *, zipf: bool) -> int:
    if not zipf:
        return chance.randrange(count)
    sums = _zipf_sums(count)
    return bisect.bisect(sums, chance.random() * sums[-1])


_sums: dict[int, list[float]] = {}


def _zipf_sums(count: int) -> list[float]:
    if count not in _sums:
        _sums[count] = list(itertools.accumulate(1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(count)))
    return _sums[count]


def _spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    return Spread(
        mean=statistics.fmean(ordered),
        p50=ordered[len(ordered) // 2],
        p99=ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)],
        maximum=ordered[-1],
    )


def size_of(nodes: int, seed: int) -> Size:
    """Memory and measured processor time for so many nodes."""
    geometry = geometry_of(ARENA_BYTES)
    geometries = [Geometry(geometry.slots, geometry.buckets) for _ in range(nodes)]
    membership = Membership(0, geometries)
    chance = random.Random(seed)
    times, shards = [], []
    for _ in range(TIMINGS):
        names = [chance.randbytes(16) for _ in range(TIMED_NAMES)]
        started_s = time.process_time()
        places = membership.places_of(names)
        times.append(time.process_time() - started_s)
        shards.append(len({place.rank for place in places}))
    arrays = (value for value in vars(membership).values() if hasattr(value, "nbytes"))
    return Size(
        nodes=nodes,
        directory_bytes=geometry.control_bytes,
        membership_bytes=sum(array.nbytes for array in arrays) + nodes * sys.getsizeof(geometry),
        opening_bytes=nodes * _facts_bytes(),
        place_lookup_s=statistics.median(times),
        shards_of_lookup=statistics.fmean(shards),
    )


def _facts_bytes() -> int:
    from cascade_aio.tiers.remote.group import FACTS_BYTES_MAX

    return FACTS_BYTES_MAX + 1
