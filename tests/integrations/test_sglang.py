"""The real SGLang's storage contract, dynamic factory and failure injector, over a host pool like SGLang's.

SGLang's own pools import its CUDA kernels; the stand-in has their two layouts and describes its pages as they do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; see examples/sglang/README.md")
pytest.importorskip("sglang", reason="SGLang is not installed; see examples/sglang/README.md")

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HiCacheStorageFailureInjector,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.storage import StorageBackendFactory

from cascade_aio import ConfigError

LAYERS, HEADS, DIM, PAGE, PAGES = 3, 2, 40, 16, 24
LAYOUTS = ["page_first", "layer_first"]
INJECTOR = {"SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.001", "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.4"}


class Pool:
    """Host KV as SGLang lays it out: [parts, tokens, layers, ...] or [parts, layers, tokens, ...]; MLA has one part."""

    dtype, page_size, layer_num, head_num, head_dim = torch.float16, PAGE, LAYERS, HEADS, DIM

    def __init__(self, layout: str, parts: int = 2) -> None:
        self.layout = layout
        rows = (PAGES * PAGE, LAYERS) if layout == "page_first" else (LAYERS, PAGES * PAGE)
        self.memory = torch.zeros(parts, *rows, HEADS, DIM, dtype=self.dtype)

    def page(self, number: int) -> torch.Tensor:
        tokens = slice(number * PAGE, (number + 1) * PAGE)
        return self.memory[:, tokens] if self.layout == "page_first" else self.memory[:, :, tokens]

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        pieces = []
        for first in indices.tolist()[::PAGE]:
            page = self.page(first // PAGE)
            split = [page[part] for part in range(len(page))]
            if self.layout == "layer_first":
                split = [part[layer] for layer in range(LAYERS) for part in split]
            pieces += split
        return [piece.data_ptr() for piece in pieces], [piece.numel() * piece.element_size() for piece in pieces]


def keys(count: int, seed: str = "prompt") -> list[str]:
    """Chained page hashes, 64 hex digits, as SGLang makes them."""
    chain, last = [], seed
    for _ in range(count):
        last = hashlib.sha256(last.encode()).hexdigest()
        chain.append(last)
    return chain


def indices(*pages: int) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def make(root: Path, pool: Pool, extra: dict[str, Any] | None = None, **config: Any) -> Any:
    ours = {"backend_name": "cascade_aio", "module_path": "cascade_aio.integrations.sglang"}
    settings = {"root": str(root), "shm_bytes": "16MiB", "segment_bytes": "16MiB"}
    fields: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": pool.layout == "page_first",
        "model_name": "some/model",
        **config,
        "extra_config": {**ours, "class_name": "CascadeHiCache", "interface_v1": 1, **settings, **(extra or {})},
    }
    backend = StorageBackendFactory.create_backend("dynamic", HiCacheStorageConfig(**fields), pool)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    return backend


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``make`` for the root of this test; closes what it made."""
    made: list[Any] = []

    def opener(*args: Any, **config: Any) -> Any:
        made.append(make(tmp_path / "kv", *args, **config))
        return made[-1]

    yield opener
    for backend in made:
        backend.close()


def filled(layout: str, parts: int = 2) -> Pool:
    pool = Pool(layout, parts)
    pool.memory.copy_(torch.randn(pool.memory.shape))
    return pool


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_survive_a_restart_and_damage_ends_the_prefix(
    opened: Callable[..., Any], tmp_path: Path, layout: str
) -> None:
    pool, names = filled(layout), keys(8)
    backend = opened(pool)
    assert backend.batch_exists(names) == 0
    assert backend.batch_set_v1(names, indices(*range(8))) == [True] * 8
    assert backend.batch_exists([*names, "f" * 64]) == 8
    assert backend.exists(names[7])
    assert not backend.exists("e" * 64)
    backend.close()

    other = Pool(layout)
    backend = opened(other)
    assert backend.batch_exists(names) == 8
    assert backend.batch_get_v1(names, indices(*range(10, 18))) == [True] * 8
    for number in range(8):
        assert torch.equal(other.page(10 + number), pool.page(number))
    assert backend.batch_get_v1([names[1], "d" * 64], indices(0, 1)) == [True, False]
    backend.close()

    segment = max((tmp_path / "kv").glob("writers/*/*.seg"), key=lambda path: path.stat().st_size)
    raw = bytearray(segment.read_bytes())
    place = raw.index(pool.page(3).contiguous().view(torch.uint8).numpy().tobytes()[:64])
    raw[place + 100] ^= 1
    segment.write_bytes(raw)
    backend = opened(other)
    assert backend.batch_get_v1(names, indices(*range(8))) == [number != 3 for number in range(8)]
    assert backend.batch_exists(names) == 3  # not offered again
    assert backend.batch_set_v1(names[3:4], indices(12)) == [True]
    assert backend.batch_exists(names) == 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_of_the_generic_interface(opened: Callable[..., Any], layout: str) -> None:
    pool, names = filled(layout), keys(4)
    backend = opened(pool, {"interface_v1": 0})
    flat = [pool.page(number).reshape(-1) for number in range(4)]
    assert backend.batch_set(names, flat)
    assert backend.set(names[0], flat[0])
    targets = [torch.zeros_like(page) for page in flat]
    loaded = backend.batch_get([*names[:3], "0" * 64], targets)
    assert loaded[3] is None
    assert all(
        found is target and torch.equal(found, page)
        for found, target, page in zip(loaded[:3], targets[:3], flat[:3], strict=True)
    )
    assert torch.equal(backend.get(names[3], torch.zeros_like(flat[3])), flat[3])
    assert backend.get(names[3], torch.zeros(7)) is None  # another size is another page
    with pytest.raises(ConfigError, match="target_locations"):
        backend.get(names[3])


def test_names_differ_in_everything_that_changes_bytes(opened: Callable[..., Any]) -> None:
    pool, names = filled("page_first"), keys(2)
    first = opened(pool)
    assert all(first.batch_set_v1(names, indices(0, 1)))
    assert opened(pool).batch_exists(names) == 2
    narrow = filled("page_first")
    narrow.head_dim = 39
    others = [
        opened(filled("layer_first")),
        opened(narrow),
        opened(pool, model_name="some/other"),
        opened(pool, tp_size=2),
        opened(pool, tp_size=2, tp_rank=1),
        opened(pool, pp_size=2),
        opened(pool, {"salt": "tenant"}),
        opened(pool, {"revision": "2"}),
        opened(pool, {"interface_v1": 0}),
    ]
    assert [other.batch_exists(names) for other in others] == [0] * len(others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mla_pages_are_written_by_one_rank_and_read_by_all(opened: Callable[..., Any], layout: str) -> None:
    pool, names = filled(layout, parts=1), keys(3)
    writer = opened(pool, is_mla_model=True, tp_size=2, tp_rank=0)
    other = Pool(layout, parts=1)
    reader = opened(other, is_mla_model=True, tp_size=2, tp_rank=1)
    assert reader.batch_set_v1(names, indices(0, 1, 2)) == [True] * 3
    assert writer.batch_exists(names) == 0  # nothing was written
    assert writer.batch_set_v1(names, indices(0, 1, 2)) == [True] * 3
    assert reader.batch_exists(names) == 3
    assert reader.batch_get_v1(names, indices(5, 6, 7)) == [True] * 3
    assert all(torch.equal(other.page(5 + number), pool.page(number)) for number in range(3))


def test_pools_beside_the_kv_pool(opened: Callable[..., Any]) -> None:
    pool, side, names = filled("page_first"), filled("page_first", parts=1), keys(6)
    backend = opened(pool)
    backend.register_mem_host_pool_v2(side, PoolName.MAMBA)
    backend.register_mem_host_pool_v2(pool, PoolName.INDEXER)
    assert all(backend.batch_set_v1(names, indices(*range(6)), HiCacheStorageExtraInfo(prefix_keys=["a" * 64])))
    stored = PoolTransfer(PoolName.MAMBA, host_indices=indices(0, 1), keys=[names[1], names[4]])
    assert backend.batch_set_v2([stored]) == {PoolName.MAMBA: [True, True]}
    assert backend.batch_set_v2([PoolTransfer(PoolName.INDEXER, host_indices=indices(0, 1, 2), keys=names[:3])]) == {
        PoolName.INDEXER: [True] * 3
    }
    last = PoolTransfer(PoolName.MAMBA, keys=[""], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    every = PoolTransfer(PoolName.INDEXER, hit_policy=PoolHitPolicy.ALL_PAGES)
    alone = backend.batch_exists_v2(names, [last])
    assert (alone.kv_hit_pages, alone.restorable_prefix_pages) == (5, [2, 5])
    both = backend.batch_exists_v2(names, [last, every])
    assert (both.kv_hit_pages, both.restorable_prefix_pages) == (2, [2])
    assert both.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.MAMBA: 5, PoolName.INDEXER: 3}
    expected = side.page(1).clone()
    side.memory.zero_()
    load = PoolTransfer(PoolName.MAMBA, host_indices=indices(9, 10), keys=[names[4], names[5]])
    assert backend.batch_get_v2([load]) == {PoolName.MAMBA: [True, False]}
    assert torch.equal(side.page(9), expected)
    short = PoolTransfer(PoolName.MAMBA, host_indices=indices(0), keys=names[:2])
    assert backend.batch_get_v2([short]) == {PoolName.MAMBA: [False, False]}
    with pytest.raises(ConfigError, match="BLOCK_GROUPS"):
        backend.batch_exists_v2(names, [PoolTransfer(PoolName.MAMBA, hit_policy=PoolHitPolicy.BLOCK_GROUPS)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_sglangs_failure_injector_no_wrong_byte(
    opened: Callable[..., Any], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in INJECTOR.items():
        monkeypatch.setenv(name, value)
    pool, names = filled(layout), keys(8)
    backend = opened(pool)
    assert isinstance(backend, HiCacheStorageFailureInjector)
    while not all(backend.batch_set_v1(names, indices(*range(8)))):
        pass
    answers = set()
    for _ in range(40):
        found = backend.batch_exists(names)
        assert found in (0, 8)
        loaded = backend.batch_get_v1(names, indices(*range(10, 18)))
        answers.add((found, all(loaded)))
        assert all(torch.equal(pool.page(10 + n), pool.page(n)) for n, there in enumerate(loaded) if there)
    assert answers == {(0, True), (0, False), (8, True), (8, False)}


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"root": None}, "neither"), ({"shm_byte": 1}, "shm_byte"), ({"salt": 7}, "salt=7"), ({"service": "/s"}, "both")],
)
def test_wrong_settings_are_named(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "kv", Pool("page_first"), extra)


def test_nothing_is_left_in_shared_memory(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    backend = make(tmp_path / "kv", Pool("page_first"))
    assert backend.statistics()["failures"] == {"load": 0, "store": 0, "lookup": 0}
    assert not [name for name in set(os.listdir("/dev/shm")) - before if str(os.getpid()) in name]
    backend.close()
    backend.close()
    assert backend.batch_exists(keys(1)) == 0
    assert backend.batch_get_v1(keys(1), indices(0)) == [False]
