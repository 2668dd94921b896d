"""The long fuzz: ``python -m tests.fuzz --seconds 60 [--target recovery]``, with atheris where it is installed.

Without it a seeded generator makes the inputs. Each target gets its share of the time; a failing input is printed as
bytes to be added to ``FOUND`` in ``test_fuzz.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from cascade_aio.testing.provenance import provenance
from tests.fuzz.guard import run_guarded
from tests.fuzz.targets import TARGETS

INPUT_BYTES_MAX = 1000


def fuzz_with_atheris(name: str, seconds: float, seed: int) -> int:
    """In a process of its own, because libFuzzer ends its process; how many inputs it tried. Ends us on a failure."""
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(seconds), str(seed)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    runs = re.findall(r"^Done (\d+) runs", done.stderr, flags=re.MULTILINE)
    if done.returncode or not runs:
        raise SystemExit(f"{name} broke its promise:\n{done.stderr[-4000:]}")
    print(f"{name}: {runs[-1]} inputs")
    return int(runs[-1])


def fuzz_at_random(name: str, seconds: float, seed: int) -> int:
    """Inputs of a seeded generator; every hundredth is watched for its allocations, which costs."""
    rng = random.Random(seed)
    until_s = time.monotonic() + seconds
    runs = 0
    while time.monotonic() < until_s:
        data = rng.randbytes(rng.randrange(INPUT_BYTES_MAX))
        try:
            if runs % 100:
                TARGETS[name](data)
            else:
                run_guarded(TARGETS[name], data)
        except BaseException:
            print(f"{name} broke its promise after {runs} inputs, on {data!r}", file=sys.stderr)
            raise
        runs += 1
    print(f"{name}: {runs} inputs, seed {seed}")
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz every parser of bytes on disk.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--target", choices=sorted(TARGETS), help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, without atheris")
    parser.add_argument("--result", type=Path, help="write what was done to this JSON file as well")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # a store says why it does not use a checkpoint, thousands of times
    provenance_before = provenance()
    names = [options.target] if options.target else list(TARGETS)
    share = options.seconds / len(names)
    guided = importlib.util.find_spec("atheris") is not None
    if not guided:
        print("atheris is not installed: inputs are drawn at random")
    run = fuzz_with_atheris if guided else fuzz_at_random
    inputs = {name: run(name, share, options.seed) for name in names}
    if options.result is not None:
        result = {
            "campaign": "fuzz",
            **provenance_before,
            "command": f"python -m tests.fuzz --seconds {options.seconds:g} --seed {options.seed}",
            "engine": "atheris, guided by coverage" if guided else "a seeded random generator",
            "inputs": inputs,
            "failures": 0,
        }
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
