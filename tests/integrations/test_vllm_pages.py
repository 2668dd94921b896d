"""Where the bytes of stored chunks are in a paged KV cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cascade_aio.errors import ConfigError
from cascade_aio.integrations import _vllm_pages
from cascade_aio.integrations._vllm_pages import Pages, Piece, pieces_of

BLOCKS = 8


def tensor(page_bytes: int, seed: int, device: str = "cpu") -> Any:
    """Of a padded KV cache: [blocks, page bytes] with a longer stride, as far as ``Pages`` looks at a torch tensor."""
    content = np.random.default_rng(seed).integers(-128, 128, (BLOCKS, page_bytes + 16), np.int8)[:, :page_bytes]
    return SimpleNamespace(tensor=SimpleNamespace(device=device, numpy=lambda: content), page_size_bytes=page_bytes)


def caches(*groups: list[tuple[int, int]], tensors: list[Any] | None = None) -> Any:
    """``groups[g]`` are (tensor, page bytes) of the layers of group ``g``."""
    refs = [[SimpleNamespace(tensor_idx=index, page_size_bytes=size) for index, size in group] for group in groups]
    return SimpleNamespace(tensors=tensors or [tensor(64, 1), tensor(48, 2)], group_data_refs=refs)


@pytest.mark.parametrize(
    ("blocks", "sizes", "indices", "per_chunk", "expected"),
    [
        ([5, 6], [2], [0], 1, [Piece(0, 0, [5]), Piece(0, 0, [6])]),
        ([5, 6, 7, 8, 9], [5], [0], 2, [Piece(0, 0, [5, 6]), Piece(0, 0, [7, 8]), Piece(0, 0, [9])]),
        ([5, 6, 7], [3], [3], 2, [Piece(0, 1, [5]), Piece(0, 0, [6, 7])]),
        ([5, 6, 7], [1, 2], [4, 1], 4, [Piece(0, 0, [5]), Piece(1, 1, [6, 7])]),
        ([5], [0, 1], [0, 7], 2, [Piece(1, 1, [5])]),
        ([], [0], [0], 2, []),
    ],
)
def test_a_transfer_is_one_piece_for_each_chunk(
    blocks: list[int], sizes: list[int], indices: list[int], per_chunk: int, expected: list[Piece]
) -> None:
    assert pieces_of(np.array(blocks, np.int32).tolist(), sizes, indices, per_chunk) == expected


def test_sizes_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks"):
        pieces_of([1, 2], [1], [0], 1)


def test_chunks_come_back_as_they_were_and_nothing_else_changes() -> None:
    kv = caches([(0, 64), (1, 40)], [(1, 40), (1, 32)])  # two layers of the second group share one tensor
    pages = Pages(kv, 2)
    assert [pages.chunk_bytes(group) for group in (0, 1)] == [208, 80]
    before = [each.tensor.numpy().copy() for each in kv.tensors]
    stored = np.full(208, 7, np.uint8)
    pages.gather(Piece(0, 0, [3, 5]), stored)
    assert bytes(stored[:64]) == before[0][3].tobytes()
    assert bytes(stored[168:]) == before[1][5][:40].tobytes()
    pages.scatter(stored, Piece(0, 0, [1, 2]))
    pages.scatter(stored, Piece(0, 1, [6]))
    for index, size in ((0, 64), (1, 40)):
        expected = before[index].copy()
        expected[[1, 2, 6], :size] = before[index][[3, 5, 5], :size]
        assert np.array_equal(kv.tensors[index].tensor.numpy(), expected)


def test_a_part_of_a_chunk_is_stored_with_zeros_for_the_rest() -> None:
    kv = caches([(0, 64)])
    stored = np.full(128, 7, np.uint8)
    Pages(kv, 2).gather(Piece(0, 1, [4]), stored)
    assert not stored[:64].any()
    assert bytes(stored[64:]) == kv.tensors[0].tensor.numpy()[4].tobytes()


def test_a_chunk_of_another_size_is_refused_before_anything_is_written() -> None:
    kv = caches([(0, 64)])
    before = kv.tensors[0].tensor.numpy().copy()
    with pytest.raises(ConfigError, match="has 63 bytes, one here 128"):
        Pages(kv, 2).scatter(np.zeros(63, np.uint8), Piece(0, 0, [1, 2]))
    assert np.array_equal(kv.tensors[0].tensor.numpy(), before)


def test_a_cache_on_two_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match="is on cpu, cuda:0"):
        Pages(caches([(0, 64)], tensors=[tensor(64, 1), tensor(64, 2, "cuda:0")]), 1)


def test_a_device_is_filled_and_emptied_through_staging_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in host memory stand for the device's: what is copied where, not in which stream."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; see examples/vllm/README.md")
    monkeypatch.setattr(_vllm_pages, "_staging", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    on_host, on_device = caches([(0, 64), (1, 40)]), caches([(0, 64), (1, 40)])
    for each in on_device.tensors:
        whole = torch.from_numpy(np.ascontiguousarray(each.tensor.numpy()))
        each.tensor = SimpleNamespace(device="cuda:0", view=whole.view, whole=whole)
    expected, stored = np.full(208, 7, np.uint8), np.full(208, 7, np.uint8)
    for kv, target in ((on_host, expected), (on_device, stored)):
        pages = Pages(kv, 2)
        pages.gather(Piece(0, 1, [3]), target)
        target.flags.writeable = False  # as a lease's bytes are
        pages.scatter(target, Piece(0, 0, [1, 2]))
    assert np.array_equal(stored, expected)
    for host, device in zip(on_host.tensors, on_device.tensors, strict=True):
        assert np.array_equal(device.tensor.whole.numpy(), host.tensor.numpy())
