"""One run: a plan carried out, judged, and brought to an end at which nothing is left.

``simulate(seed)`` never raises for what the store does: it returns an ``Outcome``. It changes the process for the
time of a run (where a store is, what its ids are, how warnings are treated) and puts everything back.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import gc
import logging
import random
import sys
import traceback
import unittest.mock
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import async_solipsism

from cascade_aio import config
from cascade_aio.errors import BrokenTierError, CascadeError, TierFullError
from cascade_aio.segments.hosts import Host
from cascade_aio.store import opening
from cascade_aio.store.merging import PROVISIONAL
from cascade_aio.store.store import Store
from cascade_aio.testing.simulation.clients import OPERATION_S_MAX, Client
from cascade_aio.testing.simulation.contents import content, name_key
from cascade_aio.testing.simulation.judging import WEATHER_S_MAX
from cascade_aio.testing.simulation.loop import LivelockError, SimulationLoop, end_tasks, tasks_of
from cascade_aio.testing.simulation.oracle import BrokenPromise
from cascade_aio.testing.simulation.plan import DAMAGE, WEATHER, Plan, Step, make_plan
from cascade_aio.testing.simulation.process import HOST, ROOT, Process
from cascade_aio.testing.simulation.world import World
from cascade_aio.testing.world import check_idle, check_invariants, settle

QUIET_S = 200.0
"""After this much virtual time without a call, nothing is under way any more."""

GIVE_UP_OPENING_S_MAX = 0.05
GIVE_UP_REPAIR_S_MAX = 0.2

RUN_S_MAX = 20_000.0
"""Virtual seconds of a run."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What came of one run. ``failure`` is ``None`` if every promise was kept."""

    seed: int
    failure: str | None
    promise: int
    steps: int
    digest: str
    events: list[tuple[Any, ...]]
    counts: collections.Counter[str]
    injected: collections.Counter[str]
    outcomes: collections.Counter[str]
    virtual_s: float
    detail: str = ""

    @property
    def command(self) -> str:
        return f"python -m cascade_aio.testing.simulation replay {self.seed}"


def simulate(seed: int, *, steps_max: int | None = None) -> Outcome:
    """Run ``seed``, or the first ``steps_max`` steps of it."""
    plan = make_plan(seed)
    if steps_max is not None:
        plan = dataclasses.replace(plan, steps=plan.steps[:steps_max])
    loop = SimulationLoop()
    world = World(plan, loop)
    failure: BaseException | None = None
    unraisable: list[str] = []
    with _isolated(seed, loop, unraisable):
        try:
            loop.run_until_complete(_Run(world).run())
        except Exception as error:
            failure = _first(error)
        finally:
            _clear_up(loop, world)
    world.met_damage()
    if failure is None and unraisable:
        failure = BrokenPromise(4, f"something was left behind: {unraisable[0]}")
    return _outcome(plan, world, loop, failure)


def _host_of_context(root: str) -> Host | None:
    """In place of ``this_host``: where the process runs that opens its store."""
    return HOST.get()


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _outcome(plan: Plan, world: World, loop: SimulationLoop, failure: BaseException | None) -> Outcome:
    promise = 0
    detail = ""
    if isinstance(failure, BrokenPromise):
        promise = failure.promise
    elif isinstance(failure, LivelockError | async_solipsism.SleepForeverError):
        promise = 5
    if failure is not None:
        detail = "".join(traceback.format_exception(failure))
        failure.__traceback__ = None
    return Outcome(
        plan.seed,
        None if failure is None else (str(failure) if promise else repr(failure)),
        promise,
        len(plan.steps),
        world.digest(),
        world.events,
        world.counts,
        world.injected,
        world.outcomes,
        loop.time(),
        detail,
    )


@contextlib.contextmanager
def _isolated(seed: int, loop: SimulationLoop, unraisable: list[str]) -> Iterator[None]:
    """Identities from the seed, hosts from the world, nothing collected or logged behind our back."""
    rng = random.Random(f"identities {seed}")

    def new_uuid() -> uuid.UUID:
        return uuid.UUID(int=rng.getrandbits(128), version=4)

    loop.set_exception_handler(lambda _, context: unraisable.append(str(context.get("message"))))
    hook, sys.unraisablehook = sys.unraisablehook, lambda args: unraisable.append(repr(args.exc_value))
    collecting = gc.isenabled()
    gc.disable()
    logger = logging.getLogger("cascade_aio")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    asyncio.set_event_loop(loop)
    try:
        with (
            warnings.catch_warnings(),
            unittest.mock.patch("uuid.uuid4", new_uuid),
            unittest.mock.patch.object(opening, "this_host", _host_of_context),
            unittest.mock.patch.dict(config._RANGES, index_blocks_max=config._Range(1, 1 << 30)),
        ):
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("ignore", ResourceWarning)
            yield
            gc.collect()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        logger.setLevel(level)
        sys.unraisablehook = hook
        if collecting:
            gc.enable()


def _clear_up(loop: SimulationLoop, world: World) -> None:
    """Whatever a failed run left: nothing of it may show up in the next one."""

    async def end_all() -> None:
        lives = [process.stop() for process in world.processes]
        for life in [*lives, *world.oracle.lives, None]:
            await end_tasks(life)

    loop.turns = 0
    try:
        loop.run_until_complete(end_all())
    except (LivelockError, async_solipsism.SleepForeverError, RuntimeError) as error:
        world.log("not cleared up", repr(error))


class _Run:
    """The course of one run."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._oracle = world.oracle
        self._plan = world.plan
        self._clients = [Client(world, number, self._act) for number in range(world.plan.clients)]
        self._judge = Client(world, -1, self._act)
        self._phase = "under way"
        self.stuck: list[str] = []
        world.listeners.append(self._opened)

    async def run(self) -> None:
        try:
            async with asyncio.timeout(RUN_S_MAX):
                try:
                    await self._course()
                except asyncio.CancelledError:
                    self.stuck = [repr(task) for life in self._oracle.lives for task in tasks_of(life)]
                    raise
        except TimeoutError:
            doing = [client.doing for client in self._clients]
            tasks = "; ".join(f"{task.get_name()} {task.get_stack(limit=2)}" for task in tasks_of(None))
            raise BrokenPromise(5, f"after {RUN_S_MAX} s: {doing}, {self._phase}; {self.stuck} {tasks}") from None

    async def _course(self) -> None:
        await asyncio.gather(*(process.open() for process in self._world.processes))
        queues: list[list[Step]] = [[] for _ in self._clients]
        for step in self._plan.steps:
            queues[step.client].append(step)
        async with asyncio.TaskGroup() as tasks:
            for client, queue in zip(self._clients, queues, strict=True):
                tasks.create_task(client.run(queue))
        await self._end()

    def _opened(self, process: Process, counts: bool) -> None:
        life, store = process.life, process.store
        assert life is not None
        assert store is not None
        self._world.counts["opened"] += 1
        made_durable = counts and process.write_faults == process.write_faults_before_opening
        made_durable &= not self._judge.knows_less(process)  # what it has no room for is there, and may be seen later
        if made_durable and self._plan.single and len(self._oracle.lives) > 1:
            present = {block for block in self._oracle.puts if content(block).block_id in store}
            self._judge.look_at_all(process, life, store)
            self._oracle.settle(life, present)
        else:
            self._judge.look_at_all(process, life, store)

    # -- what befalls the world ----------------------------------------------------------------

    async def _act(self, step: Step) -> None:
        world, process = self._world, self._world.processes[step.slot]
        world.log(step.kind, step.number)
        world.counts[step.kind] += 1
        if step.kind in DAMAGE:
            if step.kind in ("lost", "misdirected"):
                process.next_lie = step.kind
            else:
                world.rot(step.kind, step.choice)
        elif step.kind in WEATHER:
            duration_s = 0.1 + step.amount * (WEATHER_S_MAX - 0.1)
            if step.kind == "no-space":
                await self._run_short_of_space(duration_s)
            else:
                process.weather[step.kind] = world.loop.time() + duration_s
        elif step.kind == "clock":
            process.clock.offset_s += step.amount * 20 - 10
        elif step.kind == "reopen":
            await self._close(process, quietly=step.choice % 3 > 0)
            await process.open()
        elif step.kind == "reopen-cancelled":
            await self._close(process, quietly=step.choice % 2 > 0, give_up_s=step.choice % 50 / 1000)
            await process.open(give_up_s=step.amount * GIVE_UP_OPENING_S_MAX)
        elif step.kind == "repair":
            await self._close(process, quietly=False)
            await process.repair(give_up_s=step.amount * GIVE_UP_REPAIR_S_MAX if step.choice % 3 == 0 else None)
            await process.open()
        elif step.kind == "kill":
            await world.kill(process)
            await self._restart([process], step)
        elif step.kind == "power-loss":
            await self._restart(await world.lose_power(), step)
        else:
            assert step.kind == "host-loss", step.kind
            await self._restart(await world.lose_power({process.machine}), step)

    async def _restart(self, processes: list[Process], step: Step) -> None:
        await asyncio.sleep(step.amount * 0.5 if step.choice % 2 else 0)
        await asyncio.gather(*(process.open() for process in processes))

    async def _run_short_of_space(self, duration_s: float) -> None:
        world, disk = self._world, self._world.disk
        world.injected["no-space"] += 1
        world.short_of_space = True
        disk.capacity_bytes = disk.allocated_bytes
        await asyncio.sleep(duration_s * 5)
        world.disk.capacity_bytes = 1 << 50
        world.short_of_space = False
        for process in world.processes:
            process.last_fault_s["no-space"] = world.loop.time()

    async def _close(self, process: Process, *, quietly: bool, give_up_s: float | None = None) -> None:
        """``quietly``: after all calls have ended. Otherwise in the midst of them. ``give_up_s``: cancelled then, which
        closes it all the same."""
        world, life, store = self._world, process.life, process.store
        if life is None or store is None or process.closing:
            return
        if quietly:
            await self._quiet(process, store)
            if process.store is not store or process.closing:
                return
        while process.held:
            self._judge.let_go(process)
        process.closing = True
        began = self._oracle.now()
        world.log("closing", process.slot, life.number)
        task = process.spawn(store.aclose())
        await asyncio.wait((task,), timeout=give_up_s)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
        if life.ended:
            return
        process.closing = False
        process.store = None
        world.gather_reports(store)
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            world.log("close cut short", process.slot)  # whether all became durable is not told
        elif error is None:
            self._oracle.flushed(life, began)
        elif not isinstance(error, OSError | TierFullError | BrokenTierError) or not (
            process.write_faults or process.last_fault_s or world.short_of_space
        ):
            raise BrokenPromise(2, f"closing process {process.slot} failed: {error!r}") from error
        else:
            world.met("error to the caller", process)
        self._oracle.died(life)
        world.log("closed", process.slot, life.number, type(error).__name__)
        storage = process.storage
        assert storage is not None
        if process.operations:
            await asyncio.wait(list(process.operations), timeout=OPERATION_S_MAX)
        process.check_nothing_left(storage, life)

    async def _quiet(self, process: Process, store: Store) -> None:
        """Wait until no call is under way, then see that nothing is held."""
        life = process.life
        assert life is not None
        while process.held:
            self._judge.let_go(process)
        check_invariants(store)
        if process.weather or process.write_faults or self._world.short_of_space or process.pins:
            return
        try:
            await process.spawn(store.flush())
        except (CascadeError, asyncio.CancelledError):
            return
        await settle()

    # -- the end -------------------------------------------------------------------------------

    async def _end(self) -> None:
        """Close or crash everything, heal the world, open once more and read everything that is promised."""
        world = self._world
        self._phase = "ending"
        world.heal()
        if self._plan.clean_end:
            for process in world.processes:
                await self._close(process, quietly=True)
        await world.lose_power()
        process = world.processes[0]
        await process.open()
        life, store = process.life, process.store
        assert life is not None
        assert store is not None
        await self._read_everything(process)
        report = await process.spawn(store.verify())
        for error in report.damage:
            world.note_report(str(error))
        self._check_reports()
        await process.spawn(store.flush())
        await asyncio.sleep(QUIET_S)
        await settle()
        check_idle(store)
        self._check_budget(process, store)
        await self._check_reopening(process, store)
        self._check_files(process)
        if tasks := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            others = [task for task in tasks if getattr(task, "owner", None) is not None]
            if others:
                raise BrokenPromise(4, f"tasks are left at the end: {others}")

    async def _check_reopening(self, process: Process, store: Store) -> None:
        """Promises 2 and 3: with all at rest, the next opening finds the blocks and names that this one had.

        Not with a budget: what was evicted may come back.
        """
        before = self._known(store)
        doubtful = self._judge.knows_less(process) or bool(self._world.injuries.found)
        hearsay = store._context.merger.hearsay  # names that another writer may never have made durable
        await self._close(process, quietly=False)
        await process.open()
        assert process.store is not None
        doubtful |= self._judge.knows_less(process)
        after = self._known(process.store)
        pairs = {what: (before.get(what), after.get(what)) for what in before.keys() | after.keys()}
        different = {what: pair for what, pair in pairs.items() if pair[0] != pair[1] and b"" not in pair}
        if hearsay:
            different = {what: pair for what, pair in different.items() if what[1] is None}
        if different and not doubtful and not self._world.evicted_so_far():
            raise BrokenPromise(2, f"reopened, it knows {different}")
        await self._close(process, quietly=False)

    def _known(self, store: Store) -> dict[tuple[int, int | None], bytes]:
        """By block and name: what the store finds under it, as its index says; nothing for what may be torn."""
        index = store._context.catalog.index
        found: dict[tuple[int, int | None], bytes] = {}
        for block, puts in self._oracle.puts.items():
            for name in {None, *(put.name for put in puts)}:
                key = content(block).block_id if name is None else name_key(block, name)
                row = index.find(key) if name is None else index.find_prefix(key)
                if row >= 0:
                    found[block, name] = b"" if index.flags(row) & PROVISIONAL else bytes(index.block_id(row))
        return found

    async def _read_everything(self, process: Process) -> None:
        for block in sorted(self._oracle.puts):
            step = Step(-1, -1, process.slot, "get", block=block)
            await self._judge.run([step])

    def _check_reports(self) -> None:
        """Promise 2: what the medium took was reported, and nothing was reported without damage."""
        world = self._world
        world.gather_quarantine()
        for report in world.reports:
            known = report.path in world.injuries.paths or world.was_misread(report.path)
            if not known and "unreadable" not in report.text and not report.torn:
                raise BrokenPromise(2, f"damage was reported where there is none: {report.text} ({report.path})")
        for block in sorted(world.missed_after_injury):
            injuries = [injury for injury in world.injuries.of_block(block) if injury.promised]
            if not injuries:
                continue
            if not any(
                report.path == injury.path and world.injuries.reaches(report.offset, injury)
                for report in world.reports
                for injury in injuries
            ):
                if self._oracle.evictions_seen < world.evicted_so_far():
                    self._oracle.evictions_seen += 1
                    continue
                raise BrokenPromise(2, f"block {block} fell to {injuries[0]} and nobody has reported it")

    def _check_budget(self, process: Process, store: Store) -> None:
        """Promise 4: this writer's files, as they are on disk, fit its budget."""
        budget = self._plan.settings["disk_bytes"]
        if budget is None:
            return
        used = store.statistics()["disk"]["used_bytes"]
        if used > budget:
            raise BrokenPromise(4, f"{used} bytes of segments, budget {budget}")

    def _check_files(self, process: Process) -> None:
        """Promise 4: no temporary files where a store has been closed."""
        disk, storage = self._world.disk, process.storage
        assert storage is not None
        for lock in storage._locks:
            directory = lock.path.rsplit("/", 1)[0]
            left = [path for path in disk.files if path.startswith(directory + "/.") and path.endswith(".tmp")]
            if left and directory != ROOT:
                raise BrokenPromise(4, f"temporary files are left: {left}")
