"""What a torch model is, for names: the namespace under which its KV blocks may be shared.

Two models that differ in anything that changes KV bytes must never see each other's names: wrong KV
gives wrong tokens silently. So the namespace covers the configuration (RoPE, heads, layers, windows),
the weights themselves, loaded adapters, the dtype, the layout of our blocks and the library's version.

Knows torch modules by duck typing only and imports no torch: names, shapes, dtypes and a few bytes of
each parameter are enough.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from cascade_aio.model import Namespace

SAMPLE_ELEMENTS = 64
"""Elements of a parameter that go into the fingerprint, evenly spread: any training step changes nearly all of
them, and a thousand parameters take some milliseconds."""

_NOT_BYTES = frozenset(
    {"_name_or_path", "transformers_version", "use_cache", "output_attentions", "output_hidden_states"}
)
"""Fields of a configuration that do not change KV bytes, or that differ between machines."""


def model_namespace(model: Any, *, layout: str, runner: str, salt: str = "") -> Namespace:
    """The namespace of ``model`` (a transformers ``PreTrainedModel``, or what wraps one).

    ``layout`` describes how blocks are laid out, ``runner`` is the library with its version, ``salt``
    separates tenants. Reads ``SAMPLE_ELEMENTS`` of each parameter: blocks for some milliseconds (more for
    parameters on a GPU); compute it once per model.
    """
    config = model.config.to_dict()
    kept = {name: value for name, value in config.items() if name not in _NOT_BYTES}
    described = json.dumps(kept, sort_keys=True, default=str)
    return Namespace(
        model=f"{config.get('model_type', type(model).__name__)}:{hashlib.sha256(described.encode()).hexdigest()}",
        revision=weights_fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        layout=layout,
        rank=runner,
        salt=salt,
    )


def weights_fingerprint(model: Any) -> str:
    """64 hex digits over name, shape, dtype and a sample of every parameter and buffer, and the active adapters.

    A sample, not all bytes: weights that differ only between the sampled elements of every parameter have one
    fingerprint. Who edits weights by hand passes a ``salt``.
    """
    hasher = hashlib.sha256(repr(_active_adapters(model)).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        hasher.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        flat = tensor.detach().reshape(-1)
        count = len(flat)
        if count:
            places = np.unique(np.linspace(0, count - 1, min(count, SAMPLE_ELEMENTS)).astype(np.int64))
            hasher.update(repr(flat[places.tolist()].tolist()).encode())
    return hasher.hexdigest()


def _active_adapters(model: Any) -> object:
    """Names of the LoRA adapters in use: switching them changes no parameter."""
    if not getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
        return None
    active = getattr(model, "active_adapters", None)
    return active() if callable(active) else active
