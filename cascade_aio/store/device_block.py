"""Leases on copies in device memory, and the arrays that show them to PyTorch, CuPy, Numba and kernels of one's own.

A ``DeviceBlock`` pins its copy in the device's arena until it is released *and* all that was enqueued by then in the
streams it was used in is done. Its arrays are descriptions, nothing is copied: DLPack, ``__cuda_array_interface__`` and
plain pointers. An array that is still referred to when the lease ends, by itself or through DLPack, keeps the memory
pinned, as arrays of the node's arena do. The bytes belong to a block that others read, too: whoever writes into them
breaks it (neither protocol can forbid that to every consumer).
"""

from __future__ import annotations

import asyncio
import warnings
import weakref
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

from cascade_aio.errors import ConfigError, LeaseError
from cascade_aio.model import BlockId, BlockMeta, Tier
from cascade_aio.store.block import Part, Survivors, decode_meta, layer_sizes
from cascade_aio.store.device_catalog import DeviceCatalog, DeviceCopy
from cascade_aio.store.lending import Desk
from cascade_aio.tiers.gpu.tier import GpuTier

LEGACY_STREAM = 1
"""CUDA's handle of the legacy default stream; 0 means it, too."""

NO_STREAM = -1
"""What DLPack consumers pass who will order things themselves."""


def stream_handle(stream: object) -> int | None:
    """The handle of a stream: an int, or an object of PyTorch, CuPy, Numba, cuda.core; ``None`` stays.

    Raises ``ConfigError`` for what is no stream.
    """
    if stream is None:
        return None
    found = stream
    protocol = getattr(stream, "__cuda_stream__", None)  # (version, handle), a method or an attribute
    if protocol is not None:
        found = (protocol() if callable(protocol) else protocol)[1]
    else:
        for name in ("cuda_stream", "ptr", "handle"):
            if hasattr(stream, name):
                found = getattr(stream, name)
                break
    try:
        handle: int = int(found)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        handle = -1
    if isinstance(stream, bool | float | str) or handle < 0:
        raise ConfigError(
            f"stream={stream!r:.100} is no stream; pass its handle as an int, or an object of torch.cuda, cupy.cuda or "
            "cuda.core, or nothing to wait for the bytes"
        )
    return handle


class DeviceArray:
    """Bytes of a leased block in device memory, one-dimensional uint8. Made by ``DeviceBlock``."""

    __slots__ = ("__weakref__", "_desk", "_number", "_stream", "_ticket_of", "_tier", "nbytes", "pointer")

    def __init__(self, block: DeviceBlock, pointer: int, nbytes: int, start: int) -> None:
        copy = block.leased_copy
        self.pointer = pointer
        """Address on the device."""
        self.nbytes = nbytes
        self._tier: GpuTier = block.tier_of_device
        self._desk = block.desk
        self._number = block.number
        self._stream = block.stream
        self._ticket_of = (copy, start, start + nbytes)

    @property
    def shape(self) -> tuple[int]:
        return (self.nbytes,)

    @property
    def device(self) -> int:
        return self._tier.driver.ordinal

    def __len__(self) -> int:
        return self.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3. ``stream`` is the lease's, which the bytes are ordered with; ``None``: they are there."""
        stream = None if self._stream is None else self._stream or LEGACY_STREAM
        # Said to be writable, because PyTorch takes nothing else.
        return {"shape": self.shape, "typestr": "|u1", "data": (self.pointer, False), "strides": None, "version": 3,
                "stream": stream}  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tier.driver.dlpack_device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule of these bytes for a consumer that works in ``stream`` (``None``: the legacy default stream, -1: it
        takes care itself): what it enqueues there from now on finds the bytes. No copy.

        The memory stays pinned until the consumer lets go *and* what was enqueued in ``stream`` by then is done.
        Raises ``BufferError`` for another device or a copy, ``BrokenTierError``.
        """
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"these bytes are on device {self.__dlpack_device__()}, not on {tuple(dl_device)}")
        if copy:
            raise BufferError("the bytes of a block are shown, not copied; copy what you get")
        self._tier.check()
        if stream != NO_STREAM:
            handle = stream or LEGACY_STREAM
            if handle == LEGACY_STREAM:
                handle = 0
            block_copy, start, stop = self._ticket_of
            ticket = block_copy.last_ticket(start, stop)
            if ticket is not None:
                self._tier.order(handle, ticket)
            self._desk.used_in(self._number, handle)
        return self._tier.exports.show(self.pointer, self.nbytes, self)

    def __repr__(self) -> str:
        return f"DeviceArray({self.nbytes} B at {self.pointer:#x} of device {self.device})"


class DeviceDesk(Desk[DeviceCopy]):
    """Leases of one device's arena: at the end of each, fences in the streams it was used in."""

    def __init__(self, catalog: DeviceCatalog, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(catalog, loop)
        self._devices = catalog
        self._streams: dict[int, tuple[int, ...]] = {}
        self.on_last_release: Callable[[], None] | None = None
        """Of a store that was closed while leases were out: called when the last of them ends."""

    def lend(self, copy: DeviceCopy, tier: Tier, stream: int | None) -> DeviceBlock:
        """A new lease on ``copy``, for use in ``stream``, which is ordered behind what is there of it."""
        number, where = self.take(copy)
        if stream is not None:
            self._streams[number] = (stream,)
        return DeviceBlock(copy, tier, self, number, where, self._devices.tier, stream)

    def used_in(self, number: int, stream: int) -> None:
        """What lease ``number`` lent is used in ``stream``, too."""
        streams = self._streams.get(number, ())
        if stream not in streams:
            self._streams[number] = (*streams, stream)

    def release(self, copy: DeviceCopy, number: int) -> None:
        for stream in self._streams.pop(number, ()):
            self._devices.fence(copy, stream)
        super().release(copy, number)
        if self.on_last_release is not None and not self.leases:
            self.on_last_release()


class DeviceBlock:
    """A leased block on a device. Created by ``store.get(h, device=…)``; release it as a ``Block``."""

    __slots__ = (
        "__weakref__", "_arrays", "_copy", "_key", "_parts", "_value", "_where", "desk", "number", "stream", "tier",
        "tier_of_device",
    )  # fmt: skip

    def __init__(
        self, copy: DeviceCopy, tier: Tier, desk: DeviceDesk, number: int, where: str, device: GpuTier,
        stream: int | None,
    ) -> None:  # fmt: skip
        self._copy: DeviceCopy | None = copy
        self._where = where
        self._key: DeviceArray | None = None
        self._value: DeviceArray | None = None
        self._parts: list[weakref.ref[DeviceArray]] = []
        self.tier = tier
        """Where the block was found when it was asked for."""
        self.desk = desk
        self.number = number
        self.tier_of_device = device
        self.stream = stream
        """Handle of the stream that the bytes are ordered with; ``None``: they were there when the lease was given."""

    @property
    def leased_copy(self) -> DeviceCopy:
        """The copy, for the store's own parts. Raises ``LeaseError`` after ``release``."""
        if self._copy is None:
            raise LeaseError(f"this lease was released already (taken at {self._where}); get the block again")
        return self._copy

    def _whole(self) -> DeviceCopy:
        copy = self.leased_copy
        if not copy.sealed:
            raise LeaseError(
                f"block {copy.block_id} is still on its way (it was got with ready='first-bytes'); "
                "await block.ready(...) for the bytes you need, or block.ready() for all of them"
            )
        return copy

    @property
    def device(self) -> int:
        return self.tier_of_device.driver.ordinal

    @property
    def block_id(self) -> BlockId:
        return self.leased_copy.block_id

    @property
    def meta(self) -> BlockMeta | None:
        """What was stored as ``meta``, or ``None``."""
        raw = self.leased_copy.meta
        return decode_meta(raw) if raw else None

    @property
    def key(self) -> DeviceArray:
        """The key part, of ``key_bytes``; its address is 4 KiB-aligned within the device's arena."""
        if self._key is None:
            self._key = self._array("key", 0, self._whole().key_bytes)
        return self._key

    @property
    def value(self) -> DeviceArray:
        """The value part, like ``key``; its address is 64-byte aligned."""
        if self._value is None:
            self._value = self._array("value", 0, self._whole().value_bytes)
        return self._value

    @property
    def complete(self) -> bool:
        """Whether all of it is enqueued; always so but for ``ready="first-bytes"``."""
        return self.leased_copy.sealed

    async def ready(self, part: Part | None = None, start: int = 0, stop: int | None = None) -> DeviceArray | None:
        """Bytes ``start`` up to ``stop`` (default: the end) of the key or the value, as soon as they are enqueued.

        What is enqueued in the lease's stream from then on finds them; without a stream they are there. Without a
        ``part``: the whole block, gives nothing. Raises ``ConfigError`` (a range outside), and what the promotion
        of the rest failed with. May be cancelled.
        """
        copy = self.leased_copy
        if part is None:
            await self._ordered(copy, 0, copy.payload_bytes)
            return None
        if part not in ("key", "value"):
            raise ConfigError(f"part={part!r} is unknown; use 'key' or 'value'")
        size, base = (copy.key_bytes, 0) if part == "key" else (copy.value_bytes, copy.value_offset)
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise ConfigError(f"bytes {start} to {stop} are outside the {part}, which has {size}")
        await self._ordered(copy, base + start, base + stop)
        self.leased_copy  # noqa: B018 - it may have been released meanwhile
        array = self._array(part, start, stop)
        self._parts = [ref for ref in self._parts if ref() is not None]
        self._parts.append(weakref.ref(array))
        return array

    async def layers(self, count: int) -> AsyncIterator[tuple[DeviceArray, DeviceArray]]:
        """Key and value of each of ``count`` equal layers, in order, each as ``ready`` gives it."""
        copy = self.leased_copy
        key_bytes, value_bytes = layer_sizes(copy.key_bytes, copy.value_bytes, count)
        for layer in range(count):
            key = await self.ready("key", layer * key_bytes, (layer + 1) * key_bytes)
            value = await self.ready("value", layer * value_bytes, (layer + 1) * value_bytes)
            assert key is not None
            assert value is not None
            yield key, value

    async def _ordered(self, copy: DeviceCopy, start: int, stop: int) -> None:
        await copy.wait(start, stop)
        ticket = copy.last_ticket(start, stop)
        if ticket is None:
            return
        if self.stream is None:
            await ticket.watched()
        else:
            self.tier_of_device.order(self.stream, ticket)

    def _array(self, part: Part, start: int, stop: int) -> DeviceArray:
        copy = self.leased_copy
        first = start if part == "key" else copy.value_offset + start
        return DeviceArray(self, copy.extent.pointer + first, stop - start, first)

    @property
    def released(self) -> bool:
        return self._copy is None

    def release(self) -> None:
        """Give the lease back; what is enqueued in its stream may still use the memory, it is waited for.

        Without a stream, what uses the memory has ended. Arrays that are still referred to keep the memory pinned
        until they are gone. Does not block. Raises ``LeaseError`` when released twice.
        """
        copy = self.leased_copy
        self._copy = None
        arrays = [self._key, self._value, *(part() for part in self._parts)]
        self._key = self._value = None
        self._parts = []
        self.tier_of_device.exports.settle()
        if all(array is None for array in arrays):
            self.desk.release(copy, self.number)
            return
        survivors = Survivors(copy, self.desk, self.number)
        for array in arrays:
            if array is not None:
                survivors.watch(array)
        array = None
        arrays.clear()
        survivors.armed()

    def __enter__(self) -> Self:
        self.leased_copy  # noqa: B018 - raises after release
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._copy is not None:
            self.release()

    def __del__(self) -> None:
        copy = getattr(self, "_copy", None)
        if copy is not None:
            warnings.warn(
                f"a lease on block {copy.block_id} on device {self.device} taken at {self._where} was never released; "
                "use 'async with store.get(...)' or call release()",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )
            self.desk.release_later(copy, self.number)

    def __repr__(self) -> str:
        if self._copy is None:
            return "DeviceBlock(released)"
        copy = self._copy
        return f"DeviceBlock({copy.block_id}, key={copy.key_bytes} B, value={copy.value_bytes} B, device {self.device})"
