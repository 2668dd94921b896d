"""Whether what came of an operation is what was promised: errors, bytes, names, misses.

Errors are allowed by cause:

* ``OSError``: a read, call or sync of this process failed, or met a bad sector, within the time a request may take.
* ``TierFullError``: writes of this process fail, are slow or find no room; or leases hold the arena, which is small;
  or segments are kept aside because of damage, which only ``repair`` gives back, and count in a budget that is small;
  or the index is full.
* ``TierStalledError``: a request of this process is stuck, or was until just now.
* ``BrokenTierError``: writes or syncs of this process failed.
* ``CorruptionError``: names a file and place that the medium has damaged, or that a read gave wrongly, and only there.
* ``ClosedError``: the store was being closed.
* A miss of a block read later than ``read_seconds_max``: reads are slow or stuck, or the arena is held.
* A miss in a store whose index has refused what the root holds, or that was given wrong bytes by a read: it knows less.
* Everything else is a broken promise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cascade_aio.errors import BrokenTierError, ClosedError, CorruptionError, TierFullError, TierStalledError
from cascade_aio.store.block import Block
from cascade_aio.testing.simulation.contents import Content, content, name_key, number_of
from cascade_aio.testing.simulation.oracle import BrokenPromise, Life
from cascade_aio.testing.simulation.plan import Step
from cascade_aio.testing.simulation.process import STUCK_S, Process
from cascade_aio.testing.simulation.world import Report, World

WEATHER_S_MAX = 2.0
"""A fault that comes and goes lasts at most so long."""

TROUBLE_S = 30.0
"""Writes recover so long after a fault at the latest: the writer's pauses, and a shortage."""

LOOK_S = 0.1
"""A get that misses has looked at other writers once more within so long."""

_WRITE_FAULTS = ("eio-write", "eio-sync", "eio-call", "slow", "stuck", "no-space")
_READ_FAULTS = ("eio-read", "eio-call", "bad-sector", "misread")
_WRITING = ("compact", "adopt", "verify")
"""Calls that meet the faults of writes, too."""


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


class Judge:
    """Holds what a process says against what the oracle expects of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._oracle = world.oracle

    def judge(self, process: Process, life: Life, step: Step, error: BaseException) -> None:
        """Whether this error may be: see the module's docstring."""
        world = self._world
        if life.ended:
            return
        if isinstance(error, CorruptionError):
            self.check_damage(error)
            if error.path not in world.injuries.paths:
                world.met("reported as damage", process, ("misread",))
            return
        causes: tuple[str, ...] = (*_READ_FAULTS, *_WRITE_FAULTS)
        if isinstance(error, TierFullError):
            causes = _WRITE_FAULTS
            allowed = self.may_be_full(process)
        elif isinstance(error, TierStalledError):
            causes = ("stuck",)
            allowed = process.recent("stuck", within_s=STUCK_S[1] + 1)
        elif isinstance(error, BrokenTierError):
            causes = _WRITE_FAULTS
            allowed = process.write_faults > 0
        elif isinstance(error, ClosedError):
            allowed = process.closing or process.store is None
        elif isinstance(error, OSError):
            # A request is stuck for so long at most.
            writes = step.kind.removesuffix("-cancelled") in _WRITING
            causes = causes if writes else _READ_FAULTS
            allowed = process.recent(*causes, within_s=STUCK_S[1] + WEATHER_S_MAX)
        else:
            allowed = False
        if not allowed:
            raise BrokenPromise(4 if isinstance(error, TierFullError) else 2, f"{step}: {error!r}") from error
        if isinstance(error, OSError) and error.filename:
            world.reports.setdefault(Report(error.filename, None, str(error), torn=True))
        world.met("error to the caller", process, causes)

    def may_be_full(self, process: Process) -> bool:
        return (
            process.pins > 0
            or self._world.short_of_space
            or (process.store is not None and process.store.statistics()["disk"]["kept_aside_bytes"] > 0)
            or process.recent(*_WRITE_FAULTS, within_s=STUCK_S[1] + TROUBLE_S)
            or self._index_is_full(process)
        )

    def _index_is_full(self, process: Process) -> bool:
        """What it refuses is kept on disk, too, and counts in the budget."""
        store = process.store
        if store is None:
            return False
        index = store._context.catalog.index
        return len(store) >= index.capacity_max or process.index_was_full or self.knows_less(process)

    def check_damage(self, error: CorruptionError) -> None:
        self._world.note_report(str(error))
        if error.path is None or error.offset is None:
            raise BrokenPromise(2, f"damage without a place: {error}")
        if error.path not in self._world.injuries.paths and not self._world.was_misread(error.path):
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

    def winner(self, process: Process, life: Life, target: Target) -> int | None:
        """Promise 1: the block that a shared name has to name, if it can be told."""
        if not target.shared or target.name is None or life.shaken or self.knows_less(process):
            return None
        if self._world.evicted_so_far() or self._world.injuries.found:
            return None
        return self._oracle.winner(life, target.name)

    def knows_less(self, process: Process) -> bool:
        """Whether its store has no room for all that the root holds, or was told something wrong by a read."""
        store = process.store
        return process.misread or (store is not None and store.statistics()["disk"]["facts_refused"] > 0)

    def found(self, process: Process, life: Life, target: Target, *, never_before: bool) -> None:
        """Promise 3: it was found; ``never_before``: it must not have been when the call began."""
        if target.shared or process.misread:
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
        if life.shaken or self.knows_less(process) or self._is_blind(process, life, target, why):
            return
        evicted = world.evicted_so_far()
        if target.shared and evicted:
            return  # which of its blocks was evicted is not told
        blocks = self._oracle.candidates(target.name) if target.shared and target.name is not None else {target.block}
        hurt = {block for block in blocks if world.injuries.of_block(block)}
        if hurt:
            for block in hurt:
                self._oracle.give_up(block)
                world.counts["lost to damage"] += 1
                if len(hurt) == 1:  # of several blocks that a name may have had, which one it was is not told
                    world.missed_after_injury.add(block)
            for what in {injury.what for block in hurt for injury in world.injuries.of_block(block)}:
                world.outcomes[f"{what}: block missed"] += 1
            return
        if ("read_seconds_max" in why or "has not answered" in why) and (
            process.recent("slow", "stuck", within_s=STUCK_S[1]) or self.may_be_full(process)
        ):
            world.met("miss", process, ("slow", "stuck"))
            return
        if target.name is not None and self._oracle.evicted_names_seen < world.evicted_so_far("names"):
            self._oracle.evicted_names_seen += 1
            self._oracle.give_up(target.block)
            return
        if self._oracle.evictions_seen < evicted:
            self._oracle.evictions_seen += 1
            self._oracle.give_up(target.block)
            return
        raise BrokenPromise(2, f"{target} is missing in life {life.number}: {why}")

    def _is_blind(self, process: Process, life: Life, target: Target, why: str) -> bool:
        """Whether only open segments of others can have it, of which nothing can be told (see ``oracle``)."""
        if "not on stable storage when it was seen" in why and process.recent("eio-call", within_s=LOOK_S):
            return True  # it was stored again elsewhere, and the look that would have told of it failed
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
