"""Blocks and names by number: bytes, ids and prefix keys follow from the number, whatever the seed. Pure."""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

from cascade_aio.model import BlockId, BlockMeta, PrefixKey, compute_block_id, prefix_keys
from cascade_aio.testing.simulation.plan import CONTENTS, LARGE_FROM

_SIZES = (
    (0, 0),
    (1, 0),
    (0, 100),
    (63, 65),
    (4000, 4096),
    (30_000, 1),
    (12_345, 8_000),
    (4096, 4032),
    (70_000, 70_001),
    (100_000, 120_000),
)
_LARGE = (180_000, 230_000)
_METAS = (None, BlockMeta(dtype="float16", shape=(1, 2)), BlockMeta(tokens=7, extra=b"x" * 500))


class Content(NamedTuple):
    """A block: ``meta`` is the one that it is always put with, so that whatever a get gives is right or wrong."""

    number: int
    key: bytes
    value: bytes
    block_id: BlockId
    meta: BlockMeta | None

    @property
    def nbytes(self) -> int:
        return len(self.key) + len(self.value)


@functools.cache
def content(number: int) -> Content:
    """Block ``number``."""
    key_bytes, value_bytes = _SIZES[number % len(_SIZES)] if number < LARGE_FROM else _LARGE
    if number >= len(_SIZES) and not key_bytes + value_bytes:
        value_bytes = number  # one empty block is enough
    elif number >= len(_SIZES) and key_bytes + value_bytes == 1:
        value_bytes = number * 50
    key = hashlib.shake_128(b"key %d" % number).digest(key_bytes)
    value = hashlib.shake_128(b"value %d" % number).digest(value_bytes)
    return Content(number, key, value, compute_block_id(key, value), _METAS[number % len(_METAS)])


@functools.lru_cache(maxsize=1)
def number_of() -> dict[bytes, int]:
    """Block id → number."""
    return {content(number).block_id: number for number in range(CONTENTS)}


@functools.cache
def name_key(block: int, name: int) -> PrefixKey:
    """Name ``name`` of a block; a negative one is shared by all blocks."""
    token = [1 << 20, -name] if name < 0 else [block, name]
    return prefix_keys(token, block_tokens=2, namespace="simulation")[0]
