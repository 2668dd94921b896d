"""Where a stored chunk's bytes are in a worker's KV cache: which blocks of which group, and which pages of each.

A chunk is ``blocks_per_chunk`` blocks of one cache group, one after the other; a block is the pages of the group's
tensors, one after the other. Imports neither vLLM nor torch at import time.

Invariants: the order of pages is that of vLLM's canonical references, the same on every start of one configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cascade_aio.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import CanonicalKVCaches

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """The part of one chunk that moves: ``block_ids`` from the chunk's block number ``first`` on."""

    group: int
    first: int
    block_ids: list[int]


def pieces_of(
    block_ids: Sequence[int], group_sizes: Sequence[int], block_indices: Sequence[int], blocks_per_chunk: int
) -> list[Piece]:
    """One piece for each chunk of a transfer, in the order of its keys.

    ``block_ids`` are those of all groups, ``group_sizes[g]`` of them of group ``g``, whose first one is block number
    ``block_indices[g]`` of the request (vLLM's ``GPULoadStoreSpec``): where that is in the midst of a chunk, the blocks
    before it do not move. Nor do those after the last one. Raises ``ValueError`` for sizes that do not agree.
    """
    if sum(group_sizes) != len(block_ids) or len(group_sizes) != len(block_indices):
        raise ValueError(f"{len(block_ids)} blocks, groups of {list(group_sizes)} from {list(block_indices)}")
    pieces = []
    start = 0
    for group, (size, index) in enumerate(zip(group_sizes, block_indices, strict=True)):
        stop = start + size
        first = index % blocks_per_chunk
        while start < stop:
            count = min(blocks_per_chunk - first, stop - start)
            pieces.append(Piece(group, first, [int(block_id) for block_id in block_ids[start : start + count]]))
            start += count
            first = 0
    return pieces


class Pages:
    """The pages of one worker's KV cache, in host memory or on a device."""

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int) -> None:
        """Keeps views of the tensors. Raises ``ConfigError`` if they are on different devices."""
        devices = {str(each.tensor.device) for each in kv_caches.tensors}
        if len(devices) != 1:
            raise ConfigError(
                f"the KV cache is on {', '.join(sorted(devices))}; CascadeOffloadingSpec serves one device"
            )
        self._blocks_per_chunk = blocks_per_chunk
        self._on_host = devices == {"cpu"}
        pages = [_as_bytes(each.tensor, on_host=self._on_host) for each in kv_caches.tensors]
        self._groups: list[list[tuple[Any, int]]] = []
        for refs in kv_caches.group_data_refs:
            sizes: dict[int, int] = {}  # layers that share a tensor share its pages
            for ref in refs:
                sizes[ref.tensor_idx] = max(sizes.get(ref.tensor_idx, 0), ref.page_size_bytes)
            self._groups.append([(pages[index], size) for index, size in sizes.items()])

    def chunk_bytes(self, group: int) -> int:
        return self._block_bytes(group) * self._blocks_per_chunk

    def _block_bytes(self, group: int) -> int:
        return sum(size for _, size in self._groups[group])

    def gather(self, piece: Piece, value: Bytes) -> None:
        """KV cache → ``value``, a whole chunk; zeros where the piece has no blocks. Blocks while bytes move."""
        if len(piece.block_ids) < self._blocks_per_chunk:
            value[:] = 0
        staged: Any = value if self._on_host else _staging(value.nbytes)
        for at, page in self._places(piece):
            staged[at : at + len(page)] = page
        if not self._on_host:
            start, stop = self._span(piece)
            value[start:stop] = staged[start:stop].numpy()

    def scatter(self, value: Bytes, piece: Piece) -> None:
        """``value``, a whole chunk → KV cache. Blocks while bytes move.

        Raises ``ConfigError`` for a chunk of another size; nothing was written then.
        """
        if value.nbytes != self.chunk_bytes(piece.group):
            raise ConfigError(f"a stored chunk has {value.nbytes} bytes, one here {self.chunk_bytes(piece.group)}")
        staged: Any = value
        if not self._on_host:
            staged = _staging(value.nbytes)
            staged.numpy()[:] = value
        for at, page in self._places(piece):
            page[:] = staged[at : at + len(page)]

    def _span(self, piece: Piece) -> tuple[int, int]:
        size = self._block_bytes(piece.group)
        return piece.first * size, (piece.first + len(piece.block_ids)) * size

    def _places(self, piece: Piece) -> list[tuple[int, Any]]:
        """(Offset in the chunk, page) of everything that moves."""
        places = []
        at, _ = self._span(piece)
        for block_id in piece.block_ids:
            for pages, size in self._groups[piece.group]:
                places.append((at, pages[block_id][:size]))
                at += size
        return places


def _as_bytes(tensor: Any, *, on_host: bool) -> Any:
    """[blocks, page bytes] without a copy: a NumPy array in host memory, else the tensor."""
    if on_host:
        return tensor.numpy().view(np.uint8)
    import torch

    return tensor.view(torch.uint8)


def _staging(nbytes: int) -> Any:
    """Page-locked host memory. Copies between it and a device are ordered with the caller's current stream, and have
    ended when they return."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
