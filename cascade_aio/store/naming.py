"""Which block a prefix key names when several blocks claim it, and what waits until that can be said.

The rule (FORMAT.md, "What wins"): of the blocks that are there, the one whose claim is oldest; of equal claims the
smaller block id. So all who read a root agree, in whatever order they read it, and whatever was compacted. Two
writers that compute the same prompt produce such claims all the time: their bytes differ in the last bits.

A claim that lost is a *rival*: it is remembered, because its block keeps its name on disk, and names the block as
soon as the winner has gone. A claim whose block is not known yet *waits* until ``settle``, the end of a look at
the root.

What it must not know: where blocks lie, and who reads what when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cascade_aio.core.index import BlockIndex
from cascade_aio.errors import TierFullError

WAITING_NAMES_MAX = 1_000_000
"""Claims that wait for their block's record during one look; beyond, the newest are dropped (a miss)."""

RIVALS_MAX = 200_000
"""Claims that lost and are remembered, some 400 bytes each; beyond, the oldest are forgotten: then a block loses its
name with the winner, until the segments are read again."""


class Name(NamedTuple):
    """A claim: ``key`` names the block since ``stamp``; ``parent`` precedes it in the prompt."""

    block_id: bytes
    key: bytes
    parent: bytes | None
    stamp: int


class NameKeeper:
    """The names in an index. Synchronous; microseconds per call."""

    def __init__(self, index: BlockIndex) -> None:
        self.index = index
        self.is_live: Callable[[bytes, int], bool] = lambda block_id, stamp: True
        """Whether no deletion covers a claim of this stamp."""
        self.doubtful: set[bytes] = set()
        """Names whose claim is not known to be durable: it may vanish with its writer, though the block does not."""
        self._waiting: dict[bytes, list[tuple[Name, bool]]] = {}
        self._waiting_count = 0
        self._rivals: dict[bytes, dict[bytes, Name]] = {}
        self.rivals_count = 0

    def claim(self, name: Name, *, provisional: bool = False) -> None:
        """``name`` was heard of; ``provisional``: its record may come to nothing.

        Raises ``TierFullError`` at the limit of prefix keys, and changes nothing then.
        """
        if not self.is_live(name.block_id, name.stamp):
            return
        index = self.index
        row = index.find(name.block_id)
        if row < 0:
            self._wait(name, provisional)
            return
        held = index.binding(name.key)
        if held is None or held[0] == row:
            if index.bind(name.key, row, name.parent, name.stamp) or not provisional:
                self._doubt(name.key, provisional)
            if self._rivals and name.key in self._rivals:
                self._forget(name.key, name.block_id)
                self._settle_rivalry(name.key)
            return
        holder = Name(index.block_id(held[0]), name.key, held[1], held[2])
        if _precedence(name) < _precedence(holder) and name.block_id not in self._rivals.get(name.key, ()):
            self._replace(holder, held[0], name)
            self._doubt(name.key, provisional)
        else:
            self._remember(name)

    def _doubt(self, key: bytes, provisional: bool) -> None:
        if provisional:
            self.doubtful.add(key)
        elif self.doubtful:
            self.doubtful.discard(key)

    def appeared(self, block_id: bytes) -> None:
        """The block is in the index now: what waited for it is claimed."""
        for name, provisional in self._waiting.pop(block_id, ()):
            self._waiting_count -= 1
            self.claim(name, provisional=provisional)

    def settle(self) -> None:
        """The look is over: the blocks that claims still wait for are not there."""
        self._waiting.clear()
        self._waiting_count = 0

    def contested(self, row: int) -> list[bytes]:
        """The names of ``row`` that others claim, too: to be told to ``freed`` once they name nothing."""
        if not self._rivals:
            return []
        return [key for key, _ in self.index.bindings(row) if key in self._rivals]

    def freed(self, keys: Iterable[bytes]) -> None:
        """These names may name nothing any more: the oldest rival whose block is there takes over."""
        for key in keys:
            if key in self._rivals and self.index.find_prefix(key) < 0:
                self._settle_rivalry(key)

    def rivals(self) -> Iterator[Name]:
        """The claims of blocks that are there which lost, for the checkpoint."""
        for names in self._rivals.values():
            yield from (name for name in names.values() if self.index.find(name.block_id) >= 0)

    def remember(self, names: Iterable[Name]) -> None:
        """What ``rivals`` gave at the end of an earlier session. Before anything is claimed."""
        for name in names:
            self._remember(name)

    # -- waiting and losing -----------------------------------------------------------------------

    def _wait(self, name: Name, provisional: bool) -> None:
        if self._waiting_count < WAITING_NAMES_MAX:
            self._waiting.setdefault(name.block_id, []).append((name, provisional))
            self._waiting_count += 1

    def _remember(self, name: Name) -> None:
        names = self._rivals.get(name.key)
        known = None if names is None else names.get(name.block_id)
        if known is None:
            while self.rivals_count >= RIVALS_MAX:
                self.rivals_count -= len(self._rivals.pop(next(iter(self._rivals))))
            self.rivals_count += 1
        if known is None or known.stamp < name.stamp:
            self._rivals.setdefault(name.key, {})[name.block_id] = name

    def _forget(self, key: bytes, block_id: bytes) -> None:
        names = self._rivals[key]
        if names.pop(block_id, None) is not None:
            self.rivals_count -= 1
        if not names:
            del self._rivals[key]

    def _settle_rivalry(self, key: bytes) -> None:
        """Let the oldest of all claims to ``key`` win whose block is there; deleted ones are forgotten."""
        index = self.index
        there: list[Name] = []
        for name in list(self._rivals.get(key, {}).values()):
            if not self.is_live(name.block_id, name.stamp):
                self._forget(key, name.block_id)
            elif index.find(name.block_id) >= 0:
                there.append(name)
        if not there:
            return
        best = min(there, key=_precedence)
        held = index.binding(key)
        if held is None:
            if self._take(best):
                self._forget(key, best.block_id)
            return
        holder = Name(index.block_id(held[0]), key, held[1], held[2])
        if _precedence(best) < _precedence(holder):
            self._forget(key, best.block_id)
            self._replace(holder, held[0], best)

    def _replace(self, holder: Name, row: int, winner: Name) -> None:
        """``winner``, whose block is there, takes the key from ``holder``, which is in ``row``."""
        self.index.unbind(holder.key)
        if self._take(winner):
            self._remember(holder)
        else:
            self.index.bind(holder.key, row, holder.parent, holder.stamp)  # in the place that it had just now
            self._remember(winner)

    def _take(self, name: Name) -> bool:
        """Bind a key that names nothing; ``False`` if there is no room for its parent. Whether the claim is durable is
        not remembered."""
        try:
            self.index.bind(name.key, self.index.find(name.block_id), name.parent, name.stamp)
        except TierFullError:
            return False
        self.doubtful.add(name.key)
        return True


def _precedence(name: Name) -> tuple[int, bytes]:
    return name.stamp, name.block_id
