"""The namespace of vLLM's KV blocks: everything that vLLM tells about them and that changes their bytes.

vLLM's block hashes cover tokens, LoRA, salt and images, not the model, its revision, dtype, layout or ranks: two
servers that differ in one of these must never see each other's blocks. Imports no torch; blocks while it reads a
little of each weight file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import vllm

from cascade_aio.model import Namespace

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadKey, ReqContext
    from vllm.v1.kv_offload.config import OffloadingConfig

MODEL_SAMPLE_BYTES = 1 << 20
"""Bytes at the head and at the tail of each weight file that name a model directory."""


def namespace_of(
    config: OffloadingConfig, *, layout: str, revision: str, salt: str, rank: int | None = None
) -> Namespace:
    """``layout`` names what a block holds; ``rank`` is the worker's whose bytes those are, by default all of them."""
    parallel = config.parallel
    described = {
        "cache": dataclasses.asdict(config.cache),
        "groups": [dataclasses.asdict(group) for group in config.groups],
        "worker_kv_bytes_per_block": config.worker_kv_bytes_per_block,
        "replicated_layout": config.replicated_layout,
        "canonical_layout": config.canonical_layout,
        "kv_cache_layout": config.kv_cache_layout,
    }
    ranks = (
        parallel.rank if rank is None else rank,
        parallel.world_size,
        parallel.tp_size,
        parallel.pp_size,
        parallel.pcp_size,
        parallel.dcp_size,
    )
    fingerprint = _directory_fingerprint(config.model.name)
    return Namespace(
        model=fingerprint or config.model.name,  # a directory's path says nothing of what is in it
        revision=f"{revision}:vllm {vllm.__version__}",
        dtype=str(config.model.dtype),
        layout=f"{layout}:{hashlib.sha256(msgspec.json.encode(described, order='sorted')).hexdigest()}",
        rank=":".join(map(str, ranks)),
        salt=salt,
    )


def in_order(keys: Sequence[OffloadKey], request: ReqContext) -> bool:
    """Whether ``keys`` come in the order of the request: then each has the one before it as its parent."""
    places = [request.get_offload_key_position(key) for key in keys]
    return all(a is not None and b is not None and a < b for a, b in itertools.pairwise(places))


def _directory_fingerprint(model: str) -> str:
    """Of a model in a local directory: its configuration and the head and tail of each weight file; else empty."""
    directory = Path(model)
    if not directory.is_dir():
        return ""
    hasher = hashlib.sha256()
    for path in sorted([*directory.glob("*.json"), *directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = path.stat().st_size
        hasher.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            hasher.update(file.read(MODEL_SAMPLE_BYTES))
            file.seek(max(0, size - MODEL_SAMPLE_BYTES))
            hasher.update(file.read(MODEL_SAMPLE_BYTES))
    return hasher.hexdigest()
