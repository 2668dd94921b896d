"""Which rank keeps what is known of a name: rendezvous hashing (Thaler and Ravishankar 1996), pure.

Every rank hashes the name together with its own number; the largest hash owns it. So all who know the same
ranks agree without talking, names spread evenly, and when a rank goes only its names move, each to the
next best rank. Names are hashes already (16 bytes); mixing them with splitmix64's finaliser (Steele, Lea and
Flood 2014) makes the ranks' orders independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NAME_BYTES = 16

_CELLS_MAX = 1 << 20
"""Names × ranks hashed in one step: 8 MiB of temporaries."""

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def seeds_of(ranks: int) -> NDArray[np.uint64]:
    """One seed for each rank from 0 on; a rank's does not depend on how many there are."""
    return _mixed(np.arange(1, ranks + 1, dtype=np.uint64) * _STEP)


def hashes_of(names: Sequence[bytes]) -> NDArray[np.uint64]:
    """One word per 16-byte name, in which all of its bits count."""
    words = np.frombuffer(b"".join(names), dtype="<u8").reshape(-1, 2).astype(np.uint64, copy=False)
    hashes: NDArray[np.uint64] = _mixed(words[:, 0] + _STEP) ^ words[:, 1]
    return hashes


def owners(hashes: NDArray[np.uint64], live: NDArray[np.int64], seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The rank of ``live``, which must not be empty, that owns each of ``hashes``."""
    chosen = np.empty(len(hashes), dtype=np.int64)
    salts = seeds[live]
    step = max(1, _CELLS_MAX // len(live))
    for start in range(0, len(hashes), step):
        part = hashes[start : start + step]
        chosen[start : start + step] = live[_mixed(part[:, None] ^ salts[None, :]).argmax(axis=1)]
    return chosen


def buckets_of(hashes: NDArray[np.uint64], buckets: NDArray[np.int64]) -> NDArray[np.int64]:
    """A bucket below ``buckets`` (one count per hash) for each of ``hashes``, independent of its owner."""
    return (_mixed(hashes ^ _SECOND) % buckets.astype(np.uint64)).astype(np.int64)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
