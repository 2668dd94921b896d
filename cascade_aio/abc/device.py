"""What the GPU tier needs of a device: memory, streams, events, copies between host and device.

``DeviceDriver`` is the CUDA driver API cut down to what is used, so that the real one (``tiers.gpu.cuda``) and
the fake of ``testing.gpu`` are interchangeable. Everything that takes a stream is *enqueued*: it returns at once and
happens later, in the order of that stream, in no order with other streams but the one that events make. Handles
(streams, events) and addresses (host and device) are plain ints; one address space holds both.

Rules that an implementation may rely on, and that the fake enforces: host memory of a copy is pinned, and each copy
lies within one pinned piece; memory is neither freed, unpinned nor written to while a copy of it may be running; an
event is destroyed only when nothing refers to it. Streams and events are used from the event loop's thread;
``allocate``, ``free``, ``pin``, ``unpin``, ``allocate_pinned``, ``free_pinned`` and ``close`` may block for
milliseconds and are called in worker threads, one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from cascade_aio.errors import BrokenTierError


class DeviceError(BrokenTierError):
    """The device refused a call. ``code`` is the driver's name for it, such as ``CUDA_ERROR_OUT_OF_MEMORY``.

    ``lost``: the context is dead; every later call fails, and what was enqueued may never be reported as done.
    """

    def __init__(self, message: str, *, code: str = "", lost: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.lost = lost


class DeviceMemoryError(DeviceError):
    """There is not enough memory, of the device or for pinning."""


class MemoryCopy(NamedTuple):
    """``nbytes`` from the address ``source`` to the address ``target``; either may be host or device."""

    target: int
    source: int
    nbytes: int


class DeviceDriver(Protocol):
    """One device. Every method may raise ``DeviceError``."""

    @property
    def ordinal(self) -> int:
        """Number of the device, as CUDA and PyTorch count."""
        ...

    @property
    def description(self) -> str:
        """Name of the device and version of the driver, for people."""
        ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """(device type, id) as DLPack has it."""
        ...

    @property
    def batches_copies(self) -> bool:
        """Whether ``copy`` of many is one call of the driver."""
        ...

    def free_bytes(self) -> int:
        """Device memory that nobody has taken."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes at least. Raises ``DeviceMemoryError``. May block."""
        ...

    def free(self, pointer: int) -> None:
        """Waits for what uses it, then frees. May block."""
        ...

    def pin(self, address: int, nbytes: int) -> None:
        """Page-lock host memory for copies of every device. Takes time by the page.

        Raises ``DeviceMemoryError`` beyond a limit, ``DeviceError`` for memory that cannot be pinned.
        """
        ...

    def unpin(self, address: int) -> None: ...

    def allocate_pinned(self, nbytes: int) -> memoryview:
        """Host memory that is pinned from the start, writable. May block."""
        ...

    def free_pinned(self, memory: memoryview) -> None: ...

    def create_stream(self) -> int:
        """A stream that is not ordered with the legacy default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """No more will be enqueued; what was enqueued still runs."""
        ...

    def create_event(self) -> int:
        """An event without timing; not recorded yet, it counts as done."""
        ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """``event`` is done when all that was enqueued in ``stream`` so far is; forgets an earlier record."""
        ...

    def wait(self, stream: int, event: int) -> None:
        """What is enqueued in ``stream`` from now on runs after the record of ``event`` as it is now."""
        ...

    def is_done(self, event: int) -> bool:
        """Whether the last record of ``event`` has been reached. Does not block."""
        ...

    def copy(self, copies: Sequence[MemoryCopy], stream: int) -> None:
        """Enqueue copies; among themselves they have no order. With ``batches_copies``, one call for all."""
        ...

    def notify(self, stream: int, event_fd: int) -> None:
        """When all that was enqueued in ``stream`` so far is done, add 1 to the eventfd.

        What is enqueued afterwards waits for that. Never happens on a device that is lost.
        """
        ...

    def close(self) -> None:
        """Let go of the device. May block. Repeated calls do nothing."""
        ...
