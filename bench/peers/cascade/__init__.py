"""The store itself, held to the same rules: embedded, and through the node service."""

from __future__ import annotations

from bench.peers.protocol import System

_PEER = "bench.peers.cascade.peer"

SYSTEMS = (
    System("cascade", "Cascade (embedded)", f"{_PEER}:EmbeddedPeer", own_environment=False),
    System("cascade-blake3", "Cascade (embedded, BLAKE3)", f"{_PEER}:EmbeddedPeer", own_environment=False),
    System("cascade-service", "Cascade (node service)", f"{_PEER}:ServicePeer", own_environment=False),
    System("cascade-mpi", "Cascade (MPI)", f"{_PEER}:MpiPeer", own_environment=False),
)
