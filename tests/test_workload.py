"""Requests share prefixes as promised; block bytes are reproducible, finite and checkable."""

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.errors import ConfigError
from cascade_aio.model import PrefixKey
from cascade_aio.workload import (
    LLAMA_70B,
    SessionPlan,
    block_bytes,
    content_id,
    fill_block,
    session_requests,
    trace_requests,
    verify_block,
)


def test_llama_70b_block_is_80_mib() -> None:
    assert LLAMA_70B.token_bytes == 320 * 1024
    assert block_bytes(256) == 80 << 20
    assert np.zeros(LLAMA_70B.shape(1), np.float16).nbytes == LLAMA_70B.token_bytes


def test_sessions_grow_turn_by_turn_and_share_system_prompts() -> None:
    plan = SessionPlan(sessions=6, system_prompts=2, turns=3, system_blocks=4, turn_blocks=2, block_tokens=16, seed=7)
    requests = list(session_requests(plan))
    assert len(requests) == 18
    assert [r.timestamp_s for r in requests] == sorted(r.timestamp_s for r in requests)
    by_session = {s: [r for r in requests if r.session == s] for s in range(6)}
    for turns in by_session.values():
        assert [r.turn for r in turns] == [0, 1, 2]
        assert [len(r.keys) for r in turns] == [6, 8, 10]
        for earlier, later in itertools.pairwise(turns):
            assert later.keys[: len(earlier.keys)] == earlier.keys
    assert len({r.keys[3] for r in requests}) <= 2
    assert len({r.keys[4] for r in requests}) == 6


def test_new_blocks_are_exactly_those_never_asked_for() -> None:
    seen: set[PrefixKey] = set()
    for request in session_requests(SessionPlan(sessions=5, block_tokens=8)):
        assert not set(request.new_keys) & seen
        assert set(request.keys[: request.new_from]) <= seen
        seen.update(request.keys)


def test_a_plan_is_reproducible_and_seeds_differ() -> None:
    assert list(session_requests(SessionPlan(seed=3))) == list(session_requests(SessionPlan(seed=3)))
    first, second = (next(session_requests(SessionPlan(seed=seed))) for seed in (3, 4))
    assert not set(first.keys) & set(second.keys)


@pytest.mark.parametrize("wrong", [{"sessions": 0}, {"turns": -1}, {"system_blocks": -1}, {"turns": 10**6}])
def test_a_plan_without_a_workload_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)) if wrong.get("turns") != 10**6 else "lower system_blocks"):
        SessionPlan(**wrong)


def trace_line(**changes: Any) -> dict[str, Any]:
    return {"timestamp": 1500, "input_length": 1100, "output_length": 10, "hash_ids": [1, 2, 3], **changes}


def write_trace(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_trace_requests_chain_the_hash_ids(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", trace_line(), "", trace_line(timestamp=2000, hash_ids=[1, 2, 9], more=1))
    first, second = trace_requests(path)
    assert (first.timestamp_s, first.new_from, second.new_from) == (1.5, 0, 2)
    assert first.keys[:2] == second.keys[:2]
    assert second.parent(0) is None
    assert second.parent(2) == second.keys[1]
    assert second.new_keys == second.keys[2:]
    assert len(list(trace_requests(path, limit=1))) == 1
    other = next(trace_requests(path, namespace="other"))
    assert not set(other.keys) & set(first.keys)


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "[]",
        {"timestamp": 1},
        trace_line(hash_ids="x"),
        trace_line(hash_ids=[1.5]),
        trace_line(hash_ids=[-1]),
        trace_line(hash_ids=[2**64]),
        trace_line(hash_ids=[1, 2, 3, 4]),
        trace_line(input_length=-1),
        trace_line(timestamp=-5),
    ],
)
def test_a_bad_trace_line_is_named(tmp_path: Path, bad: Any) -> None:
    path = write_trace(tmp_path / "trace.jsonl", trace_line(), bad)
    with pytest.raises(ConfigError, match=r"trace\.jsonl, line 2: "):
        list(trace_requests(path))


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: No such file"):
        list(trace_requests(tmp_path / "absent"))


@given(
    block=st.integers(0, 2**64 - 1),
    sizes=st.tuples(st.integers(0, 600_000), st.integers(0, 3000)),
    shift=st.integers(0, 9),
)
def test_filled_blocks_verify_at_any_length_and_alignment(block: Any, sizes: Any, shift: Any) -> None:
    key, value = (memoryview(bytearray(size + shift))[shift:] for size in sizes)
    fill_block(block, key, value)
    assert verify_block(block, key, value) == -1
    halves = np.frombuffer(key[: len(key) // 2 * 2], "<f2")
    assert np.isfinite(halves).all()
    assert (np.abs(halves) < 2).all()


@given(data=st.data())
def test_verify_finds_the_first_wrong_byte(data: Any) -> None:
    key, value = bytearray(300_001), bytearray(70_000)
    fill_block(11, key, value)
    offsets = data.draw(st.sets(st.integers(0, 370_000), min_size=1, max_size=3))
    for offset in offsets:
        part, position = (key, offset) if offset < len(key) else (value, offset - len(key))
        part[position] ^= data.draw(st.integers(1, 255))
    assert verify_block(11, key, value) == min(offsets)


def test_ids_parts_and_chunks_have_different_bytes() -> None:
    size = 1 << 20
    pieces = []
    for block in range(8):
        key, value = bytearray(size), bytearray(size)
        fill_block(block, key, value)
        pieces += [bytes(part[i : i + 4096]) for part in (key, value) for i in range(0, size, 4096)]
    assert len(set(pieces)) == len(pieces)
    assert len(zlib.compress(b"".join(pieces[:256]))) > 0.9 * size


def test_bytes_of_an_id_never_change() -> None:
    key, value = bytearray(1 << 20), bytearray(1000)
    fill_block(0xC0FFEE, key, value)
    assert f"{zlib.crc32(key):08x} {zlib.crc32(value):08x}" == "363c8041 7bc679d2"


def test_fill_refuses_what_it_cannot_fill() -> None:
    with pytest.raises(ConfigError, match="key_out is read-only"):
        fill_block(1, bytes(8), bytearray(8))
    with pytest.raises(ConfigError, match="C-contiguous"):
        fill_block(1, bytearray(8), np.zeros((4, 4), np.uint8)[:, ::2])
    with pytest.raises(ConfigError, match="content id -1"):
        fill_block(-1, bytearray(8), bytearray(8))
    fill_block(1, b"", np.zeros((0, 3), np.float16))


def test_content_id_is_a_64_bit_number() -> None:
    keys = next(session_requests(SessionPlan())).keys
    assert len({content_id(key) for key in keys}) == len(keys)
    assert all(0 <= content_id(key) < 2**64 for key in keys)
