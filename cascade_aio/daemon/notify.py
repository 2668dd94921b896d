"""Telling systemd how the service is: ``sd_notify`` in its few lines. Does nothing outside of systemd."""

from __future__ import annotations

import contextlib
import os
import socket

WATCHDOG_PART = 2
"""The watchdog is fed this many times in the interval after which systemd would act."""


class SystemdNotifier:
    """``NOTIFY_SOCKET`` and ``WATCHDOG_USEC`` of the environment, taken once."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        variables = dict(os.environ) if environment is None else environment
        self._address = variables.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        microseconds = variables.get("WATCHDOG_USEC", "")
        watched = variables.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_seconds: float | None = None
        """How often ``tell("WATCHDOG=1")`` is due; ``None``: never."""
        if self._address and watched and microseconds.isdigit() and int(microseconds):
            self.watchdog_seconds = int(microseconds) / 1e6 / WATCHDOG_PART

    def tell(self, *lines: str) -> None:
        """Send ``lines`` such as ``READY=1``. A supervisor that does not listen is none of our business."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.setblocking(False)
            connection.sendto("\n".join(lines).encode(), self._address)
