"""The simulation itself: some seeds keep every promise, a seed is always the same run, and a broken promise is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments import format as fmt
from cascade_aio.segments import reader
from cascade_aio.store.catalog import Catalog
from cascade_aio.testing.memory import MemoryDisk, _Inode
from cascade_aio.testing.simulation import simulate
from cascade_aio.testing.simulation.__main__ import run
from cascade_aio.testing.simulation.contents import content
from cascade_aio.testing.simulation.media import Injuries
from cascade_aio.testing.simulation.oracle import Life, Oracle
from cascade_aio.testing.simulation.plan import make_plan

SEEDS = int(os.environ.get("CASCADE_TEST_SEEDS", "32"))
BATCHES = 4


@pytest.mark.parametrize("batch", range(BATCHES))
def test_some_seeds_keep_every_promise(batch: int) -> None:
    for seed in range(batch, SEEDS, BATCHES):
        outcome = simulate(seed)
        assert outcome.failure is None, f"{outcome.failure}\nreplay: {outcome.command}"
        assert outcome.events


@pytest.mark.parametrize("seed", [11])
def test_a_seed_is_the_same_run_in_every_process(seed: int) -> None:
    """Whatever the hashes of strings are, and wherever objects lie."""
    program = f"from cascade_aio.testing.simulation import simulate; print(simulate({seed}).digest)"
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    assert digests == {simulate(seed).digest}


def test_a_shorter_plan_is_a_beginning_of_the_longer_one() -> None:
    plan = make_plan(5)
    assert simulate(5, steps_max=20).steps == 20 < len(plan.steps)
    assert make_plan(5) == plan


def test_a_run_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "simulation.json"
    assert run(0, 4, 1, out) == 0
    result = json.loads(out.read_text())
    assert result["seeds_run"] == 4
    assert result["operations"] == sum(result["operations_by_kind"].values()) > 100
    assert result["bytes_verified"] > 0
    assert result["failures"] == []
    assert all(fault["met"].get("absorbed", 0) <= fault["injected"] for fault in result["faults"].values())


# -- a simulation that cannot fail shows nothing: each promise, broken on purpose -------------------


def _first_failure(seeds: range, promise: int) -> str | None:
    for seed in seeds:
        outcome = simulate(seed)
        if outcome.failure is not None and outcome.promise == promise:
            assert str(seed) in outcome.command
            return outcome.failure
    return None


def test_what_damage_keeps_a_refresh_from_hearing_is_expected_of_the_next_opening_only() -> None:
    """The oracle itself: what was heard before the damage stays promised, and so does what an opening looks at."""
    oracle = Oracle(skewed=False)

    def look(life: Life) -> None:
        assert oracle.look_ends(life, oracle.look_begins(life), counts=True)

    def opened() -> Life:
        life = oracle.born(0, budget=False)
        look(life)
        return life

    writer, reader = opened(), opened()
    for block in (1, 2, 3):
        oracle.put_ends(oracle.put_begins(writer, block, None), stored=True)
    oracle.deleted(writer, 1)
    oracle.flushed(writer, oracle.now())
    look(reader)
    oracle.damaged([writer])
    oracle.deleted(writer, 2)
    oracle.flushed(writer, oracle.now())
    look(reader)
    assert oracle.must_not_see(reader, 1)
    assert not oracle.must_not_see(reader, 2)
    assert oracle.must_see(reader, 3)
    later = opened()
    assert oracle.must_not_see(later, 1)
    assert oracle.must_not_see(later, 2)
    assert oracle.must_see(later, 3)
    oracle.deleted(writer, 3)
    oracle.flushed(writer, oracle.now())
    look(later)
    assert not oracle.must_not_see(later, 3)
    assert not oracle.must_see(later, 3)


def test_a_lost_write_hits_the_record_whose_header_is_written_after_it() -> None:
    """Seed 3184: a record goes to the medium in pieces, in any order; who is hit was asked once, before its header."""
    wanted = content(69)
    path = f"/kv/writers/{bytes(16).hex()}/0000000001.seg"
    payload_bytes = fmt.payload_bytes_of(len(wanted.key), len(wanted.value))
    header = fmt.RecordHeader(
        fmt.BLOCK,
        1,
        PAGE_BYTES + payload_bytes,
        PAGE_BYTES,
        0,
        0,
        digest_kind="blake3",
        digest=bytes(wanted.block_id) + bytes(16),
        key_bytes=len(wanted.key),
        value_bytes=len(wanted.value),
        value_offset=fmt.value_offset_of(len(wanted.key)),
        chunk_crcs=(0,) * -(-payload_bytes // fmt.CHUNK_BYTES),
    )
    page = memoryview(bytearray(PAGE_BYTES))
    fmt.encode_record(page, header, fmt.SegmentIdentity(bytes(16), 1))

    def found(*, again: bool) -> list[frozenset[int]]:
        disk, injuries = MemoryDisk(), Injuries()
        inode = disk.files[path] = _Inode()
        lost = bytes(8 * PAGE_BYTES)
        inode.lie(9 * PAGE_BYTES, lost)
        assert not injuries.add(disk, "lost", path, 9 * PAGE_BYTES, len(lost))
        if again:
            inode.write(9 * PAGE_BYTES, lost)
            assert not injuries.written(disk, path, 9 * PAGE_BYTES, len(lost))
        rest = header.end - 17 * PAGE_BYTES
        inode.write(17 * PAGE_BYTES, bytes(rest))
        assert not injuries.written(disk, path, 17 * PAGE_BYTES, rest)
        inode.write(PAGE_BYTES, bytes(page))
        told = injuries.written(disk, path, PAGE_BYTES, PAGE_BYTES)
        assert told == injuries.found == injuries.of_block(69)
        assert not injuries.written(disk, path, PAGE_BYTES, PAGE_BYTES), "once"
        return [injury.blocks for injury in told]

    assert found(again=False) == [frozenset({69})]
    assert found(again=True) == [], "what was written again is whole"


def test_reads_that_are_not_verified_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 1: with damage of the medium on disk, wrong bytes come out."""
    monkeypatch.setattr(reader, "verify_payload", lambda header, crcs, entry: None)
    damaged = [seed for seed in range(400) if make_plan(seed).faults & {"rot", "lost", "misdirected"}]
    assert any(simulate(seed).promise == 1 for seed in damaged[:60])


def test_deletions_that_are_forgotten_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 3: tombstones that are never written."""
    from cascade_aio.tiers.disk import DiskTier

    monkeypatch.setattr(DiskTier, "append_tombstone", lambda tier, block_id, stamp: None)
    assert _first_failure(range(20), 3) is not None


def test_extents_that_are_never_given_back_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 4."""
    given_back = Catalog._free
    calls = 0

    def sometimes(catalog: Catalog, copy: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 40:
            given_back(catalog, copy)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "_free", sometimes)
    assert any(simulate(seed).failure is not None for seed in range(8))


def test_flushes_that_do_not_sync_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 2."""
    from cascade_aio.testing.memory import _Inode

    monkeypatch.setattr(_Inode, "harden", lambda inode, covered, size: None)
    assert any(simulate(seed).failure is not None for seed in range(6))
