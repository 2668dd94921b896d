"""Many nodes in virtual time: the operations of ``core.remote_operations`` as they are, on a modelled network.

What is real: every decision. Lookups, publications, reads and withdrawals are the generators that the MPI thread
drives, on directories with the tier's own bytes. What is modelled: a command takes the time of ``Costs`` at its
origin's MPI thread, on the way, and at its target, whose network interface serves one command after the other, in
the order in which commands were issued. Payload bytes are counted and not moved.

Invariant: a run depends on its arguments alone. Nothing here measures; a number that comes out is a simulation.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Generator
from typing import Any

from cascade_aio.core.remote_directory import BUCKET_BYTES, ENTRY_BYTES, GENERATION_BYTES, TOKEN_BYTES, Geometry
from cascade_aio.core.remote_operations import Command, Get, Membership, Operation, Put, Region, Swap

Script = Generator[Operation[Any], Any, None]
"""What one client does: yields operations, is resumed with their results."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Parameters of the network and of a rank, in seconds and bytes per second."""

    latency_s: float
    """There and back, without payload and without waiting."""
    origin_s: float
    """The MPI thread's own time for one command."""
    target_s: float
    """How long a command occupies the target's network interface, besides its payload."""
    bytes_per_s: float
    """Of one node's link, each direction."""


@dataclasses.dataclass
class Load:
    """What one node had to do for others, or asked of them."""

    directory_messages: int = 0
    served_messages: int = 0
    served_bytes: int = 0
    busy_s: float = 0.0


class Cluster:
    """``nodes`` ranks with one directory among them. ``start`` scripts, then ``run``."""

    def __init__(self, nodes: int, geometry: Geometry, costs: Costs) -> None:
        self.membership = Membership(0, [geometry] * nodes)
        self.geometry = geometry
        self.costs = costs
        self.now_s = 0.0
        self.loads = [Load() for _ in range(nodes)]
        self.messages: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.generations: list[dict[int, int]] = [{} for _ in range(nodes)]
        self._buckets: list[dict[int, bytearray]] = [{} for _ in range(nodes)]
        self._thread_free_s = [0.0] * nodes
        self._served_until_s = [0.0] * nodes
        self._received_until_s = [0.0] * nodes
        self._events: list[tuple[float, int, int, Script, Operation[Any] | None]] = []
        self._order = itertools.count()

    def start(self, node: int, script: Script, at_s: float = 0.0) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), node, script, None))

    def run(self) -> None:
        """Until every script has ended."""
        while self._events:
            self.now_s, _, node, script, operation = heapq.heappop(self._events)
            self._resume(node, script, operation)

    def entries(self, node: int) -> int:
        """Entries in use in the node's part of the directory."""
        tokens = (
            bucket[start : start + TOKEN_BYTES]
            for bucket in self._buckets[node].values()
            for start in range(0, BUCKET_BYTES, ENTRY_BYTES)
        )
        return sum(any(token) for token in tokens)

    def _resume(self, node: int, script: Script, operation: Operation[Any] | None) -> None:
        outcome: Any = None
        while True:
            if operation is None:
                try:
                    operation = script.send(outcome)
                except StopIteration:
                    return
            try:
                commands = next(operation)
            except StopIteration as end:
                outcome, operation = end.value, None
                continue
            done_s = max((self._carry_out(node, command) for command in commands), default=self.now_s)
            heapq.heappush(self._events, (done_s, next(self._order), node, script, operation))
            return

    def _carry_out(self, node: int, command: Command) -> float:
        """Its effect now; when its origin hears of it."""
        costs = self.costs
        nbytes = self._effect(command)
        self._count(node, command, nbytes)
        issued_s = max(self.now_s, self._thread_free_s[node]) + costs.origin_s
        self._thread_free_s[node] = issued_s
        if command.rank == node:
            return issued_s
        busy_s = costs.target_s + nbytes / costs.bytes_per_s
        served_s = max(issued_s + costs.latency_s / 2, self._served_until_s[command.rank]) + busy_s
        self._served_until_s[command.rank] = served_s
        self.loads[command.rank].busy_s += busy_s
        arrived_s = max(served_s + costs.latency_s / 2, self._received_until_s[node] + nbytes / costs.bytes_per_s)
        self._received_until_s[node] = arrived_s
        return arrived_s

    def _count(self, node: int, command: Command, nbytes: int) -> None:
        kind = _kind(command)
        if command.rank == node:
            self.messages["own memory"] += 1
            return
        self.messages[kind] += 1
        self.bytes[kind] += nbytes
        load = self.loads[command.rank]
        load.served_messages += 1
        load.served_bytes += nbytes
        load.directory_messages += kind not in ("payload", "generation")

    def _effect(self, command: Command) -> int:
        """Do what the command does to the memories; how many bytes go over the network."""
        if isinstance(command, Swap):
            bucket, at = self._at(command.rank, command.offset)
            word = bucket[at : at + TOKEN_BYTES]
            command.found = int.from_bytes(word, "little")
            if command.found == command.expected:
                bucket[at : at + TOKEN_BYTES] = command.desired.to_bytes(TOKEN_BYTES, "little")
            return 2 * TOKEN_BYTES
        if isinstance(command, Put):
            bucket, at = self._at(command.rank, command.offset)
            bucket[at : at + len(command.payload)] = command.payload
            return len(command.payload)
        if command.region is Region.CONTROL:
            if command.offset < self.geometry.buckets_at:
                generation = self.generations[command.rank].get(command.offset // GENERATION_BYTES, 0)
                command.into[:] = generation.to_bytes(GENERATION_BYTES, "little")
            else:
                known = self._buckets[command.rank].get(command.offset - self.geometry.buckets_at)
                if known is not None:
                    command.into[:] = known
        return len(command.into)

    def _at(self, rank: int, offset: int) -> tuple[bytearray, int]:
        number, at = divmod(offset - self.geometry.buckets_at, BUCKET_BYTES)
        return self._buckets[rank].setdefault(number * BUCKET_BYTES, bytearray(BUCKET_BYTES)), at


def _kind(command: Command) -> str:
    if isinstance(command, Get):
        if command.region is Region.ARENA:
            return "payload"
        return "generation" if len(command.into) == GENERATION_BYTES else "bucket"
    return "swap" if isinstance(command, Swap) else "entry"
