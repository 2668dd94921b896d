"""The life of one copy of a block in one tier, as one table.

``absent → filling → sealed → (copying) → evicting → absent``. A copy never moves: the block is
copied to another tier first, and the source is dropped after that copy is sealed. Tiers keep a
``CopyState`` per copy and change it only through ``advance``, so whatever is not in the table is a
bug that is noticed where it happens. Pure: knows no tier, no extent, no clock.

What each state permits is in ``PERMITS``:

========  ========  =======  =========  ==================================================
state     readable  counted  evictable  who owns the extent
========  ========  =======  =========  ==================================================
absent    no        no       no         nobody: it is free
filling   no        yes      no         the one writer that reserved it (put, read, reserve)
sealed    yes       yes      if no pin  the tier; leases and pins only borrow it
copying   yes       yes      no         the tier, lent to the copy: it may not be freed
evicting  no        yes      no         the tier, until the last borrower has let go
========  ========  =======  =========  ==================================================

*Readable* is the right to hand out new leases; a lease taken before stays valid in ``evicting``,
which is why the bytes stay counted until ``evicted``. Several copies out of one sealed block are one
``copying``: the tier counts them, the first is ``copy`` and the last is ``copied``.
"""

from __future__ import annotations

import dataclasses
import enum
from types import MappingProxyType

from cascade_aio.errors import InternalError


class CopyState(enum.Enum):
    """Where a copy is in its life. ``ABSENT`` is also the state of whatever is not known."""

    ABSENT = "absent"
    FILLING = "filling"
    SEALED = "sealed"
    COPYING = "copying"
    EVICTING = "evicting"


class CopyEvent(enum.Enum):
    """What may happen to a copy.

    ``reserve``  an extent was allocated and given to one writer.
    ``seal``     the bytes are complete and checked (or known good): readable from now on.
    ``abort``    the writer failed or was cancelled: the extent goes back at once.
    ``copy``     the first transfer out of this copy started (write-behind, promotion, remote read).
    ``copied``   the last transfer out of it ended, well or badly.
    ``evict``    chosen as victim, or deleted: no new leases.
    ``keep``     an eviction is called off (it was asked for again, or its demotion failed).
    ``evicted``  the last borrower let go and the extent was freed.
    ``lose``     damaged or gone from outside: no new leases, whoever still borrows it.
    """

    RESERVE = "reserve"
    SEAL = "seal"
    ABORT = "abort"
    COPY = "copy"
    COPIED = "copied"
    EVICT = "evict"
    KEEP = "keep"
    EVICTED = "evicted"
    LOSE = "lose"


@dataclasses.dataclass(frozen=True, slots=True)
class Permits:
    """What a state allows. ``counted``: its bytes belong to the tier's budget."""

    readable: bool
    counted: bool
    evictable: bool
    owner: str


PERMITS = MappingProxyType(
    {
        CopyState.ABSENT: Permits(readable=False, counted=False, evictable=False, owner="nobody"),
        CopyState.FILLING: Permits(readable=False, counted=True, evictable=False, owner="the writer"),
        CopyState.SEALED: Permits(readable=True, counted=True, evictable=True, owner="the tier"),
        CopyState.COPYING: Permits(readable=True, counted=True, evictable=False, owner="the tier, lent to the copy"),
        CopyState.EVICTING: Permits(readable=False, counted=True, evictable=False, owner="the tier, until released"),
    }
)

TRANSITIONS = MappingProxyType(
    {
        (CopyState.ABSENT, CopyEvent.RESERVE): CopyState.FILLING,
        (CopyState.FILLING, CopyEvent.SEAL): CopyState.SEALED,
        (CopyState.FILLING, CopyEvent.ABORT): CopyState.ABSENT,
        (CopyState.SEALED, CopyEvent.COPY): CopyState.COPYING,
        (CopyState.COPYING, CopyEvent.COPIED): CopyState.SEALED,
        (CopyState.SEALED, CopyEvent.EVICT): CopyState.EVICTING,
        (CopyState.SEALED, CopyEvent.LOSE): CopyState.EVICTING,
        (CopyState.COPYING, CopyEvent.LOSE): CopyState.EVICTING,
        (CopyState.EVICTING, CopyEvent.KEEP): CopyState.SEALED,
        (CopyState.EVICTING, CopyEvent.EVICTED): CopyState.ABSENT,
    }
)
"""Everything that may happen; what is not here is refused. A copy lost while it is being copied goes
to ``evicting`` like any other: the transfer is one more borrower that ``evicted`` waits for."""


def advance(state: CopyState, event: CopyEvent) -> CopyState:
    """The state after ``event``. Raises ``InternalError`` naming both when the table has no such row."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        allowed = ", ".join(known.value for origin, known in TRANSITIONS if origin is state)
        raise InternalError(
            f"a copy that is {state.value!r} cannot {event.value!r} (it can: {allowed}); please report this"
        ) from None


def render_mermaid() -> str:
    """The table as a Mermaid state diagram, for the design notes. Ends with a newline."""
    lines = ["stateDiagram-v2", f"    [*] --> {CopyState.ABSENT.value}"]
    merged: dict[tuple[CopyState, CopyState], list[str]] = {}
    for (origin, event), target in TRANSITIONS.items():
        merged.setdefault((origin, target), []).append(event.value)
    lines += [
        f"    {origin.value} --> {target.value}: {' / '.join(names)}" for (origin, target), names in merged.items()
    ]
    return "\n".join(lines) + "\n"
