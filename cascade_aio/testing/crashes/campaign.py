"""Kill campaigns: many seeds, one after the other, on the file system that is there or on one made for it.

``python -m cascade_aio.testing.crashes campaign --kills 200 --file-system all --result FILE``. Each seed is a root on
which writers are killed several times in a row: at a random moment, exactly at a chosen call of their storage, or
while their file system fails (``disks``: no room, read-only, shut down, loss of power with a volatile
write cache). After each kill the root is opened again and compared with what the writers had reported:

* what a flush acknowledged is there (unless a disk budget may have evicted it), with its bytes and names;
* what was deleted and acknowledged stays away, with its names;
* a crash is not damage: no ``CorruptionError``, nothing in ``statistics()["damage"]``, ``verify`` clean;
* open segments were sealed by whoever adopted them, so that whoever opens next scans nothing;
* nothing piles up: no temporary files, no arena but those in use, no descriptor.

A failure names its seed and the command that replays it. The moments of timed kills differ from run
to run, so a replay may take several turns; counted kills are exact up to the kernel's timing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_aio.cli.root_checks import file_system_name
from cascade_aio.testing.crashes.child import run_child
from cascade_aio.testing.crashes.disks import FILE_SYSTEMS, Disk, missing_for, open_disk
from cascade_aio.testing.crashes.figures import CampaignError, Figures
from cascade_aio.testing.crashes.seed import GENERATIONS_PER_SEED, SeedRun
from cascade_aio.testing.provenance import provenance

RESULT_FORMAT = 1
FAILURES_MAX = 5
"""A campaign that collects failures gives up after so many."""


def run_campaign(
    seeds: Sequence[int],
    directory: Path,
    *,
    kills: int | None = None,
    generations: int = GENERATIONS_PER_SEED,
    file_system: str = "here",
    shm_parent: str = "/dev/shm",
    keep: bool = False,
    failures_max: int = 1,
) -> Figures:
    """Run ``seeds`` until ``kills`` processes were killed, or ``failures_max`` seeds have failed.

    Raises ``CampaignError`` at the first failure if that is all it may see, else tells failures in its figures. Roots
    are made below ``directory``, or on a ``file_system`` (of ``FILE_SYSTEMS``) mounted there, and removed, those
    of failures excepted if they are not on a mounted one. ``keep``: none is removed. Raises ``OSError`` if the file
    system cannot be made. Takes some 24 MiB of shared memory and up to 900 MiB of disk.
    """
    figures = Figures()
    started_s = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="cascade-crash-", dir=directory))
    try:
        with open_disk(file_system, place / "disk") as disk:
            for seed in seeds:
                if kills is not None and figures.kills >= kills:
                    break
                try:
                    _run_seed(seed, disk, place, generations, shm_parent, keep=keep, figures=figures)
                except CampaignError as error:
                    figures.failed(error)
                    if failures_max == 1:
                        raise
                    sys.stderr.write(f"{error}\n")
                    if len(figures.failures) >= failures_max:
                        break
    finally:
        if not (keep or figures.failures):
            shutil.rmtree(place, ignore_errors=True)
    figures.seconds = round(time.monotonic() - started_s, 1)
    return figures


def _run_seed(
    seed: int, disk: Disk, place: Path, generations: int, shm_parent: str, *, keep: bool, figures: Figures
) -> None:
    directory, logs = disk.place / f"seed-{seed}", place / f"logs-{seed}"
    directory.mkdir()
    logs.mkdir()
    shm_dir = Path(tempfile.mkdtemp(prefix="cascade-crash-", dir=shm_parent))
    try:
        SeedRun(seed, disk, directory, logs, shm_dir, figures).run(generations)
        if not keep:
            shutil.rmtree(directory)
            shutil.rmtree(logs)
    finally:
        shutil.rmtree(shm_dir)


def run_all(kinds: Sequence[str], options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """One campaign per kind of file system, the kills shared out; the result as it is written to a file."""
    missing = {kind: reason for kind in kinds if (reason := missing_for(kind)) is not None}
    present = [kind for kind in kinds if kind not in missing]
    result: dict[str, Any] = {
        "campaign": "crash",
        "format": RESULT_FORMAT,
        **provenance(),
        "command": "python -m cascade_aio.testing.crashes campaign "
        f"--file-system {options.file_system} --seed {options.seed} --kills {options.kills}",
        "here": file_system_name(str(directory)),
        "first_seed": options.seed,
        "file_systems": {},
        "not_run": missing,
    }
    total = Figures()
    for number, kind in enumerate(present):
        share = options.kills // len(present) + (number < options.kills % len(present))
        seeds = range(options.seed, options.seed + 2 * share + 1)
        figures = run_campaign(
            seeds, directory, kills=share, file_system=kind, keep=options.keep, failures_max=FAILURES_MAX
        )
        result["file_systems"][kind] = figures.as_json()
        total.add(figures)
        sys.stderr.write(f"{kind}: {figures.kills} kills in {figures.seconds} s, {len(figures.failures)} failures\n")
    result["total"] = total.as_json()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """``campaign`` for people, ``child`` for the campaign itself."""
    options = _parser().parse_args(arguments)
    if options.command == "child":
        run_child(json.loads(options.plan))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unmounts, as Ctrl-C does
    own_directory = options.directory is None
    directory = options.directory or Path(tempfile.mkdtemp(prefix="cascade-crash-"))
    directory.mkdir(parents=True, exist_ok=True)
    kinds = FILE_SYSTEMS if options.file_system == "all" else (options.file_system,)
    failed = True
    try:
        result = run_all(kinds, options, directory)
        failed = bool(result["total"]["failures"])
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing is left mounted\n")
        return 130
    finally:
        if own_directory and not (options.keep or failed):
            shutil.rmtree(directory, ignore_errors=True)
    text = json.dumps(result, indent=2) + "\n"
    if options.result is not None:
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(text)
    sys.stdout.write(text)
    for kind, reason in result["not_run"].items():
        sys.stderr.write(f"{kind} was not run: {reason}\n")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cascade_aio.testing.crashes", description="Kill campaigns.")
    commands = parser.add_subparsers(dest="command", required=True)
    campaign = commands.add_parser("campaign", help="kill writers and check what is left")
    campaign.add_argument("--kills", type=int, default=40)
    campaign.add_argument("--seed", type=int, default=0, help="the first seed; the following ones are used in turn")
    campaign.add_argument(
        "--file-system",
        choices=(*FILE_SYSTEMS, "all"),
        default="here",
        help="where: on the directory's own file system, or on one on a loop device (takes root), which then fails too",
    )
    campaign.add_argument("--directory", type=Path, help="where the roots are made (default: a temporary directory)")
    campaign.add_argument("--result", type=Path, help="write the figures to this JSON file as well")
    campaign.add_argument("--keep", action="store_true", help="keep the roots")
    child = commands.add_parser("child", help="internal")
    child.add_argument("plan")
    return parser
