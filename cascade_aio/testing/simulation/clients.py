"""What clients do with a store.

Each operation runs as a task of the process whose store it uses, so it dies with it. ``Client`` asks the oracle
before and after: a promise is broken only if it held the whole time; what comes of an operation is for ``Judge``. An
operation that has not ended after ``OPERATION_S_MAX`` is a broken promise.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from cascade_aio.errors import BlockNotFoundError, CorruptionError
from cascade_aio.model import PrefixKey
from cascade_aio.store.store import Store
from cascade_aio.testing.simulation.contents import content, name_key, number_of
from cascade_aio.testing.simulation.judging import Judge, Target
from cascade_aio.testing.simulation.oracle import BrokenPromise, Life, Put
from cascade_aio.testing.simulation.plan import Step
from cascade_aio.testing.simulation.process import STUCK_S, Process
from cascade_aio.testing.simulation.world import World

OPERATION_S_MAX = 4 * STUCK_S[1]
"""Virtual seconds: a few stuck requests one after the other."""

READ_GRACE_S = 0.5
"""A get ends so long after its deadline at the latest."""

CANCELLED = "-cancelled"
"""Ends the kinds of steps whose caller gives up: after some turns of the loop, or some time."""

FEW_TURNS_MAX = 23
TURNS_MAX = 301
SECONDS_MAX = 0.05


class Client(Judge):
    """Does steps one after the other. ``act_on_world`` does those that are not about a store."""

    def __init__(self, world: World, number: int, act_on_world: Callable[[Step], Coroutine[Any, Any, None]]) -> None:
        super().__init__(world)
        self._number = number
        self._act_on_world = act_on_world
        self.doing = "nothing"

    async def run(self, steps: list[Step]) -> None:
        for step in steps:
            if step.pause_s:
                await asyncio.sleep(step.pause_s)
            self.doing = str(step)
            work = self._work(step.kind)
            if work is None:
                await self._act_on_world(step)
                continue
            process = self._world.processes[step.slot]
            if process.is_open:
                self._world.counts[step.kind] += 1
                await self._operate(process, step, work)
        self.doing = "done"

    def _work(self, kind: str) -> Callable[..., Coroutine[Any, Any, Any]] | None:
        """What does a step; ``None``: it is not about a store."""
        base = kind.removesuffix(CANCELLED)
        work: Callable[..., Coroutine[Any, Any, Any]] | None = getattr(self, "_do_" + base.replace("-", "_"), None)
        if work is None or base == kind:
            return work

        async def cut_short(process: Process, life: Life, store: Store, step: Step) -> str:
            return await self._cancelled(asyncio.ensure_future(work(process, life, store, step)), step)

        return cut_short

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
            self.judge(process, life, step, error)
            world.log("failed", step.number, type(error).__name__)
        else:
            world.log("done", step.number, task.result())

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

    async def _cancelled(self, task: asyncio.Task[Any], step: Step) -> str:
        """Cancel an operation after some turns of the loop or some time; what came of it."""
        try:
            if step.choice % 3:
                for _ in range(step.choice % (TURNS_MAX if step.choice % 2 else FEW_TURNS_MAX)):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(step.amount * SECONDS_MAX)
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
        self.found(process, life, target, never_before=never)
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
        winner = self.winner(process, life, target)
        began_s = self._world.loop.time()
        deadline_s = self._world.plan.settings["read_seconds_max"]
        process.pins += 1
        try:
            async with store.get(target.key()) as block:
                self._check_deadline(began_s, deadline_s, target)
                self.found(process, life, target, never_before=never)
                found = self.check_bytes(block, target)
                if winner not in (None, found.number) and self.winner(process, life, target) == winner:
                    raise BrokenPromise(1, f"{target} gave block {found.number}, but {winner} was first")
                await asyncio.sleep(0)
                self.check_bytes(block, target)
        except BlockNotFoundError as error:
            self._check_deadline(began_s, deadline_s, target)
            self.missed(process, life, target, str(error), needed=needed)
            return "miss"
        except CorruptionError:
            if not (self._world.injuries.of_block(target.block) or target.shared or process.misread):
                raise BrokenPromise(2, f"{target} is damaged, and the medium did not damage it") from None
            if not process.misread:
                self._oracle.give_up(target.block)
            raise
        finally:
            process.pins -= 1
        return "hit"

    def _check_deadline(self, began_s: float, deadline_s: float | None, target: Target) -> None:
        if deadline_s is not None and self._world.loop.time() > began_s + deadline_s + READ_GRACE_S:
            raise BrokenPromise(5, f"{target} took {self._world.loop.time() - began_s:.1f} s, deadline {deadline_s} s")

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
            if not process.misread:
                self._oracle.give_up(target.block)
            raise
        self.found(process, life, target, never_before=never)
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
                    self.found(process, life, target, never_before=True)
                else:
                    self.missed(process, life, target, "it is not in the index", needed=True)
        return present

    async def _do_verify(self, process: Process, life: Life, store: Store, step: Step) -> str:
        report = await store.verify()
        for error in report.damage:
            self._world.note_report(str(error))
        return f"{report.blocks} blocks, {len(report.damage)} damaged"

    async def _do_compact(self, process: Process, life: Life, store: Store, step: Step) -> str:
        await store.compact()
        return "compacted"

    async def _do_adopt(self, process: Process, life: Life, store: Store, step: Step) -> str:
        return f"{len((await store.adopt()).writers)} adopted"
