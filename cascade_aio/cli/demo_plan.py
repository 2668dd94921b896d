"""How large the demo is on this machine, and which requests it plays. Pure: free space comes in, a plan goes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from cascade_aio.config import ALIGNMENT_BYTES, MIB, format_size
from cascade_aio.errors import ConfigError
from cascade_aio.model import BlockMeta, Namespace, PrefixKey
from cascade_aio.workload import LLAMA_70B, Request, SessionPlan, block_bytes, session_requests

FULL_BLOCK_BYTES = block_bytes(256)
FULL_BLOCKS = 16
SMALL_BLOCK_BYTES = MIB
SMALL_BLOCKS = 32
BLOCK_BYTES_MIN = 64 * 1024
BLOCKS_MIN = 4
"""Fewer show nothing: the plan then takes smaller blocks instead."""
BATCH_BYTES_MAX = 640 * MIB
"""Block bytes that exist in private memory at once, generated before the clock starts."""
BATCH_BLOCKS_MAX = 64
SPARE_BLOCKS = 2
"""Extents beyond the working set, so that a second put of a cached block finds room to be hashed in."""
FREE_PART_MAX = 0.8
"""Part of what is free that the demo takes at most."""
SEGMENT_BYTES_MAX = 512 * MIB


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """What is free, in bytes: the root's file system, shared memory, and memory altogether (shm included)."""

    disk_bytes: int
    shm_bytes: int
    memory_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class DemoPlan:
    """``blocks`` different blocks of ``block_bytes`` (key and value are halves). ``notes`` tell what was cut."""

    block_bytes: int
    blocks: int
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.blocks

    @property
    def batch_blocks(self) -> int:
        return max(1, min(self.blocks, BATCH_BLOCKS_MAX, BATCH_BYTES_MAX // self.block_bytes))

    @property
    def shm_bytes(self) -> int:
        extent = -(-self.block_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + 2 * ALIGNMENT_BYTES
        return max(16 * MIB, extent * (self.blocks + SPARE_BLOCKS))

    @property
    def segment_bytes(self) -> int:
        """About three segments for the whole, so that sealing is part of the show."""
        third = self.total_bytes // 3 // MIB * MIB
        return max(4 * MIB, 2 * self.block_bytes // MIB * MIB, min(SEGMENT_BYTES_MAX, third))

    @property
    def disk_bytes(self) -> int:
        """Segments, their preallocated ends, and the file of the raw limits."""
        return 2 * self.total_bytes + 2 * self.segment_bytes

    @property
    def meta(self) -> BlockMeta:
        tokens, rest = divmod(self.block_bytes, LLAMA_70B.token_bytes)
        return (
            BlockMeta(dtype="float16", shape=LLAMA_70B.shape(tokens)) if tokens and not rest else BlockMeta("float16")
        )

    def fits(self, room: Room) -> bool:
        memory = self.shm_bytes + 2 * self.batch_blocks * self.block_bytes
        return (
            self.disk_bytes <= FREE_PART_MAX * room.disk_bytes
            and self.shm_bytes <= FREE_PART_MAX * room.shm_bytes
            and memory <= FREE_PART_MAX * room.memory_bytes
        )


def choose_plan(wanted_block_bytes: int, wanted_blocks: int, room: Room) -> DemoPlan:
    """The wanted plan, or the largest smaller one that fits: fewer blocks first, then smaller ones.

    Raises ``ConfigError`` for sizes that make no demo, and where not even the smallest plan fits.
    """
    if wanted_block_bytes < BLOCK_BYTES_MIN or wanted_block_bytes % 4:
        raise ConfigError(f"--block-size must be a multiple of 4 and at least 64 KiB, not {wanted_block_bytes}")
    if wanted_blocks < BLOCKS_MIN:
        raise ConfigError(f"--blocks must be at least {BLOCKS_MIN}, not {wanted_blocks}")
    size, blocks = wanted_block_bytes, wanted_blocks
    free = (
        f"{format_size(room.disk_bytes)} of disk, {format_size(room.shm_bytes)} of shared memory and "
        f"{format_size(room.memory_bytes)} of memory are free"
    )
    while not DemoPlan(size, blocks).fits(room):
        if blocks > BLOCKS_MIN:
            blocks = max(BLOCKS_MIN, blocks * 3 // 4)
        elif size >= 2 * BLOCK_BYTES_MIN:
            size, blocks = size // 8 * 4, wanted_blocks
        else:
            raise ConfigError(f"the smallest demo does not fit: {free}; free some")
    if (size, blocks) == (wanted_block_bytes, wanted_blocks):
        return DemoPlan(size, blocks)
    return DemoPlan(size, blocks, (f"cut to {blocks} blocks of {format_size(size)}: {free}",))


def demo_requests(blocks: int, seed: int) -> Iterable[Request]:
    """Sessions of three turns over two system prompts, enough of them for ``blocks`` different blocks."""
    return session_requests(SessionPlan(sessions=blocks, turns=3, system_blocks=2, seed=seed, namespace=DEMO_NAMESPACE))


DEMO_NAMESPACE = Namespace("llama-70b", dtype="float16", rank="tp0", salt="demo")


def cut_requests(requests: Iterable[Request], blocks: int) -> list[Request]:
    """The first requests that together name ``blocks`` different blocks; the last one may be shortened."""
    kept: list[Request] = []
    seen: set[PrefixKey] = set()
    for request in requests:
        keys: list[PrefixKey] = []
        for key in request.keys:
            if key not in seen and len(seen) == blocks:
                break
            seen.add(key)
            keys.append(key)
        if keys:
            kept.append(dataclasses.replace(request, keys=tuple(keys), new_from=min(request.new_from, len(keys))))
        if len(seen) == blocks and len(keys) < len(request.keys):
            break
    return kept
