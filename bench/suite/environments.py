"""A virtual environment for each peer, made from its pinned requirements and kept for the next time.

``python -m bench install NAME`` makes them; nothing else installs anything. An environment lies below
``.cache/peers`` of the checkout (``CASCADE_BENCH_CACHE`` names another place) and carries the requirements it was made
from: with other requirements it is not used but made anew.

Directives in ``requirements.txt``: ``# apt: NAME…`` names Debian packages that are asked for (not installed: that is
the user's decision), ``# no-deps: REQUIREMENT…`` is installed without its dependencies, after everything else.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

from bench.machine import REPOSITORY
from bench.peers.catalog import FOLDER, entries
from bench.results import BenchError, CannotRunError

CACHE_VARIABLE = "CASCADE_BENCH_CACHE"
STAMP = "requirements.installed"
INSTALL_SECONDS_MAX = 1800.0
_APT, _NO_DEPS = "# apt:", "# no-deps:"
OUTPUT_LINES_SHOWN = 20


def peers() -> list[str]:
    """The peers that have an environment of their own, by name of the folder."""
    return sorted({entry.peer for entry in entries().values() if entry.system.own_environment})


def place(peer: str) -> pathlib.Path:
    """Where the environment of ``peer`` is or would be."""
    cache = os.environ.get(CACHE_VARIABLE)
    return (pathlib.Path(cache) if cache else REPOSITORY / ".cache" / "peers") / peer


def interpreter(system: str) -> pathlib.Path:
    """The Python that runs ``system``. Raises ``CannotRunError`` if its environment is not there."""
    entry = entries()[system]
    if not entry.system.own_environment:
        return pathlib.Path(sys.executable)
    folder = place(entry.peer)
    stamp = folder / STAMP
    if not stamp.exists():
        raise CannotRunError(f"not installed: run `python -m bench install {entry.peer}`")
    if stamp.read_text() != entry.requirements.read_text():
        raise CannotRunError(f"installed with other requirements: run `python -m bench install {entry.peer}`")
    return folder / "bin" / "python"


def install(peer: str) -> pathlib.Path:
    """Make the environment of ``peer`` unless it is there; its folder.

    Raises ``BenchError`` for an unknown peer or if pip fails (with its last lines); what was begun is removed.
    """
    if peer not in peers():
        raise BenchError(f"there is no peer {peer} to install; there are {', '.join(peers())}")
    requirements = FOLDER / peer / "requirements.txt"
    text = requirements.read_text()
    missing = _missing_packages(text)
    if missing:
        raise BenchError(f"{peer} needs Debian packages: apt-get install {' '.join(missing)}")
    folder = place(peer)
    if (folder / STAMP).exists() and (folder / STAMP).read_text() == text:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "-r", str(requirements)])
        for requirement in _directive(text, _NO_DEPS):
            _run([*pip, "--no-deps", requirement])
        (folder / STAMP).write_text(text)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _directive(text: str, name: str) -> list[str]:
    return [word for line in text.splitlines() if line.startswith(name) for word in line.removeprefix(name).split()]


def _missing_packages(text: str) -> list[str]:
    """Which of the Debian packages are not there; none are missed on a machine without dpkg."""
    names = _directive(text, _APT)
    if not names or shutil.which("dpkg-query") is None:
        return []
    found = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Status}\\n", *names], capture_output=True, text=True, check=False
    ).stdout
    installed = {line.split()[0] for line in found.splitlines() if line.endswith(" installed")}
    return [name for name in names if name not in installed]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS_MAX)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{' '.join(command[1:5])} … took longer than {INSTALL_SECONDS_MAX:.0f} s") from error
    if done.returncode != 0:
        last = "\n".join((done.stderr or done.stdout).splitlines()[-OUTPUT_LINES_SHOWN:])
        raise BenchError(f"{' '.join(command[1:5])} … failed:\n{last}")
