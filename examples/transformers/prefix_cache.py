"""A prompt's KV kept over processes: run it twice with the same --root and compare the two first lines.

    pip install cascade_aio torch transformers
    python prefix_cache.py --root /tmp/kv
    python prefix_cache.py --root /tmp/kv

The model is a random Llama made from a seed, so nothing is downloaded; --model NAME takes a real one.
"""

import argparse
import asyncio
import time

import torch
import transformers

import cascade_aio
from cascade_aio.integrations.transformers import load_prefix, namespace_of, save_prefix


def build_model(name: str | None, layers: int) -> transformers.PreTrainedModel:
    if name is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(name).eval()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32000,
        initializer_range=0.08,
        max_position_embeddings=32768,
    )
    return transformers.LlamaForCausalLM(config).eval()


async def answer(arguments: argparse.Namespace) -> None:
    model = build_model(arguments.model, arguments.layers)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, arguments.tokens), generator=generator)
    namespace = namespace_of(model)
    cache = transformers.DynamicCache(config=model.config)
    async with cascade_aio.open_store(arguments.root, shm_bytes=arguments.shm) as store:
        start = time.perf_counter()
        loaded = await load_prefix(store, ids, cache, model=model, namespace=namespace)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, pad_token_id=0)
        first_token_s = time.perf_counter() - start
        print(f"{loaded} of {arguments.tokens} tokens from the store, first token after {first_token_s:.3f} s")
        out = model.generate(out, past_key_values=cache, max_new_tokens=15, do_sample=False, pad_token_id=0)
        saved = await save_prefix(store, ids, cache, namespace=namespace)
        await store.flush()
    print(f"{saved} tokens are in {arguments.root} now")
    print(f"tokens: {out[0, arguments.tokens :].tolist()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="directory of the store")
    parser.add_argument("--shm", default="512MiB", help="shared memory for warm blocks")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prompt")
    parser.add_argument("--layers", type=int, default=8, help="layers of the random model")
    parser.add_argument("--model", help="a model of the Hugging Face hub, or a directory, instead of the random one")
    asyncio.run(answer(parser.parse_args()))
