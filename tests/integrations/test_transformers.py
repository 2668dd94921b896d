"""Prompt prefixes of a real transformers model: the same tokens with KV from the store, never another model's KV."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import cascade_aio
from cascade_aio import ConfigError, Store

torch = pytest.importorskip("torch", reason="torch is not installed (pip install torch==2.13.0)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")

from cascade_aio.integrations.transformers import (  # noqa: E402 - needs both
    block_names,
    load_prefix,
    namespace_of,
    save_prefix,
)

TOKENS = 16
"""Tokens of a block."""

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers" / "prefix_cache.py"


def build(seed: int = 0, dtype: Any = torch.float32, **changes: Any) -> Any:
    """A small random Llama with grouped heads, whose greedy tokens depend on the context."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        initializer_range=0.3,
        **changes,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def prompt(count: int = 101) -> Any:
    return torch.randint(0, 500, (1, count), generator=torch.Generator().manual_seed(1))


def prefilled(model: Any, ids: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


def continued(model: Any, ids: Any, cache: Any) -> list[int]:
    with torch.no_grad():
        out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def fresh(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with cascade_aio.open_store(str(tmp_path / "root"), shm_bytes="32MiB", segment_bytes="16MiB") as opened:
        yield opened


async def save(store: Store, model: Any, ids: Any) -> int:
    return await save_prefix(store, ids, prefilled(model, ids), namespace=namespace_of(model), block_tokens=TOKENS)


async def load(store: Store, model: Any, ids: Any, cache: Any) -> int:
    namespace = namespace_of(model)
    return await load_prefix(store, ids, cache, model=model, namespace=namespace, block_tokens=TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
async def test_the_same_tokens_follow_and_the_kv_is_the_same_bits(store: Store, dtype: Any) -> None:
    model, ids = build(dtype=dtype), prompt()
    original = prefilled(model, ids)
    assert await save(store, model, ids) == 96
    cache = fresh(model)
    assert await load(store, model, ids, cache) == 96
    for mine, theirs in zip(cache.layers, original.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys[:, :, :96])
        assert torch.equal(mine.values, theirs.values[:, :, :96])
    assert continued(model, ids, cache) == continued(model, ids, fresh(model))


async def test_another_prompt_shares_what_it_begins_with(store: Store) -> None:
    model, ids = build(), prompt()
    await save(store, model, ids)
    other = ids.clone()
    other[0, 40] += 1
    cache = fresh(model)
    assert await load(store, model, other, cache) == 32
    assert continued(model, other, cache) == continued(model, other, fresh(model))
    assert await save(store, model, other) == 96
    assert len(store) == 6 + 4  # two blocks are common


async def test_one_token_is_left_to_compute(store: Store) -> None:
    model, ids = build(), prompt(6 * TOKENS)
    await save(store, model, ids)
    cache = fresh(model)
    assert await load(store, model, ids, cache) == 5 * TOKENS
    assert continued(model, ids, cache) == continued(model, ids, fresh(model))


async def test_kv_of_another_model_is_a_miss(store: Store) -> None:
    model, ids = build(), prompt()
    await save(store, model, ids)
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    others = [build(seed=1), build(dtype=torch.bfloat16), build(rope_parameters=rope)]
    for other in others:
        assert await load(store, other, ids, fresh(other)) == 0
    edited = build()
    with torch.no_grad():
        edited.model.layers[2].mlp.up_proj.weight.add_(0.01)
    assert await load(store, edited, ids, fresh(edited)) == 0
    assert await load(store, model, ids, fresh(model)) == 96
    tenant = namespace_of(model, salt="another tenant")
    assert await load_prefix(store, ids, fresh(model), model=model, namespace=tenant, block_tokens=TOKENS) == 0


async def test_block_sizes_do_not_mix(store: Store) -> None:
    model, ids = build(), prompt()
    await save(store, model, ids)
    assert await load_prefix(store, ids, fresh(model), model=model, block_tokens=2 * TOKENS) == 0
    namespace = namespace_of(model)  # the caller's, used for both sizes by mistake
    assert await load_prefix(store, ids, fresh(model), model=model, namespace=namespace, block_tokens=32) == 0


async def test_a_block_that_does_not_fit_the_others_ends_the_prefix(store: Store) -> None:
    model, ids = build(), prompt()
    names = block_names(ids, namespace_of(model), block_tokens=TOKENS)
    await store.put(b"not", b"kv", prefix=names[2])
    await save(store, model, ids)
    cache = fresh(model)
    assert await load(store, model, ids, cache) == 32
    assert continued(model, ids, cache) == continued(model, ids, fresh(model))


async def test_caches_that_cannot_be_cut_into_prefixes_are_refused(store: Store) -> None:
    model, ids = build(), prompt()
    batch = prefilled(model, torch.cat([ids, ids]))
    with pytest.raises(ConfigError, match="batch of 2"):
        await save_prefix(store, ids, batch, namespace=namespace_of(model), block_tokens=TOKENS)
    with pytest.raises(ConfigError, match="no single prompt"):
        await load(store, model, torch.cat([ids, ids]), fresh(model))
    with pytest.raises(ConfigError, match="holds 101 tokens already"):
        await load(store, model, ids, prefilled(model, ids))
    torch.manual_seed(0)
    windows = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            num_hidden_layers=1,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=500,
            sliding_window=24,
        )
    ).eval()
    with pytest.raises(ConfigError, match="DynamicSlidingWindowLayer"):
        await save(store, windows, ids)


async def test_short_prompts_have_no_blocks(store: Store) -> None:
    model, ids = build(), prompt(TOKENS - 1)
    assert await save(store, model, ids) == 0
    assert await load(store, model, ids, fresh(model)) == 0
    assert await load(store, model, prompt(TOKENS), fresh(model)) == 0  # its only block would leave nothing to compute


def test_the_example_answers_the_same_in_a_new_process(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--root", str(tmp_path / "root"), "--tokens", "300", "--layers", "2"]
    lines = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.splitlines())
    first, second = lines
    assert "0 of 300 tokens from the store" in first[0]
    assert "256 of 300 tokens from the store" in second[0]
    assert first[-1] == second[-1]
    assert first[-1].startswith("tokens: ")
