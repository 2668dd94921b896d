"""What the remote tier needs of a transport: ranks that can reach into each other's memory.

``MpiGroup`` is the real one; ``cascade_aio.testing.rma`` has one in memory, with faults. A group drives the
operations of ``core.remote_operations`` and knows nothing of blocks.
"""

from __future__ import annotations

import asyncio
import dataclasses
from concurrent.futures import Executor
from typing import Any, Generic, Protocol, TypeVar

from cascade_aio.core.remote_operations import Operation

T = TypeVar("T")

FACTS_BYTES_MAX = 2048
"""What a rank tells all others at opening."""


class Call(Generic[T]):
    """One operation under way. Loop thread only.

    ``outcome`` is its result; it fails with ``BrokenTierError`` when the group can do nothing any more, and with
    ``ThrottledError`` when too much is under way. ``settled`` is done, always without an error, when nobody touches
    the operation's buffers any more: usually with the outcome, later when a rank did not answer, never if it
    never does.
    """

    def __init__(self, operation: Operation[T], loop: asyncio.AbstractEventLoop) -> None:
        self.operation = operation
        self.outcome: asyncio.Future[T] = loop.create_future()
        self.outcome.add_done_callback(_heard)
        self.settled: asyncio.Future[None] = loop.create_future()
        self.abandoned = False

    def abandon(self) -> None:
        """Nobody wants the outcome: no further command is issued. ``settled`` comes all the same."""
        self.abandoned = True


def _heard(outcome: asyncio.Future[T]) -> None:
    """A failure that nobody waits for any more, because its caller was cancelled, is not worth a complaint."""
    if not outcome.cancelled():
        outcome.exception()


@dataclasses.dataclass(frozen=True, slots=True)
class Regions:
    """This rank's two regions, zeroed and writable; ``arena`` starts on a boundary of 2 MiB.

    ``arena`` is given back when nobody views it any more, ``control`` must not be touched after ``aclose``.
    """

    arena: memoryview
    control: memoryview


class RmaGroup(Protocol):
    """The ranks of one store. Loop thread only; no call but the first three waits for other ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def checks(self) -> Executor:
        """Where bytes that have landed are looked at, without the loop: ``Get.tell`` submits to it."""
        ...

    async def join(self, arena_bytes: int, control_bytes: int) -> Regions:
        """Collective, first: make regions of these sizes, which all others may reach into.

        Raises ``BrokenTierError`` if a rank refused or did not come.
        """
        ...

    async def agree(self, facts: bytes) -> list[bytes]:
        """Collective, after ``join``: tell ``facts``, hear everybody's. Raises as ``join``."""
        ...

    async def refuse(self, reason: str) -> None:
        """Collective, in place of ``join`` or ``agree``: this rank cannot go on, so nobody shall wait for it."""
        ...

    def submit(self, operation: Operation[T]) -> Call[T]:
        """Carry ``operation`` out. Never blocks. Raises nothing: failures are the outcome's."""
        ...

    def statistics(self) -> dict[str, Any]: ...

    async def aclose(self) -> None:
        """Leave: nothing is submitted any more. Regions that others may still read stay. Bounded; may be repeated."""
        ...
