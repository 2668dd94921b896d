"""The eviction interface: events in, victims out. Pure; one object per tier budget.

A *node* is a block's row number in the index (small non-negative integers, reused after removal).
Nodes form a forest through ``parent``: the block that precedes it in a prompt. Implementations
promise: a pinned node is never a victim; while a node has children in the same tier it is no victim;
the same events give the same victims; each event is O(log n) or better, no clock, no randomness of
their own.
"""

from __future__ import annotations

from typing import Protocol


class EvictionPolicy(Protocol):
    def admit(self, node: int, *, parent: int = -1, nbytes: int, identity: int | None = None) -> None:
        """A copy of ``node`` entered the tier (unpinned, just used). ``parent`` is -1 for none; a
        parent that is not in the tier (now) is remembered and counts once it enters. ``identity`` is
        a number of up to 64 bits that names the block for ever (from its prefix key): by it a policy
        may recognise a block that was evicted and comes back, which a node number cannot tell."""
        ...

    def touch(self, node: int) -> None:
        """The copy was used. Callers that use a chain touch the last block first."""
        ...

    def pin(self, node: int) -> None:
        """Refuse eviction until as many ``unpin`` came."""
        ...

    def unpin(self, node: int) -> None: ...

    def remove(self, node: int) -> None:
        """The copy left the tier (evicted, deleted). Its number may be admitted again later."""
        ...

    def victim(self) -> int | None:
        """The node to evict next, still in the tier until ``remove``; ``None`` if nothing may go."""
        ...

    def __contains__(self, node: int) -> bool: ...

    def __len__(self) -> int: ...
