"""Sleeping for less than a millisecond on an event loop: a timerfd, because epoll rounds up to milliseconds.

Linux only, through libc (Python has it from 3.13 on). One sleeper at a time.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from typing import Self

_CLOCK_MONOTONIC = 1
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("it_interval", _Timespec), ("it_value", _Timespec)]


class FineTimer:
    """``with FineTimer() as timer: await timer.sleep(0.0003)``, late by some 50 µs."""

    def __init__(self) -> None:
        self._fd = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._loop = asyncio.get_running_loop()
        self._due: asyncio.Future[None] | None = None
        self._loop.add_reader(self._fd, self._fired)

    def _fired(self) -> None:
        os.read(self._fd, 8)
        if self._due is not None and not self._due.done():
            self._due.set_result(None)

    async def sleep(self, seconds: float) -> None:
        """Return ``seconds`` from now. Not meant to be cancelled in the middle of a measurement."""
        due_ns = time.monotonic_ns() + int(seconds * 1e9)
        spec = _Itimerspec(_Timespec(0, 0), _Timespec(due_ns // 10**9, due_ns % 10**9))
        self._due = self._loop.create_future()
        if _libc.timerfd_settime(self._fd, 1, ctypes.byref(spec), None) != 0:  # 1: absolute
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        await self._due

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
