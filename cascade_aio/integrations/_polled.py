"""A store for an engine that is no event loop: it runs only while the engine polls, in the engine's own thread.

Inference servers call their connectors from a busy loop that holds the GIL; a loop in a second Python thread
would get it every 5 ms at best. Here the engine's own polls turn the loop: ``submit`` starts a coroutine,
``poll`` lets whatever is ready go on, without blocking, and says what has ended. I/O is in the kernel and byte
work in the store's workers meanwhile.

Invariants: all calls come from one thread, which runs no event loop of its own; nothing makes progress between
polls but I/O and byte work already begun; what was submitted ends before ``close`` returns. Knows no server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from cascade_aio.errors import CascadeError, ClosedError, ConfigError
from cascade_aio.integrations._opening import AnyStore, Place

T = TypeVar("T")

TURNS_PER_POLL = 4
"""Turns of the loop in one poll: a completion wakes a task in the first, what that task asks for leaves in the second
or third. A turn without work takes some 20 us."""

IDLE_WAIT_S = 0.05
"""How long ``drain`` and ``close`` wait for the next event at a time."""


class Submitted(Generic[T]):
    """A coroutine on its way. ``error`` and ``result`` after ``done``."""

    __slots__ = ("_task",)

    def __init__(self, task: asyncio.Task[T]) -> None:
        self._task = task

    @property
    def done(self) -> bool:
        return self._task.done()

    @property
    def error(self) -> BaseException | None:
        """What it ended with, ``None`` for success. A cancellation is an error, too."""
        if self._task.cancelled():
            return asyncio.CancelledError("cancelled")
        return self._task.exception()

    @property
    def result(self) -> T:
        return self._task.result()


def check_expected(error: BaseException) -> None:
    """What the outside did is a miss, a defect of ours is raised in the engine's loop."""
    if not isinstance(error, CascadeError | OSError | asyncio.CancelledError):
        raise error


class PolledStore:
    """An open store and the loop it lives in; see the module's docstring."""

    def __init__(self, place: Place) -> None:
        """Open the store: blocks until it is open. Errors as of ``Place.opened``."""
        _refuse_running_loop()
        self._loop = asyncio.new_event_loop()
        self._submitted: set[asyncio.Task[Any]] = set()
        try:
            self.store: AnyStore = self._loop.run_until_complete(place.opened())
        except BaseException:
            self._loop.close()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Submitted[T]:
        """Start ``coroutine``; it runs in the polls to come. Does not block."""
        if self._loop.is_closed():
            coroutine.close()
            raise ClosedError("this store was closed; open another one")
        task = self._loop.create_task(coroutine)
        self._submitted.add(task)
        task.add_done_callback(self._submitted.discard)
        return Submitted(task)

    def call(self, function: Callable[[AnyStore], T]) -> T:
        """``function(store)``, for what does not wait: lookups. As if called in the loop, without a turn of it."""
        asyncio._set_running_loop(self._loop)  # what loops of other libraries call; a turn would cost 20 us a lookup
        try:
            return function(self.store)
        finally:
            asyncio._set_running_loop(None)

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    @property
    def pending(self) -> int:
        """Coroutines that have not ended."""
        return sum(not task.done() for task in self._submitted)

    def poll(self) -> None:
        """Let everything that is ready go on. Does not wait; some 0.1 ms and what the tasks do."""
        for _ in range(TURNS_PER_POLL):
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()

    def drain(self) -> None:
        """Return once nothing submitted is left. Blocks; for resets and shutdown."""
        while self._submitted:
            self._loop.run_until_complete(asyncio.wait(list(self._submitted), timeout=IDLE_WAIT_S))

    def close(self) -> None:
        """Finish what was submitted, flush and close the store, end the loop. Blocks; repeated calls do nothing.

        Raises what closing the store raises, after all is closed.
        """
        if self._loop.is_closed():
            return
        try:
            self.drain()
            self._loop.run_until_complete(self.store.aclose())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


def _refuse_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigError(
        "an event loop runs in this thread already: open the store in it (async with open_store(...)), "
        "or poll one from a thread without a loop"
    )
