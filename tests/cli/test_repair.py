"""``repair`` on real files: what a user sees, and that the root is sound afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cascade_aio as ca
from tests.cli.conftest import Cli


def stored(tmp_path: Path, cli: Cli, count: int = 4) -> tuple[Path, list[str]]:
    """A root of ``count`` blocks and their ids."""
    files = []
    for number in range(count):
        path = tmp_path / f"file {number}"
        path.write_bytes(bytes([number]) * 300_000)
        files.append(path)
    call = cli("put", *files, "--root", tmp_path / "root", "--json")
    assert call.code == 0, call.err
    return tmp_path / "root", [row["block_id"] for row in call.json]


def spoil(root: Path, at: int) -> None:
    (segment,) = root.glob("writers/*/*.seg")
    with open(segment, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 100)


def test_repair_of_a_sound_root_changes_nothing(tmp_path: Path, cli: Cli) -> None:
    root, _ = stored(tmp_path, cli)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    call = cli("repair", root)
    assert (call.code, "nothing to repair" in call.out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_repair_says_what_was_lost_and_verify_is_clean(tmp_path: Path, cli: Cli) -> None:
    root, ids = stored(tmp_path, cli)
    spoil(root, 400_000)
    assert cli("verify", root).code == 1
    call = cli("repair", root)
    assert call.code == 0, call.err
    assert f"lost: block {ids[1]}" in call.out
    assert len(list((root / "quarantine").glob("*.bin"))) == 1
    assert cli("verify", root).code == 0
    found = cli("repair", root, "--json")
    assert (found.code, found.json["clean"], found.json["lost_blocks"]) == (0, True, [])
    assert {row["block_id"] for row in cli("ls", root, "--json").json} == {*ids} - {ids[1]}


def test_a_damaged_footer_is_told_once_with_its_place(
    tmp_path: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    root, _ = stored(tmp_path, cli)
    (segment,) = root.glob("writers/*/*.seg")
    next(root.glob("writers/*/checkpoint")).unlink()
    spoil(root, segment.stat().st_size - 4096 - 200)
    call = cli("verify", root)
    told = call.out + call.err
    assert (call.code, told.count("checksum of the footer")) == (1, 1)
    assert next(line for line in told.splitlines() if "checksum of the footer" in line).count(str(segment)) == 1
    cli("repair", root)
    assert "damaged record" not in caplog.text, "the reports name it"
    assert cli("verify", root).code == 0


def test_repair_refuses_what_is_no_root(tmp_path: Path, cli: Cli) -> None:
    call = cli("repair", tmp_path)
    assert (call.code, "holds no store" in call.err) == (1, True)
    assert list(tmp_path.iterdir()) == []
    assert cli("repair", tmp_path, "--dead", "xyz").code == 2


async def test_repair_leaves_a_live_writer_alone(tmp_path: Path) -> None:
    settings = {"shm_bytes": "4MiB", "segment_bytes": "1MiB", "arena": f"cascade-test-repair-{os.getpid()}"}
    async with ca.open_store(tmp_path / "root", **settings) as store:
        for number in range(8):
            await store.put(b"", bytes([number]) * 300_000)
            await store.flush()
        segment = sorted((tmp_path / "root").glob("writers/*/*.seg"))[0]
        with open(segment, "r+b") as file:
            file.seek(400_000)
            file.write(b"\xff" * 100)
        report = await ca.repair_root(tmp_path / "root", shm_bytes="4MiB")
        assert "alive" in report.left[0]
        assert not (tmp_path / "root" / "quarantine").exists()


def at_work(child: subprocess.Popen[bytes], root: Path) -> bool:
    """It has a file of ``root`` open, or it has ended: while Python still starts, Ctrl-C ends it as it may."""
    opened = []
    with contextlib.suppress(OSError):  # a descriptor that is closed meanwhile, or all of them
        opened = [os.readlink(link) for link in Path(f"/proc/{child.pid}/fd").iterdir()]
    return child.poll() is not None or any(path.startswith(str(root)) for path in opened)


def test_ctrl_c_ends_a_repair_in_order_and_it_can_be_run_again(tmp_path: Path, cli: Cli) -> None:
    root, _ = stored(tmp_path, cli, 40)
    spoil(root, 400_000)
    child = subprocess.Popen([sys.executable, "-m", "cascade_aio", "repair", str(root)], stderr=subprocess.PIPE)
    try:
        while not at_work(child, root):
            time.sleep(0.001)
        child.send_signal(signal.SIGSTOP)  # whatever it is at
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGCONT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode in (0, 130), errors  # 0: it was quicker than this test
    assert cli("repair", root).code == 0
    assert cli("verify", root).code == 0
