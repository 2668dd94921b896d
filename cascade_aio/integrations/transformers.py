"""KV of prompt prefixes for models of the ``transformers`` library: save it once, load it in any later process.

A block holds ``block_tokens`` tokens of every layer: its key part is the layers' keys one after the other,
each of shape [kv_heads, block_tokens, head_dim], its value part the values likewise. Blocks are named by
prefix keys of the token ids in a namespace made from the model itself (``_fingerprint``), so KV of other
weights, another dtype or another RoPE is a miss. What was loaded is what was saved, bit for bit.

Full-attention caches of one sequence only: a sliding window or a recurrent state does not hold its past,
and is refused. Tensors are copied in worker threads, once each way: out of the arena under a lease, or into
a reserved extent.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from cascade_aio.errors import ConfigError
from cascade_aio.integrations._fingerprint import model_namespace
from cascade_aio.model import BlockMeta, Namespace, PrefixKey, prefix_keys
from cascade_aio.store import Block, Store

try:
    import torch
    import transformers
except ImportError as error:  # pragma: no cover - tried by hand: the message is all there is
    raise ImportError(
        f"cascade_aio.integrations.transformers needs torch and transformers ({error}); "
        "install them: pip install torch transformers"
    ) from error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BLOCK_TOKENS = 256
"""Tokens of a block unless told otherwise: 80 MiB for a model with LLaMA-70B's geometry."""

LAYOUT = "transformers/LHTD/1"
"""Name and version of the layout of a block, as the module's first paragraph states it."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Geometry:
    """Shape and dtype of each layer's KV: (kv_heads, head_dim of keys, head_dim of values)."""

    layers: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype

    def part_bytes(self, tokens: int) -> tuple[int, int]:
        size = tokens * self.dtype.itemsize
        return sum(h * k for h, k, _ in self.layers) * size, sum(h * v for h, _, v in self.layers) * size

    def meta(self, tokens: int) -> BlockMeta:
        described = msgspec.json.encode(self.layers) if len(set(self.layers)) > 1 else b""
        heads, key_dim, value_dim = self.layers[0]
        return BlockMeta(
            dtype=str(self.dtype).removeprefix("torch."),
            shape=(len(self.layers), heads, tokens, key_dim, value_dim),
            layout=LAYOUT,
            tokens=tokens,
            extra=described,
        )


def namespace_of(model: Any, *, block_tokens: int = BLOCK_TOKENS, salt: str = "") -> Namespace:
    """The namespace of ``model``'s blocks. Reads a sample of every weight: some milliseconds, so keep it.

    Covers configuration, weights, active adapters, dtype, layout and the transformers release (major.minor).
    """
    release = ".".join(transformers.__version__.split(".")[:2])
    return model_namespace(model, layout=f"{LAYOUT}/{block_tokens}", runner=f"transformers {release}", salt=salt)


async def save_prefix(
    store: Store,
    token_ids: Sequence[int] | torch.Tensor,
    cache: transformers.DynamicCache,
    *,
    namespace: Namespace,
    block_tokens: int = BLOCK_TOKENS,
) -> int:
    """Store the KV of all full blocks of ``token_ids`` that ``cache`` holds; returns the tokens stored or known.

    ``cache`` must hold the KV of ``token_ids[:n]`` for some n (more ids than that are left alone). Blocks whose
    names are bound are not touched. Durable after ``store.flush()``. Raises ``ConfigError`` for a cache that
    cannot be cut into prefixes (batch, sliding window, quantised, recurrent) and what ``store.put`` raises.
    Cancellation keeps the blocks stored so far.
    """
    ids = _flat_ids(token_ids)
    held = min(len(ids), cache.get_seq_length())
    if held < block_tokens:
        return 0
    keys = prefix_keys(ids[:held], block_tokens, namespace)
    geometry = _geometry_of(cache)
    key_bytes, value_bytes = geometry.part_bytes(block_tokens)
    known = len(store.lookup(keys))
    for number, name in enumerate(keys[known:], start=known):
        parent = keys[number - 1] if number else None
        async with store.reserve(
            key_bytes=key_bytes, value_bytes=value_bytes, prefix=name, parent=parent, meta=geometry.meta(block_tokens)
        ) as slot:
            await asyncio.to_thread(_gather, cache, slot.key, slot.value, number * block_tokens, block_tokens)
    return len(keys) * block_tokens


async def load_prefix(
    store: Store,
    token_ids: Sequence[int] | torch.Tensor,
    cache: transformers.DynamicCache,
    *,
    model: Any,
    namespace: Namespace | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> int:
    """Fill the empty ``cache`` with the longest stored prefix of ``token_ids``; returns how many tokens that is.

    At least one token is left for the model to compute, as ``generate(ids, past_key_values=cache)`` needs it.
    Tensors are placed on ``model``'s device. ``namespace`` is ``namespace_of(model)`` where it is not given.
    A block that is missing, damaged or of another shape ends the prefix; nothing half-loaded stays in
    ``cache``. Raises ``ConfigError`` for a cache that is not empty, and what ``store.get_prefix`` raises.
    """
    if cache.get_seq_length():
        raise ConfigError(
            f"the cache holds {cache.get_seq_length()} tokens already; load a prefix into an empty DynamicCache"
        )
    ids = _flat_ids(token_ids)
    names = prefix_keys(
        ids[: max(0, len(ids) - 1)], block_tokens, namespace or namespace_of(model, block_tokens=block_tokens)
    )
    if not names:
        return 0
    async with store.get_prefix(names) as blocks:
        fitting, geometry = _fitting(blocks, block_tokens)
        if geometry is None:
            return 0
        layers = await asyncio.to_thread(_scatter, fitting, geometry, block_tokens, model.device)
    for number, (key, value) in enumerate(layers):
        cache.update(key, value, number)
    return len(fitting) * block_tokens


def block_names(
    token_ids: Sequence[int] | torch.Tensor, namespace: Namespace, *, block_tokens: int = BLOCK_TOKENS
) -> list[PrefixKey]:
    """Prefix keys of the full blocks of ``token_ids``: to prefetch ahead of a request, or to look it up."""
    return prefix_keys(_flat_ids(token_ids), block_tokens, namespace)


def _flat_ids(token_ids: Sequence[int] | torch.Tensor) -> list[int]:
    if isinstance(token_ids, torch.Tensor):
        if token_ids.ndim == 2 and token_ids.shape[0] == 1:
            token_ids = token_ids[0]
        if token_ids.ndim != 1:
            raise ConfigError(
                f"token_ids of shape {tuple(token_ids.shape)} are no single prompt; pass one row at a time"
            )
        flat: list[int] = token_ids.tolist()
        return flat
    return list(token_ids)


def _geometry_of(cache: transformers.DynamicCache) -> _Geometry:
    """The layers' shapes. Raises ``ConfigError`` unless every layer holds its whole past for one sequence."""
    layers = []
    dtypes = set()
    length = cache.get_seq_length()
    for number, layer in enumerate(cache.layers):
        if type(layer) is not transformers.cache_utils.DynamicLayer:
            raise ConfigError(
                f"layer {number} of the cache is a {type(layer).__name__}, which does not hold the plain keys and "
                "values of all tokens; only full attention in a DynamicCache can be stored by prefix"
            )
        key, value = layer.keys, layer.values
        if key is None or value is None or key.shape[2] != length or value.shape[2] != length:
            raise ConfigError(f"layer {number} of the cache does not hold {length} tokens as layer 0 does")
        if key.shape[0] != 1:
            raise ConfigError(f"the cache holds a batch of {key.shape[0]} sequences; save one sequence at a time")
        layers.append((key.shape[1], key.shape[3], value.shape[3]))
        dtypes |= {key.dtype, value.dtype}
    if len(dtypes) != 1:
        raise ConfigError(f"the cache mixes dtypes {sorted(map(str, dtypes))}; only one can be stored")
    return _Geometry(tuple(layers), dtypes.pop())


def _fitting(blocks: Sequence[Block], block_tokens: int) -> tuple[list[Block], _Geometry | None]:
    """The leading blocks that have one and the same geometry, and that geometry (``None``: not even one has)."""
    geometry: _Geometry | None = None
    fitting: list[Block] = []
    for block in blocks:
        found = _geometry_in(block.meta, block_tokens)
        if found is None or (geometry is not None and found != geometry):
            break
        if (len(block.key), len(block.value)) != found.part_bytes(block_tokens):
            break
        geometry = found
        fitting.append(block)
    return fitting, geometry


def _geometry_in(meta: BlockMeta | None, block_tokens: int) -> _Geometry | None:
    if (
        meta is None
        or meta.layout != LAYOUT
        or meta.tokens != block_tokens
        or meta.shape is None
        or len(meta.shape) != 5
    ):
        return None
    dtype = getattr(torch, meta.dtype or "", None)
    if not isinstance(dtype, torch.dtype):
        return None
    count, heads, _, key_dim, value_dim = meta.shape
    if meta.extra:
        return _Geometry(tuple(msgspec.json.decode(meta.extra, type=list[tuple[int, int, int]])), dtype)
    return _Geometry(((heads, key_dim, value_dim),) * count, dtype)


def _gather(
    cache: transformers.DynamicCache, key: npt.NDArray[np.uint8], value: npt.NDArray[np.uint8], start: int, tokens: int
) -> None:
    """Copy tokens ``start`` and following of every layer into a block's parts. Runs in a worker thread."""
    for part, name in ((key, "keys"), (value, "values")):
        done = 0
        for layer in cache.layers:
            source = getattr(layer, name)[0, :, start : start + tokens]
            target = torch.frombuffer(part[done : done + source.nbytes], dtype=source.dtype)
            target.view(source.shape).copy_(source)
            done += source.nbytes


def _scatter(
    blocks: Sequence[Block], geometry: _Geometry, tokens: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors [1, kv_heads, all tokens, head_dim] of every layer, filled from the blocks. Runs in a worker thread.

    Copied as bytes by NumPy: it takes read-only memory and any dtype, and releases the GIL.
    """
    total, size = len(blocks) * tokens, geometry.dtype.itemsize
    parts = [(block.key, block.value) for block in blocks]
    result = []
    offsets = [0, 0]
    for heads, *dims in geometry.layers:
        pair = []
        for part, dim in enumerate(dims):
            target = torch.empty((1, heads, total, dim), dtype=geometry.dtype)
            rows = target.view(torch.uint8).numpy()[0]
            nbytes = heads * tokens * dim * size
            for number in range(len(blocks)):
                source = parts[number][part][offsets[part] : offsets[part] + nbytes]
                rows[:, number * tokens : (number + 1) * tokens] = source.reshape(heads, tokens, dim * size)
            offsets[part] += nbytes
            pair.append(target.to(device))
        result.append((pair[0], pair[1]))
    return result
