"""The real vLLM on a CPU answers from KV that an earlier process left. Starts vLLM three times: minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.config import StoreConfig, arena_name
from cascade_aio.segments import format as fmt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see examples/vllm/README.md"
    ),
]

EXAMPLES = Path(__file__).parents[2] / "examples" / "vllm"
PROMPT_TOKENS = 512
SERVED_SHARE_MIN = 0.96


def answer(tmp_path: Path) -> tuple[dict[str, Any], str]:
    """One process: (what it printed, its log)."""
    command = [sys.executable, str(EXAMPLES / "restart.py")]
    options = ["--root", str(tmp_path / "kv"), "--model", str(tmp_path / "model"), "--tokens", str(PROMPT_TOKENS)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stdout + done.stderr


def damage(root: Path) -> int:
    """Zero some bytes in the payload of every block of the root, behind its back; returns how many."""
    count = 0
    for path in root.glob("writers/*/*.seg"):
        content = bytearray(path.read_bytes())
        header = fmt.decode_segment_header(memoryview(content), path=str(path))
        assert header is not None
        at = PAGE_BYTES
        while content[at : at + len(fmt.RECORD_MAGIC)] == fmt.RECORD_MAGIC:
            record = fmt.decode_record(memoryview(content)[at:], header.identity, path=str(path), offset=at)
            assert record is not None
            if record.kind == fmt.BLOCK:
                middle = (at + record.header_pages * PAGE_BYTES + record.end) // 2
                content[middle : middle + 64] = bytes(64)
                count += 1
            at = record.end
        path.write_bytes(content)
    return count


def test_a_new_process_answers_from_the_store_and_never_from_damage(tmp_path: Path) -> None:
    first, _ = answer(tmp_path)
    second, _ = answer(tmp_path)
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] >= SERVED_SHARE_MIN * PROMPT_TOKENS
    assert second["tokens"] == first["tokens"]
    assert damage(tmp_path / "kv") >= PROMPT_TOKENS // 32
    third, log = answer(tmp_path)
    assert third["tokens"] == first["tokens"]
    assert third["cached_tokens"] < SERVED_SHARE_MIN * PROMPT_TOKENS
    assert "could not load a block" in log
    ours = arena_name(StoreConfig(root=str(tmp_path / "kv")))
    assert not [name for name in os.listdir("/dev/shm") if name.startswith((ours, "vllm_offload"))]
