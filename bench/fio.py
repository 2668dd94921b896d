"""The raw limit as fio measures it, where fio is installed: a second opinion on our own loop.

fio runs as a process of its own, reports its own rate, and leaves a final fsync out of the rate of
writes, which favours it. It writes its own incompressible buffers, not our blocks.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess

from bench.results import BenchError, CannotRunError

FIO_SECONDS_MAX = 300.0


def available() -> bool:
    return shutil.which("fio") is not None


def fio_gb_per_s(path: pathlib.Path, total_bytes: int, request_bytes: int, depth: int, *, write: bool) -> float:
    """Rate in GB/s (10**9 bytes) of one sequential pass over ``path`` with io_uring and O_DIRECT.

    Writing creates (or overwrites) a preallocated file; reading needs one of ``total_bytes``. Blocks.
    Raises ``CannotRunError`` with fio's own words if it ends with an error, as where io_uring is forbidden.
    """
    total_bytes -= total_bytes % request_bytes
    command = [
        "fio",
        "--name=limit",
        f"--filename={path}",
        "--ioengine=io_uring",
        "--direct=1",
        f"--rw={'write' if write else 'read'}",
        f"--bs={request_bytes}",
        f"--iodepth={depth}",
        f"--size={total_bytes}",
        "--output-format=json",
    ]
    if write:
        command += ["--fallocate=posix", "--end_fsync=1", "--refill_buffers=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FIO_SECONDS_MAX)
    if done.returncode != 0:
        raise CannotRunError(f"fio failed: {(done.stderr or done.stdout).strip()[-400:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchError(f"fio failed with error {job['error']}")
    return float(job["write" if write else "read"]["bw_bytes"]) / 1e9
