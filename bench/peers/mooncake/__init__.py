"""Mooncake Store over TCP: embedded, from a process of its own, and with SSD offload."""

from __future__ import annotations

from bench.peers.protocol import System

_ADAPTER = "bench.peers.mooncake.peer:MooncakePeer"

SYSTEMS = (
    System("mooncake", "Mooncake Store (embedded)", _ADAPTER),
    System("mooncake-tcp", "Mooncake Store (another process, TCP)", _ADAPTER),
    System("mooncake-ssd", "Mooncake Store (SSD offload)", _ADAPTER),
)
