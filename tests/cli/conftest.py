"""Calling the command line in this process, as a shell would see it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade_aio.cli import main


@dataclasses.dataclass(frozen=True)
class Call:
    """Exit code and output of one call."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Call]


@pytest.fixture(autouse=True)
def no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CASCADE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("put", path, …)``; no call may leave an arena behind."""

    def call(*arguments: str | Path) -> Call:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        mine = [
            name for name in os.listdir("/dev/shm") if name.startswith("cascade-") and name.endswith(f"-{os.getpid()}")
        ]
        assert mine == []
        code = ended.value.code
        return Call(code if isinstance(code, int) else int(code is not None), written.out, written.err)

    return call
