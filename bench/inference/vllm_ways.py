"""Time to first token of vLLM: computing a prompt, and loading it in a new process by each of several tiers.

Each way is two engines: the first computes the prompts and stores them, the second, in a new process, is asked for
them again after the files have left the page cache. The reference is an engine without a tier. The prompts are all
different; the engine was warmed up with another one.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import Any

from bench.inference.child import ANSWER
from bench.inference.rows import Part, Way
from cascade_aio.cli.page_cache import drop_cache

CHILD = pathlib.Path(__file__).with_name("child.py")
EXAMPLE = CHILD.parents[2] / "examples" / "vllm"
CHILD_SECONDS_MAX = 420
SETTLE_S = 1.0
SERVED_SHARE_MIN = 0.9
PRIMARY_BYTES = 1 << 30
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
}

Answers = list[dict[str, Any]]
Transfer = dict[str, Any]


def tiering(tier: Transfer) -> Transfer:
    """vLLM's tiering offload with ``tier`` behind the primary one, on a CPU."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_spec",
            "cpu_bytes_to_use": PRIMARY_BYTES,
            "block_size": 32,
            "secondary_tiers": [tier],
        },
    }


def ways(folder: pathlib.Path) -> dict[str, tuple[Transfer, dict[str, str]]]:
    """Each way that loads: its ``kv-transfer-config`` and variables; files below ``folder``."""
    ours = {
        "type": "CascadeTier",
        "module_path": "cascade_aio.integrations.vllm",
        "root": str(folder / "cascade"),
        "shm_bytes": "1GiB",
    }
    lmcache = {
        "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_LOCAL_CPU": "True",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "1",
        "LMCACHE_LOCAL_DISK": f"file://{folder / 'lmcache'}/",
        "LMCACHE_MAX_LOCAL_DISK_SIZE": "4",
        "PYTHONHASHSEED": "0",
    }
    return {
        "cascade_aio (`CascadeTier`)": (tiering(ours), {}),
        "vLLM's own `fs` tier": (tiering({"type": "fs", "root_dir": str(folder / "fs")}), {}),
        "LMCache, its disk": ({"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}, lmcache),
    }


def measure(
    python: str, folder: pathlib.Path, *, tokens: int, runs: int, say: Callable[[str], None]
) -> tuple[Part, list[str]]:
    """The table, and what went wrong. A way that does not run becomes a row that says so."""
    seeds = list(range(1, runs + 1))

    def ask(transfer: Transfer | None, variables: dict[str, str]) -> tuple[Answers, str]:
        plan = {"model": str(folder / "model"), "tokens": tokens, "seeds": seeds, "transfer": transfer}
        return _child(python, {**plan, "settle_s": SETTLE_S}, variables, folder)

    say("vLLM computes")
    computed, _ = ask(None, {})
    expected = [answer["tokens"] for answer in computed]
    found = [Way("computing it again", "s", [answer["first_token_s"] for answer in computed])]
    problems: list[str] = []
    for name, (transfer, variables) in ways(folder).items():
        try:
            say(f"{name}: storing")
            ask(transfer, variables)
            drop_cache(str(path) for path in folder.rglob("*") if path.is_file() and "model" not in path.parts)
            say(f"{name}: loading")
            loaded, log = ask(transfer, variables)
        except ChildError as error:
            say(f"{name}: {error}")
            problems.append(f"{name}: {error.log}")
            found.append(Way(name, "s", not_run=str(error)))
            continue
        served = min(answer["cached_tokens"] for answer in loaded) / tokens
        if served < SERVED_SHARE_MIN:  # its time is one of computing
            problems.append(f"{name}: {log}")
            found.append(Way(name, "s", not_run=f"{served:.0%} of a prompt was loaded. {_reason(log)}"))
            continue
        same = [answer["tokens"] for answer in loaded] == expected
        found.append(Way(name, "s", [answer["first_token_s"] for answer in loaded], served, same))
    how = (
        f"Time to first token of vLLM on this CPU, prompts of {tokens} tokens, random Llama of 8 layers, hidden size "
        "1024, float32; loads in a new process with cold files:"
    )
    return Part("first token after", how, "lower", found), problems


class ChildError(Exception):
    """An engine that did not answer; ``log`` is the end of what it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def _child(python: str, plan: dict[str, Any], variables: dict[str, str], folder: pathlib.Path) -> tuple[Answers, str]:
    """What an engine answered, and what it said. Not in a checkout, whose packages its processes would import."""
    path = os.pathsep.join([str(EXAMPLE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, **variables}
    command = [python, str(CHILD), json.dumps(plan)]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"the engine did not end within {CHILD_SECONDS_MAX} s", str(error.output)[-4000:]) from error
    log = done.stdout + done.stderr
    for line in done.stdout.splitlines():
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER)), log
    raise ChildError(_reason(log) or f"the engine ended with {done.returncode}", log[-4000:])


def _reason(log: str) -> str:
    """The first line of ``log`` that tells of an exception and is not only a warning."""
    for line in log.splitlines():
        if "WARNING" in line:
            continue
        if found := re.search(r"\b(\w*(?:Error|Exception): .*)", line):
            return found[1][:200]
    return ""
