"""What must be true of every block and name, from the history of puts, deletions, flushes, deaths and looks.

Pure: it is told what was called and what came of it, in order, and says what a store must and must not give. Time
is the number of an event. A *life* is one open store, from its opening to its end. It *looks* when it opens and when
it refreshes; a look with a failed read in it, or beside another writer's removals, proves nothing and counts for
nothing. An event is *durable* once a later flush of its life came back, or a clean close. It is *decided* once it is
durable, or its life has ended: what that has left by then is all there will ever be. A life *knows* its own events,
and those that were durable before its last look began; of those decided by then it knows whether they are there.

A block **must** be there for a life that knows a put of it, unless some deletion may cover that put. It **must not**
be there if every put of it that may have stored something is covered for certain by a deletion that the life knows.
(What a life does not have to know it may have heard of all the same: compaction and adoption look, too.) A deletion
*may cover* a put unless the put's life knew what became of it; it covers it *for certain* if the put had ended before,
and in the same life, or known to it, or with clocks that agree.

What is exempt, and why:

* A put that was under way when its life died, and one that found its name bound to another block, may have stored
  something or not: nobody was promised anything. A put that raised or was cancelled has stored nothing: exact.
* Deletions of other lives that a put's life did not know: a put that finds the block there writes nothing, so the
  deletion may take it along. Nobody can know better without asking all other writers.
* With clocks that disagree, a deletion covers what its life knew, and perhaps more: stamps decide.
* A disk budget evicts: a block may be missing as often as the stores say that they evicted one
  (``evicted_blocks``), not once more; so may a name of a block that stays (``evicted_names``). What was evicted may
  come back after a crash: its record is removed later.
* What the medium damaged (``Injury``) may be missing, or raise, or (a damaged deletion) come back; then the damage
  must have been reported with path and offset in that record, except where nothing on disk tells damage from a write
  that a crash cut short (FORMAT.md, Recovery 3: behind the last sync that a later header speaks of).
* Another writer that removed segments since our last look: what was moved is a miss until the next look, because
  nothing tells a reader (FORMAT.md, Who may write what).
* A name that was never flushed may survive a crash that its block does not, in a note: it names the block again when
  that is put again. The bytes are those that the client had named so.
* Of several records of a block in open segments of others, one that its writer never finished may be the one that
  is known: then the block is a miss until the next look, which tells the others again.
* A refresh stops at a hole in an open segment of another writer, who may be about to fill it: where the medium has
  made one, what others put may be missing, and what they deleted may be there, until that segment is sealed or the
  store is opened again: that look goes on behind holes. So of a life whose segments were damaged while open the others
  know what they had heard before, and what their opening looked at.
* What the dead have left is read by whoever opens in their directory, and not by its refreshes (FORMAT.md, Recovery):
  after an opening with a failed read in it, what they put may be missing, and what they deleted may be there, until the
  next opening.
* A name put under several blocks resolves to the first, where the calls tell which that is (``winner``), else to one of
  them: stamps decide, which clients do not see. After a deletion of any of them it may resolve to nothing: puts that
  were told another block's id have stored nothing.
* Errors are allowed where their cause was injected: see ``judging``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


class BrokenPromise(AssertionError):
    """The store did what it promised never to do. ``promise`` is the number in the issue (1 to 5)."""

    def __init__(self, promise: int, message: str) -> None:
        super().__init__(f"promise {promise}: {message}")
        self.promise = promise


@dataclasses.dataclass(slots=True, eq=False)
class Life:
    """One open store, as far as the oracle knows it. Times are event numbers; 0: not yet."""

    number: int
    slot: int
    budget: bool
    opened: int = 0
    ended: int = 0
    heard: int = 0
    """When the last look that counts began."""
    removals: int = 0
    """Removals by other lives so far."""
    removals_heard: int = 0
    """How many of them the last look that counts has taken in."""

    deaf: dict[Life, int] = dataclasses.field(default_factory=dict)
    """Lives whose segments the medium has damaged, or an opening could not read, with when the last look began that was
    sure to hear them."""
    blind: dict[int, int] = dataclasses.field(default_factory=dict)
    """Blocks that it has forgotten after a record of them came to nothing, with ``heard`` of that moment."""

    @property
    def shaken(self) -> bool:
        """Others removed segments of which it has not heard."""
        return self.removals != self.removals_heard


@dataclasses.dataclass(slots=True, eq=False)
class _Event:
    life: Life
    block: int
    began: int
    heard: int
    ended: int = 0
    durable: int = 0
    void: bool = False

    @property
    def decided(self) -> int:
        """Since when whoever looks knows whether it is there; 0 for not yet."""
        return self.durable or self.life.ended


@dataclasses.dataclass(slots=True, eq=False)
class Put(_Event):
    """``stored``: ``None`` for perhaps. ``firm`` until the block was evicted or damaged: then it need not be there."""

    name: int | None = None
    stored: bool | None = None
    firm: bool = True
    vanished: bool = False
    """Not there when all that is left was looked at; its name may be, in a note, and wait for the block."""


@dataclasses.dataclass(slots=True, eq=False)
class Delete(_Event):
    """``sound`` until the medium damaged it."""

    sound: bool = True


class Oracle:
    """See the module's docstring."""

    def __init__(self, *, skewed: bool) -> None:
        self._skewed = skewed
        self._time = 0
        self.lives: list[Life] = []
        self.puts: dict[int, list[Put]] = {}
        self.deletes: dict[int, list[Delete]] = {}
        self._open_ended: dict[Life, list[_Event]] = {}
        self._damaged: dict[Life, None] = {}
        self.evictions_seen = 0
        self.evicted_names_seen = 0

    def now(self) -> int:
        """The next event's number."""
        self._time += 1
        return self._time

    # -- lives ---------------------------------------------------------------------------------

    def born(self, slot: int, *, budget: bool) -> Life:
        """A store is about to be opened."""
        life = Life(len(self.lives), slot, budget, deaf=dict.fromkeys(self._damaged, 0))
        self.lives.append(life)
        self._open_ended[life] = []
        return life

    def look_begins(self, life: Life) -> tuple[int, int]:
        """A token for ``look_ends``."""
        return self.now(), life.removals

    def look_ends(self, life: Life, token: tuple[int, int], *, counts: bool) -> bool:
        """``counts``: it ended well and no read failed in it. Whether it counts after all."""
        began, removals = token
        failed = not counts
        counts = counts and life.removals == removals
        if counts and began > life.heard:
            life.heard, life.removals_heard = began, removals
        if not life.opened:
            life.opened = self.now()
            if counts:
                life.deaf = dict.fromkeys(life.deaf, began)
            elif failed:  # which of their directories is its own now is not known here
                life.deaf.update((other, 0) for other in self.lives if other.ended)
        return counts

    def removed_segments(self, by: Life) -> None:
        """``by`` removed segment files just now, or may have."""
        for life in self.lives:
            if life is not by and not life.ended:
                life.removals += 1

    def damaged(self, writers: Iterable[Life]) -> None:
        """The medium damaged an open segment of one of these lives: no refresh is sure to hear more of them now."""
        for writer in writers:
            self._damaged[writer] = None
            for life in self.lives:
                if life is not writer and not life.ended:
                    life.deaf.setdefault(writer, life.heard)

    def died(self, life: Life) -> None:
        """Killed, or its node; also after a close that failed. What was under way stays open for ever."""
        life.ended = self.now()
        for event in self._open_ended[life]:
            event.ended = event.ended or life.ended
        self._open_ended[life].clear()

    # -- events --------------------------------------------------------------------------------

    def put_begins(self, life: Life, block: int, name: int | None) -> Put:
        put = Put(life, block, self.now(), life.heard, name=name)
        self.puts.setdefault(block, []).append(put)
        self._open_ended[life].append(put)
        return put

    def put_ends(self, put: Put, *, stored: bool | None) -> None:
        """``stored``: ``False`` if it raised, ``None`` if it came back with another block's id."""
        if not put.ended:
            put.ended = self.now()
        put.stored = stored
        if stored is False:
            put.void = True

    def deleted(self, life: Life, block: int) -> None:
        """``delete`` came back."""
        now = self.now()
        event = Delete(life, block, now, life.heard, ended=now)
        self.deletes.setdefault(block, []).append(event)
        self._open_ended[life].append(event)

    def flushed(self, life: Life, began: int) -> None:
        """A flush that began then came back: everything that had ended by then is durable."""
        now = self.now()
        still: list[_Event] = []
        for event in self._open_ended[life]:
            if event.ended and event.ended <= began:
                if not event.void:
                    event.durable = now
            else:
                still.append(event)
        self._open_ended[life] = still

    # -- what must be ----------------------------------------------------------------------------

    def _heard(self, life: Life, heard: int, of: Life) -> int:
        """When the last look of ``life`` began that was sure to hear ``of``; ``heard``: the last one that counts."""
        return min(heard, life.deaf.get(of, heard))

    def _knows(self, life: Life, event: _Event) -> bool:
        if event.life is life:
            return bool(event.ended)
        return bool(event.durable) and event.durable < self._heard(life, life.heard, event.life)

    def _is_newer(self, put: Put, delete: Delete) -> bool:
        """The put's life knew of the deletion: its record cannot be covered."""
        if delete.life is put.life:
            return delete.began < put.began
        return bool(delete.decided) and delete.decided < self._heard(put.life, put.heard, delete.life)

    def _covers(self, delete: Delete, put: Put) -> bool:
        """The deletion takes what the put stored, for certain."""
        if not put.ended or put.ended >= delete.began:
            return False
        if put.life is delete.life or not self._skewed:
            return True
        return bool(put.decided) and put.decided < self._heard(delete.life, delete.heard, put.life)

    def _safe(self, put: Put) -> bool:
        return not any(
            not delete.void and not self._is_newer(put, delete) for delete in self.deletes.get(put.block, ())
        )

    def must_see(self, life: Life, block: int, name: int | None = None) -> bool:
        """Whether ``life`` has to find the block (by that name of it)."""
        return any(
            put.stored is True
            and put.firm
            and not put.void
            and not put.vanished
            and (name is None or put.name == name)
            and self._knows(life, put)
            and self._safe(put)
            for put in self.puts.get(block, ())
        )

    def must_not_see(self, life: Life, block: int, name: int | None = None) -> bool:
        """Whether ``life`` cannot find the block (by that name of it)."""
        return all(
            put.void
            or (put.vanished and name is None)
            or (name is not None and put.name != name)
            or any(
                not delete.void and delete.sound and self._knows(life, delete) and self._covers(delete, put)
                for delete in self.deletes.get(block, ())
            )
            for put in self.puts.get(block, ())
        )

    def candidates(self, name: int) -> set[int]:
        """Blocks that a shared name may name."""
        return {block for block, puts in self.puts.items() if any(put.name == name and not put.void for put in puts)}

    def must_resolve(self, life: Life, name: int) -> bool:
        """Whether a shared name has to name something: none of its blocks was ever deleted."""
        candidates = self.candidates(name)
        if any(self.deletes.get(block) for block in candidates):
            return False
        return any(self.must_see(life, block, name) for block in candidates)

    def winner(self, life: Life, name: int) -> int | None:
        """The block that a shared name has to name, if the calls tell: all that put it under this name had ended before
        any other block was. ``None``: stamps decide, or a deletion does."""
        claims: dict[int, list[Put]] = {}
        for block, puts in self.puts.items():
            if found := [put for put in puts if put.name == name and not put.void]:
                claims[block] = found
        if self._skewed or not claims or any(self.deletes.get(block) for block in claims):
            return None
        first = min(claims, key=lambda block: claims[block][0].began)
        ended = [put.ended for put in claims.pop(first)]
        later = min((put.began for puts in claims.values() for put in puts), default=max(ended) + 1)
        return first if all(0 < at < later for at in ended) and self.must_see(life, first, name) else None

    # -- what ends promises ------------------------------------------------------------------------

    def give_up(self, block: int) -> None:
        """The block was evicted, or the medium damaged it: what was put so far need not be there any more."""
        for put in self.puts.get(block, ()):
            put.firm = False

    def doubt_deletions(self, blocks: Iterable[int]) -> None:
        """The medium damaged what told of deletions of these blocks."""
        for block in blocks:
            for delete in self.deletes.get(block, ()):
                delete.sound = False

    def settle(self, life: Life, present: set[int]) -> None:
        """All other lives have ended, and ``life`` has looked at everything: what it has found is durable now,
        and what it has not found never comes back. For one process per root: it adopts what it finds."""
        for block, puts in self.puts.items():
            deletes = self.deletes.get(block, [])
            if block not in present:
                for put in puts:  # with a budget it may have been evicted, and its record still be there
                    put.vanished = put.vanished or (put.life is not life and put.firm and not life.budget)
                continue
            others = [put for put in puts if not put.void and not put.vanished and put.life is not life]
            for delete in deletes:
                if not delete.durable and all(self._covers(delete, put) for put in others):
                    delete.void = True  # had it survived, the block would not be there
            now = self.now()
            found = Put(life, block, now, now, ended=now, durable=now, stored=True)
            found.firm = any(put.firm for put in puts)
            puts.append(found)
