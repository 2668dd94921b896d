"""What the benchmark tests need of the machine, and a result file to work on."""

from __future__ import annotations

import os
import pathlib

import pytest

from bench.results import (
    Environment,
    NotRun,
    ResultFile,
    Row,
    Target,
    make_series,
    pair_summary,
)

COLD_BYTES = 1 << 20


@pytest.fixture
def cold_reads(tmp_path: pathlib.Path) -> None:
    """Skip where the kernel cannot show that a read was one of the medium (file systems in memory or in user space)."""
    from bench.peers import meters
    from bench.peers.protocol import CannotRunError

    path = tmp_path / "is-it-cold"
    path.write_bytes(os.urandom(COLD_BYTES))
    try:
        meters.drop_page_cache([path])
    except CannotRunError as error:
        pytest.skip(str(error))
    before = meters.usage([])
    assert len(path.read_bytes()) == COLD_BYTES
    if meters.usage([]).since(before).read_bytes < COLD_BYTES:
        pytest.skip("the kernel does not count what is read from this file system")
    path.unlink()


@pytest.fixture
def environment() -> Environment:
    return Environment(
        version="0.1.0",
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        python="3.11.7",
        packages={"numpy": "2.0.0"},
        kernel="6.1.0",
        cpu="Some CPU",
        cores=2,
        memory_bytes=24 << 30,
        file_system="ext4",
        device="virtio disk",
    )


def make_row(
    ours: list[float], other: list[float] | None, target: Target | None, unit: str = "GB/s", **changes: object
) -> Row:
    series = make_series("cascade", unit, ours)
    limit = make_series("io_uring O_DIRECT, 8192 KiB x 16", "GB/s", other) if other else None
    ratios, ratio = pair_summary(series, limit) if limit else ([], None)
    fields: dict[str, object] = {
        "figure": "cold_get",
        "title": "cold get / raw direct read",
        "block_bytes": 16 << 20,
        "date": "2026-01-02T03:04:05+00:00",
        "system": "cascade",
        "temperature": "cold",
        "checked": "every byte",
        "verified_bytes": 5_000_000_000,
        "io_backend": "uring",
        "io_backend_reason": "as asked: auto",
        "configuration": {"shm_bytes": 1 << 30},
        "seed": 1,
        "repeats": len(ours),
        "order": ["cascade,raw"] * len(ours),
        "ours": series,
        "other": limit,
        "ratios": ratios,
        "ratio": ratio,
        "target": target,
        **changes,
    }
    return Row(**fields)  # type: ignore[arg-type]


@pytest.fixture
def sample(environment: Environment) -> ResultFile:
    """A pair that meets its target, one that misses, a value held to its worst, and a figure not run."""
    at_least = Target("ratio", 0.9, at_least=True)
    lag = Target("value", 15.0, at_least=False, use="worst")
    return ResultFile(
        environment=environment,
        started="2026-01-02T03:00:00+00:00",
        command=["python", "-m", "bench", "run"],
        rows=[
            make_row([1.9, 2.0, 1.0], [2.0, 2.0, 1.0], at_least),
            make_row([1.0, 1.2, 1.1], [2.0, 2.0, 2.0], at_least, block_bytes=80 << 20),
            make_row(
                [4.0, 16.0, 5.0],
                None,
                lag,
                figure="loop_lag",
                variant="max",
                title="event-loop lag, max",
                unit="ms",
                extra=[make_series("idle", "ms", [0.2, 0.3, 0.2])],
            ),
        ],
        not_run=[NotRun("put_flush", "put + flush", 1 << 20, "sha256", "2026-01-02", "io_uring is not available here")],
    )
