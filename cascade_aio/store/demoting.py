"""Demotion: what a device has to give up and the node's arena has not got is copied back before it goes.

Worth it only where it is cheap: the block is on disk, the copy back is some fifty times faster than reading it, and it
takes room only from what was used less recently than this block was. A device's memory may have been written to by a
consumer, so the bytes are checked like those of a record before they count.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from cascade_aio.abc.device import DeviceError
from cascade_aio.core.lifecycle import CopyEvent, advance
from cascade_aio.errors import BrokenTierError
from cascade_aio.segments.buffers import page_padded
from cascade_aio.segments.format import CHUNK_BYTES
from cascade_aio.store.catalog import Copy
from cascade_aio.store.context import StoreContext
from cascade_aio.store.device_catalog import DeviceCatalog, DeviceCopy
from cascade_aio.store.room import Claim
from cascade_aio.tiers.shm import Extent

logger = logging.getLogger("cascade_aio.store")

DEMOTIONS_MAX = 8
"""Copies on their way back at a time; what has to go beside them is dropped."""


class Demoter:
    """Demotions from one device to the node's arena."""

    def __init__(self, context: StoreContext, devices: DeviceCatalog) -> None:
        self._context = context
        self._devices = devices
        self._running = 0
        self.demoted_blocks = 0
        self.damaged_blocks = 0
        devices.demote = self.start

    def start(self, copy: DeviceCopy) -> bool:
        """Begin to demote ``copy``, which is held from now on, and evicted at the end. ``False``: not worth it."""
        context = self._context
        if self._running >= DEMOTIONS_MAX or context.closed or context.catalog.is_in_arena(copy.row):
            return False
        claim = Claim(copy.host_mark, lambda: False)
        nbytes = copy.header_bytes + page_padded(copy.payload_bytes)
        extent = context.room.reserve_now(nbytes, claim=claim) if copy.payload_bytes else None
        if extent is None:
            return False
        self._running += 1
        self._devices.hold(copy)
        copy.state = advance(copy.state, CopyEvent.COPY)
        context.tasks.spawn(self._run(copy, extent), name=f"cascade-demote-{copy.block_id}")
        return True

    async def _run(self, copy: DeviceCopy, extent: Extent) -> None:
        catalog = self._context.catalog
        host = Copy(
            extent,
            header_bytes=copy.header_bytes,
            digest=copy.digest,
            key_bytes=copy.key_bytes,
            value_bytes=copy.value_bytes,
            value_offset=copy.value_offset,
            chunk_crcs=copy.chunk_crcs,
            meta=copy.meta,
        )
        catalog.hold(host)
        try:
            with suppress(BrokenTierError):  # the device has said so itself, and dropped all it had
                await self._bring(copy, host)
        finally:
            self._running -= 1
            if copy.row >= 0:
                copy.state = advance(copy.state, CopyEvent.COPIED)
            self._devices.release(copy)
            catalog.release(host)
            if copy.row >= 0 and not copy.holds:
                self._devices.evict(copy)

    async def _bring(self, copy: DeviceCopy, host: Copy) -> None:
        """Copy, check, admit. Raises ``BrokenTierError``."""
        catalog, memory = self._context.catalog, host.extent.memory
        payload = memory[host.header_bytes :]
        try:
            await self._devices.tier.download([(copy.extent.pointer, payload[: copy.payload_bytes])])
        except DeviceError as error:
            logger.warning("block %s could not be copied back from its device: %s", copy.block_id, error)
            return
        payload[copy.payload_bytes :] = bytes(len(payload) - copy.payload_bytes)
        if await self._context.platform.engine.checksum(payload, CHUNK_BYTES) != copy.chunk_crcs:
            self.damaged_blocks += 1
            logger.warning(
                "block %s has changed on device %d: somebody wrote to a leased array; it was dropped there",
                copy.block_id,
                self._devices.tier.driver.ordinal,
            )
            return
        row = copy.row
        if row >= 0 and not catalog.is_in_arena(row):
            catalog.admit(host, row)
            self.demoted_blocks += 1
