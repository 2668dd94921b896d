"""The figures of the GPU tier run through on the fake device: all of them, every byte compared. Nothing about time."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.gpu.__main__ import main
from bench.gpu.figures import FIGURES
from bench.gpu.rows import GpuResult


def test_every_figure_runs_on_the_fake_device(tmp_path: Path) -> None:
    names = set(FIGURES)
    out = tmp_path / "gpu.json"
    assert main(["--fake", "--out", str(out), "--dir", str(tmp_path)]) in (0, 1)
    result = msgspec.json.decode(out.read_bytes(), type=GpuResult)
    assert result.device == "a device of memory"
    assert result.registration == "as needed"
    not_run = {item.figure: item.reason for item in result.not_run}
    assert set(not_run) <= {"from_disk"}, not_run  # the raw limit takes io_uring
    assert len({row.figure for row in result.rows}) == len(names - set(not_run))
    assert all(row.verified_bytes for row in result.rows if row.figure != "loop_lag")


def test_an_unknown_figure_and_a_missing_device_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "x.json"), "--figures", "speed"])
    assert "there is no figure speed" in capsys.readouterr().err
