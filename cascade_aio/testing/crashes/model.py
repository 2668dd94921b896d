"""What must be true after a crash: contents by number, and an oracle fed with what a process reported.

The child says what it is about to do, what it has done and what a flush has acknowledged; the oracle
turns that into what each block and each name *must* be and *may* be after the process was killed.
Pure: no files, no processes.

A block is a number; its bytes, its id and its names follow from it, so that "the right bytes" needs
no table. A name (prefix key) belongs to one block for ever, so that "first writer wins" never makes
the outcome depend on timing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cascade_aio.model import BlockId, PrefixKey, compute_block_id, prefix_keys

CHAIN_BLOCKS = 16
"""Blocks of one prompt: block n's parent is block n - 1 within it."""

BLOCK_BYTES_MIN = 4 << 10
BLOCK_BYTES_MAX = 2 << 20

COMPLAINTS = ("wrong", "damage", "leak")
"""Reports that must never come, by the kind of promise they say is broken."""

NAMES_PER_BLOCK = 3
"""Name 0 is the block's place in its prompt, the others are further prompts with the same bytes."""


@functools.lru_cache(maxsize=512)
def contents(number: int) -> tuple[bytes, bytes]:
    """Key and value of a block: 4 KiB to 2 MiB together, small sizes as likely as large ones."""
    rng = np.random.default_rng(number)
    nbytes = int(BLOCK_BYTES_MIN * (BLOCK_BYTES_MAX / BLOCK_BYTES_MIN) ** rng.random())
    key_bytes = int(nbytes * rng.random())
    return rng.bytes(key_bytes), rng.bytes(nbytes - key_bytes)


@functools.lru_cache(maxsize=4096)
def block_id_of(number: int) -> BlockId:
    """The content address of a block."""
    return compute_block_id(*contents(number))


@functools.lru_cache(maxsize=16384)
def name_of(number: int, name: int) -> PrefixKey:
    """One of the prefix keys of a block."""
    return prefix_keys([number, name], block_tokens=2, namespace="crash")[0]


def parent_of(number: int) -> PrefixKey | None:
    """The name that precedes a block in its prompt."""
    return name_of(number - 1, 0) if number % CHAIN_BLOCKS else None


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One call of the child. ``name`` is the prefix key of a put, ``None`` without one."""

    number: int
    kind: str
    block: int
    name: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Expectation:
    """What is allowed of one block after the crash."""

    must_be_there: bool
    may_be_there: bool
    names_must: frozenset[int]
    names_may: frozenset[int]


class Oracle:
    """Follows one generation of a child, from what was there before.

    ``baseline`` maps blocks that are on stable storage to their names. ``may_evict``: a disk budget
    may drop any block, so nothing has to be there; what was deleted stays away all the same.
    An operation in doubt (cancelled, failed) may have been done or not, whatever was flushed after it.
    """

    def __init__(self, baseline: Mapping[int, frozenset[int]], *, may_evict: bool) -> None:
        self.baseline = dict(baseline)
        self.durable = -1
        self.complaints: list[tuple[str, str]] = []
        self._may_evict = may_evict
        self._operations: dict[int, list[Operation]] = {}
        self._void: set[int] = set()
        self._doubtful: set[int] = set()
        self.count = 0
        self.closed = False

    def feed(self, event: Sequence[Any]) -> None:
        """One report of the child, in the order in which it made them."""
        what = event[0]
        if what == "op":
            operation = Operation(*event[1:])
            self._operations.setdefault(operation.block, []).append(operation)
            self.count += 1
        elif what == "miss":
            self._void.add(event[1])
        elif what == "doubt":
            self._doubtful.add(event[1])
        elif what == "durable":
            self.durable = max(self.durable, event[1])
        elif what == "closed":
            self.closed = True
        elif what in COMPLAINTS:
            self.complaints.append((what, f"the child itself saw: {event[1]}"))

    @property
    def doubts(self) -> int:
        """Operations in doubt."""
        return len(self._doubtful)

    def history(self, block: int) -> str:
        """What is known of a block, for a failure's message."""
        told = [
            f"{operation.number} {operation.kind} {operation.name}"
            + (" (missed)" if operation.number in self._void else "")
            + (" (in doubt)" if operation.number in self._doubtful else "")
            for operation in self._operations.get(block, ())
        ]
        before = sorted(self.baseline[block]) if block in self.baseline else None
        return f"names before {before}; operations {told}; durable {self.durable}"

    def blocks(self) -> list[int]:
        """Every block that was ever mentioned."""
        return sorted(self.baseline.keys() | self._operations.keys())

    def expect(self, block: int) -> Expectation:
        """What is allowed of ``block`` now that the child is dead."""
        names = self.baseline.get(block)
        must = may = names is not None
        names_must = names_may = names or frozenset()
        for operation in self._operations.get(block, ()):
            if operation.number in self._void:
                continue
            acknowledged = operation.number <= self.durable and operation.number not in self._doubtful
            if operation.kind == "delete":
                must, names_must = False, frozenset()
                if acknowledged:
                    may, names_may = False, frozenset()
                continue
            may = True
            added = frozenset() if operation.name is None else frozenset((operation.name,))
            names_may |= added
            if acknowledged:
                must = True
                names_must |= added
        if self._may_evict:
            must, names_must = False, frozenset()
        return Expectation(must, may, names_must, names_may)
