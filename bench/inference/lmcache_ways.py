"""LMCache's own benchmark of its L2 adapters, which compares every byte: our plug-in beside its own adapters.

Rounds of the adapters are interleaved, each in a process and a directory of its own. Its rates are its own words:
megabytes of payload per second of a round of store or load tasks. Its own adapters acknowledge what is in the page
cache and load from there; ours acknowledges what is on stable storage and loads from its arena.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from bench.inference.rows import Part, Way

KEYS, KEY_KIB = 64, 4096
BENCH_SECONDS_MAX = 120


def adapters(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Name in the table and configuration of each adapter, LMCache's first."""
    ours = {"root": str(folder), "shm_bytes": "1GiB"}
    plugin = {"type": "plugin", "module_path": "cascade_aio.integrations.lmcache", "class_name": "CascadeL2Adapter"}
    return {
        "LMCache's `fs` adapter": {"type": "fs", "base_path": str(folder)},
        "LMCache's `fs_native` adapter": {"type": "fs_native", "base_path": str(folder)},
        "cascade_aio (`CascadeL2Adapter`)": {**plugin, "adapter_params": ours},
    }


def measure(
    python: str, folder: pathlib.Path, *, runs: int, say: Callable[[str], None]
) -> tuple[list[Part], list[str]]:
    """The tables of storing and loading, and what went wrong."""
    names = list(adapters(folder))
    rates: dict[str, dict[str, list[float]]] = {name: {"Store": [], "Load": []} for name in names}
    failed: dict[str, str] = {}
    problems: list[str] = []
    for number in range(runs):
        say(f"LMCache, run {number + 1} of {runs}")
        for name in names:
            place = folder / "l2"
            place.mkdir(parents=True)
            try:
                if name not in failed:
                    log = _bench(python, adapters(place)[name], folder)
                    for kind, rate in _rates(log).items():
                        rates[name][kind].append(rate)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                failed[name] = " ".join(str(error).split())[:160]
                problems.append(f"{name}: {error}")
            finally:
                shutil.rmtree(place)
    parts = []
    for kind, title in (("Store", "LMCache stores through"), ("Load", "LMCache loads through")):
        found = [
            Way(name, "MB/s", not_run=failed[name]) if name in failed else Way(name, "MB/s", rates[name][kind])
            for name in names
        ]
        how = (
            f"`lmcache bench l2`, {KEYS} objects of {KEY_KIB // 1024} MiB a round, every byte compared by it; its own "
            "adapters end in the page cache and load from there, ours ends on stable storage and loads from its arena:"
        )
        parts.append(Part(title, how, "higher", found))
    return parts, problems


def _bench(python: str, adapter: dict[str, Any], folder: pathlib.Path) -> str:
    """Its output. Raises ``CalledProcessError``, ``TimeoutExpired``, ``FileNotFoundError``."""
    command = [str(pathlib.Path(python).with_name("lmcache")), "bench", "l2", "--l2-adapter", json.dumps(adapter)]
    sizes = ["--num-keys", str(KEYS), "--data-size-kb", str(KEY_KIB), "--l1-align-bytes", "4096", "--rounds", "1"]
    checks = ["--no-skip-verify", "--lookup-max-hit-rate", "1.0"]
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    return subprocess.run(
        [*command, *sizes, *checks],
        cwd=folder,  # not in a checkout, whose packages would be imported
        env=environment,
        capture_output=True,
        text=True,
        timeout=BENCH_SECONDS_MAX,
        check=True,
    ).stdout


def _rates(log: str) -> dict[str, float]:
    """Megabytes per second of ``Store`` and ``Load``. Raises ``ValueError`` for a round that did not succeed."""
    found: dict[str, float] = {}
    kind = ""
    for line in log.splitlines():
        name, _, value = line.partition(":")
        if name == "Operation":
            kind = value.strip()
        elif name == "Total success" and kind and int(value) != KEYS:
            raise ValueError(f"{kind}: {int(value)} of {KEYS} objects succeeded")
        elif name == "Throughput avg (MB/s)" and kind in ("Store", "Load"):
            found[kind] = float(value)
    if found.keys() != {"Store", "Load"}:
        raise ValueError(f"lmcache bench printed no rates: {log[-400:]}")
    return found
