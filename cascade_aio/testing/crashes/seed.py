"""One seed: a root on which generation after generation of writers is killed, and what is left is checked.

The writers report through pipes; an oracle for each follows them. What must not happen is a ``CampaignError`` with
the seed and the command that replays it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cascade_aio.testing.crashes.check import READER_ARENA, RootCheck, split_state
from cascade_aio.testing.crashes.disks import Disk
from cascade_aio.testing.crashes.figures import CampaignError, Figures, count
from cascade_aio.testing.crashes.model import Oracle
from cascade_aio.testing.crashes.plan import UNIVERSE_BLOCKS, Death, SeedPlan
from cascade_aio.testing.crashes.process import Process

GENERATIONS_PER_SEED = 4
"""Kills in a row on one root."""

HANG_SECONDS_MAX = 180.0
"""A child that has not ended, or not answered, by then hangs."""

SIGKILLED = -9


class SeedRun:
    """All generations of one seed on one root below ``directory``, which is on ``disk``."""

    def __init__(self, seed: int, disk: Disk, directory: Path, logs: Path, shm_dir: Path, figures: Figures) -> None:
        self._plan = SeedPlan.of(seed, disk.faults)
        self._disk = disk
        self._root = directory / "kv"
        self._logs = logs
        self._shm_dir = shm_dir
        self._figures = figures
        self._state: dict[int, frozenset[int]] = {}
        self._where = ""
        self._reader: Process | None = None

    def run(self, generations: int) -> None:
        """Kill ``generations`` times. Raises ``CampaignError``."""
        try:
            for generation in range(generations):
                self._generation(generation)
            self._end_reader()
        except CampaignError as error:
            raise CampaignError(error.kind, f"{error}\nwhere: {self._where}\nreplay: {self._replay()}") from error
        finally:
            if self._reader is not None:
                self._reader.__exit__()
                self._reader = None
        self._figures.seeds += 1

    def _replay(self) -> str:
        return (
            f"{sys.executable} -m cascade_aio.testing.crashes campaign --file-system {self._disk.kind} "
            f"--seed {self._plan.seed} --kills {GENERATIONS_PER_SEED} --keep"
        )

    def _generation(self, generation: int) -> None:
        death = self._plan.death(generation)
        plans = [self._plan.child(self._root, self._shm_dir, generation, n) for n in range(self._plan.writers)]
        self._where = f"{self._plan}, generation {generation}, {death}, dies at call {plans[0].die_at}"
        if self._plan.with_reader and self._reader is None:
            self._start_reader()
        may_evict = self._plan.disk_bytes is not None
        oracles = [
            Oracle(split_state(self._state, plan.first_block, UNIVERSE_BLOCKS), may_evict=may_evict) for plan in plans
        ]
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(
                    Process({"role": "write", **dataclasses.asdict(plan)}, self._logs / f"writer-{n}.log")
                )
                for n, plan in enumerate(plans)
            ]
            if death.fault is not None:
                self._await_open(writers, oracles)
            with self._following(writers[0], oracles[0], death):
                self._end_writers(writers, oracles, death)
        if self._reader is not None:
            self._hear_reader()
        self._check(oracles)

    # -- writers -------------------------------------------------------------------------------

    def _await_open(self, writers: list[Process], oracles: list[Oracle]) -> None:
        """Nothing promises that a store can be opened on a file system that fails."""
        followed = [*zip(writers, oracles, strict=True), *([] if self._reader is None else [(self._reader, None)])]
        for process, oracle in followed:
            for event in process.events(time.monotonic() + HANG_SECONDS_MAX):
                if oracle is not None:
                    oracle.feed(event)
                if event[0] in ("open", "read"):
                    break
            else:
                kind, what = ("error", "ended by itself") if process.ended else ("hang", "hangs")
                raise CampaignError(kind, f"a process {what} while opening:\n{process.error_text()}")

    @contextlib.contextmanager
    def _following(self, writer: Process, oracle: Oracle, death: Death) -> Iterator[None]:
        """Follow the first writer until its time has come, let the disk fail if it is to, mend it at the end."""
        self._live(writer, oracle, death)
        if death.fault is None:
            yield
            return
        count(self._figures.faults, death.fault)
        with self._disk.suffering(death.fault):
            try:
                if death.fault != "power cut":
                    self._live_on(writer, oracle, death.fault_seconds)
                yield
            finally:
                writer.kill()
                if death.fault != "full":
                    self._end_reader()  # it keeps the file system from being unmounted

    def _live(self, writer: Process, oracle: Oracle, death: Death) -> None:
        """Follow the child to its end or to the moment when it is to be killed."""
        hang_s = time.monotonic() + HANG_SECONDS_MAX
        at_once = death.phase == "opening" or death.fault is not None
        until_s = time.monotonic() + death.seconds if at_once else hang_s
        while True:
            for event in writer.events(until_s):
                oracle.feed(event)
                if event[0] == "open" and death.phase == "time":
                    until_s = time.monotonic() + death.seconds
                    break
            else:
                break
        if time.monotonic() >= hang_s:
            raise CampaignError("hang", f"the writer hangs:\n{writer.error_text()}")

    def _live_on(self, writer: Process, oracle: Oracle, seconds: float) -> None:
        """The disk fails: the writer goes on, and answers."""
        started_s = time.monotonic()
        hang_s = started_s + HANG_SECONDS_MAX
        for event in writer.events(hang_s):
            oracle.feed(event)
            if time.monotonic() >= started_s + seconds:
                return
        if time.monotonic() >= hang_s:
            raise CampaignError("hang", f"the writer does not answer on a failing disk:\n{writer.error_text()}")

    def _end_writers(self, writers: list[Process], oracles: list[Oracle], death: Death) -> None:
        """Kill all, hear what they had reported, count."""
        for writer in writers:
            writer.kill()
        for n, (writer, oracle) in enumerate(zip(writers, oracles, strict=True)):
            for event in writer.events(time.monotonic() + HANG_SECONDS_MAX):
                oracle.feed(event)
            self._count(writer, oracle, death.phase if n == 0 else "beside")

    def _count(self, writer: Process, oracle: Oracle, phase: str) -> None:
        code = writer.kill()
        if code == SIGKILLED and not oracle.closed:
            self._figures.kills += 1
            self._figures.kills_beside_reader += self._reader is not None
            self._figures.kills_beside_writers += self._plan.writers > 1
            count(self._figures.kills_by_phase, phase)
        elif oracle.closed:
            self._figures.clean_ends += 1
        else:
            raise CampaignError("error", f"the writer failed by itself with exit code {code}:\n{writer.error_text()}")
        for kind, what in oracle.complaints:
            raise CampaignError(kind, what)
        self._figures.operations += oracle.count
        self._figures.operations_in_doubt += oracle.doubts

    def _check(self, oracles: list[Oracle]) -> None:
        check = RootCheck(
            self._root,
            self._shm_dir,
            self._figures,
            segment_bytes=self._plan.segment_bytes,
            io_backend=self._plan.io_backend,
            disk_bytes=self._plan.disk_bytes,
            keep_checkpoints=self._plan.seed % 2 == 0,
        )
        check.run(oracles, reader_lives=self._reader is not None)
        self._state = check.state

    # -- the reader ----------------------------------------------------------------------------

    def _start_reader(self) -> None:
        arguments = {
            "role": "read",
            "root": str(self._root),
            "shm_dir": str(self._shm_dir),
            "arena": READER_ARENA,
            "seed": self._plan.seed,
            "may_fail": bool(self._plan.faults),
        }
        self._reader = Process(arguments, self._logs / "reader.log")

    def _hear_reader(self) -> None:
        """It must still answer, and have nothing to complain of."""
        assert self._reader is not None
        for event in self._reader.events(time.monotonic() + HANG_SECONDS_MAX):
            self._judge(event)
            if event[0] == "read":
                return
        what = "ended by itself" if self._reader.ended else "hangs"
        raise CampaignError(
            "error" if self._reader.ended else "hang", f"the reader {what}:\n{self._reader.error_text()}"
        )

    def _end_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is None:
            return
        with reader:
            ended = reader.ended
            reader.kill()
            last = [0, 0, 0, 0]
            for event in reader.events(time.monotonic() + HANG_SECONDS_MAX):
                self._judge(event)
                last = event if event[0] == "read" else last
            if ended:
                raise CampaignError("error", f"the reader ended by itself:\n{reader.error_text()}")
            self._figures.reader_reads += last[1]
            self._figures.reader_bytes += last[3]

    def _judge(self, event: list[object]) -> None:
        if event[0] in ("wrong", "damage"):
            raise CampaignError(str(event[0]), str(event[1]))
