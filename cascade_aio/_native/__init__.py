"""The compiled part, typed: io_uring ring, streaming copies, CRC-32C, prefault, eventfd notify.

Only ``cascade_aio.io`` and ``cascade_aio.tiers`` import this package, and only ``_library`` in it
imports the compiled module. It holds no policy: no futures, no limits, no retries. Importing it
without the compiled module raises ``ImportError`` saying how to build it.
"""

from __future__ import annotations

from cascade_aio._native.dlpack import SharedTensor
from cascade_aio._native.memory import (
    address_of,
    collapse,
    copy,
    copy_crc32c,
    copy_variant,
    crc32c,
    crc32c_chunks,
    crc32c_ranges,
    ingest_sha256,
    map_in,
    map_shared,
    notify,
    notify_address,
    prefault,
    select_copy,
    sha256_available,
    trim_heap,
    uring_version,
)
from cascade_aio._native.ring import (
    FIXED_BUFFER_BYTES_MAX,
    OP,
    REAP_BATCH,
    NativeRing,
    OpCode,
    OpFlag,
    RingFeature,
)

__all__ = [
    "FIXED_BUFFER_BYTES_MAX",
    "OP",
    "REAP_BATCH",
    "NativeRing",
    "OpCode",
    "OpFlag",
    "RingFeature",
    "SharedTensor",
    "address_of",
    "collapse",
    "copy",
    "copy_crc32c",
    "copy_variant",
    "crc32c",
    "crc32c_chunks",
    "crc32c_ranges",
    "ingest_sha256",
    "map_in",
    "map_shared",
    "notify",
    "notify_address",
    "prefault",
    "select_copy",
    "sha256_available",
    "trim_heap",
    "uring_version",
]
