"""A simulated process: a place for a store, and what decides about its requests.

The store in it is opened, closed, killed and opened again; each opening is a ``Life`` of the oracle. It is ``Medium``
and ``Calls`` of its storage: weather comes and goes. All randomness is the world's own generator.

Must not know: what a client does, or which promises there are, but for what opening and repairing leave behind.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import errno
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from cascade_aio.abc.storage import PAGE_BYTES, Platform
from cascade_aio.config import make_config
from cascade_aio.errors import CascadeError, TierStalledError
from cascade_aio.io.engine import EngineLimits
from cascade_aio.io.transfer import Kind
from cascade_aio.segments.hosts import Host
from cascade_aio.store.opening import open_with
from cascade_aio.store.repairing import RepairReport, repair_root
from cascade_aio.store.store import Store
from cascade_aio.testing.memory import MemoryEngine, MemoryFile
from cascade_aio.testing.simulation.contents import number_of
from cascade_aio.testing.simulation.device import Treatment
from cascade_aio.testing.simulation.loop import OWNER, tasks_of
from cascade_aio.testing.simulation.oracle import BrokenPromise, Life
from cascade_aio.testing.simulation.plan import WEATHER
from cascade_aio.testing.simulation.storage import SimulatedStorage
from cascade_aio.tiers.arena import PrivateArena

if TYPE_CHECKING:
    from cascade_aio.testing.simulation.world import World

ROOT = "/kv"

HOST: contextvars.ContextVar[Host | None] = contextvars.ContextVar("simulated-host", default=None)
"""Where code runs; see ``Host``."""

LATENCIES_S = (0.0001, 0.0003, 0.001, 0.004)
"""Of a request in fine weather."""
SLOW_S_MAX = 2.0
STUCK_S = (20.0, 90.0)
CALL_LATENCIES_S = (0.0, 0.0, 0.0, 0.0005)
OPEN_ATTEMPTS_MAX = 40
"""A store that could not be opened is tried again every second; weather does not last that long."""

LIMITS = EngineLimits()
"""Of a repair."""


class Clock:
    """A machine's time: never twice the same, ``offset_s`` away from the world's."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.offset_s = 0.0

    def wall_ns(self) -> int:
        return self._world.wall_ns() + int(self.offset_s * 1e9)

    def monotonic_s(self) -> float:
        return self._world.loop.time()


class Process:
    """See the module's docstring."""

    def __init__(self, world: World, slot: int, machine: int) -> None:
        self.world = world
        self.slot = slot
        self.machine = machine
        self.clock = Clock(world)
        self.life: Life | None = None
        self.store: Store | None = None
        self.storage: SimulatedStorage | None = None
        self.opening = False
        self.closing = False
        self.weather: dict[str, float] = {}
        self.last_fault_s: dict[str, float] = {}
        self.next_lie = ""
        self.held: list[Any] = []
        self.operations: dict[asyncio.Task[Any], None] = {}
        self.pins = 0
        """Leases that clients of it hold or are about to get."""
        self.read_faults = 0
        self.write_faults = 0
        self.write_faults_before_opening = 0
        self.misread = False
        """A read has given wrong bytes to the store that is open now."""
        self.index_was_full = False

    # -- what happens to its requests

    def treat(self, kind: Kind, file: MemoryFile, offset: int, nbytes: int) -> Treatment:
        rng, weather = self.world.rng, self.weather
        treatment = Treatment(rng.choice(LATENCIES_S))
        bad = self.world.bad_pages.get(file.path)
        if bad is not None and kind is not Kind.SYNC:
            pages = range(offset // PAGE_BYTES, -(-(offset + nbytes) // PAGE_BYTES))
            if kind is Kind.WRITE:
                bad.difference_update(pages)
            elif not bad.isdisjoint(pages):
                treatment.code = self._fault("bad-sector", errno.EIO)
                return treatment
        if weather:
            self._under_weather(kind, file.path, nbytes, treatment)
        if self.next_lie and kind is Kind.WRITE and file.path.endswith(".seg") and not treatment.code and offset:
            if self.next_lie == "lost":
                treatment.lost = True
            else:
                treatment.misdirected_to = rng.randrange(1, max(2, file.inode.size // PAGE_BYTES)) * PAGE_BYTES
            self._fault(self.next_lie, 0)
            self.next_lie = ""
        return treatment

    def _under_weather(self, kind: Kind, path: str, nbytes: int, treatment: Treatment) -> None:
        rng = self.world.rng
        if self._raining("slow"):
            self._fault("slow", 0)
            treatment.delay_s = rng.random() * SLOW_S_MAX
        if self._raining("stuck"):
            self._fault("stuck", 0)
            treatment.delay_s = rng.uniform(*STUCK_S)
            treatment.stubborn = True
        if kind is Kind.SYNC:
            if self._raining("eio-sync"):
                treatment.code = self._fault("eio-sync", errno.EIO)
            return
        if self._raining("short") and nbytes > PAGE_BYTES:
            self._fault("short", 0)
            treatment.move_bytes = rng.randrange(1, nbytes // PAGE_BYTES) * PAGE_BYTES
        if self._raining("again"):
            treatment.code = self._fault("again", rng.choice((errno.EAGAIN, errno.EINTR)))
        if kind is Kind.READ and (path, self.life) not in self.world.misreads and self._raining("misread"):
            self.world.misreads[path, self.life] = None
            self.misread = True
            treatment.flipped_bit = rng.randrange(8 * nbytes)
            self._fault("misread", 0)
        if kind is Kind.READ and self._raining("eio-read"):
            treatment.code = self._fault("eio-read", errno.EIO)
        if kind is Kind.WRITE and self._raining("eio-write"):
            treatment.code = self._fault("eio-write", errno.EIO)

    def treat_call(self, name: str, path: str) -> tuple[float, int]:
        code = 0
        if self.weather and name != "step" and self._raining("eio-call"):
            code = self._fault("eio-call", errno.EIO)
        return self.world.rng.choice(CALL_LATENCIES_S), code

    def hurt(self, path: str, what: str, offset: int, nbytes: int) -> None:
        self.world.hurt(path, what, offset, nbytes)

    def written(self, path: str, offset: int, nbytes: int) -> None:
        self.world.written(path, offset, nbytes)

    def _raining(self, kind: str) -> bool:
        until_s = self.weather.get(kind)
        if until_s is None:
            return False
        if self.world.loop.time() >= until_s:
            del self.weather[kind]
            return False
        return self.world.rng.random() < WEATHER[kind]

    def _fault(self, kind: str, code: int) -> int:
        world = self.world
        world.injected[kind] += 1
        self.last_fault_s[kind] = world.loop.time()
        self.read_faults += kind in ("eio-read", "eio-call", "bad-sector", "misread")
        self.write_faults += kind in ("eio-write", "eio-sync", "eio-call")
        return code

    def recent(self, *kinds: str, within_s: float) -> bool:
        """Whether one of these faults hit it within so many seconds."""
        now_s = self.world.loop.time()
        return any(now_s - self.last_fault_s.get(kind, -1e9) <= within_s for kind in kinds)

    # -- life and death

    @property
    def is_open(self) -> bool:
        return self.store is not None and not self.closing

    async def open(self, *, give_up_s: float | None = None) -> bool:
        """Open a store in it; ``False`` if the process was killed meanwhile or weather kept it from opening.

        ``give_up_s``: the first attempt is cancelled after so long.
        """
        if self.store is not None or self.opening:
            return False
        self.opening = True
        try:
            for _ in range(OPEN_ATTEMPTS_MAX):
                outcome, give_up_s = await self._open_once(give_up_s), None
                if outcome is not None:
                    return outcome
                await asyncio.sleep(1.0)
        finally:
            self.opening = False
        raise BrokenPromise(5, f"process {self.slot} could not be opened in {OPEN_ATTEMPTS_MAX} attempts")

    async def _open_once(self, give_up_s: float | None) -> bool | None:
        """``None``: failed for a reason that may pass."""
        world = self.world
        settings = world.plan.settings
        config = make_config(ROOT, **settings)
        life = self.life = world.oracle.born(self.slot, budget=config.disk_bytes is not None)
        self.misread = False
        limits = EngineLimits(
            request_bytes_max=config.request_bytes_max,
            requests_in_flight_max=config.requests_in_flight_max,
            bytes_in_flight_max=config.bytes_in_flight_max,
        )
        storage = self.storage = world.new_storage(self, limits)
        platform = Platform(storage, MemoryEngine(), self.clock)
        token, faults = world.oracle.look_begins(life), self.read_faults
        self.write_faults_before_opening = self.write_faults
        world.log("open", self.slot, life.number)
        task = self.spawn(open_with(config, platform=platform, arena=PrivateArena(config.shm_bytes)))
        await asyncio.wait((task,), timeout=give_up_s)
        given_up = not task.done()
        if given_up:
            task.cancel()
            await asyncio.wait((task,))
        if life.ended:
            return False
        if not task.cancelled() and task.exception() is None:
            self.store = task.result()
            counts = world.oracle.look_ends(life, token, counts=faults == self.read_faults)
            world.log("opened", self.slot, life.number, len(self.store), counts)
            world.on_opened(self, counts)
            return True
        error: BaseException = asyncio.CancelledError() if task.cancelled() else task.exception()  # type: ignore[assignment]
        world.oracle.look_ends(life, token, counts=False)
        world.oracle.died(life)
        world.log("not opened", self.slot, life.number, type(error).__name__)
        self.check_nothing_left(storage, life)
        if given_up and task.cancelled():
            return None
        trouble = faults != self.read_faults or self.recent(*WEATHER, within_s=5.0) or world.short_of_space
        trouble |= isinstance(error, TierStalledError) and self.recent("stuck", within_s=STUCK_S[1] + 1)
        if not isinstance(error, OSError | CascadeError) or not trouble:
            raise BrokenPromise(2, f"process {self.slot} cannot open its root: {error!r}") from error
        world.met("error to the caller", self)
        return None

    async def repair(self, *, give_up_s: float | None) -> None:
        """Repair the root in this process, which has no store open; ``give_up_s``: cancelled after so long."""
        world = self.world
        if self.store is not None or self.opening:
            return
        self.opening = True
        config = dataclasses.replace(make_config(ROOT, **world.plan.settings), disk_bytes=None)
        life = self.life = world.oracle.born(self.slot, budget=False)
        self.misread = False
        storages: list[SimulatedStorage] = []

        def make_platform() -> Platform:
            self.storage = world.new_storage(self, LIMITS)
            storages.append(self.storage)
            return Platform(self.storage, MemoryEngine(), self.clock)

        make_platform()
        world.log("repair", self.slot, life.number)
        faults = self._faults()
        task = self.spawn(repair_root(config, make_platform=make_platform))
        await asyncio.wait((task,), timeout=give_up_s)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
        self.opening = False
        if life.ended:
            return
        world.oracle.died(life)
        for storage in storages[1:]:
            self.check_nothing_left(storage, life)
        if task.cancelled():
            world.log("repair cut short", self.slot)
        elif (error := task.exception()) is not None:
            trouble = faults != self._faults() or self.recent(*WEATHER, within_s=STUCK_S[1])
            if not isinstance(error, OSError | CascadeError) or not (trouble or world.short_of_space):
                raise BrokenPromise(2, f"process {self.slot} cannot repair its root: {error!r}") from error
            world.met("error to the caller", self)
        else:
            world.log("repaired", self.slot, *self._judged(task.result(), faults))

    def _faults(self) -> tuple[int, ...]:
        """How often reads and writes of this process failed, and the medium was damaged (a write that never came)."""
        return self.read_faults, self.write_faults, self.world.injuries.count

    def _judged(self, report: RepairReport, faults: tuple[int, ...]) -> tuple[int, ...]:
        """What it reports as lost was damaged, and where nobody was in its way nothing wrong is left."""
        world = self.world
        numbers = number_of()
        for error in [*report.before.damage, *report.remaining.damage]:
            world.note_report(str(error))
        for lost in report.lost_blocks:
            number = numbers[bytes.fromhex(lost.block_id)]
            if not world.injuries.of_block(number) and not self.misread:
                raise BrokenPromise(2, f"repair says that block {number} is lost, which nothing has damaged")
            world.oracle.give_up(number)
        alone = all(other.store is None and not other.opening for other in world.processes)
        fine = faults == self._faults() and "no-space" not in world.plan.faults
        left = [line for line in report.left if not self._lost_twice(line)]
        if alone and fine and not world.plan.shared and (left or not report.remaining.clean):
            raise BrokenPromise(2, f"repaired, and not clean: {report.left}, {report.remaining}")
        return len(report.quarantined), len(report.lost_blocks), len(report.left)

    def _lost_twice(self, line: str) -> bool:
        """Whether a repair says of a damaged segment that its record and the copy in its footer are both gone."""
        path, _, what = line.partition(": ")
        return path in self.world.injuries.paths and "the footer is damaged, too" in what

    def check_nothing_left(self, storage: SimulatedStorage, life: Life) -> None:
        """Promise 4, after a store was closed, or not opened after all."""
        if storage.open_files:
            raise BrokenPromise(4, f"open files are left: {[file.path for file in storage.open_files]}")
        if held := [lock.path for lock in storage._locks if lock.path in self.world.disk.locked and lock.held]:
            raise BrokenPromise(4, f"locks are left: {held}")
        if left := tasks_of(life):
            raise BrokenPromise(4, f"tasks are left: {left}")
        engine = storage.engine
        if engine.statistics()["requests_in_flight"] or engine.statistics()["queued"]:
            raise BrokenPromise(4, f"requests are left: {engine.statistics()}")
        limits = engine.limits
        if engine.requests_in_flight_worst > limits.requests_in_flight_max:
            raise BrokenPromise(4, f"{engine.requests_in_flight_worst} requests were in flight at once")
        if engine.bytes_in_flight_worst > max(limits.bytes_in_flight_max, limits.request_bytes_max):
            raise BrokenPromise(4, f"{engine.bytes_in_flight_worst} bytes were in flight at once")

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``work`` in this process: it dies with it."""
        context = contextvars.copy_context()
        context.run(OWNER.set, self.life)
        context.run(HOST.set, self.world.host(self.machine))
        return self.world.loop.create_task(work, context=context)

    def stop(self) -> Life | None:
        """The process is dead from now on; its tasks still have to be ended."""
        life, store = self.life, self.store
        if life is None or life.ended:
            return None
        self.world.log("dies", self.slot, life.number)
        if store is not None:
            self.world.gather_reports(store)
        assert self.storage is not None
        self.storage.die(self.world.rng.random())
        self.world.oracle.died(life)
        self.store = None
        self.closing = False
        for block in self.held:
            if not block.released:
                block.release()
        self.held.clear()
        self.pins = 0
        return life
