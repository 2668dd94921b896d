"""Threads for blocking calls that nobody has to wait for in the end.

Those of ``concurrent.futures`` are joined when the interpreter exits: one call into a file system that hangs, and
the process never ends. These are daemons, and ``abandon`` lets go of whoever waits for them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from cascade_aio.io.errors import abandoned

P = ParamSpec("P")
T = TypeVar("T")

_Call = tuple["Future[Any]", Callable[[], Any]]


class DaemonThreads(Executor):
    """At most ``threads_max`` daemon threads, started as they are needed. ``submit`` from one thread only."""

    def __init__(self, threads_max: int, name: str) -> None:
        self._threads_max = threads_max
        self._name = name
        self._threads: list[threading.Thread] = []
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._waiting: set[Future[Any]] = set()
        self._abandoned = False
        self._ended = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn`` in a thread. Raises ``RuntimeError`` after ``shutdown``; after ``abandon`` the future fails."""
        if self._ended:
            raise RuntimeError(f"the threads {self._name} were shut down")
        future: Future[T] = Future()
        if self._abandoned:
            future.set_exception(abandoned("a call", None))
            return future
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        if len(self._threads) < min(self._threads_max, len(self._waiting)):
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def abandon(self) -> None:
        """Fail every call that has not ended with ``OSError`` (ETIMEDOUT), now, and all later ones."""
        self._abandoned = True
        for future in list(self._waiting):
            with contextlib.suppress(InvalidStateError):  # it has ended this moment
                future.set_exception(abandoned("a call", None))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after the calls already made. Never waits for them, whatever ``wait`` says."""
        self._ended = True
        for _ in self._threads:
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            del call
            if future.done():
                continue
            try:
                outcome = function()
            except BaseException as error:
                with contextlib.suppress(InvalidStateError):  # it was abandoned meanwhile
                    future.set_exception(error)
            else:
                with contextlib.suppress(InvalidStateError):
                    future.set_result(outcome)
                del outcome
            del future, function  # an idle thread keeps nothing
