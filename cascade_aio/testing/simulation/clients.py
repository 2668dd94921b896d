"""What clients do with a store, and whether what comes of it is what was promised.

Each operation runs as a task of the process whose store it uses, so it dies with it. ``Client`` asks the oracle
before and after: a promise is broken only if it held the whole time. Errors are allowed by cause:

* ``OSError``: a read, call or sync of this process failed, or met a bad sector, within the time a request may take.
* ``TierFullError``: writes of this process fail, are slow or find no room; or leases hold the arena, which is small;
  or segments are kept aside because of damage, which only ``repair`` gives back, and count in a budget that is small.
* ``TierStalledError``: a request of this process is stuck, or was until just now.
* ``BrokenTierError``: writes or syncs of this process failed.
* ``CorruptionError``: names a file and place that the medium has damaged, and only there.
* ``ClosedError``: the store was being closed.
* A miss of a block read later than ``read_seconds_max``: reads are slow or stuck, or the arena is held.
* Everything else, and every operation that has not ended after ``OPERATION_S_MAX``, is a broken promise.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

from cascade_aio.errors import (
    BlockNotFoundError,
    BrokenTierError,
    ClosedError,
    CorruptionError,
    TierFullError,
    TierStalledError,
)
from cascade_aio.model import PrefixKey
from cascade_aio.store.block import Block
from cascade_aio.store.store import Store
from cascade_aio.testing.simulation.contents import Content, content, name_key, number_of
from cascade_aio.testing.simulation.oracle import BrokenPromise, Life, Put
from cascade_aio.testing.simulation.plan import Step
from cascade_aio.testing.simulation.world import STUCK_S, Process, Report, World

OPERATION_S_MAX = 4 * STUCK_S[1]
"""Virtual seconds: a few stuck requests one after the other."""

READ_GRACE_S = 0.5
"""A get ends so long after its deadline at the latest."""

WEATHER_S_MAX = 2.0
"""A fault that comes and goes lasts at most so long."""

TROUBLE_S = 30.0
"""Writes recover so long after a fault at the latest: the writer's pauses, and a shortage."""

_WRITE_FAULTS = ("eio-write", "eio-sync", "eio-call", "slow", "stuck", "no-space")
_READ_FAULTS = ("eio-read", "eio-call", "bad-sector")


@dataclasses.dataclass(slots=True)
class Target:
    """What an operation asks for: a block, by its id or by a name."""

    block: int
    name: int | None

    @property
    def shared(self) -> bool:
        return self.name is not None and self.name < 0

    def key(self) -> Any:
        return content(self.block).block_id if self.name is None else name_key(self.block, self.name)


class Client:
    """Does steps one after the other. ``act_on_world`` does those that are not about a store."""

    def __init__(self, world: World, number: int, act_on_world: Callable[[Step], Coroutine[Any, Any, None]]) -> None:
        self._world = world
        self._oracle = world.oracle
        self._number = number
        self._act_on_world = act_on_world
        self.doing = "nothing"

    async def run(self, steps: list[Step]) -> None:
        for step in steps:
            if step.pause_s:
                await asyncio.sleep(step.pause_s)
            self.doing = str(step)
            work = getattr(self, "_do_" + step.kind.replace("-", "_"), None)
            if work is None:
                await self._act_on_world(step)
                continue
            process = self._world.processes[step.slot]
            if process.is_open:
                self._world.counts[step.kind] += 1
                await self._operate(process, step, work)
        self.doing = "done"

    # -- running one operation -----------------------------------------------------------------

    async def _operate(self, process: Process, step: Step, work: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        world, life, store = self._world, process.life, process.store
        assert life is not None
        assert store is not None
        world.log(step.kind, step.number, life.number)
        task = process.spawn(work(process, life, store, step))
        process.operations[task] = None
        await asyncio.wait((task,), timeout=OPERATION_S_MAX)
        process.operations.pop(task, None)
        if not task.done():
            raise BrokenPromise(5, f"{step} has not ended after {OPERATION_S_MAX} s: {task.get_stack(limit=3)}")
        if task.cancelled():
            if not life.ended:
                raise BrokenPromise(5, f"{step} was cancelled by nobody")
            world.log("cut short", step.number)
        elif (error := task.exception()) is not None:
            if isinstance(error, BrokenPromise):
                raise error
            self._judge(process, life, step, error)
            world.log("failed", step.number, type(error).__name__)
        else:
            world.log("done", step.number, task.result())

    def _judge(self, process: Process, life: Life, step: Step, error: BaseException) -> None:
        """Whether this error may be: see the module's docstring."""
        world = self._world
        if life.ended:
            return
        if isinstance(error, CorruptionError):
            self._check_damage(error)
            world.met("reported damage", process)
            return
        if isinstance(error, TierFullError):
            allowed = self._may_be_full(process)
        elif isinstance(error, TierStalledError):
            allowed = process.recent("stuck", within_s=STUCK_S[1] + 1)
        elif isinstance(error, BrokenTierError):
            allowed = process.write_faults > 0
        elif isinstance(error, ClosedError):
            allowed = process.closing or process.store is None
        elif isinstance(error, OSError):
            # A compaction writes; whatever else raises this has read. A request is stuck for so long at most.
            causes = (*_READ_FAULTS, *_WRITE_FAULTS) if step.kind == "compact" else _READ_FAULTS
            allowed = process.recent(*causes, within_s=STUCK_S[1] + WEATHER_S_MAX)
        else:
            allowed = False
        if not allowed:
            raise BrokenPromise(4 if isinstance(error, TierFullError) else 2, f"{step}: {error!r}") from error
        if isinstance(error, OSError) and error.filename:
            world.reports.setdefault(Report(error.filename, None, str(error), torn=True))
        world.met("error to the caller", process)

    def _may_be_full(self, process: Process) -> bool:
        return (
            process.pins > 0
            or self._world.short_of_space
            or (process.store is not None and process.store.statistics()["disk"]["kept_aside_bytes"] > 0)
            or process.recent(*_WRITE_FAULTS, within_s=STUCK_S[1] + TROUBLE_S)
        )

    def _check_damage(self, error: CorruptionError) -> None:
        self._world.note_report(str(error))
        if error.path is None or error.offset is None:
            raise BrokenPromise(2, f"damage without a place: {error}")
        if error.path not in self._world.injuries.paths:
            raise BrokenPromise(2, f"damage was reported where there is none: {error}") from error

    # -- checking what was given ---------------------------------------------------------------

    def check_bytes(self, block: Block, target: Target) -> Content:
        """Promise 1."""
        number = number_of().get(block.block_id)
        if number is None:
            raise BrokenPromise(1, f"block {block.block_id} was never put")
        wanted = content(number)
        key, value = block.views()
        if bytes(key) != wanted.key or bytes(value) != wanted.value or block.meta != wanted.meta:
            raise BrokenPromise(1, f"block {number} has other bytes or meta than were put")
        if target.name is None or not target.shared:
            if number != target.block:
                raise BrokenPromise(1, f"{target} gave block {number}")
        elif number not in self._oracle.candidates(target.name):
            raise BrokenPromise(1, f"{target} gave block {number}, which was never put under it")
        self._world.counts["bytes verified"] += wanted.nbytes
        return wanted

    def _found(self, life: Life, target: Target, *, never_before: bool, number: int | None = None) -> None:
        """Promise 3: it was found; ``never_before``: it must not have been when the call began."""
        if target.shared:
            return
        if never_before and self._oracle.must_not_see(life, target.block, target.name):
            raise BrokenPromise(3, f"{target} was deleted and is back in life {life.number}")

    def must(self, life: Life, target: Target) -> bool:
        if target.shared:
            assert target.name is not None
            return self._oracle.must_resolve(life, target.name)
        return self._oracle.must_see(life, target.block, target.name)

    def must_not(self, life: Life, target: Target) -> bool:
        return not target.shared and self._oracle.must_not_see(life, target.block, target.name)

    def missed(self, process: Process, life: Life, target: Target, why: str, *, needed: bool) -> None:
        """Promise 2: it was not found; ``needed``: it had to be there when the call began."""
        if not needed or not self.must(life, target):
            return
        world = self._world
        if life.shaken or self._is_blind(life, target, why):
            return
        blocks = self._oracle.candidates(target.name) if target.shared and target.name is not None else {target.block}
        hurt = {block for block in blocks if world.injuries.of_block(block)}
        if hurt:
            for block in hurt:
                self._oracle.give_up(block)
                world.counts["lost to damage"] += 1
                world.missed_after_injury.add(block)
            world.met("missed, reported", process)
            return
        if ("read_seconds_max" in why or "has not answered" in why) and (
            process.recent("slow", "stuck", within_s=STUCK_S[1]) or self._may_be_full(process)
        ):
            world.met("miss", process)
            return
        evicted = world.evicted_so_far()
        if target.shared and evicted:
            return  # which of its blocks was evicted is not told
        if self._oracle.evictions_seen < evicted:
            self._oracle.evictions_seen += 1
            self._oracle.give_up(target.block)
            return
        raise BrokenPromise(2, f"{target} is missing in life {life.number}: {why}")

    def _is_blind(self, life: Life, target: Target, why: str) -> bool:
        """Whether only open segments of others can have it, of which nothing can be told (see ``oracle``)."""
        blocks = {target.block}
        if target.shared and target.name is not None:
            blocks = self._oracle.candidates(target.name)
        puts = [put for block in blocks for put in self._oracle.puts[block] if put.stored is True and not put.void]
        if any(put.life is life and put.firm for put in puts):
            return False
        if len(self._world.processes) > 1 and self._world.injuries.found:
            return True
        if "not on stable storage when it was seen" in why and not all(put.durable for put in puts):
            life.blind.update(dict.fromkeys(blocks, life.heard))
        return any(life.blind.get(block) == life.heard for block in blocks)

    # -- writing -------------------------------------------------------------------------------

    async def _do_put(self, process: Process, life: Life, store: Store, step: Step) -> str:
        wanted = content(step.block)
        put = self._oracle.put_begins(life, step.block, step.name)
        prefix = None if step.name is None else name_key(step.block, step.name)
        try:
            got = await store.put(wanted.key, wanted.value, prefix=prefix, meta=wanted.meta)
        except BaseException:
            self._not_stored(put)
            raise
        self._stored(put, got)
        return str(got)[:8]

    def _stored(self, put: Put, got: bytes) -> None:
        number = number_of().get(got)
        if number != put.block and (put.name is None or put.name >= 0):
            raise BrokenPromise(1, f"put of block {put.block} gave the id of {number}")
        if put.name is not None and number != put.block and number not in self._oracle.candidates(put.name):
            raise BrokenPromise(1, f"put of block {put.block} gave block {number}, never put under name {put.name}")
        self._oracle.put_ends(put, stored=True if number == put.block else None)

    def _not_stored(self, put: Put) -> None:
        if not put.life.ended:
            self._oracle.put_ends(put, stored=False)

    async def _do_put_cancelled(self, process: Process, life: Life, store: Store, step: Step) -> str:
        put = asyncio.ensure_future(self._do_put(process, life, store, step))
        return await self._cancelled(put, step)

    async def _cancelled(self, task: asyncio.Task[Any], step: Step) -> str:
        """Cancel an operation after some turns of the loop or some time; what came of it."""
        try:
            if step.choice % 3:
                for _ in range(step.choice % 23):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(step.amount * 0.02)
        finally:
            task.cancel()
            await asyncio.wait((task,))
        if task.cancelled():
            return "cancelled"
        return str(task.result())

    async def _do_reserve(self, process: Process, life: Life, store: Store, step: Step) -> str:
        wanted = content(step.block)
        put = self._oracle.put_begins(life, step.block, step.name)
        prefix = None if step.name is None else name_key(step.block, step.name)
        process.pins += 1
        slot = None
        aborted = step.choice % 4 == 0
        try:
            with contextlib.suppress(ZeroDivisionError):
                async with store.reserve(
                    key_bytes=len(wanted.key), value_bytes=len(wanted.value), prefix=prefix, meta=wanted.meta
                ) as slot:
                    slot.key[:] = memoryview(wanted.key)
                    await asyncio.sleep(step.amount * 0.01)
                    slot.value[:] = memoryview(wanted.value)
                    if aborted:
                        raise ZeroDivisionError
        except BaseException:
            self._not_stored(put)
            raise
        finally:
            process.pins -= 1
        if aborted:
            self._not_stored(put)
            return "aborted"
        assert slot is not None
        self._stored(put, slot.block_id)
        return str(slot.block_id)[:8]

    async def _do_delete(self, process: Process, life: Life, store: Store, step: Step) -> str:
        target = Target(step.block, None)
        needed = self.must(life, target)
        never = self.must_not(life, target)
        try:
            await store.delete(target.key())
        except BlockNotFoundError as error:
            self.missed(process, life, target, str(error), needed=needed)
            return "missing"
        self._found(life, target, never_before=never)
        self._oracle.deleted(life, step.block)
        if target.key() in store:
            raise BrokenPromise(3, f"block {step.block} is there right after it was deleted")
        return "deleted"

    async def _do_flush(self, process: Process, life: Life, store: Store, step: Step) -> str:
        began = self._oracle.now()
        await store.flush()
        if life.ended:
            return "too late"
        self._oracle.flushed(life, began)
        return "flushed"

    # -- reading -------------------------------------------------------------------------------

    async def _do_get(self, process: Process, life: Life, store: Store, step: Step) -> str:
        return await self._get(process, life, store, step, Target(step.block, None))

    async def _do_get_name(self, process: Process, life: Life, store: Store, step: Step) -> str:
        name = step.choice % 6 - 4
        return await self._get(process, life, store, step, Target(step.block, name))

    async def _get(self, process: Process, life: Life, store: Store, step: Step, target: Target) -> str:
        needed, never = self.must(life, target), self.must_not(life, target)
        began_s = self._world.loop.time()
        deadline_s = self._world.plan.settings["read_seconds_max"]
        process.pins += 1
        try:
            async with store.get(target.key()) as block:
                self._check_deadline(began_s, deadline_s, target)
                self._found(life, target, never_before=never)
                self.check_bytes(block, target)
                await asyncio.sleep(0)
                self.check_bytes(block, target)
        except BlockNotFoundError as error:
            self._check_deadline(began_s, deadline_s, target)
            self.missed(process, life, target, str(error), needed=needed)
            return "miss"
        except CorruptionError:
            if not self._world.injuries.of_block(target.block) and not target.shared:
                raise BrokenPromise(2, f"{target} is damaged, and the medium did not damage it") from None
            self._oracle.give_up(target.block)
            raise
        finally:
            process.pins -= 1
        return "hit"

    def _check_deadline(self, began_s: float, deadline_s: float | None, target: Target) -> None:
        if deadline_s is not None and self._world.loop.time() > began_s + deadline_s + READ_GRACE_S:
            raise BrokenPromise(5, f"{target} took {self._world.loop.time() - began_s:.1f} s, deadline {deadline_s} s")

    async def _do_get_cancelled(self, process: Process, life: Life, store: Store, step: Step) -> str:
        get = asyncio.ensure_future(self._do_get(process, life, store, step))
        return await self._cancelled(get, step)

    async def _do_get_prefix(self, process: Process, life: Life, store: Store, step: Step) -> str:
        names = [name for name in (0, -1, 1, -2) if step.choice >> (4 - name) & 1]
        keys = [PrefixKey(name_key(step.block, name)) for name in names]
        process.pins += 1
        try:
            async with store.get_prefix(keys) as blocks:
                for block, name in zip(blocks, names, strict=False):
                    self.check_bytes(block, Target(step.block, name))
                return f"{len(blocks)} of {len(keys)}"
        finally:
            process.pins -= 1

    async def _do_read_into(self, process: Process, life: Life, store: Store, step: Step) -> str:
        wanted, target = content(step.block), Target(step.block, None)
        needed, never = self.must(life, target), self.must_not(life, target)
        key, value = bytearray(len(wanted.key)), bytearray(len(wanted.value))
        try:
            await store.read_into(wanted.block_id, key, value)
        except BlockNotFoundError as error:
            self.missed(process, life, target, str(error), needed=needed)
            return "miss"
        except CorruptionError:
            self._oracle.give_up(target.block)
            raise
        self._found(life, target, never_before=never)
        if (bytes(key), bytes(value)) != (wanted.key, wanted.value):
            raise BrokenPromise(1, f"read_into of block {step.block} gave other bytes than were put")
        self._world.counts["bytes verified"] += wanted.nbytes
        return "hit"

    async def _do_stream(self, process: Process, life: Life, store: Store, step: Step) -> str:
        wanted = [(step.block + i) % 12 for i in range(4)]
        process.pins += 1
        given = 0
        try:
            async with store.stream([content(block).block_id for block in wanted]) as blocks:
                async for block in blocks:
                    self.check_bytes(block, Target(wanted[given], None))
                    given += 1
                    await asyncio.sleep(step.amount * 0.01)
        finally:
            process.pins -= 1
        return f"{given} of {len(wanted)}"

    async def _do_hold(self, process: Process, life: Life, store: Store, step: Step) -> str:
        """A lease that outlives its call. Few and small: there has to be room for others."""
        target = Target(step.block, None)
        if len(process.held) >= 2 or content(step.block).nbytes > 150_000:
            return "enough"
        needed = self.must(life, target)
        process.pins += 1
        try:
            process.held.append(await store.get(target.key()))
        except BlockNotFoundError as error:
            process.pins -= 1
            self.missed(process, life, target, str(error), needed=needed)
            return "miss"
        except BaseException:
            process.pins -= 1
            raise
        return "held"

    async def _do_let_go(self, process: Process, life: Life, store: Store, step: Step) -> str:
        self.let_go(process)
        return "let go"

    def let_go(self, process: Process) -> None:
        """Release a held lease; its bytes are what they were all the time."""
        if process.held:
            block = process.held.pop(0)
            self.check_bytes(block, Target(number_of()[block.block_id], None))
            block.release()
            process.pins -= 1

    async def _do_prefetch(self, process: Process, life: Life, store: Store, step: Step) -> str:
        store.prefetch([content((step.block + i) % 20).block_id for i in range(5)])
        return "asked"

    async def _do_rest(self, process: Process, life: Life, store: Store, step: Step) -> str:
        await asyncio.sleep(step.amount * 3)
        return "rested"

    async def _do_refresh(self, process: Process, life: Life, store: Store, step: Step) -> str:
        token, faults = self._oracle.look_begins(life), process.read_faults
        counts = False
        try:
            fresh = await store.refresh()
            counts = faults == process.read_faults
        finally:
            self._oracle.look_ends(life, token, counts=counts)
        return str(fresh)

    async def _do_look(self, process: Process, life: Life, store: Store, step: Step) -> str:
        """Without any I/O: what the store says that it has."""
        return str(self.look_at_all(process, life, store))

    def look_at_all(self, process: Process, life: Life, store: Store) -> int:
        """Promises 2 and 3 for every block and name that was ever put, as far as the index tells."""
        present = 0
        for block, puts in self._oracle.puts.items():
            names = {None, *(put.name for put in puts)}
            for name in sorted(names, key=lambda name: -99 if name is None else name):
                target = Target(block, name)
                if target.key() in store:
                    present += name is None
                    self._found(life, target, never_before=True)
                else:
                    self.missed(process, life, target, "it is not in the index", needed=True)
        return present

    async def _do_verify(self, process: Process, life: Life, store: Store, step: Step) -> str:
        report = await store.verify()
        for error in report.damage:
            self._world.note_report(str(error))
        return f"{report.blocks} blocks, {len(report.damage)} damaged"

    async def _do_compact(self, process: Process, life: Life, store: Store, step: Step) -> str:
        compact = getattr(store, "compact", None)
        if compact is None:
            return "cannot"
        await compact()
        return "compacted"
