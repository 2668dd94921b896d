"""A trace through a whole store with real bytes: are its hits those of the pure replay?

Blocks are scaled to 4 KiB. Each request asks for what the arena holds of its prompt, leases it, brings
the rest (from disk what the store has seen, else by a put), checks the bytes, and gives the leases back
from the end. Hits are the leading blocks found in the arena. They must be *equal* to those of
``replay_as_store``: any difference is a defect of the store or of the replay.
"""

from __future__ import annotations

import hashlib
import pathlib
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from cascade_aio import Block, PrefixKey, Store, Tier, open_store
from cascade_aio.core.contest import make_policy
from cascade_aio.core.replay import ReplayTrace, replay, replay_as_store

PART_BYTES = 2048
"""Of key and of value: together a page, which with its header page takes ``RECORD_BYTES`` of arena."""
RECORD_BYTES = 8192
_WORD_BYTES = 8


class Confirmation(msgspec.Struct, frozen=True):
    """One trace, one policy, one arena. ``pure_hits`` is what ``replay`` says, which evicts after each request."""

    trace: str
    policy: str
    capacity_blocks: int
    requests: int
    blocks: int
    store_hits: int
    replay_hits: int
    pure_hits: int
    disk_reads: int


def prefix_keys_of(trace: ReplayTrace) -> list[PrefixKey]:
    """By node: chained as a server would chain them."""
    keys: list[PrefixKey] = []
    for node, parent in enumerate(trace.parents):
        before = bytes(keys[parent]) if parent >= 0 else b""
        keys.append(PrefixKey(hashlib.sha256(before + node.to_bytes(_WORD_BYTES, "little")).digest()))
    return keys


async def confirm(
    trace: ReplayTrace, policy: str, *, capacity_blocks: int, root: pathlib.Path, **settings: Any
) -> Confirmation:
    """Serve ``trace`` with a store in the new directory ``root`` and compare. Raises ``AssertionError`` for
    wrong bytes, never for different hits: those are in the result."""
    keys = prefix_keys_of(trace)
    async with open_store(
        root, shm_bytes=capacity_blocks * RECORD_BYTES, eviction=policy,
        arena=f"cascade-replay-{uuid.uuid4().hex[:12]}", **settings,
    ) as store:  # fmt: skip
        identities = [int.from_bytes(key[:_WORD_BYTES], "little") for key in keys]
        hits = 0
        for chain in trace.chains:
            hits += await _serve(store, chain, keys, trace.parents)
        disk_reads = store.statistics()["store"]["disk_hits"]
    replayed = replay_as_store(trace, make_policy(policy), capacity_blocks=capacity_blocks, identities=identities)
    pure = replay(trace, make_policy(policy), capacity_blocks=capacity_blocks)
    return Confirmation(
        trace.name, policy, capacity_blocks, len(trace.chains), trace.events,
        hits, replayed.hit_blocks, pure.hit_blocks, disk_reads,
    )  # fmt: skip


async def _serve(store: Store, chain: Sequence[int], keys: Sequence[PrefixKey], parents: Sequence[int]) -> int:
    found = store.lookup([keys[node] for node in chain])
    hits = next((place for place, tier in enumerate(found.tiers) if tier is not Tier.SHM), len(found))
    leases: list[Block] = list(await store.get_prefix([keys[node] for node in chain[:hits]]))
    assert len(leases) == hits, "what the arena held was lent"
    for node in chain[hits:]:
        if keys[node] not in store:
            parent = None if parents[node] < 0 else keys[parents[node]]
            await store.put(_part(node, b"k"), _part(node, b"v"), prefix=keys[node], parent=parent)
        leases.append(await store.get(keys[node]))
    for node, lease in zip(chain, leases, strict=True):
        assert bytes(lease.key) == _part(node, b"k"), f"node {node} has another key"
        assert bytes(lease.value) == _part(node, b"v"), f"node {node} has another value"
    await store.flush()  # what is not durable could not be evicted: a matter of timing, not of policy
    for lease in reversed(leases):
        lease.release()
    return hits


def _part(node: int, half: bytes) -> bytes:
    return hashlib.shake_128(half + node.to_bytes(_WORD_BYTES, "little")).digest(PART_BYTES)
