"""The simulated world: machines, processes with a store each, one disk, and everything that befalls them.

Damage happens once and stays. All randomness is the world's own generator, drawn in the order of events.

Must not know: what a client does, or which promises there are.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import json
import posixpath
import random
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.io.engine import EngineLimits
from cascade_aio.segments.footer import TRAILER_MAGIC
from cascade_aio.segments.hosts import Host
from cascade_aio.store.repairing import QUARANTINE
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import MemoryDisk
from cascade_aio.testing.simulation.loop import end_tasks
from cascade_aio.testing.simulation.media import Injuries
from cascade_aio.testing.simulation.oracle import BrokenPromise, Life, Oracle
from cascade_aio.testing.simulation.plan import WEATHER, Plan
from cascade_aio.testing.simulation.process import ROOT, Process
from cascade_aio.testing.simulation.storage import SimulatedStorage

WALL_NS = 1_700_000_000_000_000_000
_DAMAGE = re.compile(r" in (\S+?)(?: at offset (\d+))?(?: \(|$|:)")


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Damage that a store has reported."""

    path: str
    offset: int | None
    text: str
    torn: bool = False


class World:
    """One disk and the processes on it."""

    def __init__(self, plan: Plan, loop: asyncio.AbstractEventLoop) -> None:
        self.plan = plan
        self.loop = loop
        self.rng = random.Random(f"world {plan.seed}")
        self.disk = MemoryDisk()
        self.oracle = Oracle(skewed=plan.skewed)
        self.injuries = Injuries()
        self.bad_pages: dict[str, set[int]] = {}
        self.misreads: dict[tuple[str, Life | None], None] = {}
        """Files that a life has read wrongly: once, read again they are right."""
        self.boots = [1] * (max(plan.hosts) + 1)
        self.processes = [Process(self, slot, machine) for slot, machine in enumerate(plan.hosts)]
        for process, skew_s in zip(self.processes, plan.skew_s, strict=True):
            process.clock.offset_s = skew_s
        self.injected: collections.Counter[str] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.counts: collections.Counter[str] = collections.Counter()
        self.reports: dict[Report, None] = {}
        self.missed_after_injury: set[int] = set()
        self.evicted: collections.Counter[str] = collections.Counter()
        """By stores that have ended."""
        self.short_of_space = False
        self.events: list[tuple[Any, ...]] = []
        self._storages = 0
        self._writers: dict[str, dict[Life, None]] = {}
        """By directory: the lives that have written in it."""
        self._last_wall_ns = 0
        self.listeners: list[Callable[[Process, bool], None]] = []

    # -- time, names, the log

    def wall_ns(self) -> int:
        now_ns = WALL_NS + int(self.loop.time() * 1e9)
        self._last_wall_ns = max(now_ns, self._last_wall_ns + 1)
        return self._last_wall_ns

    def host(self, machine: int) -> Host:
        """As processes of this machine see it now; on a disk of its own every lock is seen."""
        return Host(f"machine{machine}", f"boot{self.boots[machine]}", sees_all_locks=not self.plan.shared)

    def log(self, what: str, *details: Any) -> None:
        self.events.append((round(self.loop.time(), 6), what, *details))

    def digest(self) -> str:
        """Of everything that happened, in order."""
        return hashlib.sha256("\n".join(map(repr, self.events)).encode()).hexdigest()

    def new_storage(self, process: Process, limits: EngineLimits) -> SimulatedStorage:
        life = process.life
        assert life is not None

        def unlinked(path: str) -> None:
            if path.endswith(".seg"):
                self.oracle.removed_segments(life)

        self._storages += 1
        return SimulatedStorage(self.disk, limits, process, process, unlinked, self._storages)

    def on_opened(self, process: Process, counts: bool) -> None:
        assert process.life is not None
        self._writers.setdefault(self._directory(process), {})[process.life] = None
        for listener in self.listeners:
            listener(process, counts)

    def met(self, how: str, process: Process, kinds: Iterable[str] = WEATHER) -> None:
        """A fault of this process was met like this: counted for the newest of its faults of these kinds."""
        last = {kind: at for kind, at in process.last_fault_s.items() if kind in kinds}
        self.outcomes[f"{max(last, key=lambda kind: last[kind], default='none')}: {how}"] += 1

    def met_damage(self) -> None:
        """At the end: of each record that the medium has damaged, whether its damage was ever reported."""
        for injury in self.injuries.found:
            places = [report.offset for report in self.reports if report.path == injury.path]
            told = any(place is None or injury.start <= place < injury.end for place in places)
            self.outcomes[f"{injury.what}: {'record reported' if told else 'record not met again'}"] += 1

    # -- what stores say of themselves

    def gather_reports(self, store: Store) -> None:
        """The end of a store, whatever kind: what it has reported and evicted."""
        statistics = store.statistics()
        disk = statistics["disk"]
        self.evicted.update({what: disk[f"evicted_{what}"] for what in ("blocks", "names")})
        for text in statistics["damage"]:
            self.note_report(text)
        for torn in disk["recovery"]["torn"]:
            self.reports.setdefault(Report(torn["path"], torn["offset"], torn["reason"], torn=True))

    def evicted_so_far(self, what: Literal["blocks", "names"] = "blocks") -> int:
        """``names``: of blocks that stayed."""
        living = (process.store for process in self.processes if process.store is not None)
        return self.evicted[what] + sum(int(store.statistics()["disk"][f"evicted_{what}"]) for store in living)

    def note_report(self, text: str) -> None:
        found = _DAMAGE.search(text)
        if found is None:
            raise BrokenPromise(2, f"a report of damage without path: {text}")
        self.reports.setdefault(Report(found[1], None if found[2] is None else int(found[2]), text))

    def was_misread(self, path: str) -> bool:
        """Whether a read of this file has given wrong bytes."""
        return any(path == other for other, _ in self.misreads)

    def gather_quarantine(self) -> None:
        """What repairs have set aside, also those that were cut short: each has said what it is and why."""
        for path, inode in self.disk.files.items():
            if path.startswith(f"{ROOT}/{QUARANTINE}/") and path.endswith(".json"):
                self.note_report(json.loads(inode.read(0, inode.size))["reason"])

    # -- what befalls it

    def hurt(self, path: str, what: str, offset: int, nbytes: int) -> None:
        """The medium was damaged there just now."""
        hit = self.injuries.add(self.disk, what, path, offset, nbytes)
        for injury in hit:
            self.oracle.doubt_deletions(injury.deletions)
        if path.endswith(".seg") and not self._still_sealed(path, offset + nbytes):
            self.oracle.damaged(self._writers.get(posixpath.dirname(path), ()))
        self.log("damaged", what, path[-14:], offset, nbytes, [sorted(injury.blocks) for injury in hit])

    def written(self, path: str, offset: int, nbytes: int) -> None:
        """What was damaged there before may get its header, and so its name, only now."""
        for injury in self.injuries.written(self.disk, path, offset, nbytes):
            self.oracle.doubt_deletions(injury.deletions)
            self.log("had damaged", injury.what, path[-14:], injury.start, sorted(injury.blocks))

    def _still_sealed(self, path: str, end: int) -> bool:
        """Whether a segment that was damaged up to ``end`` has its trailer: whoever looks at it stops at no hole."""
        inode = self.disk.files.get(path)
        if inode is None or end > inode.size - PAGE_BYTES:
            return False
        return inode.read(inode.size - PAGE_BYTES, len(TRAILER_MAGIC)) == TRAILER_MAGIC

    def rot(self, what: str, choice: int) -> None:
        """Damage something that is stored: a page of a segment, seldom of a checkpoint."""
        paths = sorted(
            path for path, inode in self.disk.files.items() if path.endswith((".seg", "checkpoint")) and inode.pages
        )
        if not paths:
            return
        path = paths[choice % len(paths)]
        inode = self.disk.files[path]
        limit = -(-inode.size // PAGE_BYTES)
        pages = sorted(page for page in inode.pages if page < limit)
        if not pages:
            return
        page = pages[(choice >> 8) % len(pages)]
        if what == "bad-sector":
            if path.endswith(".seg"):
                self.bad_pages.setdefault(path, set()).add(page)
                self.injected[what] += 1
                self.hurt(path, what, page * PAGE_BYTES, PAGE_BYTES)
            return
        data = bytearray(inode.read(page * PAGE_BYTES, PAGE_BYTES))
        data[(choice >> 16) % len(data)] ^= 1 << (choice % 8)
        self.injected[what] += 1
        inode.rot(page * PAGE_BYTES, bytes(data))
        self.hurt(path, what, page * PAGE_BYTES, PAGE_BYTES)

    async def lose_power(self, machines: set[int] | None = None) -> list[Process]:
        """Of all machines, or of some: their processes end, and what was not synced is lost in part."""
        struck = [process for process in self.processes if machines is None or process.machine in machines]
        directories = [self._directory(process) for process in struck]
        lives = [process.stop() for process in struck]
        seed = self.rng.randrange(1 << 30)
        if machines is None:
            self.disk = self.disk.crash(seed, torn_bytes=self.plan.torn_bytes)
        else:
            for directory in sorted(set(filter(None, directories))):
                self.disk.crash_directory(directory, seed, torn_bytes=self.plan.torn_bytes)
        for machine in range(len(self.boots)):
            if machines is None or machine in machines:
                self.boots[machine] += 1
        for life in lives:
            if life is not None:
                await end_tasks(life)
        return struck

    def _directory(self, process: Process) -> str:
        """Where it writes: the directory whose lock it holds."""
        locks = [] if process.storage is None else process.storage._locks
        held = [lock.path for lock in locks if lock.path in self.disk.locked and lock.path.endswith("/lock")]
        return held[0].removesuffix("/lock") if held else ""

    async def kill(self, process: Process) -> None:
        """SIGKILL: the machine, and what it had taken from the process, lives on."""
        life = process.stop()
        if life is not None:
            await end_tasks(life)

    def heal(self) -> None:
        """Fine weather from now on, on a disk that reads and has room."""
        self.bad_pages.clear()
        self.disk.capacity_bytes = 1 << 50
        self.short_of_space = False
        for process in self.processes:
            process.weather.clear()
            process.next_lie = ""
