"""HDF5 through h5py: one dataset per block in one file."""

from __future__ import annotations

from bench.peers.protocol import System

_ADAPTER = "bench.peers.hdf5.peer:Hdf5Peer"
GZIP_ROUND_BYTES_MAX = 64 << 20
"""Some 0.04 GB/s: a round of 1 GiB would take half a minute."""

SYSTEMS = (
    System("hdf5-contiguous", "HDF5 (contiguous)", _ADAPTER),
    System("hdf5-gzip", "HDF5 (gzip)", _ADAPTER, round_bytes_max=GZIP_ROUND_BYTES_MAX),
)
