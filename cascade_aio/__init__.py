"""cascade_aio: a tiered KV-cache store for LLM inference.

``async with cascade_aio.open_store(root) as store`` opens an embedded store; see ``Store``. ``connect`` attaches
to the store of a node service (``cascade-aio serve``), with the same interface.
"""

from cascade_aio._version import __version__
from cascade_aio.config import StoreConfig
from cascade_aio.daemon import ServiceStore, connect
from cascade_aio.errors import (
    BlockNotFoundError,
    BlockTooLargeError,
    BrokenTierError,
    CascadeError,
    ClosedError,
    ConfigError,
    CorruptionError,
    DigestConflictError,
    InternalError,
    LeaseError,
    ProtocolError,
    ServiceUnavailableError,
    ThrottledError,
    TierFullError,
    TierStalledError,
)
from cascade_aio.model import (
    BlockId,
    BlockMeta,
    Namespace,
    PrefixKey,
    Tier,
    compute_block_id,
    prefix_keys,
)
from cascade_aio.store import (
    Block,
    BlockInfo,
    BlockStream,
    DeviceArray,
    DeviceBlock,
    PrefetchHandle,
    PrefetchProgress,
    PrefixLookup,
    RepairReport,
    Slot,
    Store,
    VerifyReport,
    open_store,
    repair_root,
)

__all__ = [
    "Block",
    "BlockId",
    "BlockInfo",
    "BlockMeta",
    "BlockNotFoundError",
    "BlockStream",
    "BlockTooLargeError",
    "BrokenTierError",
    "CascadeError",
    "ClosedError",
    "ConfigError",
    "CorruptionError",
    "DeviceArray",
    "DeviceBlock",
    "DigestConflictError",
    "InternalError",
    "LeaseError",
    "Namespace",
    "PrefetchHandle",
    "PrefetchProgress",
    "PrefixKey",
    "PrefixLookup",
    "ProtocolError",
    "RepairReport",
    "ServiceStore",
    "ServiceUnavailableError",
    "Slot",
    "Store",
    "StoreConfig",
    "ThrottledError",
    "Tier",
    "TierFullError",
    "TierStalledError",
    "VerifyReport",
    "__version__",
    "compute_block_id",
    "connect",
    "open_store",
    "prefix_keys",
    "repair_root",
]
