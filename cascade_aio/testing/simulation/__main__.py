"""``python -m cascade_aio.testing.simulation run --seeds N`` and ``… replay SEED``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TextIO

from cascade_aio.testing.simulation.many import map_pieces
from cascade_aio.testing.simulation.plan import make_plan
from cascade_aio.testing.simulation.report import Tally
from cascade_aio.testing.simulation.runner import simulate

_STEP_SEEDS = 25
"""Seeds that are run before it is told what came of them."""


_BRIEFLY = (
    "seeds_run", "operations", "crashes", "reopens", "bytes_verified",
    "blocks_lost", "wrong_bytes", "came_back", "leaks", "hangs", "unexpected",
)  # fmt: skip


def _say(line: str, stream: TextIO | None = None) -> None:
    stream = sys.stdout if stream is None else stream
    stream.write(line + "\n")
    stream.flush()


def run(first: int, count: int, workers: int, out: Path | None) -> int:
    """Run seeds, print every failure with its replay command, and keep the result file up to date. The exit status.

    The file is written anew after every piece: whoever ends the run early has the figures of what was run.
    """
    started_s = time.monotonic()
    total = Tally(first)
    pieces = [(start, min(start + _STEP_SEEDS, first + count)) for start in range(first, first + count, _STEP_SEEDS)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for tally, failed in map_pieces(pieces, workers, stack):
            total.merge(tally)
            result = total.result(time.monotonic() - started_s)
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            for outcome in failed:
                _say(f"seed {outcome.seed}: {outcome.failure}\n  replay: {outcome.command}")
            _say(f"{total.seeds_run} of {count} seeds, {sum(total.broken.values())} failed", sys.stderr)
    _say(", ".join(f"{name} {result[name]}" for name in _BRIEFLY))
    return 1 if total.failures else 0


def replay(seed: int, shrink: bool) -> int:
    """Run one seed and print its history; with ``shrink``, the shortest beginning of its plan that fails too."""
    plan = make_plan(seed)
    steps_max = len(plan.steps)
    outcome = simulate(seed)
    if shrink and outcome.failure is not None:
        for steps in range(1, steps_max):
            shorter = simulate(seed, steps_max=steps)
            if shorter.failure is not None and shorter.promise == outcome.promise:
                outcome, steps_max = shorter, steps
                break
    _say(f"settings {plan.settings}\nmachines {plan.hosts}, shared {plan.shared}, faults {sorted(plan.faults)}")
    steps_by_number = {step.number: step for step in plan.steps}
    for time_s, what, *details in outcome.events:
        step = steps_by_number.get(details[0]) if details and isinstance(details[0], int) else None
        told = f"  [{step}]" if step is not None and step.kind == what else ""
        _say(f"{time_s:12.6f} {what} {' '.join(map(str, details))}{told}")
    _say(f"history {outcome.digest}")
    if outcome.failure is None:
        _say("every promise was kept")
        return 0
    _say(f"{outcome.detail}\nseed {seed}, first {steps_max} steps: {outcome.failure}")
    return 1


def main() -> int:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(prog="python -m cascade_aio.testing.simulation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="run many seeds")
    run_parser.add_argument("--seeds", type=int, default=200)
    run_parser.add_argument("--first", type=int, default=0)
    run_parser.add_argument("--workers", type=int, default=1, help="processes")
    run_parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    replay_parser = commands.add_parser("replay", help="run one seed and print its history")
    replay_parser.add_argument("seed", type=int)
    replay_parser.add_argument("--shrink", action="store_true", help="look for a shorter plan that fails, too")
    options = parser.parse_args()
    if options.command == "run":
        if options.seeds < 1 or options.workers < 1:
            parser.error("--seeds and --workers must be at least 1")
        return run(options.first, options.seeds, options.workers, options.out)
    return replay(options.seed, options.shrink)


if __name__ == "__main__":
    sys.exit(main())
