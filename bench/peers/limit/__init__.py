"""The limits of the machine, measured in the same turns and by the same harness as the systems."""

from __future__ import annotations

from bench.peers.protocol import System

_PEER = "bench.peers.limit.peer"

SYSTEMS = (
    System("limit-disk", "Limit: raw disk", f"{_PEER}:DiskPeer", own_environment=False),
    System("limit-memory", "Limit: raw copy", f"{_PEER}:MemoryPeer", own_environment=False),
)
