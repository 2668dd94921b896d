"""Operations that do not end: noticed by one timer, told to whoever waits for more than they can give.

A hung parallel file system fails nothing; it just does not answer. ``StallWatch`` calls ``on_change`` when an
operation has been in progress for longer than its limit, and again when none is any more. It has a timer only while
something is in progress, and none for what it has told already.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

from cascade_aio.abc.storage import Storage


class StallWatch:
    """Belongs to one event loop. ``limit_s``: longer is a stall."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.on_change: Callable[[], None] = lambda: None
        self.stalls = 0
        self._loop = asyncio.get_running_loop()
        self._started: dict[object, float] = {}
        self._overdue: set[object] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def stalled(self) -> bool:
        """Whether something has been in progress for longer than the limit."""
        return bool(self._overdue)

    @property
    def stalled_s(self) -> float:
        """How long the oldest such operation has taken; 0 without one."""
        begun = [self._started[token] for token in self._overdue]
        return self._loop.time() - min(begun) if begun else 0.0

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        """The scope of one operation."""
        token = object()
        self._started[token] = self._loop.time()
        if self._timer is None:
            self._arm()
        try:
            yield
        finally:
            del self._started[token]
            if token in self._overdue:
                self._overdue.discard(token)
                if not self._overdue:
                    self.on_change()

    def _arm(self) -> None:
        waiting = (begun for token, begun in self._started.items() if token not in self._overdue)
        oldest = next(waiting, None)  # in order of their beginning
        self._timer = None if oldest is None else self._loop.call_at(oldest + self.limit_s, self._look)

    def _look(self) -> None:
        now_s = self._loop.time()
        late = {token for token, begun in self._started.items() if begun + self.limit_s <= now_s}
        if late - self._overdue:
            self.stalls += not self._overdue
            self._overdue |= late
            self.on_change()
        self._arm()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def in_progress(storage: Storage) -> object:
    """What ``storage`` has done so far, while it is doing something; ``None`` while it is not.

    The same answer twice, and not ``None``: nothing has ended or begun meanwhile.
    """
    figures = storage.statistics()
    return figures if figures["in_progress"] else None


def watched(storage: Storage, watch: StallWatch) -> Storage:
    """``storage``, with every call of it watched."""
    return cast(Storage, _Watched(storage, watch))


class _Watched:
    """Delegates; a coroutine method is one operation."""

    def __init__(self, storage: Storage, watch: StallWatch) -> None:
        self._storage = storage
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._storage, name)
        if not inspect.iscoroutinefunction(method):
            return method

        @functools.wraps(method)
        async def call(*arguments: Any, **options: Any) -> Any:
            with self._watch.operation():
                return await method(*arguments, **options)

        setattr(self, name, call)
        return call
