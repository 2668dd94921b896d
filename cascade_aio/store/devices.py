"""The devices of one store: opening and closing them, and leases on what they hold.

What it is: per device a tier, a catalog, a desk, promotions and demotions, joined here; and ``DeviceSource``, which
answers ``store.get(h, device=…, stream=…)``. A device that is lost answers with ``BrokenTierError`` from then on and
the store goes on without it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Sequence

from cascade_aio.abc.device import DeviceDriver
from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.errors import (
    BlockNotFoundError,
    ClosedError,
    ConfigError,
    CorruptionError,
    TierFullError,
)
from cascade_aio.io.waiting import call_with_undo
from cascade_aio.model import BlockId, PrefixKey, Tier
from cascade_aio.segments.format import payload_bytes_of
from cascade_aio.store.context import StoreContext
from cascade_aio.store.demoting import Demoter
from cascade_aio.store.device_block import DeviceBlock, DeviceDesk
from cascade_aio.store.device_catalog import DeviceCatalog, DeviceCopy
from cascade_aio.store.getting import Getter
from cascade_aio.store.promoting import Promoter, Waiter
from cascade_aio.tiers.gpu.lanes import Ticket
from cascade_aio.tiers.gpu.pinning import HostPins
from cascade_aio.tiers.gpu.tier import DRAIN_S_MAX, GpuTier

OpenDriver = Callable[[int], DeviceDriver]
"""Opens the device of this number; may block. Raises ``ConfigError`` or ``DeviceError``."""

_PREFIX_ARENA_SHARE_MAX = 0.9
"""One prefix may pin at most this share of a device's arena."""


@dataclasses.dataclass(slots=True, eq=False)
class Device:
    """All there is of one device."""

    tier: GpuTier
    catalog: DeviceCatalog
    desk: DeviceDesk
    promoter: Promoter
    demoter: Demoter

    def statistics(self) -> dict[str, object]:
        return {
            **self.catalog.statistics(),
            "leases": self.desk.leases,
            "leased_bytes": self.desk.leased_bytes,
            "leases_outlived": self.desk.outlived,
            "promoting": len(self.promoter),
            "promoted_blocks": self.promoter.promoted_blocks,
            "single_flight_joins": self.promoter.single_flight_joins,
            "demoted_blocks": self.demoter.demoted_blocks,
            "damaged_blocks": self.demoter.damaged_blocks,
        }


class Devices:
    """The devices of a store. Made by ``open_devices``."""

    def __init__(self, context: StoreContext, getter: Getter) -> None:
        self.context = context
        self.getter = getter
        self.devices: dict[int, Device] = {}
        self._pins: HostPins | None = None

    async def open(self, policy: Callable[[], EvictionPolicy], open_driver: OpenDriver) -> None:
        """Open every device of the configuration, if it has a GPU tier. After a failure, ``close`` gives back what was
        opened."""
        context, config = self.context, self.context.config
        if config.gpu_bytes is None:
            return
        for ordinal in config.gpu_devices:
            driver = await call_with_undo(None, functools.partial(open_driver, ordinal), lambda driver: driver.close())
            if self._pins is None:
                self._pins = HostPins(driver, context.shm.memory, ready_bytes=lambda: context.shm.ready_bytes)
            try:
                tier = await GpuTier.open(driver, config.gpu_bytes, self._pins, context.platform.engine)
            except BaseException:
                await call_with_undo(None, driver.close, None)
                raise
            self._add(ordinal, tier, policy())
        self._listen()
        context.devices = self
        context.tasks.spawn(self._pin_all(), "cascade-pin")

    def _add(self, ordinal: int, tier: GpuTier, policy: EvictionPolicy) -> None:
        context = self.context

        def explain() -> str:
            device = self.devices[ordinal]
            return (
                f"{device.desk.describe()}, {device.catalog.fences} released ones are still in use by their streams; "
                "release leases sooner or open the store with larger gpu_bytes"
            )

        catalog = DeviceCatalog(tier, context.catalog.index, policy, explain)
        desk = DeviceDesk(catalog, context.loop)
        self.devices[ordinal] = Device(
            tier, catalog, desk, Promoter(context, self.getter, catalog), Demoter(context, catalog)
        )

    def _listen(self) -> None:
        """A block that is gone from the store is gone from its devices."""
        before = self.context.catalog.on_forget

        def forget(row: int) -> None:
            for device in self.devices.values():
                device.catalog.drop(row)
            before(row)

        self.context.catalog.on_forget = forget

    async def _pin_all(self) -> None:
        """Page-lock the arena in the background, once its pages are there."""
        await self.context.prefaulted.wait()
        if self._pins is not None and not self.context.closed:
            await self._pins.register_all()

    def device(self, ordinal: object) -> Device:
        """The device of this number. Raises ``ConfigError`` for one that the store does not use."""
        number = getattr(ordinal, "index", None) if not isinstance(ordinal, int) else ordinal  # torch.device has one
        try:
            found = self.devices.get(operator.index(number))  # type: ignore[arg-type]
        except TypeError:
            found = None
        if found is None or isinstance(ordinal, bool):
            raise ConfigError(
                f"device={ordinal!r:.100} is none of this store's devices ({', '.join(map(str, self.devices))}); "
                "gpu_devices names them"
            )
        return found

    def holds(self, row: int) -> bool:
        """Whether any device has a copy of the block."""
        return any(row in device.catalog.copies for device in self.devices.values())

    def statistics(self) -> dict[str, object]:
        return {
            "devices": [device.statistics() for device in self.devices.values()],
            **({} if self._pins is None else self._pins.statistics()),
        }

    async def close(self) -> None:
        """After the store's tasks have ended: wait for what is in flight, give everything back."""
        for device in self.devices.values():
            device.catalog.room.close(ClosedError(f"the store on {self.context.config.root} was closed"))
            await device.tier.drain()
            device.tier.exports.settle()
            device.desk.settle()
            await _settle_fences(device.catalog)
            device.catalog.close()
        if self._pins is not None:
            await self._pins.close()
        for device in self.devices.values():
            leased = bool(device.desk.leases)
            if leased:
                device.desk.on_last_release = device.tier.give_memory_back
            await device.tier.close(keep_memory=leased)
            if leased:
                warnings.warn(
                    f"the store on {self.context.config.root} was closed while {device.desk.describe()} of device "
                    f"{device.tier.driver.ordinal}; its arena stays allocated until they are released",
                    ResourceWarning,
                    stacklevel=2,
                )


async def _settle_fences(catalog: DeviceCatalog) -> None:
    """Kernels that read released leases have ended, or have had ``DRAIN_S_MAX``: freeing waits for them anyway."""
    try:
        async with asyncio.timeout(DRAIN_S_MAX):
            await catalog.settle()
    except TimeoutError:
        warnings.warn(
            f"{catalog.fences} streams did not end within {DRAIN_S_MAX:g} s of closing the store",
            ResourceWarning,
            stacklevel=2,
        )


class DeviceSource:
    """Who gives leases on one device for the request objects, for use in one stream or, of bytes there, in any."""

    def __init__(self, devices: Devices, device: Device, stream: int | None) -> None:
        self._context = devices.context
        self._getter = devices.getter
        self._device = device
        self._stream = stream

    def try_hot(self, name: BlockId | PrefixKey | str) -> DeviceBlock | None:
        """A lease on what is on the device or can be enqueued at once; never suspends."""
        self._context.check()
        self._device.tier.check()
        catalog = self._device.catalog
        tier = Tier.GPU
        try:
            copy = catalog.hot.get(name)  # type: ignore[arg-type]
        except TypeError:  # unhashable: no name, as ``find`` will say
            copy = None
        if copy is None:
            row = self._getter.find(name)
            copy = catalog.copies.get(row)
            if copy is None:
                if row < 0:
                    return None
                self._device.promoter.start_now((row,))
                tier = Tier.SHM
                copy = catalog.copies.get(row)
                if copy is None:
                    return None
        if self._stream is None and not copy.landed:
            return None
        return self._lend(copy, tier)

    async def load(self, name: BlockId | PrefixKey | str, *, early: bool = False) -> DeviceBlock:
        """A lease, promoting the block if need be. See ``Store.get`` for the errors."""
        self._context.check()
        self._device.tier.check()
        catalog, promoter = self._device.catalog, self._device.promoter
        row = self._getter.find(name)
        if row < 0:
            with await self._getter.load(name) as block:  # from another rank; else it raises
                return await self.load(block.block_id, early=early)
        copy, tier = catalog.copies.get(row), Tier.GPU
        if copy is not None:
            catalog.hold(copy)
        else:
            tier = Tier.SHM if self._context.catalog.is_in_arena(row) else Tier.DISK
            block_id = self._context.catalog.index.block_id(row)
            waiter = promoter.join(block_id, early=early)
            try:
                copy = await waiter
            except BaseException:
                promoter.leave(block_id, waiter)
                raise
        try:
            if self._stream is None and not early:
                ticket = copy.last_ticket(0, copy.payload_bytes)
                if ticket is not None:
                    await ticket.watched()
            self._context.check()
            self._device.tier.check()
            return self._lend(copy, tier, early=early)
        finally:
            catalog.release(copy)

    async def load_prefix(self, keys: Sequence[PrefixKey]) -> list[DeviceBlock]:
        """Leases on the longest cached prefix: what the node's arena has in one call of the driver, the rest in
        parallel; it ends before the first block that fails."""
        self._context.check()
        self._device.tier.check()
        catalog, promoter = self._device.catalog, self._device.promoter
        rows = self._cached_rows(keys)
        ids = [self._context.catalog.index.block_id(row) for row in rows]
        tiers = [self._tier_of(row) for row in rows]
        pending: list[tuple[BlockId, DeviceCopy | Waiter]] = []
        blocks: list[DeviceBlock] = []
        held = [catalog.copies[row] for row in rows if row in catalog.copies]
        for copy in held:  # room for the others is not made at their cost
            catalog.hold(copy)
        try:
            promoter.start_now([row for row in rows if row not in catalog.copies])
            for row, block_id in zip(rows, ids, strict=True):
                here = catalog.copies.get(row)
                if here is not None:
                    catalog.hold(here)
                    held.append(here)
                pending.append((block_id, promoter.join(block_id, early=False) if here is None else here))
            await self._collect(pending, tiers, blocks)
        except BaseException:
            for block in blocks:
                block.release()
            raise
        finally:
            for copy in held:
                catalog.release(copy)
            for block_id, item in pending[len(blocks) :]:
                if not isinstance(item, DeviceCopy):
                    promoter.leave(block_id, item)
        return blocks

    async def _collect(
        self,
        pending: Sequence[tuple[BlockId, DeviceCopy | Waiter]],
        tiers: Sequence[Tier],
        blocks: list[DeviceBlock],
    ) -> None:
        """Move what arrives, in order, from ``pending`` to ``blocks``; stop at the first that does not."""
        last: Ticket | None = None
        try:
            for (_, item), tier in zip(pending, tiers, strict=True):
                copy = item if isinstance(item, DeviceCopy) else await item
                # A waiter's hold is given back here: the lease holds the copy from now on.
                blocks.append(self._lend(copy, tier, early=True))
                if not isinstance(item, DeviceCopy):
                    self._device.catalog.release(copy)
                ticket = copy.last_ticket(0, copy.payload_bytes)
                if ticket is not None and (last is None or last.number < ticket.number):
                    last = ticket
        except (BlockNotFoundError, CorruptionError, TierFullError, OSError):
            self._context.counters.misses += 1
        if last is not None:  # tickets of one lane end in the order of their numbers
            if self._stream is None:
                await last.watched()
            else:
                self._device.tier.order(self._stream, last)
        self._context.check()
        self._device.tier.check()

    def _lend(self, copy: DeviceCopy, tier: Tier, *, early: bool = False) -> DeviceBlock:
        """A lease; but for ``early``, the stream is made to wait for all of the copy."""
        if self._stream is not None and not early:
            ticket = copy.last_ticket(0, copy.payload_bytes)
            if ticket is not None:
                self._device.tier.order(self._stream, ticket)
        catalog = self._context.catalog
        self._device.catalog.touch(copy, catalog.uses)
        if copy.row >= 0:
            catalog.touch(copy.row)
        return self._device.desk.lend(copy, tier, self._stream)

    def _tier_of(self, row: int) -> Tier:
        if row in self._device.catalog.copies:
            return Tier.GPU
        return Tier.SHM if self._context.catalog.is_in_arena(row) else Tier.DISK

    def _cached_rows(self, keys: Sequence[PrefixKey]) -> list[int]:
        catalog = self._context.catalog
        budget = int(self._device.tier.capacity_bytes * _PREFIX_ARENA_SHARE_MAX)
        rows: dict[int, None] = {}
        for key in keys:
            row = self._getter.find_prefix(key)
            if row < 0:
                self._context.counters.misses += 1
                break
            budget -= 0 if row in rows else payload_bytes_of(*catalog.index.lengths(row))
            if budget < 0 and rows:
                break
            rows[row] = None
        return list(rows)
