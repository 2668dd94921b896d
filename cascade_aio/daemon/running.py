"""Running a service as a process: signals, systemd, loop lag, the page, and an end that does not hang."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from cascade_aio.config import StoreConfig
from cascade_aio.daemon.lag import LagMeter
from cascade_aio.daemon.notify import SystemdNotifier
from cascade_aio.daemon.service import Service, serve
from cascade_aio.daemon.settings import ServiceConfig

logger = logging.getLogger("cascade_aio.service")

STUCK_EXIT = 70
"""Exit code (``EX_SOFTWARE``) of a service whose end took longer than ``shutdown_seconds_max``."""


async def run_service(
    config: StoreConfig, service: ServiceConfig, *, on_ready: Callable[[Service], None]
) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT, then flush, seal and return the last statistics.

    Raises as ``serve``. An end that takes longer than ``shutdown_seconds_max`` ends the process: what was not
    flushed by then may be lost.
    """
    loop = asyncio.get_running_loop()
    notifier = SystemdNotifier()
    stop = asyncio.Event()
    with contextlib.ExitStack() as handlers:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
            handlers.callback(loop.remove_signal_handler, number)
        listener = None if service.http is None else handlers.enter_context(_listening(service.http))
        async with serve(config, service) as running, _page(running, listener), LagMeter(running.node.lag, notifier):
            on_ready(running)
            notifier.tell("READY=1", f"STATUS=serving {config.root} at {running.socket_path}")
            await _first(stop, running.failed)
            notifier.tell("STOPPING=1", "STATUS=flushing")
            report = running.node.statistics()
            handlers.callback(loop.call_later(service.shutdown_seconds_max, _stuck, service).cancel)
            failed = running.failed.is_set()
    if failed:
        raise SystemExit(STUCK_EXIT)
    return report


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _listening(address: str) -> contextlib.AbstractContextManager[socket.socket]:
    from cascade_aio.daemon.page import listening  # starlette and uvicorn are extras

    return listening(address)


def _page(running: Service, listener: socket.socket | None) -> contextlib.AbstractAsyncContextManager[object]:
    if listener is None:
        return contextlib.nullcontext()
    from cascade_aio.daemon.page import page

    return page(running.node, listener)


def _stuck(service: ServiceConfig) -> None:
    logger.critical(
        "the store could not be closed within %g s; what was not flushed may be lost, everything else is found at the "
        "next start",
        service.shutdown_seconds_max,
    )
    os._exit(STUCK_EXIT)
