"""One file per block: what a sceptic would write in an hour."""

from __future__ import annotations

from bench.peers.protocol import System

_ADAPTER = "bench.peers.files.peer:FilesPeer"

SYSTEMS = (
    System("files", "Files (plain)", _ADAPTER, own_environment=False),
    System("files-direct", "Files (O_DIRECT, threads)", _ADAPTER, own_environment=False),
)
