"""doctor finds facts, says what they mean, and fails only where a store cannot work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_aio.cli import host_checks, root_checks
from cascade_aio.config import GIB, make_config
from cascade_aio.testing.mpi import find_runtimes
from tests.cli.conftest import Cli


def test_report_of_this_machine(tmp_path: Path, cli: Cli) -> None:
    call = cli("doctor", tmp_path / "to be made", "--shm-bytes", "64MiB", "--json")
    findings = {finding["check"]: finding for finding in call.json["findings"]}
    assert {"kernel", "io_uring", "memlock", "huge pages", "shared memory", "root", "direct I/O"} <= set(findings)
    assert {"lustre", "processor", "gpu", "mpi", "python", "native module"} <= set(findings)
    assert all(f["found"] and f["meaning"] for f in findings.values())
    assert all(f["cure"] for f in findings.values() if f["level"] in ("warning", "fatal"))
    assert call.code == (0 if call.json["usable"] else 1)
    assert not (tmp_path / "to be made").exists()
    table = cli("doctor", tmp_path, "--shm-bytes", "64MiB")
    assert "io_uring" in table.out


def test_an_arena_that_cannot_fit_is_fatal(tmp_path: Path, cli: Cli) -> None:
    call = cli("doctor", tmp_path, "--shm-bytes", "900TiB", "--json")
    assert call.code == 1
    assert [f["check"] for f in call.json["findings"] if f["level"] == "fatal"] == ["shared memory"]


def test_a_missing_shm_directory_is_fatal() -> None:
    assert host_checks.check_shm(make_config("/r", shm_dir="/absent")).level == "fatal"


def test_direct_io_is_really_tried(tmp_path: Path) -> None:
    reason = root_checks.try_direct_write(str(tmp_path))
    if reason is not None:
        pytest.skip(f"no direct I/O in the temporary directory: {reason}")
    assert list(tmp_path.iterdir()) == []
    assert root_checks.check_direct_io(make_config(tmp_path)).level == "ok"
    assert root_checks.try_direct_write("/proc") is not None


def test_file_systems_are_known_by_their_magic() -> None:
    assert root_checks.file_system_name("/dev/shm") == "tmpfs"
    assert root_checks.file_system_name("/proc").startswith("type 0x9fa0")
    with pytest.raises(FileNotFoundError):
        root_checks.file_system_magic("/absent")


def test_nearest_directory_of_a_root_that_is_still_to_be_made(tmp_path: Path) -> None:
    assert root_checks.nearest_directory(str(tmp_path / "a" / "b")) == str(tmp_path)
    (tmp_path / "file").touch()
    assert root_checks.nearest_directory(str(tmp_path / "file")) == str(tmp_path)


def test_old_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {}
    for release in ("4.18.0-553.el8", "5.14.0", "5.19.0-rc1", "6.1", "10.0.1+"):
        monkeypatch.setattr("platform.release", lambda release=release: release)
        levels[release] = host_checks.check_kernel().level
    assert list(levels.values()) == ["warning", "note", "ok", "ok", "ok"]


def test_mpi_is_really_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpi4py alone opens no store: it is there after ``pip install`` and finds no MPI library on most machines."""
    pytest.importorskip("mpi4py")
    runtimes, reason = find_runtimes()
    libraries = [runtime.library for runtime in runtimes.values() if runtime.library is not None]
    if not libraries:
        pytest.skip(f"no MPI library of its own in this environment: {reason}")
    monkeypatch.setattr(host_checks, "TOOL_SECONDS_MAX", 60.0)  # a busy machine loads slowly
    monkeypatch.setenv("MPI4PY_LIBMPI", "/absent/libmpi.so")
    finding = host_checks.check_mpi()
    assert (finding.level, "finds no MPI library" in finding.found) == ("note", True)
    assert "MPI4PY_LIBMPI" in finding.cure
    for library in libraries:
        monkeypatch.setenv("MPI4PY_LIBMPI", library)
        finding = host_checks.check_mpi()
        assert finding.level == "ok"
        assert "MPI" in finding.found.partition(",")[2]


def test_a_small_memlock_limit_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "_has_ipc_lock", lambda: False)
    monkeypatch.setattr("resource.getrlimit", lambda _: (8 << 20, 8 << 20))
    finding = host_checks.check_memlock(make_config("/r", shm_bytes=GIB))
    assert finding.level == "note"
    assert "ulimit -l" in finding.cure


def test_a_read_only_root_is_fatal(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "root").mkdir(mode=0o500)
    assert root_checks.check_root(make_config(tmp_path / "root")).level == "fatal"


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda root: (root / "notes.txt").write_text("x"), "not empty"),
        (lambda root: (root / "cascade.json").write_text("{}"), "does not describe"),
        (lambda root: (root / "cascade.json").write_text("not JSON"), "damaged"),
    ],
    ids=["strangers", "another format", "damaged"],
)
def test_what_an_open_would_refuse_is_fatal(
    tmp_path: Path, cli: Cli, made: Callable[[Path], object], found: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    made(root)
    before = sorted(root.iterdir())
    call = cli("doctor", root, "--json")
    (finding,) = [finding for finding in call.json["findings"] if finding["check"] == "root"]
    assert (call.code, finding["level"]) == (1, "fatal")
    assert found in finding["found"] + finding["cure"]
    assert sorted(root.iterdir()) == before


@pytest.mark.shm(96)
def test_the_digest_of_a_root_is_asked_for(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "one").write_bytes(b"x")
    assert cli("put", tmp_path / "one", "--root", tmp_path / "root", "--digest", "blake3").code == 0
    asked = ("doctor", tmp_path / "root", "--shm-bytes", "16MiB")
    assert cli(*asked).code == 1
    assert cli(*asked, "--digest", "blake3").code == 0


def test_the_directory_one_is_in_need_not_be_empty(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "anything").write_text("x")
    monkeypatch.chdir(tmp_path)
    call = cli("doctor", "--json")
    (finding,) = [finding for finding in call.json["findings"] if finding["check"] == "root"]
    assert finding["level"] != "fatal"
    assert [path.name for path in tmp_path.iterdir()] == ["anything"]
