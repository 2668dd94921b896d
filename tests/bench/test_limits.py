"""The raw limits on a few MiB: they must move the right bytes, whatever the speed."""

from __future__ import annotations

import os
import pathlib

import pytest

from bench import fio
from bench.copies import calibrate_copy, copy_gb_per_s
from bench.data import Pool, scratch_memory
from bench.digests import digest_seconds
from bench.files import write_files
from bench.limits import DiskGrid, DiskLimit
from bench.raw_ring import RawRing
from bench.results import BenchError, Calibration, CannotRunError

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture(params=[False, True], ids=["plain", "registered"])
def registered(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def open_ring(depth: int) -> RawRing:
    try:
        return RawRing(depth)
    except CannotRunError as error:
        pytest.skip(str(error))


def test_the_raw_loop_writes_and_reads_the_very_bytes(tmp_path: pathlib.Path, registered: bool) -> None:
    path = tmp_path / "raw"
    with open_ring(4) as ring, Pool(64 * KIB, 37, seed=1) as pool:  # 37 x 64 KiB: the last request is a short one
        try:
            assert ring.write_file(path, pool.view, 256 * KIB, registered=registered) > 0
        except CannotRunError as error:
            pytest.skip(str(error))
        assert path.read_bytes() == bytes(pool.view)
    buffers = scratch_memory(MIB)
    with open_ring(4) as ring:
        assert ring.read_file(path, 4 * 256 * KIB, buffers, 256 * KIB, registered=registered) > 0
    content = path.read_bytes()
    got = {bytes(buffers[slot * 256 * KIB : (slot + 1) * 256 * KIB]) for slot in range(4)}
    assert got == {content[part * 256 * KIB : (part + 1) * 256 * KIB] for part in range(4)}


def test_a_file_that_is_too_short_is_an_error_and_not_a_fast_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(100 * KIB))
    with open_ring(4) as ring:
        buffers = scratch_memory(256 * KIB)
        with pytest.raises(BenchError, match="raw read gave"):
            ring.read_file(path, 256 * KIB, buffers, 64 * KIB, registered=False)


def test_the_best_setting_is_kept_and_not_measured_again(tmp_path: pathlib.Path) -> None:
    cells: list[Calibration] = []
    grid = DiskGrid(2 * MIB, (256 * KIB, MIB), (2, 4), (), ())
    open_ring(2).close()
    limit = DiskLimit(tmp_path, grid, 1, cells, cells.extend)
    setting = limit.setting(write=True)
    assert len([cell for cell in cells if cell.chosen]) == 1
    assert len(cells) == 2 * 2 * 2
    assert all(cell.gb_per_s or cell.note for cell in cells)
    assert limit.setting(write=True) == setting
    resumed = DiskLimit(tmp_path, grid, 1, cells, lambda more: pytest.fail("calibrated again"))
    assert resumed.setting(write=True) == setting
    with Pool(64 * KIB, 16, seed=2) as pool:
        assert limit.write_gb_per_s(pool.view) > 0
    assert limit.read_gb_per_s(MIB) > 0
    limit.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not fio.available(), reason="fio is not installed")
def test_fio_writes_and_reads(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "fio"
    try:
        assert fio.fio_gb_per_s(path, 4 * MIB, MIB, 4, write=True) > 0
    except BenchError as error:
        pytest.skip(str(error))
    assert path.stat().st_size == 4 * MIB
    assert fio.fio_gb_per_s(path, 4 * MIB, MIB, 4, write=False) > 0
    with pytest.raises(BenchError, match="fio failed"):
        fio.fio_gb_per_s(path / "below a file", MIB, MIB, 4, write=False)


@pytest.mark.parametrize("direct", [False, True])
def test_files_are_written_synced_and_removed(tmp_path: pathlib.Path, direct: bool) -> None:
    with Pool(64 * KIB, 8, seed=1) as pool:
        blocks = [pool.view[index * 64 * KIB : (index + 1) * 64 * KIB] for index in range(8)]
        assert write_files(tmp_path / "files", blocks, 4, direct=direct) > 0
    assert os.listdir(tmp_path) == []


def test_the_best_copy_copies_and_puts_the_choice_back() -> None:
    from cascade_aio import _native

    before = _native.copy_variant()
    with Pool(64 * KIB, 4, seed=3) as pool:
        target = scratch_memory(pool.total_bytes)
        assert copy_gb_per_s([(target, pool.view)], "memcpy", 3) > 0
        assert target == pool.view
    cells: list[Calibration] = []
    variant, threads = calibrate_copy(64 * KIB, 2, cells.extend)
    assert [cell.setting for cell in cells if cell.chosen] == [
        {"block_bytes": 64 * KIB, "variant": variant, "threads": threads}
    ]
    assert _native.copy_variant() == before


@pytest.mark.parametrize("digest", ["sha256", "blake3"])
def test_digests_take_time(digest: str) -> None:
    with Pool(64 * KIB, 4, seed=3) as pool:
        assert digest_seconds([pool.parts(index) for index in range(4)], digest, 2) > 0


def test_blocks_are_new_content_for_every_stamp_and_the_same_for_the_same() -> None:
    with Pool(16 * KIB, 3, seed=5) as pool, Pool(16 * KIB, 3, seed=5) as twin:
        pool.stamp(1)
        twin.stamp(1)
        assert pool.view == twin.view
        key, value = pool.parts(2)
        assert pool.equals(2, bytes(key), bytes(value))
        assert not pool.equals(1, key, value)
        first = bytes(key)
        pool.stamp(2)
        assert bytes(key) != first
        assert not pool.equals(2, first, value)
        assert not pool.equals(2, key[:-1], value)
