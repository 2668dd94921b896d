"""A prompt answered by vLLM from KV that an earlier process left in a cascade_aio store.

    python restart.py --root /tmp/kv --model DIR      twice: the second answers from the store

Runs on a CPU with the community build (see README.md beside this file); prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

BLOCK_TOKENS = 32
"""Attention on a CPU wants a multiple of this."""


def make_model(directory: Path, layers: int, hidden: int) -> None:
    """A random Llama whose greedy tokens depend on the context, made once."""
    if (directory / "config.json").exists():
        return
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32000,
        initializer_range=0.08,
        max_position_embeddings=8192,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


TIERS = ("CascadeTier", "fs", "none")


def tier_settings(tier: str, root: str) -> dict[str, Any]:
    """One entry of ``secondary_tiers``."""
    if tier == "fs":
        return {"type": "fs", "root_dir": root}
    return {"type": tier, "module_path": "cascade_aio.integrations.vllm", "root": root, "shm_bytes": "256MiB"}


def transfer_settings(tier: dict[str, Any]) -> dict[str, Any]:
    """``kv-transfer-config`` of an engine on a CPU with ``tier`` behind the primary one."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_spec",
            "cpu_bytes_to_use": 512 << 20,
            "block_size": BLOCK_TOKENS,
            "secondary_tiers": [tier],
        },
    }


def make_engine(model: str, transfer: dict[str, Any] | None, **options: Any) -> Any:
    """vLLM's ``LLM``, warmed up with a prompt that is not ours; ``transfer`` is its ``kv-transfer-config``."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    engine = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        enable_prefix_caching=True,
        block_size=BLOCK_TOKENS,
        max_model_len=8192,
        disable_log_stats=False,
        kv_transfer_config=None if transfer is None else KVTransferConfig(**transfer),
        **options,
    )
    ask(engine, [7] * 64)
    return engine


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return [(number * 7919 + 13 + seed * 104729) % 31991 for number in range(tokens)]


def ask(engine: Any, prompt: list[int]) -> dict[str, Any]:
    """Greedy tokens and how long they took, in seconds."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    output = engine.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0]
    return {
        "tokens": list(output.outputs[0].token_ids),
        "cached_tokens": output.num_cached_tokens,
        "first_token_s": output.metrics.first_token_latency,
        "request_s": round(time.perf_counter() - start, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="directory of the store")
    parser.add_argument("--model", required=True, help="directory of a model; a random one is made if it is empty")
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tier", default="CascadeTier", choices=TIERS)
    arguments = parser.parse_args()
    make_model(Path(arguments.model), arguments.layers, arguments.hidden)
    transfer = None if arguments.tier == "none" else transfer_settings(tier_settings(arguments.tier, arguments.root))
    engine = make_engine(arguments.model, transfer)
    result = ask(engine, prompt_of(arguments.tokens))
    engine.llm_engine.engine_core.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
