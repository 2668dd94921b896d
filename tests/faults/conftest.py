"""File systems of a few megabytes, where this process may mount them, and processes with other rights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SMALL_BYTES = 48 << 20
"""Size of the mounted file systems."""

NOBODY = 65534

Child = Callable[..., Any]

_PRELUDE = """
import asyncio, json, os, resource, sys, tempfile
from pathlib import Path
import cascade_aio as ca
from tests.faults.harness import make_world
arguments = json.loads(sys.argv[1])
with tempfile.TemporaryDirectory() as place:  # imports everything: another user may not be able to read the files
    asyncio.run(make_world(Path(place), "footer"))
for name, soft in arguments.pop("limits").items():
    resource.setrlimit(getattr(resource, name), (soft, soft))
uid = arguments.pop("uid")
if uid is not None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
"""


def _mounted(arguments: list[str], point: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system takes root and mount(8)")
    point.mkdir()
    done = subprocess.run(["mount", *arguments, str(point)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty ext4 of ``SMALL_BYTES`` on a loop device."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is missing: install e2fsprogs")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SMALL_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    yield from _mounted(["-o", "loop,errors=remount-ro", str(image)], tmp_path / "disk")


@pytest.fixture
def small_shm(tmp_path: Path) -> Iterator[Path]:
    """An empty tmpfs of 8 MiB."""
    yield from _mounted(["-t", "tmpfs", "-o", "size=8m", "tmpfs"], tmp_path / "shm")


def need_another_user() -> None:
    """Skip where this process may not become ``NOBODY``: not root, or root of a container that has no such user."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    try:
        subprocess.run(["true"], user=NOBODY, group=NOBODY, extra_groups=[], check=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"this root may not become another user: {error}")


@pytest.fixture
def child() -> Child:
    """``child(script, limits={...}, uid=..., **arguments)``: runs in a process of its own and returns what the
    script printed as JSON. ``arguments`` is a dictionary there; ``uid`` needs root."""

    def run(script: str, *, limits: dict[str, int] | None = None, uid: int | None = None, **arguments: Any) -> Any:
        if uid is not None:
            need_another_user()
        passed = json.dumps({"limits": limits or {}, "uid": uid, **arguments})
        done = subprocess.run(
            [sys.executable, "-c", _PRELUDE + textwrap.dedent(script), passed],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def fill(place: Path, leave_bytes: int = 0) -> Path:
    """A file that takes all the room of a file system but ``leave_bytes``."""
    filler = place / "filler"
    with filler.open("ab") as file:
        for step in (1 << 20, 4096):
            while True:
                room = os.statvfs(place)
                if room.f_bavail * room.f_frsize - step < leave_bytes:
                    break
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), step)
                except OSError:
                    break
    return filler
