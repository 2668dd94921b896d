"""The whole store against a dict, whatever the order of calls, crashes and reopenings.

The model knows for every block and every name the set of states that are allowed: one while the store
is open; after a loss of power any it had since the last flush. With a disk budget blocks may also be
missing, but never wrong, and never back after a flushed deletion.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import cascade_aio as ca
from cascade_aio.errors import BlockNotFoundError, DigestConflictError
from cascade_aio.testing.world import World, check_idle, check_invariants, pseudo_bytes, settle, virtual_loop

EXAMPLES = int(os.environ.get("CASCADE_TEST_EXAMPLES", "60"))
STEPS = 40
KEYS = ca.prefix_keys(range(10), block_tokens=1, namespace="model")
BUDGET_BYTES = 8 << 20
HELD_MAX = 3
"""Leases held across rules: less than the arena, so that there is always room for one more block."""

T = TypeVar("T")


class Content(NamedTuple):
    key: bytes
    value: bytes
    block_id: ca.BlockId

    def __repr__(self) -> str:
        return f"{len(self.key)}+{len(self.value)}:{str(self.block_id)[:8]}"


def _content(number: int, key_bytes: int, value_bytes: int) -> Content:
    key, value = pseudo_bytes(f"key {number}", key_bytes), pseudo_bytes(f"value {number}", value_bytes)
    return Content(key, value, ca.compute_block_id(key, value))


SIZES = [(0, 0), (1, 0), (0, 100), (63, 65), (4000, 4096), (30_000, 1), (70_000, 70_001), (100_000, 150_000)]
CONTENTS = [_content(number, *SIZES[number % len(SIZES)]) for number in range(1, 22)]
METAS = [None, ca.BlockMeta(dtype="float16", shape=(1, 2)), ca.BlockMeta(tokens=7, extra=b"x" * 500)]

contents = st.sampled_from(CONTENTS)
names = st.sampled_from(KEYS)
Names = dict[bytes, "ca.BlockId | None"]


class StoreMachine(RuleBasedStateMachine):
    """Without a disk budget: what was put and not deleted is there."""

    budget: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=virtual_loop)
        self.world = World(shm_bytes=1 << 20, disk_bytes=self.budget, tail_seconds_max=0.5)
        self.by_id = {content.block_id: content for content in CONTENTS}
        self.there: dict[ca.BlockId, bool] = dict.fromkeys(self.by_id, False)
        self.there_since: dict[ca.BlockId, set[bool]] = {block_id: {False} for block_id in self.by_id}
        self.bound: Names = dict.fromkeys(KEYS, None)
        self.bound_since: dict[bytes, set[ca.BlockId | None]] = {key: {None} for key in KEYS}
        self.metas: dict[ca.BlockId, set[ca.BlockMeta | None]] = {block_id: set() for block_id in self.by_id}
        self.leases: list[tuple[ca.Block, Content]] = []
        self.store: ca.Store = self.run(self.world.open())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    # -- the model -------------------------------------------------------------------------------

    def note(self, block_id: ca.BlockId, there: bool) -> None:
        self.there[block_id] = there
        self.there_since[block_id].add(there)
        if not there:
            for name in [name for name, bound in self.bound.items() if bound == block_id]:
                self.note_name(name, None)

    def note_name(self, name: bytes, block_id: ca.BlockId | None) -> None:
        self.bound[name] = block_id
        self.bound_since[name].add(block_id)

    def note_flushed(self) -> None:
        self.there_since = {block_id: {there} for block_id, there in self.there.items()}
        self.bound_since = {name: {block_id} for name, block_id in self.bound.items()}

    def expected(self, name: Any) -> Content | None:
        """What a get must give, if there is anything."""
        block_id = self.bound.get(name) if len(name) == 32 else name
        return self.by_id[block_id] if block_id is not None and self.there[block_id] else None

    async def adopt_what_is_there(self) -> None:
        """After a crash: every state is one that was since the last flush, and is now the one that counts."""
        for block_id, allowed in self.there_since.items():
            found = block_id in self.store
            assert found in allowed, (block_id, found, allowed)
            self.there[block_id] = found
        known = {info.block_id for info in self.store.blocks()}
        assert known == {block_id for block_id, there in self.there.items() if there}
        for name, bounds in self.bound_since.items():
            row = self.store._getter.find(ca.PrefixKey(name))
            found_id = None if row < 0 else self.store._context.catalog.index.block_id(row)
            assert found_id in bounds, (name, found_id, bounds)
            self.bound[name] = found_id
        self.note_flushed()

    def check_block(self, block: ca.Block, content: Content) -> None:
        assert block.block_id == content.block_id
        key, value = block.views()
        assert bytes(key) == content.key
        assert bytes(value) == content.value
        assert block.meta in self.metas[content.block_id]

    # -- rules -----------------------------------------------------------------------------------

    @rule(content=contents, name=st.none() | names, parent=st.none() | names, meta=st.sampled_from(METAS))
    def put(self, content: Content, name: Any, parent: Any, meta: Any) -> None:
        parent = None if name is None or parent == name else parent
        known = self.bound.get(name) if name is not None else None
        self.metas[content.block_id].add(meta)
        got = self.run(self.store.put(content.key, content.value, prefix=name, parent=parent, meta=meta))
        self.took(content, name, got, known)

    def took(self, content: Content, name: Any, got: ca.BlockId, known: ca.BlockId | None) -> None:
        if known is not None:
            assert got == known
            # Another writer's block that may still vanish: then ours was written, too.
            if self.run(self.holds(content.block_id)):
                self.note(content.block_id, True)
            return
        assert got == content.block_id
        self.note(content.block_id, True)
        if name is not None:
            self.note_name(name, content.block_id)

    async def holds(self, block_id: ca.BlockId) -> bool:
        return block_id in self.store

    @rule(content=contents)
    def put_with_another_split(self, content: Content) -> None:
        joined = content.key + content.value
        cut = len(content.key) - 1
        if cut < 0 or not self.certainly(content.block_id):
            return
        with pytest.raises(DigestConflictError):
            self.run(self.store.put(joined[:cut], joined[cut:]))

    def certainly(self, block_id: ca.BlockId) -> bool:
        return self.there[block_id]

    @rule(content=contents, name=st.none() | names, commit=st.booleans(), keep_a_view=st.booleans())
    def reserve(self, content: Content, name: Any, commit: bool, keep_a_view: bool) -> None:
        known = self.bound.get(name) if name is not None else None
        kept: list[Any] = []

        async def fill() -> ca.BlockId | None:
            slot = None
            with contextlib.suppress(ZeroDivisionError):
                async with self.store.reserve(
                    key_bytes=len(content.key), value_bytes=len(content.value), prefix=name
                ) as slot:
                    assert known is not None or not slot.bound  # a name that may vanish does not count as bound
                    slot.key[:] = memoryview(content.key)
                    slot.value[:] = memoryview(content.value)
                    if keep_a_view:
                        kept.append(slot.value)
                    if not commit:
                        raise ZeroDivisionError
            for view in kept:
                view[:] = 0  # after the end: nobody may see this
            kept.clear()
            return slot.block_id if commit and slot is not None else None

        self.metas[content.block_id].add(None)
        got = self.run(fill())
        if got is not None:
            self.took(content, name, got, known)

    @rule(content=contents, as_text=st.booleans())
    def get(self, content: Content, as_text: bool) -> None:
        self.get_by(str(content.block_id) if as_text else content.block_id, self.expected(content.block_id))

    @rule(name=names)
    def get_by_name(self, name: ca.PrefixKey) -> None:
        self.get_by(name, self.expected(name))

    def get_by(self, name: Any, content: Content | None) -> None:
        async def get() -> None:
            if content is None:
                with pytest.raises(BlockNotFoundError):
                    await self.store.get(name)
            else:
                async with self.store.get(name) as block:
                    self.check_block(block, content)

        self.run(get())

    @rule(content=contents)
    def get_many_at_once(self, content: Content) -> None:
        others = [self.expected(other.block_id) for other in CONTENTS[:4]] + [self.expected(content.block_id)] * 3

        async def get(wanted: Content) -> None:
            async with self.store.get(wanted.block_id) as block:
                await asyncio.sleep(0)
                self.check_block(block, wanted)

        async def get_all() -> None:
            await asyncio.gather(*(get(wanted) for wanted in others if wanted is not None))

        self.run(get_all())

    @rule(content=contents)
    def hold(self, content: Content) -> None:
        if self.expected(content.block_id) is not None and len(self.leases) < HELD_MAX:
            self.leases.append((self.run(_leased(self.store, content.block_id)), content))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        block, content = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.check_block(block, content)
        block.release()

    @rule(chain=st.lists(names, max_size=5))
    def get_prefix(self, chain: list[ca.PrefixKey]) -> None:
        wanted = list(itertools.takewhile(lambda content: content is not None, map(self.expected, chain)))

        async def get() -> None:
            assert len(self.store.lookup(chain)) == len(wanted)
            async with self.store.get_prefix(chain) as blocks:
                # Held leases, or the share of the arena one prefix may pin, may end it early.
                assert len(blocks) <= len(wanted)
                assert len(blocks) == len(wanted) or sum(len(c.key) + len(c.value) for c in wanted if c) > 400_000
                for block, content in zip(blocks, wanted, strict=False):
                    assert content is not None
                    self.check_block(block, content)

        self.run(get())

    @rule(content=contents)
    def read_into(self, content: Content) -> None:
        if self.expected(content.block_id) is None:
            return
        key, value = bytearray(len(content.key)), bytearray(len(content.value))
        self.run(self.store.read_into(content.block_id, key, value))
        assert (bytes(key), bytes(value)) == (content.key, content.value)

    @rule(wanted=st.lists(contents, max_size=4))
    def prefetch(self, wanted: list[Content]) -> None:
        async def start() -> None:
            self.store.prefetch([content.block_id for content in wanted])
            await asyncio.sleep(0)

        self.run(start())

    @rule(content=contents, name=st.none() | names)
    def delete(self, content: Content, name: Any) -> None:
        which = content.block_id if name is None else name
        known = self.expected(which)

        async def delete() -> None:
            if known is None:
                with pytest.raises(BlockNotFoundError):
                    await self.store.delete(which)
            else:
                await self.store.delete(which)

        self.run(delete())
        if known is not None:
            self.note(known.block_id, False)

    @rule()
    def flush(self) -> None:
        self.run(self.store.flush())
        self.note_flushed()

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule()
    def verify(self) -> None:
        report = self.run(self.store.verify())
        assert report.damage == ()
        self.note_flushed()

    @rule(content=contents, name=st.none() | names, delete=st.booleans())
    def another_writer(self, content: Content, name: Any, delete: bool) -> None:
        async def share() -> ca.BlockId | None:
            await self.store.flush()
            other = await self.world.open()
            try:
                for known in filter(None, map(self.expected, self.by_id)):
                    async with other.get(known.block_id) as block:
                        self.check_block(block, known)
                if not delete:
                    got = await other.put(content.key, content.value, prefix=name)
                    await other.flush()
                    await self.store.refresh()
                    return got
                if content.block_id in other:
                    await other.delete(content.block_id)
                await other.flush()
                await self.store.refresh()
                return None
            finally:
                await other.aclose()

        self.metas[content.block_id].add(None)
        known = self.bound.get(name) if name is not None else None
        got = self.run(share())
        self.note_flushed()
        if got is None:
            self.note(content.block_id, False)
        else:
            self.took(content, name, got, known)
        self.note_flushed()

    @rule()
    def compact(self) -> None:
        report = self.run(self.store.compact())
        assert report.kept_aside == 0
        self.note_flushed()

    @rule(turns=st.integers(0, 200))
    def compact_interrupted(self, turns: int) -> None:
        async def interrupted() -> None:
            task = asyncio.ensure_future(self.store.compact())
            await settle(turns)
            task.cancel()
            await asyncio.wait([task])

        self.run(interrupted())

    @rule(seconds=st.sampled_from([-3600.0, 3600.0]))
    def set_the_wall_clock(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    @rule()
    def reopen(self) -> None:
        self.release_all()
        self.run(self.close_and_check())
        self.note_flushed()
        self.store = self.run(self.world.open())
        self.run(self.adopt_what_is_there())

    @rule(seed=st.none() | st.integers(0, 1 << 16), turns=st.integers(0, 12))
    def crash(self, seed: int | None, turns: int) -> None:
        self.release_all()
        self.run(settle(turns))
        self.run(self.world.crash(seed))
        self.store = self.run(self.world.open())
        self.run(self.adopt_what_is_there())

    @invariant()
    def everything_agrees(self) -> None:
        self.run(_checked(self.store))

    # -- the end ---------------------------------------------------------------------------------

    def release_all(self) -> None:
        for block, content in self.leases:
            self.check_block(block, content)
            block.release()
        self.leases.clear()

    async def close_and_check(self) -> None:
        await self.store.flush()
        await settle()
        await asyncio.sleep(10)  # prefetches that wait for room give up
        check_idle(self.store)
        await self.store.aclose()
        self.world.check_closed()

    def teardown(self) -> None:
        try:
            self.release_all()
            self.run(self.close_and_check())
        finally:
            self.runner.close()


class BudgetMachine(StoreMachine):
    """With a disk budget: anything may be evicted, so a miss proves nothing; what comes back is right all the same.

    ``doomed`` are blocks whose deletion was flushed and that were not put since: they must stay away.
    ``ever`` are the blocks that each name was given to.
    """

    budget = BUDGET_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.doomed: set[ca.BlockId] = set()
        self.ever: dict[bytes, set[ca.BlockId]] = {key: set() for key in KEYS}
        self.serial = 0

    def certainly(self, block_id: ca.BlockId) -> bool:
        async def known() -> bool:
            return block_id in self.store

        return self.run(known())

    async def adopt_what_is_there(self) -> None:
        for block_id in self.doomed:
            assert block_id not in self.store
        for name in KEYS:
            self.named(name)
        self.there = {block_id: block_id in self.store for block_id in self.by_id}

    def named(self, name: bytes) -> ca.BlockId | None:
        row = self.store._getter.find(ca.PrefixKey(name))
        if row < 0:
            return None
        block_id = self.store._context.catalog.index.block_id(row)
        assert block_id in self.ever[name], (name, block_id)
        return block_id

    def took(self, content: Content, name: Any, got: ca.BlockId, known: ca.BlockId | None) -> None:
        if name is not None and got != content.block_id:
            assert got in self.ever[name], (name, got)
            return
        assert got == content.block_id
        self.doomed.discard(got)
        self.there[got] = True
        if name is not None:
            self.ever[name].add(got)

    def note(self, block_id: ca.BlockId, there: bool) -> None:
        self.there[block_id] = there
        if not there:
            self.run(self.store.flush())
            self.doomed.add(block_id)

    def note_flushed(self) -> None:
        """Nothing is promised to stay."""

    def expected(self, name: Any) -> Content | None:
        async def find() -> Content | None:
            block_id = self.named(name) if len(name) == 32 else ca.BlockId(name)
            if block_id is None or block_id not in self.store:
                return None
            assert block_id not in self.doomed
            return self.by_id[block_id]

        return self.run(find())

    # Rules that reach into the model for what must be there make no sense here.
    reserve = another_writer = None  # type: ignore[assignment]

    @rule(count=st.integers(1, 30))
    def put_many(self, count: int) -> None:
        async def put() -> None:
            for _ in range(count):
                self.serial += 1
                content = _content(1000 + self.serial, 60_000, 60_000)
                self.by_id[content.block_id] = content
                self.metas[content.block_id] = {None}
                await self.store.put(content.key, content.value)
                del self.by_id[content.block_id]  # its id is not asked for: it is there to fill the disk

        self.run(put())

    @invariant()
    def the_budget_is_kept(self) -> None:
        used = self.run(_used_bytes(self.store))
        assert used <= BUDGET_BYTES, used


async def _used_bytes(store: ca.Store) -> int:
    return int(store.statistics()["disk"]["used_bytes"])


async def _leased(store: ca.Store, block_id: ca.BlockId) -> ca.Block:
    return await store.get(block_id)


async def _checked(store: ca.Store) -> None:
    check_invariants(store)


def _run(machine: type[RuleBasedStateMachine], examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, examples),
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_against_a_dict() -> None:
    _run(StoreMachine, EXAMPLES)


def test_with_a_disk_budget() -> None:
    _run(BudgetMachine, EXAMPLES // 2)
