"""The long fuzz: ``python -m tests.fuzz --seconds 60 [--target recovery]``, with atheris where it is installed.

Without it hypothesis generates the inputs. Each target gets its share of the time; a failing input is printed as
bytes to be added to ``FOUND`` in ``test_fuzz.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import random
import subprocess
import sys
import time

from tests.fuzz.guard import run_guarded
from tests.fuzz.targets import TARGETS

INPUT_BYTES_MAX = 1000


def fuzz_with_atheris(name: str, seconds: int) -> int:
    """In a process of its own: libFuzzer ends its process."""
    command = [sys.executable, "-m", "tests.fuzz", "--atheris-child", name, "--seconds", str(seconds)]
    return subprocess.run(command, check=False).returncode


def atheris_child(name: str, seconds: int) -> None:
    """Never returns."""
    import atheris

    target = TARGETS[name]
    with atheris.instrument_imports(include=["cascade_aio.segments"]):
        pass
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES_MAX}"], target)
    atheris.Fuzz()


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
    parser.add_argument("--atheris-child", choices=sorted(TARGETS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # a store says why it does not use a checkpoint, thousands of times
    if options.atheris_child:
        atheris_child(options.atheris_child, int(options.seconds))
    names = [options.target] if options.target else list(TARGETS)
    share = options.seconds / len(names)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: inputs are drawn at random")
        for name in names:
            fuzz_at_random(name, share, options.seed)
        return 0
    return max(fuzz_with_atheris(name, max(1, round(share))) for name in names)


if __name__ == "__main__":
    raise SystemExit(main())
