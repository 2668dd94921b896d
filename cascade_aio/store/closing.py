"""Closing a store: nothing new comes in, what was put becomes durable, everything is given back.

The order is the reverse of opening. Each step runs even when one before it failed or the caller was
cancelled; the first error is raised at the end.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable

from cascade_aio.errors import ClosedError, TierStalledError
from cascade_aio.store.context import StoreContext
from cascade_aio.tiers.stalls import in_progress


async def close_store(context: StoreContext) -> None:
    """See ``Store.aclose``. A cancelled close still closes everything, then raises ``CancelledError``."""
    context.closed = True
    context.prefaulted.set()  # whoever waits looks again
    gone = ClosedError(f"the store on {context.config.root} was closed while the call waited for room")
    context.room.close(gone)
    context.disk.close_backlog(gone)
    context.desk.settle()
    if context.desk.leases:
        warnings.warn(
            f"the store on {context.config.root} was closed while {context.desk.describe()}; their memory stays "
            "mapped until they are released",
            ResourceWarning,
            stacklevel=2,
        )
        if context.publisher is not None:  # what is still read must not become the next owner's room
            context.publisher.discard_arena()
    try:
        await _run_unless_stuck(context)
    finally:
        context.catalog.forget_copies()


async def _run_unless_stuck(context: StoreContext) -> None:
    """Run the closers; a storage that makes no progress for ``stall_seconds_max`` is given up, and they end by that."""
    storage = context.platform.storage
    closing = asyncio.ensure_future(run_all(context.closers))
    cancelled: asyncio.CancelledError | None = None
    abandoned = False
    before = in_progress(storage)
    while not closing.done():
        try:
            await asyncio.wait((closing,), timeout=context.config.stall_seconds_max)
        except asyncio.CancelledError as error:
            cancelled = error
            continue
        if not closing.done() and before is not None and in_progress(storage) == before:
            abandoned = True
            storage.abandon()
            if context.publisher is not None:
                context.publisher.discard_arena()
        before = in_progress(storage)
    if abandoned:
        raise TierStalledError(
            f"the storage of {context.config.root} did not answer for {context.config.stall_seconds_max:g} s while "
            "the store was being closed: it was given up, and what was not flushed before may be lost"
        ) from closing.exception()
    if cancelled is not None:
        closing.exception()  # told by the cancellation
        raise cancelled
    closing.result()


async def run_all(steps: list[Callable[[], Awaitable[None]]]) -> None:
    """Run every step to its end whatever the others raise; then raise the first error.

    Each step runs in a task of its own, so that cancelling the caller does not cut a step short.
    """
    first: BaseException | None = None
    for step in steps:
        task = asyncio.ensure_future(_call(step))
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                first = first or error
        try:
            task.result()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


async def _call(step: Callable[[], Awaitable[None]]) -> None:
    await step()
