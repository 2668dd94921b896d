"""Where a result comes from: code, machine and moment, for result files that are published.

No host name, user name or path of the machine. Outside a git checkout (an installed wheel) the commit is unknown.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import cascade_aio

CHECKOUT = Path(cascade_aio.__file__).resolve().parent.parent
NOT_CODE = (":(exclude)bench/results", ":(exclude)*.md")
"""What campaigns and tables write themselves does not make the tested code dirty."""


def provenance() -> dict[str, Any]:
    """Version, commit, whether tracked files differ from it, date, Python, kernel and cores. Runs git; blocks."""
    commit = _git("rev-parse", "HEAD")
    return {
        "version": cascade_aio.__version__,
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "-uno", "--", ".", *NOT_CODE)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
