"""Between blocks and the paged KV memory of an inference engine: a block's layers to many places, and back.

*Scatter* goes straight from wherever the block is fastest: the device's arena, else the node's arena, without a copy in
the device's arena between. *Gather* goes straight into a reservation. All layers are one call of the driver where it
has batched copies; neighbours on both sides are one copy. The copies wait for what the caller's stream has, and the
stream for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cascade_aio.abc.device import DeviceError, MemoryCopy
from cascade_aio.errors import ConfigError
from cascade_aio.model import BlockId, PrefixKey
from cascade_aio.store.block import layer_sizes
from cascade_aio.store.catalog import Catalog, Copy
from cascade_aio.store.device_catalog import DeviceCatalog, DeviceCopy
from cascade_aio.store.devices import Device, Devices
from cascade_aio.store.putting import Slot
from cascade_aio.tiers.gpu.lanes import Ticket
from cascade_aio.tiers.gpu.tier import GpuTier, Part

POINTERS_MAX = 1 << 16
"""Layers of one part of a block, at most."""


async def scatter(
    devices: Devices,
    device: Device,
    name: BlockId | PrefixKey | str,
    keys: Sequence[Any],
    values: Sequence[Any],
    stream: int | None,
) -> None:
    """See ``Store.scatter``."""
    devices.context.check()
    device.tier.check()
    row = devices.getter.find(name)
    copy = device.catalog.copies.get(row)
    if copy is not None:
        device.catalog.touch(copy, devices.context.catalog.uses)
        devices.context.catalog.touch(row)
        parts = _parts(copy, keys, values)
        await _finish(device.tier, _from_device(device.catalog, copy, parts, stream), stream)
        return
    catalog = devices.context.catalog
    with devices.getter.try_hot(name) or await devices.getter.load(name) as block:
        host: Copy = block.leased_copy  # type: ignore[assignment] # an embedded store's
        parts = _parts(host, keys, values)
        memory = host.extent.memory[host.header_bytes : host.header_bytes + host.value_offset + host.value_bytes]
        if not await device.tier.prepare(memory):
            await device.tier.upload_parts(memory, parts, after=stream)
            return  # staged: it has arrived, and the stream need not wait
        ticket = _from_host(catalog, device.tier, host, memory, parts, stream)
    await _finish(device.tier, ticket, stream)


async def gather(device: Device, slot: Slot, keys: Sequence[Any], values: Sequence[Any], stream: int | None) -> None:
    """See ``Store.gather``."""
    device.tier.check()
    key, value = memoryview(slot.key), memoryview(slot.value)
    sizes = layer_sizes_of(len(key), len(value), keys, values)
    for memory, pointers, nbytes in ((key, keys, sizes[0]), (value, values, sizes[1])):
        addresses = [address_on_device(pointer, nbytes) for pointer in pointers]
        parts = merged([Part(address, i * nbytes, nbytes) for i, address in enumerate(addresses) if nbytes])
        if parts:
            await device.tier.download_parts(memory, parts, after=stream)


def layer_sizes_of(key_bytes: int, value_bytes: int, keys: Sequence[Any], values: Sequence[Any]) -> tuple[int, int]:
    """Bytes of one layer of key and value; without pointers for it, a part has no bytes. Raises ``ConfigError``."""
    for part, pointers, nbytes in (("keys", keys, key_bytes), ("values", values, value_bytes)):
        if len(pointers) > POINTERS_MAX or (not pointers and nbytes):
            raise ConfigError(
                f"{part} are {len(pointers)} pointers for {nbytes} bytes; pass one per layer, at most {POINTERS_MAX}"
            )
    return layer_sizes(key_bytes, 0, max(1, len(keys)))[0], layer_sizes(0, value_bytes, max(1, len(values)))[1]


def address_on_device(pointer: Any, nbytes: int) -> int:
    """The address of a layer of ``nbytes``: an int, or a contiguous array of just this size, of PyTorch or any that has
    ``__cuda_array_interface__``. Raises ``ConfigError``."""
    if isinstance(pointer, int) and not isinstance(pointer, bool) and pointer > 0:
        return pointer
    if hasattr(pointer, "data_ptr"):
        address, size, contiguous = pointer.data_ptr(), pointer.nbytes, pointer.is_contiguous()
    elif hasattr(pointer, "__cuda_array_interface__"):
        interface = pointer.__cuda_array_interface__
        size = math.prod(interface["shape"]) * int(interface["typestr"][2:])
        address, contiguous = interface["data"][0], interface.get("strides") is None
    else:
        raise ConfigError(f"{pointer!r:.100} is neither an address on the device nor an array there")
    if size != nbytes or not contiguous:
        kind = "a contiguous" if contiguous else "not a contiguous"
        raise ConfigError(f"{kind} array of {size} bytes was given for a layer of {nbytes}; pass views of one layer")
    return int(address)


def merged(parts: Sequence[Part]) -> list[Part]:
    """The same bytes in as few parts as there can be without reordering: neighbours on both sides become one."""
    found: list[Part] = []
    for part in parts:
        if found:
            last = found[-1]
            if last.pointer + last.nbytes == part.pointer and last.offset + last.nbytes == part.offset:
                found[-1] = Part(last.pointer, last.offset, last.nbytes + part.nbytes)
                continue
        found.append(part)
    return found


def _parts(copy: Copy | DeviceCopy, keys: Sequence[Any], values: Sequence[Any]) -> list[Part]:
    """Where each layer of the payload goes."""
    key_bytes, value_bytes = layer_sizes_of(copy.key_bytes, copy.value_bytes, keys, values)
    parts = [Part(address_on_device(key, key_bytes), i * key_bytes, key_bytes) for i, key in enumerate(keys)]
    parts += [
        Part(address_on_device(value, value_bytes), copy.value_offset + i * value_bytes, value_bytes)
        for i, value in enumerate(values)
    ]
    return merged([part for part in parts if part.nbytes])


def _from_device(catalog: DeviceCatalog, copy: DeviceCopy, parts: Sequence[Part], stream: int | None) -> Ticket | None:
    if not parts:
        return None
    catalog.hold(copy)

    def ended(error: DeviceError | None) -> None:
        catalog.release(copy)

    base = copy.extent.pointer
    copies = [MemoryCopy(part.pointer, base + part.offset, part.nbytes) for part in parts]
    try:
        return catalog.tier.start_local(copies, ended, after=stream, behind=copy.last_ticket(0, copy.payload_bytes))
    except BaseException:
        catalog.release(copy)
        raise


def _from_host(
    catalog: Catalog, tier: GpuTier, host: Copy, memory: memoryview, parts: Sequence[Part], stream: int | None
) -> Ticket | None:
    if not parts:
        return None
    catalog.hold(host)

    def ended(error: DeviceError | None) -> None:
        catalog.release(host)

    try:
        return tier.start_scatter(memory, parts, ended, after=stream)
    except BaseException:
        catalog.release(host)
        raise


async def _finish(tier: GpuTier, ticket: Ticket | None, stream: int | None) -> None:
    if ticket is None:
        return
    if stream is None:
        await ticket.watched()
    else:
        tier.order(stream, ticket)
