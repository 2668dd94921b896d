"""One half of ``cascade-aio demo --model``, in a process of its own: a model computes prompts and saves their KV, or a
new process of it loads that KV and answers.

    python -m cascade_aio.integrations._model_demo save|load ROOT '[512, 2048]'

Prints one JSON list, an entry per prompt. The model is a random Llama made from a seed: nothing is downloaded, and
both processes have the same weights. Its greedy tokens depend on the whole prompt.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import torch
import transformers

from cascade_aio.integrations.transformers import load_prefix, namespace_of, save_prefix
from cascade_aio.store import open_store

LAYERS, HIDDEN, HEADS, VOCABULARY = 8, 512, 8, 32000
NEW_TOKENS = 16
SHM_BYTES = "512MiB"


def build_model(tokens_max: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11 // 4,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        initializer_range=0.08,
        max_position_embeddings=tokens_max + NEW_TOKENS,
    )
    return transformers.LlamaForCausalLM(config).eval()


async def answer(phase: str, root: str, lengths: list[int]) -> list[dict[str, Any]]:
    model = build_model(max(lengths))
    namespace = namespace_of(model)
    generator = torch.Generator().manual_seed(1)
    answers = []
    model.generate(torch.zeros((1, 8), dtype=torch.long), max_new_tokens=2, do_sample=False, pad_token_id=0)  # warms up
    async with open_store(root, shm_bytes=SHM_BYTES) as store:
        for tokens in lengths:
            ids = torch.randint(0, VOCABULARY, (1, tokens), generator=generator)
            cache = transformers.DynamicCache(config=model.config)
            start = time.perf_counter()
            loaded = 0
            if phase == "load":
                loaded = await load_prefix(store, ids, cache, model=model, namespace=namespace)
            out = model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, pad_token_id=0)
            first_token_s = time.perf_counter() - start
            out = model.generate(
                out, past_key_values=cache, max_new_tokens=NEW_TOKENS - 1, do_sample=False, pad_token_id=0
            )
            if phase == "save":
                await save_prefix(store, ids, cache, namespace=namespace)
            answers.append({"loaded": loaded, "first_token_s": first_token_s, "tokens": out[0, tokens:].tolist()})
        await store.flush()
    return answers


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(answer(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))) + "\n")
