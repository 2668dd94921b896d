"""The model that the tests with a real vLLM share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.vllm_drive import ENVIRONMENT


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "model"
    make = f"import pathlib, restart; restart.make_model(pathlib.Path({str(directory)!r}), layers=4, hidden=256)"
    subprocess.run([sys.executable, "-c", make], env=ENVIRONMENT, check=True)
    return directory
