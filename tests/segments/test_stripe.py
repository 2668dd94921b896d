"""Striping is asked of `lfs` on Lustre, and of nobody elsewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cascade_aio.segments import stripe

MOUNTS = """\
/dev/vda / ext4 rw 0 0
10.0.0.1@o2ib:/scratch /scratch lustre rw 0 0
tmpfs /scratch/ram tmpfs rw 0 0
/dev/x /with\\040space xfs rw 0 0
"""


def fake_lfs(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    program = folder / "lfs"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return program


def test_the_file_system_is_that_of_the_longest_mount_point() -> None:
    for path, kind in {
        "/scratch/kv": "lustre",
        "/scratch": "lustre",
        "/scratchy": "ext4",
        "/scratch/ram/kv": "tmpfs",
        "/with space/kv": "xfs",
        "/home": "ext4",
    }.items():
        assert stripe.file_system_of(path, MOUNTS) == kind, path
    assert stripe.file_system_of("/kv", "") == "unknown"


async def test_on_lustre_lfs_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_lfs(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/called\n')
    report = await stripe.prepare_directory("/scratch/kv", 8, 1 << 20, file_system="lustre")
    assert report == stripe.StripeReport("lustre", True)
    assert (tmp_path / "called").read_text() == "setstripe -c 8 -S 1048576 /scratch/kv\n"


async def test_a_failing_or_missing_lfs_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_lfs(tmp_path, monkeypatch, "echo no such pool >&2; exit 3\n")
    report = await stripe.prepare_directory("/scratch/kv", file_system="lustre")
    assert not report.striped
    assert report.warning is not None
    assert "no such pool" in report.warning
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    report = await stripe.prepare_directory("/scratch/kv", file_system="lustre")
    assert report.warning is not None
    assert "not on PATH" in report.warning


async def test_an_lfs_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_lfs(tmp_path, monkeypatch, "exec sleep 600\n")
    monkeypatch.setattr(stripe, "LFS_SECONDS_MAX", 0.05)
    report = await asyncio.wait_for(stripe.prepare_directory("/scratch/kv", file_system="lustre"), 30)
    assert report.warning is not None
    assert "no answer" in report.warning


async def test_elsewhere_nothing_is_done_and_said_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_lfs(tmp_path, monkeypatch, f"touch {tmp_path}/called\n")
    assert await stripe.prepare_directory("/kv", file_system="xfs") == stripe.StripeReport("xfs", False)
    report = await stripe.prepare_directory("/kv", asked=True, file_system="xfs")
    assert report.warning is not None
    assert "not Lustre" in report.warning
    assert not (tmp_path / "called").exists()
