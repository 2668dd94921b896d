"""What the scheduler's half of ``CascadeOffloadingSpec`` tells the workers' half: the names of chunks to move."""

from __future__ import annotations

import dataclasses

from vllm.v1.kv_offload.base import LoadStoreSpec

from cascade_aio.model import PrefixKey

LAYOUT = "vllm/chunk/1"
"""Name and version of what a value holds: one chunk of one worker, as ``_vllm_pages`` lays it out."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredChunks(LoadStoreSpec):  # type: ignore[misc]
    """``names[rank][i]`` is what chunk ``i`` of that worker is stored under, in the order of the transfer's blocks."""

    names: list[list[PrefixKey]]
    ordered: bool = False
    """Whether each chunk but the first continues the one before it."""
