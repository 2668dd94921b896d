"""LMCache on the CPU: the in-process back ends of its cache engine, and the L2 adapters of its multi-process mode."""

from __future__ import annotations

from bench.peers.protocol import System

_BACKEND = "bench.peers.lmcache.backends:"
_LAYER = "bench.peers.lmcache.layers:LayerPeer"

SYSTEMS = (
    System("lmcache-disk", "LMCache LocalDiskBackend (default)", _BACKEND + "DiskPeer"),
    System("lmcache-disk-direct", "LMCache LocalDiskBackend (O_DIRECT)", _BACKEND + "DiskPeer"),
    System("lmcache-cpu", "LMCache LocalCPUBackend", _BACKEND + "MemoryPeer"),
    System("lmcache-fs", "LMCache L2 fs", _LAYER),
    System("lmcache-fs-native", "LMCache L2 fs_native", _LAYER),
    System("lmcache-fs-native-direct", "LMCache L2 fs_native (O_DIRECT)", _LAYER),
    System("lmcache-raw-block", "LMCache L2 raw_block (io_uring)", _LAYER),
)
