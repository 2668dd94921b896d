"""NIXL's POSIX plug-in with io_uring: a transfer library, here with the smallest store that can be made of it."""

from __future__ import annotations

from bench.peers.protocol import System

_ADAPTER = "bench.peers.nixl.peer:NixlPeer"

SYSTEMS = (
    System("nixl", "NIXL POSIX (io_uring, page cache)", _ADAPTER),
    System("nixl-direct", "NIXL POSIX (io_uring, O_DIRECT)", _ADAPTER),
)
