"""Waiting for work that owns memory: a wait that cancellation cannot cut short.

Requests in the kernel and jobs in worker threads hold on to the caller's buffers. A cancelled waiter
therefore asks for the work to stop, keeps waiting until it has really ended, and only then raises
``CancelledError``. Invariant: when ``Completion.wait`` or ``wait_through`` returns or raises, nobody
touches the work's memory any more. Knows nothing of files or bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Completion:
    """One thing that will end. Belongs to the loop's thread; at most one task waits for it.

    The future inside never carries an exception: a waiter that was cancelled while the work failed
    would leave it unretrieved. Outcomes are kept by the subclass.
    """

    __slots__ = ("_future", "_loop", "finished")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self.finished = False

    def finish(self) -> None:
        """Wake the waiter (now or in its next turn). Loop thread only."""
        self.finished = True
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)

    async def wait(self, on_cancel: Callable[[Any], None] | None = None) -> None:
        """Return once finished; if cancelled meanwhile, call ``on_cancel(self)`` once, wait on, then raise."""
        cancelled: asyncio.CancelledError | None = None
        while not self.finished:
            # Cancelling a task cancels the future it waits for, hence a fresh one for each wait.
            self._future = self._loop.create_future()
            try:
                await self._future
            except asyncio.CancelledError as error:
                if cancelled is None and on_cancel is not None and not self.finished:
                    on_cancel(self)
                cancelled = error
        if cancelled is not None:
            raise cancelled


async def wait_through(future: asyncio.Future[T]) -> asyncio.CancelledError | None:
    """Wait until ``future`` is done whatever happens; returns the cancellation that came meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def call_in_thread(
    executor: Executor | None,
    function: Callable[P, T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Run a blocking call in ``executor`` (``None``: the loop's own); a cancelled caller awaits its end first."""
    return await call_with_undo(executor, lambda: function(*args, **kwargs), None)


async def call_with_undo(executor: Executor | None, function: Callable[[], T], undo: Callable[[T], None] | None) -> T:
    """Like ``call_in_thread``; when cancelled after success, ``undo(result)`` runs in ``executor`` first.

    For calls that hand out a resource (a descriptor, a lock), which a cancelled caller never sees.
    """
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(executor, function)
    cancelled = await wait_through(future)
    if cancelled is None:
        return future.result()
    if future.exception() is None and undo is not None:
        undoing = loop.run_in_executor(executor, undo, future.result())
        await wait_through(undoing)
        undoing.result()
    raise cancelled
