"""Kill campaigns: real processes on real files, killed at random, and what must be there afterwards.

``python -m cascade_aio.testing.crash campaign --kills 200`` runs many seeds; each seed is a root on
which a writer process is killed several times in a row, at a random moment or exactly at a chosen
call of its storage. After each kill the same root is opened again under the same arena name and
compared with what the writer had reported through a pipe:

* what a flush acknowledged is there (unless a disk budget may have evicted it), with its bytes;
* what was deleted and acknowledged stays away, with its names;
* a kill is not damage: no ``CorruptionError``, nothing in ``statistics()["damage"]``, ``verify`` clean;
* the open segment was sealed by recovery, so that whoever opens next scans nothing;
* nothing piles up: no temporary files, no arena but those in use.

A failure names its seed and the command that replays it. The moments of timed kills differ from run
to run, so a replay may take several turns; counted kills are exact up to the kernel's timing.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cascade_aio as ca
from cascade_aio.config import MIB
from cascade_aio.segments.layout import WRITERS
from cascade_aio.testing.crash_child import PHASES, ChildPlan, run_child
from cascade_aio.testing.crash_model import (
    BLOCK_BYTES_MAX,
    NAMES_PER_BLOCK,
    Oracle,
    block_id_of,
    contents,
    name_of,
)

GENERATIONS_PER_SEED = 4
"""Kills in a row on one root."""

RUN_SECONDS_MAX = 0.8
"""A timed kill comes at most so long after the store was opened."""

HANG_SECONDS_MAX = 180.0
"""A child that has not ended by then hangs."""

CALLS_MAX = 300
"""A counted kill comes at one of so many changing calls."""


class CampaignError(AssertionError):
    """A promise was broken; the message has the seed and the command that replays it."""


@dataclasses.dataclass(slots=True)
class Figures:
    """What a campaign did. ``kills`` counts processes that died by SIGKILL, ``unfinished`` operations cut short."""

    seeds: int = 0
    kills: int = 0
    clean_ends: int = 0
    operations: int = 0
    blocks_checked: int = 0
    bytes_checked: int = 0
    names_checked: int = 0
    torn_records: int = 0
    segments_sealed: int = 0
    segments_removed: int = 0
    reader_reads: int = 0
    seconds: float = 0.0
    kills_by_phase: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class SeedPlan:
    """What one seed decides for all of its generations."""

    seed: int
    io_backend: str
    segment_bytes: int
    request_bytes_max: int
    disk_bytes: int | None
    with_reader: bool

    @classmethod
    def of(cls, seed: int) -> SeedPlan:
        """Every fourth seed has a disk budget, every third a reader, every other one the thread back end."""
        rng = random.Random(seed)
        return cls(
            seed,
            io_backend="threads" if seed % 2 else "auto",
            segment_bytes=rng.choice((1, 2, 4)) * MIB,
            request_bytes_max=rng.choice((64 << 10, MIB)),
            disk_bytes=16 * MIB if seed % 4 == 2 else None,
            with_reader=seed % 3 == 0,
        )

    def child(self, root: Path, shm_dir: Path, generation: int) -> tuple[ChildPlan, str, float]:
        """The child of one generation, how it dies, and after how many seconds if by time."""
        rng = random.Random(self.seed * 1009 + generation)
        phase = rng.choice(("time", "time", "time", "opening", *PHASES))
        die_at = int(CALLS_MAX ** rng.random()) if phase in PHASES else 0
        plan = ChildPlan(
            str(root),
            str(shm_dir),
            "writer",
            seed=rng.getrandbits(32),
            io_backend=self.io_backend,
            segment_bytes=self.segment_bytes,
            request_bytes_max=self.request_bytes_max,
            disk_bytes=self.disk_bytes,
            tail_seconds_max=rng.choice((0.02, 0.2, 5.0)),
            die_at=die_at,
            phase=phase if phase in PHASES else "before",
        )
        return plan, phase, rng.random() * RUN_SECONDS_MAX


class _Process:
    """A child with its reports. Always killed and reaped at the end of its scope."""

    def __init__(self, arguments: dict[str, Any], errors: Path) -> None:
        self._errors = errors
        self._pending = b""
        self._lines: collections.deque[bytes] = collections.deque()
        with errors.open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "cascade_aio.testing.crash", "child", json.dumps(arguments)],
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL; what was reported before can still be read."""
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()

    def close(self) -> None:
        assert self.child.stdout is not None
        self.child.stdout.close()

    def events(self, until_s: float) -> Iterator[list[Any]]:
        """Reports as they come, until ``until_s`` on the monotonic clock or the end of the child."""
        assert self.child.stdout is not None
        pipe = self.child.stdout.fileno()
        while True:
            while self._lines:
                yield json.loads(self._lines.popleft())
            ready, _, _ = select.select([pipe], [], [], max(0.0, until_s - time.monotonic()))
            if not ready:
                return
            data = os.read(pipe, 1 << 16)
            if not data:
                return
            *lines, self._pending = (self._pending + data).split(b"\n")
            self._lines.extend(lines)

    def error_text(self) -> str:
        """The end of what it wrote to standard error."""
        return self._errors.read_text(errors="replace")[-4000:]


class SeedRun:
    """All generations of one seed on one root."""

    def __init__(self, seed: int, directory: Path, shm_dir: Path, figures: Figures) -> None:
        self._plan = SeedPlan.of(seed)
        self._root = directory / "kv"
        self._directory = directory
        self._shm_dir = shm_dir
        self._figures = figures
        self._state: dict[int, frozenset[int]] = {}
        self._where = ""

    def run(self, generations: int) -> None:
        """Kill ``generations`` times. Raises ``CampaignError``."""
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(self._reader()) if self._plan.with_reader else None
            for generation in range(generations):
                oracle = self._generation(generation)
                try:
                    asyncio.run(self._check(oracle))
                except (ca.CascadeError, OSError) as error:
                    raise self._failure(f"the root could not be checked: {error!r}") from error
                self._check_leftovers({"reader"} if reader is not None else set())
            if reader is not None:
                self._check_reader(reader)
        self._figures.seeds += 1

    def _failure(self, what: str) -> CampaignError:
        return CampaignError(
            f"{what}\nwhere: {self._where}\nroot: {self._root}\nreplay: {sys.executable} -m "
            f"cascade_aio.testing.crash campaign --seed {self._plan.seed} --kills {GENERATIONS_PER_SEED} --keep"
        )

    # -- processes -----------------------------------------------------------------------------

    def _reader(self) -> _Process:
        arguments = {
            "role": "read",
            "root": str(self._root),
            "shm_dir": str(self._shm_dir),
            "arena": "reader",
            "seed": self._plan.seed,
        }
        return _Process(arguments, self._directory / "reader.log")

    def _generation(self, generation: int) -> Oracle:
        plan, phase, seconds = self._plan.child(self._root, self._shm_dir, generation)
        self._where = f"{self._plan}, generation {generation}, dies by {phase} (call {plan.die_at}, {seconds:.3f} s)"
        oracle = Oracle(self._state, may_evict=plan.disk_bytes is not None)
        with _Process({"role": "write", **dataclasses.asdict(plan)}, self._directory / "writer.log") as process:
            self._live(process, oracle, phase, seconds)
            code = process.child.wait()
            process.close()
        if code == -9:
            self._figures.kills += 1
            self._figures.kills_by_phase[phase] = self._figures.kills_by_phase.get(phase, 0) + 1
        elif code == 0:
            self._figures.clean_ends += 1
        else:
            raise self._failure(f"the writer failed by itself with exit code {code}:\n{process.error_text()}")
        if oracle.complaints:
            raise self._failure("; ".join(oracle.complaints))
        self._figures.operations += oracle.count
        return oracle

    def _live(self, process: _Process, oracle: Oracle, phase: str, seconds: float) -> None:
        """Follow the child to its end, killing it when its time has come."""
        hang_s = time.monotonic() + HANG_SECONDS_MAX
        until_s = time.monotonic() + seconds if phase == "opening" else hang_s
        killed = False
        while True:
            for event in process.events(until_s):
                if event[0] == "open" and phase == "time" and not killed:
                    until_s = time.monotonic() + seconds
                    break
                oracle.feed(event)
                if event[0] == "closed":
                    until_s = hang_s
            else:
                if killed or process.child.poll() is not None or until_s == hang_s:
                    break
                process.kill()
                killed, until_s = True, hang_s
        if not killed and time.monotonic() >= hang_s:
            raise self._failure(f"the writer hangs:\n{process.error_text()}")

    def _check_reader(self, reader: _Process) -> None:
        reader_ended = reader.child.poll() is not None
        reader.kill()
        reads = 0
        for event in reader.events(time.monotonic() + HANG_SECONDS_MAX):
            if event[0] == "wrong":
                raise self._failure(event[1])
            if event[0] == "read":
                reads = event[1]
        reader.close()
        if reader_ended:
            raise self._failure(f"the reader ended by itself:\n{reader.error_text()}")
        self._figures.reader_reads += reads

    # -- checks --------------------------------------------------------------------------------

    def _open(self, arena: str) -> Any:
        return ca.open_store(
            self._root,
            shm_dir=str(self._shm_dir),
            arena=arena,
            shm_bytes=8 * MIB,
            segment_bytes=self._plan.segment_bytes,
            io_backend=self._plan.io_backend,
            workers=2,
        )

    async def _check(self, oracle: Oracle) -> None:
        async with self._open("writer") as store:
            recovery = store.statistics()["disk"]["recovery"]
            self._figures.torn_records += recovery["torn_records"]
            self._figures.segments_sealed += recovery["sealed"]
            self._figures.segments_removed += recovery["removed"]
            self._state = {}
            there = 0
            for block in oracle.blocks():
                there += await self._check_block(store, oracle, block)
            if len(store) != there:
                raise self._failure(f"{len(store)} blocks are known, {there} of them were ever put")
            report = await store.verify()
            damage = [*map(str, report.damage), *store.statistics()["damage"]]
            if damage:
                raise self._failure(f"damage without a cause: {damage}")
            async with self._open("second") as second:
                scanned = second.statistics()["disk"]["recovery"]
                if scanned["scanned"]:
                    raise self._failure(f"the next opening still scans: {scanned}")
                if self._plan.disk_bytes is None and len(second) != len(store):
                    raise self._failure(f"the next opening finds {len(second)} blocks, not {len(store)}")

    async def _check_block(self, store: ca.Store, oracle: Oracle, block: int) -> bool:
        """Whether the block is there. Its state is what the next generation starts from."""
        expected = oracle.expect(block)
        block_id = block_id_of(block)
        names: set[int] = set()
        try:
            async with store.get(block_id) as found:
                there = True
                if (bytes(found.key), bytes(found.value)) != contents(block):
                    raise self._failure(f"block {block} ({block_id}) has other bytes")
            self._figures.bytes_checked += sum(map(len, contents(block)))
        except ca.BlockNotFoundError:
            there = False
        except ca.CorruptionError as error:
            raise self._failure(f"block {block} is said to be damaged: {error}") from error
        for name in range(NAMES_PER_BLOCK):
            if store.lookup([name_of(block, name)]):
                async with store.get(name_of(block, name)) as named:
                    if named.block_id != block_id:
                        raise self._failure(f"name {name} of block {block} names {named.block_id}")
                names.add(name)
        self._figures.blocks_checked += 1
        self._figures.names_checked += NAMES_PER_BLOCK
        told = f"block {block} ({block_id}), names {sorted(names)}, {expected}, durable {oracle.durable}"
        for broken, what in (
            (expected.must_be_there and not there, "acknowledged and lost"),
            (there and not expected.may_be_there, "deleted or never put, and there"),
            (not expected.names_must <= names, "names acknowledged and lost"),
            (not names <= expected.names_may, "names deleted or never bound, and there"),
        ):
            if broken:
                raise self._failure(f"{what}: {told}")
        if self._plan.disk_bytes is not None and expected.may_be_there:
            # Evicted is not deleted: as long as its segment is there, another writer directory's index may know it.
            self._state[block] = expected.names_may
        elif there:
            self._state[block] = frozenset(names)
        return there

    def _check_leftovers(self, arenas: set[str]) -> None:
        left = set(os.listdir(self._shm_dir)) - arenas
        if left:
            raise self._failure(f"arenas left behind: {sorted(left)}")
        # A writer directory whose creation was cut short stays as it is: whose host it is cannot be told.
        strange = [
            str(path.relative_to(self._root))
            for path in self._root.rglob("*")
            if path.is_file()
            and (path.parent.parent.name != WRITERS or (path.parent / "writer.json").exists())
            and path.suffix != ".seg"
            and path.name not in ("cascade.json", "cascade.json.lock", "lock", "writer.json", "checkpoint")
        ]
        if strange:
            raise self._failure(f"files left behind: {strange}")


def run_campaign(
    seeds: Sequence[int],
    directory: Path,
    *,
    kills: int | None = None,
    generations: int = GENERATIONS_PER_SEED,
    shm_parent: str = "/dev/shm",
    keep: bool = False,
) -> Figures:
    """Run ``seeds`` until ``kills`` processes were killed. Raises ``CampaignError``, and then keeps the root.

    ``directory`` holds the roots, on the file system to be tested; each is removed unless ``keep``.
    Uses some 24 MiB of shared memory below ``shm_parent``.
    """
    figures = Figures()
    started_s = time.monotonic()
    for seed in seeds:
        if kills is not None and figures.kills >= kills:
            break
        place = Path(tempfile.mkdtemp(prefix=f"seed-{seed}-", dir=directory))
        shm_dir = Path(tempfile.mkdtemp(prefix="cascade-crash-", dir=shm_parent))
        try:
            SeedRun(seed, place, shm_dir, figures).run(generations)
            if not keep:
                shutil.rmtree(place)
        finally:
            shutil.rmtree(shm_dir)
    figures.seconds = round(time.monotonic() - started_s, 1)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """``campaign`` for people, ``child`` for the campaign itself."""
    parser = argparse.ArgumentParser(prog="python -m cascade_aio.testing.crash", description=run_campaign.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    campaign = commands.add_parser("campaign", help="kill writers and check what is left")
    campaign.add_argument("--kills", type=int, default=40)
    campaign.add_argument("--seed", type=int, default=0, help="the first seed; the following ones are used in turn")
    campaign.add_argument("--directory", type=Path, help="where the roots are made (default: a temporary directory)")
    campaign.add_argument("--keep", action="store_true", help="keep the roots")
    child = commands.add_parser("child", help="internal")
    child.add_argument("plan")
    options = parser.parse_args(arguments)
    if options.command == "child":
        run_child(json.loads(options.plan))
        return 0
    directory = options.directory or Path(tempfile.mkdtemp(prefix="cascade-crash-"))
    directory.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seed, options.seed + options.kills + 1)
    try:
        figures = run_campaign(seeds, directory, kills=options.kills, keep=options.keep)
    except CampaignError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(dataclasses.asdict(figures), indent=2) + "\n")
    if options.directory is None and not options.keep:
        shutil.rmtree(directory)
    return 0


assert BLOCK_BYTES_MAX < 8 * MIB, "the checking store's arena holds any block"

if __name__ == "__main__":
    raise SystemExit(main())
