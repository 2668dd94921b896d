"""What the scheduler's half of ``CascadeConnector`` tells the workers' half: which blocks to move, and their names."""

from __future__ import annotations

import dataclasses
import hashlib

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from cascade_aio.model import PrefixKey

LAYOUT = "vllm/block/1"
"""Name and version of what a block holds: the pages of all layers in the order of their cache group."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Blocks of one request between KV cache and store: ``hashes[i]`` is what block ``block_ids[i]`` holds."""

    request: str
    block_ids: list[int]
    hashes: list[bytes]
    above: bytes | None = None
    """The hash before the first of ``hashes``."""


@dataclasses.dataclass
class Plan(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells all workers in one step. ``roots[rank]`` begins the names of that worker's blocks."""

    roots: list[bytes]
    loads: list[Move] = dataclasses.field(default_factory=list)
    saves: list[Move] = dataclasses.field(default_factory=list)
    preempted: bool = False


def name_of(root: bytes, block_hash: bytes) -> PrefixKey:
    return PrefixKey(hashlib.sha256(root + block_hash).digest())
