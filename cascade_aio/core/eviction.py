"""Who leaves a full tier, the simple ways: ``PrefixLru`` and ``Lru`` (the baseline to beat).

The default policy is ``HitDensity`` (``policies/``).

Pure implementations of ``cascade_aio.abc.eviction.EvictionPolicy``. They see row numbers, parents
and sizes, never blocks, bytes or tiers.

``PrefixLru`` keeps the resident nodes in one doubly linked list in order of heat, coldest first.
A *use* (admit, touch, last unpin) moves a node to the hot end, so the search for a victim normally
looks at the first node only. Rules:

* A node with resident children, or pinned, is no victim. The search takes such a node off the list
  (*parks* it) instead of stepping over it: each use pays for at most one parking, so a tier full of
  pins costs nothing per search. A parked node is colder than every linked one.
* A node's heat is its subtree's: when a child leaves, its parent becomes as hot as the child was, by
  taking the child's place in the list if it was colder.
* A node that was the parent of two different children is *shared*. Instead of being evicted it goes
  to the hot end again for ``SHARED_ROUNDS`` rounds per use; while it lives on such a round it is
  *protected*. No round is granted that would leave more than ``protected_share_max`` of the
  admitted bytes protected.

Invariants: the list is sorted by tick; a resident node without resident children and without pins is
always in it. Every event is O(1), ``victim`` O(1) amortised; a node costs ``NODE_BYTES``.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

SHARED_ROUNDS = 2
"""Extra rounds of a shared node per use: enough to outlive its last suffix by two turnovers."""
PASSES_PER_SEARCH_MAX = 32
"""Shared nodes one search may send to the hot end: bounds its time when everything is shared."""
PLACE_STEPS_MAX = 64
"""Steps along the cold end to place a parent whose parked child was deleted; beyond, colder is fine."""
CYCLE_STEPS_MAX = 4096
"""Ancestors looked at when a parent arrives after its children; a longer chain is not followed."""
NODES_MAX = 1 << 26
"""Largest node number: a wild row number must not allocate columns for billions of nodes."""
NODE_BYTES = 42
"""Memory per node: the sum of the columns' item sizes."""

_GROWTH_NODES = 4096  # a step costs ~50 µs; doubling would stop the loop for milliseconds
_RESIDENT = 1
_LINKED = 2
_SHARED = 4
_PROTECTED = 8


class PrefixLru:
    """Prefix-aware LRU with pins and bounded weight for shared prefixes. See the module's text.

    ``protected_share_max`` (0.0 to 1.0) is the largest part of the admitted bytes that may live on
    extra rounds. ``admit`` of a resident node, ``remove`` of a pinned one and events for unknown
    nodes are assertions. Not thread-safe; nothing blocks.
    """

    def __init__(self, *, protected_share_max: float = 0.5) -> None:
        assert 0.0 <= protected_share_max <= 1.0, "protected_share_max is a share"
        self._protected_share_max = protected_share_max
        # Columns by slot = node + 1; slot 0 is the list's sentinel, and 0 in a link means none.
        self._tick = array("Q")
        self._nbytes = array("Q")
        self._prev = array("I")
        self._next = array("I")
        self._parent = array("I")
        self._first_child = array("I")
        self._children = array("I")
        self._pins = array("I")
        self._flags = array("B")
        self._rounds = array("B")
        self._now = 0
        self._resident = 0
        self._admitted_bytes = 0
        self._protected_bytes = 0
        self._grow(0)

    def admit(self, node: int, *, parent: int = -1, nbytes: int, identity: int | None = None) -> None:
        """``node`` entered the tier, unpinned, as its most recent use. A link to ``parent`` that
        would close a circle (identical blocks at several places of a prompt) is ignored."""
        assert node != parent, f"node {node} cannot be its own parent"
        slot = node + 1
        if (node if node > parent else parent) + 1 >= len(self._flags):
            self._grow(max(slot, parent + 1))
        assert node >= 0, "nodes are not negative"
        assert not self._flags[slot] & _RESIDENT, f"node {node} is in the tier already"
        above = parent + 1
        if above and self._children[slot] and self._is_circle(slot, above):
            above = 0
        self._parent[slot] = above
        self._nbytes[slot] = nbytes
        self._rounds[slot] = SHARED_ROUNDS
        self._flags[slot] |= _RESIDENT
        self._resident += 1
        self._admitted_bytes += nbytes
        self._append(slot)
        if above:
            self._gain_child(above, slot)

    def touch(self, node: int) -> None:
        slot = node + 1
        assert self._flags[slot] & _RESIDENT, f"node {node} is not in the tier"
        self._renew(slot)
        if self._flags[slot] & _LINKED:
            self._unlink(slot)
        self._append(slot)

    def pin(self, node: int) -> None:
        slot = node + 1
        assert self._flags[slot] & _RESIDENT, f"node {node} is not in the tier"
        self._pins[slot] += 1

    def unpin(self, node: int) -> None:
        """The last unpin counts as a use: the block was wanted until now."""
        slot = node + 1
        pins = self._pins[slot]
        assert pins, f"node {node} is not pinned"
        self._pins[slot] = pins - 1
        if pins == 1:
            self.touch(node)

    def remove(self, node: int) -> None:
        """See ``EvictionPolicy``: it has left the tier, evicted or not."""
        slot = node + 1
        assert node in self, f"node {node} is not in the tier"
        assert not self._pins[slot], f"node {node} is pinned"
        flags = self._flags[slot]
        nbytes = self._nbytes[slot]
        self._resident -= 1
        self._admitted_bytes -= nbytes
        if flags & _PROTECTED:
            self._protected_bytes -= nbytes
        above = self._parent[slot]
        if above:
            self._lose_child(above, slot)
        if self._flags[slot] & _LINKED:
            self._unlink(slot)
        self._flags[slot] &= _SHARED
        self._forget_if_unreferenced(slot)

    def victim(self) -> int | None:
        """The coldest node that may go; asked again without other events, the same one."""
        flags, children, pins = self._flags, self._children, self._pins
        passes_left = PASSES_PER_SEARCH_MAX
        while slot := self._next[0]:
            if children[slot] or pins[slot]:
                self._unlink(slot)
            elif flags[slot] & _SHARED and self._rounds[slot] and self._may_protect(slot):
                if not passes_left:
                    self._rounds[slot] = 0  # decided: asking again must give the same answer
                    return slot - 1
                passes_left -= 1
                self._rounds[slot] -= 1
                self._protect(slot)
                self._unlink(slot)
                self._append(slot)
            else:
                return slot - 1
        return None

    def __contains__(self, node: int) -> bool:
        return 0 <= node < len(self._flags) - 1 and bool(self._flags[node + 1] & _RESIDENT)

    def __len__(self) -> int:
        return self._resident

    @property
    def admitted_bytes(self) -> int:
        return self._admitted_bytes

    @property
    def protected_bytes(self) -> int:
        """Bytes of the nodes that live on an extra round now."""
        return self._protected_bytes

    @property
    def nbytes(self) -> int:
        """Memory held by the columns, in bytes."""
        return NODE_BYTES * len(self._flags)

    def _gain_child(self, above: int, child: int) -> None:
        self._children[above] += 1
        first = self._first_child[above]
        if not first:
            self._first_child[above] = child
        elif first != child:
            self._flags[above] |= _SHARED
        self._renew(above)

    def _lose_child(self, above: int, child: int) -> None:
        """Take ``child`` (still in its place) from its parent, which inherits its heat."""
        flags, tick = self._flags, self._tick
        self._children[above] -= 1
        if not flags[above] & _RESIDENT:
            self._forget_if_unreferenced(above)
            return
        if tick[child] > tick[above]:
            tick[above] = tick[child]
            if flags[child] & _LINKED:
                if flags[above] & _LINKED:
                    self._unlink(above)
                self._link_before(above, child)
        if not flags[above] & _LINKED and not self._children[above]:
            self._link_at_cold_end(above)

    def _forget_if_unreferenced(self, slot: int) -> None:
        # The number may come back as another block: what was learnt about children must not outlive
        # both the node and its last child.
        if not self._children[slot]:
            self._flags[slot] &= ~_SHARED
            self._first_child[slot] = 0

    def _is_circle(self, slot: int, above: int) -> bool:
        for _ in range(CYCLE_STEPS_MAX):
            if above == slot:
                return True
            if not above or not self._flags[above] & _RESIDENT:
                return False
            above = self._parent[above]
        return True

    def _may_protect(self, slot: int) -> bool:
        added = 0 if self._flags[slot] & _PROTECTED else self._nbytes[slot]
        return self._protected_bytes + added <= self._protected_share_max * self._admitted_bytes

    def _protect(self, slot: int) -> None:
        if not self._flags[slot] & _PROTECTED:
            self._flags[slot] |= _PROTECTED
            self._protected_bytes += self._nbytes[slot]

    def _renew(self, slot: int) -> None:
        """A use: all rounds again, and no longer living on an extra one."""
        self._rounds[slot] = SHARED_ROUNDS
        if self._flags[slot] & _PROTECTED:
            self._flags[slot] &= ~_PROTECTED
            self._protected_bytes -= self._nbytes[slot]

    def _append(self, slot: int) -> None:
        """Put an unlinked node at the hot end with a new tick."""
        self._now += 1
        self._tick[slot] = self._now
        last = self._prev[0]
        self._next[last] = slot
        self._prev[slot] = last
        self._next[slot] = 0
        self._prev[0] = slot
        self._flags[slot] |= _LINKED

    def _link_before(self, slot: int, after: int) -> None:
        before = self._prev[after]
        self._next[before] = slot
        self._prev[slot] = before
        self._next[slot] = after
        self._prev[after] = slot
        self._flags[slot] |= _LINKED

    def _link_at_cold_end(self, slot: int) -> None:
        # A parked node is colder than what was linked when it was parked; only nodes that came back
        # this way may be colder still.
        tick = self._tick
        after = self._next[0]
        for _ in range(PLACE_STEPS_MAX):
            if not after or tick[after] > tick[slot]:
                break
            after = self._next[after]
        else:
            tick[slot] = tick[after] if after else tick[slot]
        self._link_before(slot, after)

    def _unlink(self, slot: int) -> None:
        before, after = self._prev[slot], self._next[slot]
        self._next[before] = after
        self._prev[after] = before
        self._flags[slot] &= ~_LINKED

    def _grow(self, slot: int) -> None:
        assert slot <= NODES_MAX, f"node {slot - 1} is beyond any index"
        grown = (slot // _GROWTH_NODES + 1) * _GROWTH_NODES - len(self._flags)
        for column in (self._tick, self._nbytes, self._prev, self._next, self._parent):
            column.frombytes(bytes(grown * column.itemsize))
        for column in (self._first_child, self._children, self._pins, self._flags, self._rounds):
            column.frombytes(bytes(grown * column.itemsize))


class Lru:
    """Plain least-recently-used order with pins; ignores parents. The baseline in benchmarks.

    Same preconditions as ``PrefixLru``. Pinned nodes leave the order and return as just used.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()
        self._pins: dict[int, int] = {}

    def admit(self, node: int, *, parent: int = -1, nbytes: int, identity: int | None = None) -> None:
        assert 0 <= node != parent, f"node {node} cannot be its own parent"
        assert node not in self, f"node {node} is in the tier already"
        self._order[node] = None

    def touch(self, node: int) -> None:
        assert node in self, f"node {node} is not in the tier"
        if node in self._order:
            self._order.move_to_end(node)

    def pin(self, node: int) -> None:
        assert node in self, f"node {node} is not in the tier"
        self._order.pop(node, None)
        self._pins[node] = self._pins.get(node, 0) + 1

    def unpin(self, node: int) -> None:
        pins = self._pins.get(node, 0)
        assert pins, f"node {node} is not pinned"
        if pins == 1:
            del self._pins[node]
            self._order[node] = None
        else:
            self._pins[node] = pins - 1

    def remove(self, node: int) -> None:
        assert node not in self._pins, f"node {node} is pinned"
        assert node in self._order, f"node {node} is not in the tier"
        del self._order[node]

    def victim(self) -> int | None:
        return next(iter(self._order), None)

    def __contains__(self, node: int) -> bool:
        return node in self._order or node in self._pins

    def __len__(self) -> int:
        return len(self._order) + len(self._pins)
