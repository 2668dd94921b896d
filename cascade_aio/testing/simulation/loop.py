"""The loop of a simulation: virtual time, tasks and futures in an order that never depends on addresses.

What it is: ``async_solipsism``'s loop (its clock jumps to the next timer when nothing is ready) whose tasks and
futures hash by their number, so that sets of them are walked in the same order in every process; which task
belongs to which simulated process, so that one of them can be killed; and a bound on turns without time, so that
a busy loop is an error and no hang. Must not know the store.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import async_solipsism

TURNS_MAX = 2_000_000
"""Turns of the loop in one run; usual ones need some ten thousand."""

STANDSTILL_TURNS_MAX = 100_000
"""Turns in a row during which no virtual time passes: more is a busy wait."""

ENDING_S = 0.001
"""Between two attempts to end the tasks of a process that was killed."""

OWNER: contextvars.ContextVar[object] = contextvars.ContextVar("simulated-process", default=None)
"""The simulated process on whose behalf code runs; tasks inherit it."""


class LivelockError(Exception):
    """The loop turned and turned while nothing came to an end."""


class NumberedTask(asyncio.Task[Any]):
    """A task that hashes by its number and knows its ``owner``."""

    def __init__(self, coroutine: Any, *, loop: SimulationLoop, **options: Any) -> None:
        self.number = loop.next_number()
        context = options.get("context")
        self.owner = OWNER.get() if context is None else context.get(OWNER)
        super().__init__(coroutine, loop=loop, **options)

    def __hash__(self) -> int:
        return self.number


class NumberedFuture(asyncio.Future[Any]):
    """A future that hashes by its number."""

    def __init__(self, *, loop: SimulationLoop) -> None:
        self.number = loop.next_number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class SimulationLoop(async_solipsism.EventLoop):  # type: ignore[misc]
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = 0
        self.turns = 0
        self._standstill = 0
        self._last_s = -1.0
        self.set_task_factory(_make_task)

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def create_future(self) -> asyncio.Future[Any]:
        return NumberedFuture(loop=self)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """As always, but never for less than a tick from now: such a wait would end without time having passed."""
        now_s = self.time()
        due_s = max(when, now_s + self._clock_resolution) if when > now_s else when
        timer: asyncio.TimerHandle = super().call_at(due_s, callback, *args, context=context)
        return timer

    def _run_once(self) -> None:
        self.turns += 1
        now_s = self.time()
        if now_s != self._last_s:
            self._last_s = now_s
            self._standstill = 0
        else:
            self._standstill += 1
        if self.turns > TURNS_MAX or self._standstill > STANDSTILL_TURNS_MAX:
            self.turns = self._standstill = 0  # whoever cleans up may use the loop again
            raise LivelockError(f"the loop is busy and nothing ends, at {now_s:.3f} s")
        super()._run_once()


def _make_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any] | Generator[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    assert isinstance(loop, SimulationLoop), loop
    return NumberedTask(coroutine, loop=loop, **options)


def tasks_of(owner: object) -> list[NumberedTask]:
    """Tasks of a simulated process that have not ended, oldest first."""
    found = [task for task in asyncio.all_tasks() if isinstance(task, NumberedTask) and task.owner is owner]
    return sorted(found, key=lambda task: task.number)


async def end_tasks(owner: object) -> None:
    """Cancel the tasks of ``owner`` until all have ended: one that cleans up meets calls that never return."""
    while others := [task for task in tasks_of(owner) if task is not asyncio.current_task()]:
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=ENDING_S)
