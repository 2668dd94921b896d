"""The embedded store: one event loop decides, others carry bytes. ``open_store`` is the way in."""

from cascade_aio.store.block import Block
from cascade_aio.store.device_block import DeviceArray, DeviceBlock
from cascade_aio.store.getting import PrefixLookup
from cascade_aio.store.opening import open_store
from cascade_aio.store.prefetching import PrefetchHandle, PrefetchProgress
from cascade_aio.store.putting import Slot
from cascade_aio.store.repairing import RepairReport, repair_root
from cascade_aio.store.store import BlockInfo, Store
from cascade_aio.store.streaming import BlockStream
from cascade_aio.store.verifying import VerifyReport

__all__ = [
    "Block",
    "BlockInfo",
    "BlockStream",
    "DeviceArray",
    "DeviceBlock",
    "PrefetchHandle",
    "PrefetchProgress",
    "PrefixLookup",
    "RepairReport",
    "Slot",
    "Store",
    "VerifyReport",
    "open_store",
    "repair_root",
]
