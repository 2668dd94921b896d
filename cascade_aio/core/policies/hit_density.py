"""``HitDensity``: evict the leaf from which the fewest hits per unit of occupancy are to be expected.

Implements ``cascade_aio.abc.eviction.EvictionPolicy``. Only nodes without resident children and
without pins are queued (``queues``), by class and age; the order of the queues comes from how long
blocks of each class were seen to stay unused (``reuse``, ``density``) and is fitted anew every
``_FIT_EVENTS_MIN`` events or more, in steps. While one of two simple orders would have had more hits
(``duel``), that one rules. Before anything is learnt, and without identities, the order is leaf-first LRU.

What this gives, without a constant for any of it: a scan (prompts that never return) teaches that new
blocks are not asked for again and is evicted first; a conversation is kept through the pause in which
its user reads and types; blocks that were used often outlive others, until they have not been used for
longer than such blocks usually are, so nothing is protected for ever.

Must not know: blocks, bytes, tiers, time. Every event is O(log n) amortised, and none stops its caller
for a millisecond.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from cascade_aio.core.policies.density import densities, hazards
from cascade_aio.core.policies.duel import Duel
from cascade_aio.core.policies.ghosts import ENTRIES_MAX, ENTRIES_MIN, GhostTable
from cascade_aio.core.policies.kinds import (
    CLASS_OF_INTERVAL,
    CLASS_OF_TURN,
    CLASS_OF_USES,
    COUNT_MAX,
    LEARNT_OF_CLASS,
    mean_interval,
)
from cascade_aio.core.policies.orders import LEAST_RECENT, by_density
from cascade_aio.core.policies.queues import NODE_BYTES as QUEUE_NODE_BYTES
from cascade_aio.core.policies.queues import AgedQueues
from cascade_aio.core.policies.reuse import ReuseSample

NODES_MAX = 1 << 26
"""Largest node number: a wild row number must not allocate columns for billions of nodes."""
CYCLE_STEPS_MAX = 4096
"""Ancestors looked at when a parent arrives after its children; a longer chain is not followed."""
GHOSTS_PER_NODE = 2
"""At least; up to twice as many, as the table has a power of two."""
HORIZON_TURNOVERS = 16
"""A block unused for this many times the resident nodes' uses is given up as not coming back."""
HORIZON_EVENTS_MIN = 1 << 16
NODE_BYTES = QUEUE_NODE_BYTES + 31
"""Memory per node without its ghosts (8 bytes each): the sum of the columns' item sizes."""

_GROWTH_NODES = 4096
_FIT_EVENTS_MIN = 2048  # one fit takes 2 ms in all: 1 µs per event at first, 0.1 µs in the long run
_FIT_EVENTS_MAX = 16384
_ADVANCE_EVENTS = 128
_LEARNT_OF_CLASS: list[int] = LEARNT_OF_CLASS.tolist()
_U64 = (1 << 64) - 1
_MIX = 0x9E37_79B9_7F4A_7C15
_RESIDENT = 1
_HAD_CHILD = 2
_KNOWN = 4  # came with an identity


class HitDensity:
    """See the module's text. ``admit`` of a resident node, ``remove`` of a pinned one and events for
    unknown nodes are assertions. Not thread-safe; nothing blocks."""

    def __init__(self) -> None:
        # Columns by slot = node + 1; slot 0 means none.
        self._nbytes = array("Q")
        self._hash = array("Q")
        self._parent = array("I")
        self._children = array("I")
        self._pins = array("I")
        self._flags = array("B")
        self._uses = array("B")
        self._trait = array("B")
        """The turn that made it after one use, then the mean interval between uses (``kinds``)."""
        self._queues = AgedQueues()
        self._ghosts = GhostTable(ENTRIES_MIN)
        self._sample = ReuseSample()
        self._duel = Duel()
        self._order = LEAST_RECENT  # as learnt last
        self._fitting: Iterator[None] = iter(())
        self._watched = 0
        """Blocks with a hash below are in one of the samples."""
        self._now = 0
        self._newest = 0
        """Used last and not queued yet: mostly its child comes next, and it need not be queued at all."""
        self._resident = 0
        self._is_full = False
        self._admitted_bytes = 0
        self._advance_at = _ADVANCE_EVENTS
        self._fit_at = _FIT_EVENTS_MIN
        self._grow(0)
        self._queues.set_order(self._order)
        self._watch()

    def admit(self, node: int, *, parent: int = -1, nbytes: int, identity: int | None = None) -> None:
        """``node`` entered the tier, unpinned, as its most recent use. A link to ``parent`` that
        would close a circle (identical blocks at several places of a prompt) is ignored. Without
        ``identity`` nothing is learnt from the node, and nothing is remembered of it."""
        assert node != parent, f"node {node} cannot be its own parent"
        slot, above = node + 1, parent + 1
        if (slot if slot > above else above) >= len(self._flags):
            self._grow(max(slot, above))
        assert node >= 0, "nodes are not negative"
        assert not self._flags[slot] & _RESIDENT, f"node {node} is in the tier already"
        flags = _RESIDENT
        if self._children[slot]:
            flags |= _HAD_CHILD
            if self._is_circle(slot, above):
                above = 0
        self._parent[slot] = above
        self._nbytes[slot] = nbytes
        self._resident += 1
        self._admitted_bytes += nbytes
        uses = 0
        if identity is not None:
            flags |= _KNOWN
            self._hash[slot] = hashed = _mix(identity)
            uses, trait, tick = self._ghosts.take(hashed)
        self._flags[slot] = flags
        if uses:
            self._uses[slot] = uses + 1 if uses < COUNT_MAX else COUNT_MAX
            self._trait[slot] = mean_interval(uses, trait, max(self._now - tick, 1))
        else:
            self._uses[slot] = 1
            self._trait[slot] = self._next_turn(above)
        if above:
            self._gain_child(above)
        self._use(slot)

    def touch(self, node: int) -> None:
        """Two uses with no other event between count as one (a put that is read at once)."""
        slot = node + 1
        assert self._flags[slot] & _RESIDENT, f"node {node} is not in the tier"
        queues = self._queues
        unused = self._now - queues.tick[slot]
        if not unused:
            return
        uses = self._uses[slot]
        self._trait[slot] = mean_interval(uses, self._trait[slot], unused)
        if uses < COUNT_MAX:
            self._uses[slot] = uses + 1
        if queues.queue[slot]:
            queues.unlink(slot)
        self._use(slot)

    def pin(self, node: int) -> None:
        slot = node + 1
        assert self._flags[slot] & _RESIDENT, f"node {node} is not in the tier"
        self._pins[slot] += 1
        if self._queues.queue[slot]:
            self._queues.unlink(slot)

    def unpin(self, node: int) -> None:
        """The last unpin makes the node evictable at the age since its last use."""
        slot = node + 1
        pins = self._pins[slot]
        assert pins, f"node {node} is not pinned"
        self._pins[slot] = pins - 1
        if pins == 1 and not self._children[slot] and slot != self._newest:
            self._queues.put_back(slot, self._class(slot), self._now)

    def remove(self, node: int) -> None:
        """See ``EvictionPolicy``: it has left the tier, evicted or not."""
        slot = node + 1
        flags = self._flags[slot]
        assert flags & _RESIDENT, f"node {node} is not in the tier"
        assert not self._pins[slot], f"node {node} is pinned"
        queues = self._queues
        self._is_full = True
        self._resident -= 1
        self._admitted_bytes -= self._nbytes[slot]
        if queues.queue[slot]:
            queues.unlink(slot)
        elif slot == self._newest:
            self._newest = 0
        if flags & _KNOWN:
            self._ghosts.put(self._hash[slot], self._uses[slot], self._trait[slot], queues.tick[slot])
        self._flags[slot] = 0
        above = self._parent[slot]
        if above:
            children = self._children[above] = self._children[above] - 1
            if not children and self._flags[above] & _RESIDENT and not self._pins[above] and above != self._newest:
                queues.put_back(above, self._class(above), self._now)

    def victim(self) -> int | None:
        """The evictable node of the least dense queue; asked again without other events, the same one."""
        if self._newest:
            self._queue(self._newest)
            self._newest = 0
        slot = self._queues.first()
        return slot - 1 if slot else None

    def would_stay(self, *, parent: int = -1, identity: int | None = None) -> bool:
        """Admission: whether a block, used now and admitted with these arguments, would be worth more
        than what would be evicted for it. Changes nothing; in a tier with room the answer is of no use."""
        above = parent + 1
        uses, trait, tick = (0, 0, 0) if identity is None else self._ghosts.look(_mix(identity))
        if uses:
            trait = mean_interval(uses, trait, max(self._now - tick, 1))
            kind = CLASS_OF_USES[min(uses + 1, COUNT_MAX)] + CLASS_OF_INTERVAL[trait]
        else:
            kind = CLASS_OF_TURN[self._next_turn(above) if above < len(self._flags) else 1]
        return self._queues.is_above_first(kind)

    def __contains__(self, node: int) -> bool:
        return 0 <= node < len(self._flags) - 1 and bool(self._flags[node + 1] & _RESIDENT)

    def __len__(self) -> int:
        return self._resident

    @property
    def admitted_bytes(self) -> int:
        return self._admitted_bytes

    @property
    def nbytes(self) -> int:
        """Memory held by the columns and the ghosts, in bytes."""
        return NODE_BYTES * len(self._flags) + self._ghosts.nbytes

    def _use(self, slot: int) -> None:
        """A node that is in no queue was used."""
        now = self._now = self._now + 1
        self._queues.tick[slot] = now
        if self._hash[slot] < self._watched and self._flags[slot] & _KNOWN:
            self._observe(slot, now)
        newest = self._newest
        if newest != slot:
            self._newest = slot
            if newest and not self._children[newest]:
                self._queue(newest)
        if now >= self._advance_at:
            self._keep_up(now)

    def _observe(self, slot: int, now: int) -> None:
        """Let the samples see the use of a block that is in one of them."""
        hashed, kind, sample, duel = self._hash[slot], self._class(slot), self._sample, self._duel
        if hashed < sample.threshold:
            sample.use(hashed, _LEARNT_OF_CLASS[kind], now)
        if hashed < duel.threshold and duel.use(hashed, kind, now, self._resident, is_full=self._is_full):
            self._enforce()

    def _queue(self, slot: int) -> None:
        """Queue a node behind all others of its class if it is evictable (and none used since is queued)."""
        if not self._children[slot] and not self._pins[slot]:
            self._queues.append(slot, self._class(slot))

    def _class(self, slot: int) -> int:
        uses, is_last = self._uses[slot], not self._flags[slot] & _HAD_CHILD
        if uses < 2:
            return CLASS_OF_TURN[self._trait[slot]] + is_last
        return CLASS_OF_USES[uses] + CLASS_OF_INTERVAL[self._trait[slot]] + is_last

    def _next_turn(self, above: int) -> int:
        """The turn of a new block: its parent's if that is new too, else one more than the parent's uses
        before this one, which is what a conversation comes to."""
        if not above or not self._flags[above] & _RESIDENT:
            return 1
        uses = self._uses[above]
        return self._trait[above] if uses == 1 else uses

    def _gain_child(self, above: int) -> None:
        self._children[above] += 1
        queues = self._queues
        if queues.queue[above]:
            queues.unlink(above)
        flags = self._flags[above]
        if flags & (_RESIDENT | _HAD_CHILD) == _RESIDENT:
            self._flags[above] = flags | _HAD_CHILD
            hashed = self._hash[above]
            if flags & _KNOWN and hashed < self._watched:
                kind = self._class(above)
                self._sample.reclassify(hashed, _LEARNT_OF_CLASS[kind])
                self._duel.reclassify(hashed, kind, self._now)

    def _is_circle(self, slot: int, above: int) -> bool:
        for _ in range(CYCLE_STEPS_MAX):
            if above == slot:
                return True
            if not above or not self._flags[above] & _RESIDENT:
                return False
            above = self._parent[above]
        return True

    def _keep_up(self, now: int) -> None:
        self._advance_at = now + _ADVANCE_EVENTS
        self._queues.advance(now)
        self._watch()
        if now >= self._fit_at:
            self._fit_at = now + min(max(_FIT_EVENTS_MIN, now >> 4), _FIT_EVENTS_MAX)
            self._fitting = self._fit()
        next(self._fitting, None)
        if len(self._ghosts) < min(self._resident * GHOSTS_PER_NODE, ENTRIES_MAX):
            # Moving the entries would stop the loop; a tier that still grows has hardly evicted.
            self._ghosts = GhostTable(2 * len(self._ghosts))

    def _fit(self) -> Iterator[None]:
        """Learn the order anew, in steps of less than half a millisecond."""
        now = self._now
        horizon = max(HORIZON_EVENTS_MIN, HORIZON_TURNOVERS * self._resident)
        self._sample.settle(now, horizon)
        yield
        lives, now = self._sample.open_lives(), self._now
        yield
        reused, unused = self._sample.counts(now, lives)
        yield
        hazard = hazards(reused, unused)
        yield
        density = densities(hazard)
        yield
        self._order = by_density(density)
        yield
        self._duel.set_learnt(self._order)
        self._enforce()

    def _enforce(self) -> None:
        ruler = self._duel.ruler
        self._queues.set_order(self._order if ruler is None else ruler)

    def _watch(self) -> None:
        self._watched = max(self._sample.threshold, self._duel.threshold)

    def _grow(self, slot: int) -> None:
        assert slot <= NODES_MAX, f"node {slot - 1} is beyond any index"
        grown = (slot // _GROWTH_NODES + 1) * _GROWTH_NODES - len(self._flags)
        for column in (self._nbytes, self._hash):
            column.frombytes(bytes(grown * column.itemsize))
        for links in (self._parent, self._children, self._pins):
            links.frombytes(bytes(grown * links.itemsize))
        for small in (self._flags, self._uses, self._trait):
            small.frombytes(bytes(grown * small.itemsize))
        self._queues.ensure(len(self._flags))


def _mix(identity: int) -> int:
    """Spread an identity over 64 bits: callers may give counters, tables want hashes."""
    mixed = (identity * _MIX) & _U64
    return mixed ^ mixed >> 32
