"""A store for callers on threads of their own: it lives in an event loop in one thread more.

For servers whose connectors are called from several threads and notified by file descriptors. Any thread
submits; ``on_done`` is called on the loop's thread when the coroutine has ended. Where one thread polls in a
busy loop, ``_polled`` is the better face.

Invariants: what was submitted before ``close`` ends before ``close`` returns; the store is only touched on the
loop's thread. Knows no server.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from cascade_aio.errors import ClosedError
from cascade_aio.integrations._opening import AnyStore, Place

T = TypeVar("T")


class ThreadedStore:
    """An open store and its thread."""

    def __init__(self, place: Place) -> None:
        """Open the store: blocks until it is open. Errors as of ``Place.opened``."""
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._running: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="cascade-store", daemon=True)
        self._thread.start()
        try:
            self.store: AnyStore = asyncio.run_coroutine_threadsafe(place.opened(), self._loop).result()
        except BaseException:
            self._end_thread()
            raise

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()

    def submit(
        self, make: Callable[[AnyStore], Coroutine[Any, Any, T]], on_done: Callable[[Future[T]], None] | None = None
    ) -> Future[T]:
        """Run ``make(store)`` in the loop. Does not block. Raises ``ClosedError`` after ``close``.

        ``on_done`` is called with the finished future on the loop's thread and must not block or raise.
        """
        future: Future[T] = Future()
        if on_done is not None:
            future.add_done_callback(on_done)
        with self._lock:  # so that nothing comes after the close that waits for what came before
            if self._closed:
                raise ClosedError("this store was closed; open another one")
            self._loop.call_soon_threadsafe(self._start, make, future)
        return future

    def _start(self, make: Callable[[AnyStore], Coroutine[Any, Any, T]], future: Future[T]) -> None:
        task = self._loop.create_task(_settle(make(self.store), future))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def close(self) -> None:
        """Finish what was submitted, flush and close the store, end the thread. Blocks; repeated calls do nothing.

        Raises what closing the store raises, after all is closed.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        finally:
            self._end_thread()

    async def _finish(self) -> None:
        while self._running:
            await asyncio.wait(list(self._running))
        await self.store.aclose()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _settle(coroutine: Coroutine[Any, Any, T], future: Future[T]) -> None:
    """Whatever comes of ``coroutine`` goes to ``future``."""
    try:
        result = await coroutine
    except BaseException as error:
        future.set_exception(error)
        if isinstance(error, asyncio.CancelledError):
            raise
    else:
        future.set_result(result)
