"""Reading ahead: performs the plans of ``core.prefetch`` for ``store.prefetch`` and ``store.stream``.

One ``_Pump`` per call: it describes wanted blocks to its planner, starts, hurries and cancels loads as
told, and reports back. A load of a pump is an ordinary single-flight load with two differences: it
starts below the DEMAND class, and its room is bound by a ``Claim`` (``store.room``): it evicts only
what was not used since the call, or what this pump brought and its consumer has done with. What a
stream's consumer has not taken yet is held, but only softly: when a foreground call finds nothing else
to evict, the blocks furthest from their consumer are let go.

Must not know: how a window is chosen, how bytes are read, what a policy thinks of a block.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, Protocol, cast

from cascade_aio.abc.storage import Priority
from cascade_aio.core.prefetch import MIB, Act, Action, PrefetchPlanner, WindowBounds
from cascade_aio.errors import BlockTooLargeError, ClosedError, ConfigError, InternalError, TierFullError
from cascade_aio.model import BlockId, PrefixKey
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.store.fetching import Fetcher, FetchWaiter
from cascade_aio.store.getting import Getter, raw_name
from cascade_aio.store.loading import Waiter
from cascade_aio.store.room import Claim

KEYS_MAX = 1 << 16
"""Blocks of one call: a million tokens in blocks of 16. They are looked at once in the call itself."""
WINDOW_BYTES_MIN = 8 * MIB
"""Lower bound of a window, unless its upper bound is below."""
WINDOW_ARENA_PART = 2
"""Without ``window_bytes`` a window is at most one part in so many of the arena."""
SPARED_MAX = 1024
"""Wanted blocks that are in the arena already and that the call itself must not evict: the first so many."""
CONSUMED_MAX = 4096
"""Consumed blocks of one stream whose room it may use again; older ones are the policy's alone."""
_STEP_POSITIONS = 128
"""Blocks described in one loop turn: below 1 ms."""

Name = BlockId | PrefixKey | str
PrefetchPriority = Literal["low", "high"]
_PRIORITIES = {"low": Priority.BACKGROUND, "high": Priority.WRITE}


@dataclasses.dataclass(slots=True)
class PrefetchProgress:
    """Blocks of one call by what became of them so far; ``landed_bytes`` in bytes of arena."""

    wanted: int
    resident: int = 0
    landed: int = 0
    landed_bytes: int = 0
    unknown: int = 0
    failed: int = 0
    refused: int = 0
    """No room without evicting something hotter."""
    cancelled: int = 0

    @property
    def pending(self) -> int:
        """Neither there nor given up."""
        return self.wanted - self.resident - self.landed - self.unknown - self.failed - self.refused - self.cancelled


class Pump:
    """One plan being performed. Loop thread only; lives until it is finished, whoever holds it."""

    def __init__(
        self,
        prefetcher: Prefetcher,
        names: list[Name],
        *,
        streaming: bool,
        priority: PrefetchPriority,
        window_bytes: int | None,
        layered: bool = False,
    ) -> None:
        self._prefetcher = prefetcher
        self._context = prefetcher.context
        self._catalog = prefetcher.context.catalog
        self._getter = prefetcher.getter
        self._names = names
        self._streaming = streaming
        self._priority = _priority(priority)
        self._layered = layered
        self.claim = Claim(self._catalog.uses, self._give)
        self.planner = PrefetchPlanner(len(names), self._bounds(window_bytes), streaming=streaming)
        self.progress = PrefetchProgress(len(names))
        self.finished = asyncio.Event()
        self.failure: Exception | None = None
        self._rows: dict[int, int] = {}  # position → row, described and to be started
        self._bringing: dict[int, tuple[int, Waiter | FetchWaiter]] = {}
        self._listed: dict[bytes, int] = {}  # names that only other ranks know → bytes of the record
        self._asking = False
        self._held: dict[int, Copy] = {}
        self._brought: set[int] = set()
        self._consumed: collections.deque[tuple[Copy, int]] = collections.deque(maxlen=CONSUMED_MAX)
        self._step_scheduled = False
        self.errors: dict[int, BaseException] = {}
        """What loads of a stream ended with: a damaged block is forgotten, so a later get finds it missing only."""

    def _bounds(self, window_bytes: int | None) -> WindowBounds:
        most = self._catalog.shm.capacity_bytes // WINDOW_ARENA_PART if window_bytes is None else window_bytes
        return WindowBounds(min(WINDOW_BYTES_MIN, most), most)

    def start(self) -> None:
        """Spare what is there already, and begin."""
        for name in reversed(self._names[:SPARED_MAX]):  # a prefix stays hotter than what follows it
            row = self._getter.find(name)
            if row in self._catalog.copies:
                self._catalog.touch(row)
        self.advance()

    async def start_across_ranks(self, fetcher: Fetcher) -> None:
        """``start``, once it is known which of the blocks that this store does not know other ranks have."""
        self._asking = True
        for first in range(0, len(self._names), _STEP_POSITIONS):
            part = self._names[first : first + _STEP_POSITIONS]
            unknown = [raw_name(name) for name in part if self._getter.find(name) < 0]
            if unknown:
                self._listed.update(await fetcher.sizes(unknown))
            if self.finished.is_set():
                return
        self._asking = False
        self.start()

    # -- the plan ------------------------------------------------------------------------------

    def advance(self) -> None:
        """Describe and start what the window has room for; finish when nothing is left to do."""
        planner, catalog = self.planner, self._catalog
        if self._asking:
            return
        for _ in range(_STEP_POSITIONS):
            position = None if self.finished.is_set() else planner.next_position()
            if position is None:
                break
            row = self._getter.find(self._names[position])
            listed = self._listed.get(raw_name(self._names[position])) if row < 0 and self._listed else None
            if row < 0 and listed is None:
                self.progress.unknown += 1
                planner.absent(position)
                continue
            copy = catalog.copies.get(row)
            if copy is not None:
                self.progress.resident += 1
                if self._streaming:
                    catalog.hold(copy)
                    self._held[position] = copy
            else:
                self._rows[position] = row
            nbytes = copy.extent.nbytes if copy is not None else listed or catalog.stored_bytes(row)
            self._perform(planner.describe(position, nbytes, resident=copy is not None, now_s=self._now_s()))
        else:
            self._advance_soon()
        if not self._streaming and planner.exhausted:
            self._finish()

    def _advance_soon(self) -> None:
        if not self._step_scheduled:
            self._step_scheduled = True
            self._context.loop.call_soon(self._step)

    def _step(self) -> None:
        self._step_scheduled = False
        self.advance()

    def _perform(self, actions: list[Action]) -> None:
        for act, position in actions:
            if act is Act.START:
                self._bring(position)
            elif act is Act.DROP:
                self._drop(position)
            elif position in self._bringing:  # else it was found in the arena when it was to be started
                if act is Act.HURRY:
                    self._hurry(position)
                else:
                    self._leave(position)

    def _hurry(self, position: int) -> None:
        row, _ = self._bringing[position]
        if row >= 0:
            self._getter.loader.hurry(row)
        elif self._context.sharing is not None:
            self._context.sharing.fetcher.hurry(raw_name(self._names[position]))

    def _leave(self, position: int) -> None:
        row, waiter = self._bringing.pop(position)
        if row >= 0:
            self._getter.loader.leave(row, cast(Waiter, waiter))
        elif self._context.sharing is not None:
            self._context.sharing.fetcher.leave(raw_name(self._names[position]), cast(FetchWaiter, waiter))

    def _bring(self, position: int) -> None:
        """The block may have come or gone since it was described."""
        name = self._names[position]
        row = self._getter.find(name)
        if row != self._rows.pop(position) or row in self._catalog.copies:
            self._context.loop.call_soon(self._redescribed, position)
            return
        waiter: Waiter | FetchWaiter
        if row < 0 and self._context.sharing is not None:
            waiter = self._context.sharing.fetcher.join(raw_name(name), priority=self._priority, claim=self.claim)
        else:
            waiter = self._getter.loader.join(row, priority=self._priority, claim=self.claim, layered=self._layered)
        self._bringing[position] = (row, waiter)
        waiter.add_done_callback(functools.partial(self._done, position))

    def _redescribed(self, position: int) -> None:
        """It is there, or is gone, without a load: either way the consumer's get finds out."""
        if self._getter.find(self._names[position]) in self._catalog.copies:
            self.progress.resident += 1
        else:
            self.progress.unknown += 1
        self._perform(self.planner.failed(position, self._now_s()))
        self.advance()

    def _done(self, position: int, waiter: Waiter | FetchWaiter) -> None:
        if self._bringing.get(position, (0, None))[1] is not waiter:
            return  # left before it was done
        del self._bringing[position]
        error = waiter.exception()
        copy = waiter.result() if error is None else None
        now_s = self._now_s()
        if copy is not None:
            self.progress.landed += 1
            self.progress.landed_bytes += copy.extent.nbytes
            if self._streaming:
                self._held[position] = copy
                self._brought.add(position)
            else:
                self._catalog.release(copy)
            self._perform(self.planner.landed(position, now_s))
        elif error is None:  # the rank that had it has not any more
            self.progress.unknown += 1
            self._perform(self.planner.failed(position, now_s))
        elif isinstance(error, ClosedError | InternalError):
            self.close(error)
        elif isinstance(error, TierFullError) and not isinstance(error, BlockTooLargeError):
            self._perform(self.planner.refused(position, now_s))
            if not self._streaming:  # nobody will tell it when to go on
                self.progress.refused += self.progress.pending
                self.stop()
        else:
            self.progress.failed += 1
            self.errors[position] = error
            self._perform(self.planner.failed(position, now_s))
        self.advance()

    def stop(self) -> None:
        """Nothing is wanted any more: loads that nobody else waits for are cancelled, holds end. Repeated: nothing."""
        if self.finished.is_set():
            return
        self.progress.cancelled += self.progress.pending
        self._perform(self.planner.cancel())
        self._consumed.clear()
        self._finish()

    def close(self, error: Exception) -> None:
        if not self.finished.is_set():
            self.failure = error
            self.stop()

    def _finish(self) -> None:
        assert not self._bringing, self._bringing
        self.finished.set()
        self._prefetcher.forget(self)

    def _now_s(self) -> float:
        return self._context.loop.time()

    # -- room ----------------------------------------------------------------------------------

    def let_go(self) -> bool:
        """Give up the held block that is furthest from the consumer."""
        if not self._held:
            return False
        position = max(self._held)
        self._drop(position)
        self.planner.lost(position, self._now_s())
        return True

    def _drop(self, position: int) -> None:
        self._brought.discard(position)
        self._catalog.release(self._held.pop(position))

    def _give(self) -> bool:
        """Evict the block consumed last of those that this stream brought and nobody used since: a prefix stays
        whole, its end goes first."""
        kept: list[tuple[Copy, int]] = []
        given = False
        while self._consumed and not given:
            copy, used = self._consumed.pop()
            if copy.row < 0 or copy.used != used or self._catalog.index.location(copy.row) is None:
                continue  # gone, or somebody else's by now
            if copy.holds:
                kept.append((copy, used))
                continue
            given = self._catalog.evict(copy)
            if not given:
                kept.append((copy, used))
        self._consumed.extend(reversed(kept))
        return given

    # -- the consumer of a stream --------------------------------------------------------------

    def asked(self, position: int) -> None:
        """The consumer is about to wait for ``position``."""
        self._perform(self.planner.asked(position, self._now_s()))
        self.advance()

    def taken(self, position: int, nbytes: int, *, brought: bool) -> None:
        """The consumer has a lease on ``position``; ``brought`` by its own load."""
        if position in self._bringing:
            self._leave(position)
            brought = True
        if brought:
            self._brought.add(position)
        copy = self._held.pop(position, None)
        if copy is not None:
            self._catalog.release(copy)
        self._rows.pop(position, None)
        self._perform(self.planner.taken(position, nbytes, self._now_s()))
        self._perform(self.planner.room(self._now_s()))
        self.advance()

    def consumed(self, position: int, copy: Copy) -> None:
        """The consumer has given its lease on ``position`` back."""
        if position in self._brought:
            self._brought.discard(position)
            if not self.finished.is_set():
                self._consumed.append((copy, copy.used))
                self._context.room.freed()
        if not self.finished.is_set():
            self._perform(self.planner.room(self._now_s()))
            self.advance()


class Plan(Protocol):
    """What a handle shows of its prefetch: a ``Pump``, or one that a service performs."""

    @property
    def progress(self) -> PrefetchProgress: ...
    @property
    def finished(self) -> asyncio.Event: ...
    @property
    def failure(self) -> Exception | None: ...
    def stop(self) -> None: ...


class PrefetchHandle:
    """What ``store.prefetch`` returns. Nothing depends on it: dropping it leaves the prefetch going."""

    def __init__(self, pump: Plan) -> None:
        self._pump = pump

    @property
    def progress(self) -> PrefetchProgress:
        """What became of the blocks so far."""
        return self._pump.progress

    @property
    def done(self) -> bool:
        return self._pump.finished.is_set()

    def cancel(self) -> None:
        """What has not landed is not wanted any more; loads that others wait for go on. Does not block."""
        self._pump.stop()

    async def wait(self) -> PrefetchProgress:
        """Return once every block has landed or was given up. Never raises for a block.

        Raises ``ClosedError`` if the store was closed meanwhile. Cancelling it does not cancel the prefetch.
        """
        await self._pump.finished.wait()
        if self._pump.failure is not None:
            raise self._pump.failure
        return self._pump.progress

    def __repr__(self) -> str:
        return f"PrefetchHandle({self._pump.progress})"


class Prefetcher:
    """All plans of one store."""

    def __init__(self, context: StoreContext, getter: Getter) -> None:
        self.context = context
        self.getter = getter
        self._pumps: dict[Pump, None] = {}
        self._landed = self._failed = self._refused = self._plans = self._let_go = 0
        context.room.let_go = self._give_up_one

    def prefetch(self, names: Sequence[Name], priority: PrefetchPriority, deadline_s: float | None) -> PrefetchHandle:
        """See ``Store.prefetch``."""
        pump = Pump(self, self.checked(names), streaming=False, priority=priority, window_bytes=None)
        self.begin(pump)
        if deadline_s is not None:
            self.context.loop.call_later(deadline_s, pump.stop)
        return PrefetchHandle(pump)

    def checked(self, names: Sequence[Name]) -> list[Name]:
        """The names, each known to be one. Raises ``ConfigError``."""
        return checked_names(names)

    def begin(self, pump: Pump) -> None:
        self._plans += 1
        self._pumps[pump] = None
        sharing = self.context.sharing
        if sharing is not None and sharing.fetcher.serves:
            self.context.tasks.spawn(pump.start_across_ranks(sharing.fetcher), "cascade-prefetch-lookup")
        else:
            pump.start()

    def forget(self, pump: Pump) -> None:
        if self._pumps.pop(pump, 0) is None:
            self._landed += pump.progress.landed
            self._failed += pump.progress.failed
            self._refused += pump.progress.refused

    def _give_up_one(self) -> bool:
        for pump in reversed(self._pumps):
            if pump.let_go():
                self._let_go += 1
                return True
        return False

    def close(self) -> None:
        """Cancel every plan: the store is closing."""
        for pump in list(self._pumps):
            pump.close(ClosedError(f"the store on {self.context.config.root} was closed during the prefetch"))

    def statistics(self) -> dict[str, int]:
        live = list(self._pumps)
        return {
            "plans": self._plans,
            "active": len(live),
            "landed": self._landed + sum(pump.progress.landed for pump in live),
            "failed": self._failed + sum(pump.progress.failed for pump in live),
            "refused": self._refused + sum(pump.progress.refused for pump in live),
            "let_go": self._let_go,
            "window_bytes": sum(pump.planner.window_bytes for pump in live),
            "ahead_bytes": sum(pump.planner.ahead_bytes for pump in live),
        }


def checked_names(names: Sequence[Name]) -> list[Name]:
    """At most ``KEYS_MAX`` names of blocks. Raises ``ConfigError`` for anything else."""
    if isinstance(names, str | bytes):
        raise ConfigError("keys is one name; pass a sequence of BlockIds, hex strings or PrefixKeys")
    if len(names) > KEYS_MAX:
        raise ConfigError(f"{len(names)} blocks are more than one call takes ({KEYS_MAX}); pass them in parts")
    for name in names:
        raw_name(name)
    return list(names)


def _priority(priority: PrefetchPriority) -> Priority:
    try:
        return _PRIORITIES[priority]
    except KeyError:
        raise ConfigError(f"priority={priority!r} is unknown; use one of {', '.join(_PRIORITIES)}") from None
