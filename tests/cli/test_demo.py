"""The demo end to end, small; its plan; and that nothing of it stays behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.cli import demo_phases
from cascade_aio.cli.demo_plan import (
    FULL_BLOCK_BYTES,
    FULL_BLOCKS,
    SMALL_BLOCK_BYTES,
    SMALL_BLOCKS,
    Room,
    choose_plan,
    cut_requests,
    demo_requests,
)
from cascade_aio.cli.page_cache import cached_bytes, drop_cache
from cascade_aio.config import GIB, MIB
from cascade_aio.errors import ConfigError
from tests.cli.conftest import Cli

PLENTY = Room(1 << 50, 1 << 50, 1 << 50)
START_SECONDS_MAX = 60
TINY = ("--block-size", "256KiB", "--blocks", "12")


def test_small_demo_compares_every_byte(tmp_path: Path, cli: Cli) -> None:
    call = cli("demo", "--small", *TINY, "--root", tmp_path, "--json")
    assert call.code == 0, call.err
    report = call.json
    rows = {row["phase"].split(":")[0] + row["phase"][-4:]: row for row in report["phases"]}
    assert len(rows) == 6
    assert report["blocks"] == 12
    assert report["deduplicated_bytes"] == 12 * 256 * 1024
    assert report["blocks_cached"] == report["blocks_asked"] - 12 > 0
    for row in report["phases"]:
        assert row["compared"] or row["phase"].startswith(("store", "reopen"))
        assert (row["ratio"] is None) == (row["limit_gb_per_s"] is None)
    assert "12 of 12 from disk" in rows["cold get"]["detail"]
    assert list(tmp_path.iterdir()) == []


def test_table_tells_phases_limits_and_host(tmp_path: Path, cli: Cli) -> None:
    call = cli("demo", *TINY, "--root", tmp_path / "new", "--keep", "--digest", "blake3", "--io-backend", "threads")
    assert call.code == 0, call.err
    for word in (
        "store: put + flush",
        "cold: get",
        "all bytes",
        "digest alone",
        "page cache",
        "I/O: threads",
        "blake3",
    ):
        assert word in call.out
    [kept] = (tmp_path / "new").iterdir()
    assert f"kept: {kept}" in call.err


def test_a_trace_is_played(tmp_path: Path, cli: Cli) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": n, "input_length": 2048, "output_length": 1, "hash_ids": [1, 2, 10 + n, 20 + n]} for n in range(9)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    arguments = ("demo", *TINY, "--trace", trace, "--root", tmp_path / "root", "--json")
    report = cli(*arguments, "--limit", "4").json
    assert (report["requests"], report["blocks"], report["blocks_cached"]) == (4, 10, 6)
    assert cli(*arguments).json["blocks"] == 12
    trace.write_text("nonsense")
    call = cli(*arguments)
    assert (call.code, "line 1" in call.err) == (1, True)


def test_a_wrong_byte_ends_with_1_and_leaves_nothing(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_phases, "verify_block", lambda *_: 77)
    call = cli("demo", *TINY, "--root", tmp_path)
    assert call.code == 1
    assert "wrong byte 77" in call.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "cascade_aio",
        "demo",
        "--block-size",
        "4MiB",
        "--blocks",
        "24",
        "--root",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        arena = Path(f"/dev/shm/cascade-demo-{os.getuid()}-{child.pid}")
        deadline = time.monotonic() + START_SECONDS_MAX
        while not arena.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(number)
        _, told = child.communicate(timeout=START_SECONDS_MAX)
        assert child.returncode == 128 + number, told
    assert not arena.exists()
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in told


def test_wrong_sizes_are_usage_errors(tmp_path: Path, cli: Cli) -> None:
    for wrong in (["--block-size", "1k"], ["--block-size", "x"], ["--blocks", "1"], ["--limit", "3"]):
        assert cli("demo", *wrong, "--root", tmp_path).code == 2


def test_usual_plans_keep_their_promises() -> None:
    full, small = (
        choose_plan(FULL_BLOCK_BYTES, FULL_BLOCKS, PLENTY),
        choose_plan(SMALL_BLOCK_BYTES, SMALL_BLOCKS, PLENTY),
    )
    assert full.block_bytes == 80 * MIB
    assert full.disk_bytes + full.shm_bytes <= 6 * GIB
    assert small.disk_bytes + small.shm_bytes <= 300 * MIB
    assert full.meta.shape == (2, 80, 256, 8, 128)
    assert not full.notes


@given(st.tuples(*[st.integers(30 * MIB, 64 * GIB)] * 3))
def test_a_plan_fits_into_what_is_free_and_says_what_it_cut(free: tuple[int, int, int]) -> None:
    room = Room(*free)
    plan = choose_plan(FULL_BLOCK_BYTES, FULL_BLOCKS, room)
    assert plan.fits(room)
    assert bool(plan.notes) == ((plan.block_bytes, plan.blocks) != (FULL_BLOCK_BYTES, FULL_BLOCKS))
    assert plan.block_bytes % 4 == 0


def test_no_room_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match="smallest demo does not fit"):
        choose_plan(FULL_BLOCK_BYTES, FULL_BLOCKS, Room(MIB, MIB, MIB))


@given(blocks=st.integers(4, 60), seed=st.integers(0, 5))
def test_requests_name_exactly_the_planned_blocks(blocks: int, seed: int) -> None:
    requests = cut_requests(demo_requests(blocks, seed), blocks)
    seen = set(itertools.chain.from_iterable(request.keys for request in requests))
    assert len(seen) == blocks
    assert all(request.new_from <= len(request.keys) for request in requests)


def test_the_page_cache_is_really_dropped(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    Path(path).write_bytes(bytes(5 * MIB))
    assert cached_bytes([path]) >= 5 * MIB
    drop_cache([path])
    left = cached_bytes([path])
    if left == 5 * MIB:
        pytest.skip("this file system lives in the page cache (tmpfs)")
    assert left == 0
