"""The real vLLM on a CPU answers from KV that was kept, and answers correctly whatever happens to what was kept.

Starts vLLM nine times: some minutes, with ``make e2e-vllm``. Where vLLM is not installed all of it is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_aio.config import StoreConfig, arena_name, make_config
from cascade_aio.daemon.settings import arena_path
from tests.integrations.vllm_drive import (
    BLOCK_TOKENS,
    EXAMPLES,
    PROMPT_TOKENS,
    SERVED_TOKENS_MIN,
    cascade_tier,
    damage,
    engine,
    node_service,
    prompt_of,
    remove_arena,
    server,
    transfer,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see examples/vllm/README.md"
    ),
]


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory(tmp_path: Path) -> Iterator[None]:
    """Neither our arena nor vLLM's region, with whatever signal a test ends vLLM."""
    ours = arena_name(StoreConfig(root=str(tmp_path / "kv")))
    before = set(os.listdir("/dev/shm"))
    yield
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith((ours, "vllm_offload", "psm_"))}
    assert not left


def run_example(tmp_path: Path, model: Path) -> tuple[dict[str, Any], str]:
    """One process: (what it printed, its log)."""
    command = [sys.executable, str(EXAMPLES / "restart.py")]
    options = ["--root", str(tmp_path / "kv"), "--model", str(model), "--tokens", str(PROMPT_TOKENS)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stdout + done.stderr


def test_a_new_process_answers_from_the_store_and_never_from_damage(tmp_path: Path, model: Path) -> None:
    first, _ = run_example(tmp_path, model)
    second, _ = run_example(tmp_path, model)
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] >= SERVED_TOKENS_MIN
    assert second["tokens"] == first["tokens"]
    assert damage(tmp_path / "kv") >= PROMPT_TOKENS // BLOCK_TOKENS
    third, log = run_example(tmp_path, model)
    assert third["tokens"] == first["tokens"]
    assert third["cached_tokens"] < SERVED_TOKENS_MIN
    assert "could not load a block" in log


def test_reads_that_fail_or_come_late_are_recomputed(tmp_path: Path, model: Path) -> None:
    fault = tmp_path / "fault"
    tier = cascade_tier(root=str(tmp_path / "kv"), read_seconds_max=1)
    with engine(model, transfer(**tier)) as first:
        expected = [first.ask(PROMPT_TOKENS, seed)["tokens"] for seed in (1, 2, 3)]
    faulty = {**tier, "type": "FaultyTier", "module_path": "vllm_faults", "fault_file": str(fault)}
    with engine(model, transfer(**faulty)) as second:
        for seed, kind in ((1, "errors"), (2, "hang")):
            fault.write_text(kind)
            answer = second.ask(PROMPT_TOKENS, seed)
            assert answer["tokens"] == expected[seed - 1]
            assert answer["cached_tokens"] < SERVED_TOKENS_MIN
        assert "injected" in second.log
        assert "could not load a block" in second.log


def test_a_full_disk_costs_hits_and_nothing_else(tmp_path: Path, model: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system takes root and mount(8)")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=False)
    if done.returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        tier = cascade_tier(root=str(disk / "kv"), shm_bytes="32MiB", segment_bytes="8MiB", put_wait_seconds_max=1)
        with engine(model, transfer(**tier)) as full:  # 3 prompts of 2048 tokens are 48 MiB of KV each
            answers = [full.ask(2048, seed) for seed in range(3)]
            again = full.ask(2048, 0)
        assert again["tokens"] == answers[0]["tokens"]
        with engine(model, transfer(type="CascadeTier", **_elsewhere(tmp_path))) as reference:
            assert [reference.ask(2048, seed)["tokens"] for seed in range(3)] == [item["tokens"] for item in answers]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _elsewhere(tmp_path: Path) -> dict[str, Any]:
    return {"module_path": "cascade_aio.integrations.vllm", "root": str(tmp_path / "other"), "shm_bytes": "32MiB"}


def test_an_http_server_that_was_restarted_hits_and_its_metrics_say_so(tmp_path: Path, model: Path) -> None:
    config = transfer(**cascade_tier(root=str(tmp_path / "kv")))
    prompt = prompt_of(PROMPT_TOKENS, 5)
    with server(model, config) as first:
        computed = first.ask(prompt)
        assert computed["cached_tokens"] == 0
        first.ask(prompt_of(64, 6))
        assert first.metric("vllm:cascade_aio_stored_blocks_total") >= PROMPT_TOKENS // BLOCK_TOKENS
        first.child.end(signal.SIGTERM)
    with server(model, config) as second:
        loaded = second.ask(prompt)
        assert loaded["tokens"] == computed["tokens"]
        assert loaded["cached_tokens"] >= SERVED_TOKENS_MIN
        second.ask(prompt_of(64, 7))
        assert second.metric("vllm:cascade_aio_loaded_blocks_total") >= SERVED_TOKENS_MIN // BLOCK_TOKENS
        assert second.metric("vllm:external_prefix_cache_hits_total") >= SERVED_TOKENS_MIN
        second.child.crash()


def test_two_engines_share_a_node_service_and_survive_its_death(tmp_path: Path, model: Path) -> None:
    arena = arena_path(make_config(str(tmp_path / "kv")))
    with node_service(tmp_path / "kv") as (service, socket_path):
        config = transfer(**cascade_tier(service=socket_path, reconnect_seconds_max=1))
        with engine(model, config) as first:
            computed = [first.ask(PROMPT_TOKENS, seed)["tokens"] for seed in (8, 9)]
            with engine(model, config) as second:
                answer = second.ask(PROMPT_TOKENS, 8)
                assert answer["cached_tokens"] >= SERVED_TOKENS_MIN  # its first request
                assert answer["tokens"] == computed[0]
                service.end(signal.SIGKILL)
                assert second.ask(PROMPT_TOKENS, 9)["tokens"] == computed[1]  # was about to be loaded
                fresh = second.ask(PROMPT_TOKENS, 10)["tokens"]
            assert first.ask(PROMPT_TOKENS, 10)["tokens"] == fresh
    remove_arena(Path(arena))


def test_a_connector_of_its_own_loads_what_another_process_saved_and_recomputes_damage(
    tmp_path: Path, model: Path
) -> None:
    root = tmp_path / "kv"
    arena = Path(arena_path(make_config(str(root))))
    try:
        with node_service(root) as (_, socket_path):
            config = {
                "kv_connector": "CascadeConnector",
                "kv_connector_module_path": "cascade_aio.integrations.vllm_connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"service": socket_path},
            }
            with engine(model, config) as first:
                computed = [first.ask(PROMPT_TOKENS, seed) for seed in (11, 12)]
            assert [answer["cached_tokens"] for answer in computed] == [0, 0]
            with engine(model, config) as second:
                loaded = second.ask(PROMPT_TOKENS, 11)
                assert loaded["tokens"] == computed[0]["tokens"]
                assert loaded["cached_tokens"] >= SERVED_TOKENS_MIN
        remove_arena(arena)
        assert damage(root) >= PROMPT_TOKENS // BLOCK_TOKENS
        with node_service(root), engine(model, config) as third:
            again = third.ask(PROMPT_TOKENS, 12)
            assert again["tokens"] == computed[1]["tokens"]
            assert "could not load a block" in third.log
    finally:
        remove_arena(arena)
