"""The real vLLM on a CPU with a node service's arena in place of its CPU tier.

Starts vLLM six times: some minutes, with ``make e2e-vllm``. Where vLLM is not installed all of it is skipped.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_aio.config import make_config
from cascade_aio.daemon.settings import arena_path
from tests.integrations.vllm_drive import (
    BLOCK_TOKENS,
    ENVIRONMENT,
    PROMPT_TOKENS,
    SERVED_TOKENS_MIN,
    damage,
    engine,
    node_service,
    remove_arena,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see examples/vllm/README.md"
    ),
]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Of a store whose service keeps its arena for the next one; it is gone at the end."""
    root = tmp_path / "kv"
    yield root
    remove_arena(Path(arena_path(make_config(str(root)))))


@pytest.fixture
def nothing_left_of_workers() -> Iterator[None]:
    """Workers on CPUs talk through shared memory that vLLM leaves behind."""
    memory = Path("/dev/shm")
    before = set(memory.glob("vllm_dist_*cpushm*"))
    yield
    for path in set(memory.glob("vllm_dist_*cpushm*")) - before:
        path.unlink()


def config(socket_path: str, **settings: Any) -> dict[str, Any]:
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CascadeOffloadingSpec",
            "spec_module_path": "cascade_aio.integrations.vllm_spec",
            "service": socket_path,
            "reconnect_seconds_max": 1,
            **settings,
        },
    }


def test_what_one_engine_stored_the_next_one_loads_from_disk_and_never_from_damage(root: Path, model: Path) -> None:
    chunks_of_two = {"blocks_per_chunk": 2}
    with node_service(root) as (_, path), engine(model, config(path, **chunks_of_two)) as first:
        computed = [first.ask(PROMPT_TOKENS, seed) for seed in (1, 2)]
    assert [answer["cached_tokens"] for answer in computed] == [0, 0]
    remove_arena(Path(arena_path(make_config(str(root)))))
    with node_service(root) as (_, path), engine(model, config(path, **chunks_of_two)) as second:
        loaded = second.ask(PROMPT_TOKENS, 1)
        longer = second.ask(PROMPT_TOKENS - BLOCK_TOKENS, 1)  # ends in the midst of a chunk
    assert loaded["tokens"] == computed[0]["tokens"]
    assert loaded["cached_tokens"] >= SERVED_TOKENS_MIN - BLOCK_TOKENS
    assert longer["cached_tokens"] >= SERVED_TOKENS_MIN - 3 * BLOCK_TOKENS
    remove_arena(Path(arena_path(make_config(str(root)))))
    assert damage(root) >= PROMPT_TOKENS // (2 * BLOCK_TOKENS)
    with node_service(root) as (_, path), engine(model, config(path, **chunks_of_two)) as third:
        again = third.ask(PROMPT_TOKENS, 2)
        assert again["tokens"] == computed[1]["tokens"]
        assert again["cached_tokens"] == 0
        assert "could not load a block" in third.log


def test_two_engines_share_a_service_and_load_what_is_in_its_arena_when_it_has_died(root: Path, model: Path) -> None:
    with node_service(root) as (service, path), engine(model, config(path)) as first:
        computed = [first.ask(PROMPT_TOKENS, seed)["tokens"] for seed in (3, 4)]
        with engine(model, config(path)) as second:
            answer = second.ask(PROMPT_TOKENS, 3)
            assert answer["cached_tokens"] >= SERVED_TOKENS_MIN  # its first request
            assert answer["tokens"] == computed[0]
            service.end(signal.SIGKILL)
            held = second.ask(PROMPT_TOKENS, 4)
            assert held["cached_tokens"] >= SERVED_TOKENS_MIN
            assert held["tokens"] == computed[1]
            fresh = second.ask(PROMPT_TOKENS, 5)["tokens"]
        assert first.ask(PROMPT_TOKENS, 5)["tokens"] == fresh


@pytest.mark.usefixtures("nothing_left_of_workers")
def test_two_workers_store_and_load_their_parts_and_nothing_from_before_a_reset(
    root: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two workers of vLLM on CPUs take two cores")
    monkeypatch.setitem(ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    with node_service(root) as (_, path), engine(model, config(path), tensor_parallel_size=2) as both:
        computed = both.ask(PROMPT_TOKENS, 6)
        both.forget(connector=False)
        loaded = both.ask(PROMPT_TOKENS, 6)
        both.forget(connector=True)
        again = both.ask(PROMPT_TOKENS, 6)
    assert [answer["tokens"] for answer in (loaded, again)] == [computed["tokens"]] * 2
    assert computed["cached_tokens"] == again["cached_tokens"] == 0
    assert loaded["cached_tokens"] >= SERVED_TOKENS_MIN
