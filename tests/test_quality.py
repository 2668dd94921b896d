"""What a reader can check by running a tool is checked by running it: lint, types, layers, tables.

They look at the whole checkout, tests and benchmarks included; what they print is the failure message.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

TOOL_SECONDS_MAX = 800
"""mypy starts without a cache in a fresh checkout: a minute or two where nobody else works."""

TOOLS = {
    "ruff": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "layers": ["lint-imports", "--no-cache"],
}


@pytest.mark.timeout(TOOL_SECONDS_MAX + 20)
@pytest.mark.parametrize("tool", TOOLS)
def test_tool_is_content(tool: str) -> None:
    command = [str(BIN / TOOLS[tool][0]), *TOOLS[tool][1:]]
    if not Path(command[0]).exists():
        pytest.skip(f"{TOOLS[tool][0]} is not installed beside this Python: pip install -e '.[dev]'")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TOOL_SECONDS_MAX)
    assert done.returncode == 0, f"{' '.join(TOOLS[tool])}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def test_the_tables_of_the_readme_are_those_of_the_result_files() -> None:
    if not list((ROOT / "bench" / "results").glob("engine-*.json")):
        pytest.skip("no result file of the engine benchmark is in the repository yet: make bench writes one")
    command = [sys.executable, "-m", "bench", "table", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
