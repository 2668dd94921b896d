"""Device memory shown through DLPack: what a consumer still refers to is kept, and let go when it says so.

A consumer releases on any thread, at any time; an eventfd tells the loop, and the loop drops what was kept for it. The
eventfd is closed only when no consumer is left, because a late release writes to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from cascade_aio._native import SharedTensor


class Exports:
    """Tensors shown to others. Belongs to one event loop; ``show`` may be called while it runs."""

    def __init__(self, device: tuple[int, int]) -> None:
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._shown: dict[SharedTensor, object] = {}
        self._closing = False
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop.add_reader(self._event_fd, self._on_release)

    def __len__(self) -> int:
        return len(self._shown)

    def show(self, pointer: int, nbytes: int, keep: object) -> Any:
        """A DLPack capsule of these bytes; ``keep`` is referred to until its consumer has released it."""
        tensor = SharedTensor(pointer, nbytes, self._device, self._event_fd)
        self._shown[tensor] = keep
        return tensor.capsule()

    def close(self) -> None:
        """No more will be shown. Releases are still heard while the loop runs."""
        self._closing = True
        self.settle()

    def settle(self) -> None:
        """Let go of what has been released by now, without waiting to be told."""
        if self._shown or self._closing:
            self._on_release()

    def _on_release(self) -> None:
        if self._event_fd < 0:
            return
        with contextlib.suppress(BlockingIOError):  # looked without being told
            os.eventfd_read(self._event_fd)
        for tensor in [tensor for tensor in self._shown if tensor.released]:
            del self._shown[tensor]
        if self._closing and not self._shown:
            fd, self._event_fd = self._event_fd, -1
            self._loop.remove_reader(fd)
            os.close(fd)
