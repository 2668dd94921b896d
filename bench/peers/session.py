"""One opened peer and everything that can be asked of it: what runs in a peer's process besides the adapter.

Holds the source bytes and the memory that gets read into, makes jobs, hands them to ``driving``, and afterwards,
with the clock stopped, compares every byte and looks where the bytes came from. A difference, a miss or bytes of
the wrong temperature are a ``PeerError``: they void the sample and stop the run. Knows no workload and no file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from bench.data import scratch_memory
from bench.peers import driving, meters, replaying
from bench.peers.catalog import entries, make_peer
from bench.peers.content import Source
from bench.peers.protocol import CannotRunError, Description, Job, PeerError, Settings

Expect = Literal["hot", "cold", "any"]
Via = Literal["copy", "lease"]

COLD_SHARE_MIN = 0.95
"""A cold read must cause so much of what it gets (or of what the files hold, if less) to be read from storage …"""
HOT_SHARE_MAX = 0.05
"""… and a hot one no more than this …"""
HOT_BYTES_MAX = 4 << 20
"""… or this: pages of libraries that are first used now."""
PAGE_CACHE = "page cache"
"""``Description.medium`` of systems whose memory tier is the kernel's."""
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclasses.dataclass(slots=True)
class Measure:
    """What one batch (of one or several passes) took. Times in seconds, sizes in bytes."""

    seconds: float = 0.0
    """With the clock running; passes added up."""
    began_s: float = 0.0
    ended_s: float = 0.0
    """On the machine's monotonic clock, so that clients can be laid beside each other."""
    bytes: int = 0
    operations: int = 0
    cpu_s: float = 0.0
    """User and system, this process and the system's servers, with the clock running."""
    peak_bytes: int = 0
    """Resident memory at its highest, servers included; source, target and what was handed out are taken off."""
    read_bytes: int = 0
    written_bytes: int = 0
    verified_bytes: int = 0
    misses: int = 0
    """Only where a miss is an outcome (replays)."""
    extra: dict[str, float] = dataclasses.field(default_factory=dict)
    latency_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    """Quantiles over the operations; empty where operations have none (batches)."""


class Session:
    """See the module's text. One at a time; ``close`` in any case."""

    def __init__(self, system: str, request: Mapping[str, Any]) -> None:
        path = request.get("content")
        self.source = Source(
            request["block_bytes"], request["count"], request["seed"], pathlib.Path(path) if path else None
        )
        self._target = scratch_memory(self.source.total_bytes)
        self._baseline_bytes = meters.resident_bytes()
        began_s = driving.clock()
        try:
            self.peer = make_peer(system)
        except (ImportError, OSError) as error:
            self.source.close()
            if not entries()[system].system.own_environment:
                raise  # the suite's own environment is whole, or nothing can be measured
            raise CannotRunError(f"cannot be imported in its environment: {error}") from error
        self.import_s = driving.clock() - began_s
        """What importing the system took, if this process had not done so before."""
        self.opening_s = 0.0
        self.settings = Settings(
            folder=pathlib.Path(request["folder"]),
            block_bytes=request["block_bytes"],
            blocks_max=request["blocks_max"],
            memory_bytes=request["memory_bytes"],
            in_flight_max=request["in_flight_max"],
            durable=request["durable"],
            source=self.source.view,
            target=self._target,
            settled=request.get("settled", True),
            options=request.get("options", {}),
            endpoint=request.get("endpoint"),
        )
        self._latency_s: list[float] = []

    async def open(self) -> Description:
        """Open the peer; closes what was begun if that fails."""
        began_s = driving.clock()
        try:
            await driving.call(self.peer, "open", self.settings)
        except BaseException:
            await self.close()
            raise
        self.opening_s = driving.clock() - began_s
        return self.peer.describe()

    async def close(self) -> None:
        await driving.call(self.peer, "close")
        self.source.close()

    async def put(self, stamps: Sequence[int], count: int, in_flight: int, *, flush: bool) -> Measure:
        """Put blocks 0..count of each stamp, one pass per stamp; with ``flush`` until all of it is durable."""
        measure = self._start()
        for number, stamp in enumerate(stamps):
            self.source.stamp(stamp)
            jobs = [Job(self.source.name(stamp, index), self.source.block(index)) for index in range(count)]
            with self.counted(measure):
                ran = await driving.put_all(self.peer, jobs, in_flight)
                if flush and number == len(stamps) - 1:
                    await driving.call(self.peer, "flush")
                    ran.ended_s = driving.clock()
            self.add(measure, ran, count)
        return self._finish(measure)

    async def flush(self) -> Measure:
        """Time of a flush alone."""
        measure = self._start()
        with self.counted(measure):
            began_s = driving.clock()
            await driving.call(self.peer, "flush")
            ran = driving.Ran(began_s, driving.clock(), [], [])
        self.add(measure, ran, 0)
        return self._finish(measure)

    async def get(self, stamps: Sequence[int], count: int, in_flight: int, *, via: Via, expect: Expect) -> Measure:
        """Get blocks 0..count of each stamp in the order in which they were put; all bytes are compared."""
        measure = self._start()
        for stamp in stamps:
            self.source.stamp(stamp)
            jobs = [Job(self.source.name(stamp, index), self.room(index)) for index in range(count)]
            self.spoil(count)
            async with contextlib.AsyncExitStack() as held:
                with self.counted(measure):
                    if via == "lease":
                        ran = await driving.lease_all(self.peer, jobs, in_flight, held)
                    else:
                        ran = await driving.get_all(self.peer, jobs, in_flight)
                pieces = ran.results if via == "lease" else [[one] for one in ran.results]
                self.add(measure, ran, count, own_bytes=_own_bytes(pieces, via))
                measure.verified_bytes += self._compare(stamp, range(count), pieces)
                del ran, pieces
        self._check_temperature(measure, expect)
        return self._finish(measure)

    async def mix(self, stamp: int, in_flight: int, reads: Sequence[int], writes: Sequence[int]) -> Measure:
        """Gets of ``reads`` and puts of ``writes`` (indices, disjoint), evenly mixed; all that was got is compared."""
        measure = self._start()
        self.source.stamp(stamp)
        jobs: list[tuple[bool, Job]] = []
        taken: list[int | None] = []
        for number in range(len(reads) + len(writes)):
            done_writes = sum(1 for write, _ in jobs if write)
            if done_writes * len(reads) < (number - done_writes) * len(writes) or number - done_writes == len(reads):
                index = writes[done_writes]
                jobs.append((True, Job(self.source.name(stamp, index), self.source.block(index))))
                taken.append(None)
            else:
                index = reads[number - done_writes]
                jobs.append((False, Job(self.source.name(stamp, index), self.room(number))))
                taken.append(index)
        self.spoil(len(jobs))
        with self.counted(measure):
            ran = await driving.mix(self.peer, jobs, in_flight)
        self.add(measure, ran, len(jobs))
        for read, found in zip(taken, ran.results, strict=True):
            if read is not None:
                measure.verified_bytes += self._compare(stamp, [read], [[found]])
        return self._finish(measure)

    async def replay(self, requests: Sequence[Sequence[int]], in_flight: int) -> Measure:
        """Requests of an inference server, one after the other; see ``replaying``."""
        measure = self._start()
        await replaying.replay(self, measure, requests, in_flight)
        return self._finish(measure)

    async def contains(self, stamp: int, indices: Sequence[int]) -> list[bool]:
        return [await driving.call(self.peer, "contains", self.source.name(stamp, index)) for index in indices]

    async def delete(self, stamp: int, indices: Sequence[int]) -> None:
        for index in indices:
            await driving.call(self.peer, "delete", self.source.name(stamp, index))

    async def drop_caches(self) -> int:
        """Make the next gets cold, verified by ``mincore``; bytes that the files hold."""
        await driving.call(self.peer, "drop_caches")
        files = self.peer.files()
        if not files:
            raise CannotRunError("keeps nothing on disk")
        meters.drop_page_cache(files)
        return meters.allocated_bytes(files)

    async def bound_page_cache(self) -> int:
        """Leave in the page cache no more than the memory tier of a system that has no other, and else nothing.

        Without it a system that reads through the page cache would have all of the machine's memory.
        """
        keep = self.settings.memory_bytes if self.peer.describe().medium == PAGE_CACHE else 0
        return meters.bound_page_cache(self.peer.files(), keep)

    def room(self, index: int) -> memoryview:
        """Where block ``index`` is to be read into."""
        return self._target[index * self.source.block_bytes : (index + 1) * self.source.block_bytes]

    def spoil(self, count: int) -> None:
        """Change a byte in every page of the first ``count`` rooms: what an earlier get left there is no answer."""
        np.frombuffer(self._target, np.uint8)[: count * self.source.block_bytes : mmap.PAGESIZE] ^= 0xFF

    def _start(self) -> Measure:
        self._latency_s = []
        return Measure()

    @contextlib.contextmanager
    def counted(self, measure: Measure) -> Any:
        """CPU, storage and peak memory of what runs inside are added to ``measure``."""
        processes = self.peer.processes()
        meters.reset_peaks(processes)
        before = meters.usage(processes)
        yield
        used = meters.usage(processes).since(before)
        measure.cpu_s += used.cpu_s
        measure.read_bytes += used.read_bytes
        measure.written_bytes += used.written_bytes
        measure.peak_bytes = max(measure.peak_bytes, meters.peak_bytes(processes) - self._baseline_bytes)

    def add(self, measure: Measure, ran: driving.Ran, operations: int, own_bytes: int = 0) -> None:
        """Take down a batch of whole blocks."""
        measure.began_s = measure.began_s or ran.began_s
        measure.ended_s = ran.ended_s
        measure.seconds += ran.ended_s - ran.began_s
        measure.operations += operations
        measure.bytes += operations * self.source.block_bytes
        measure.peak_bytes = max(0, measure.peak_bytes - own_bytes)
        self._latency_s += ran.latency_s

    def _finish(self, measure: Measure) -> Measure:
        ordered = sorted(self._latency_s)
        if ordered:
            last = len(ordered) - 1
            measure.latency_ms = {f"{share:g}": ordered[round(share * last)] * 1e3 for share in QUANTILES}
        return measure

    def _compare(self, stamp: int, indices: Sequence[int], found: Sequence[Sequence[memoryview | bytes]]) -> int:
        assert self.source.stamped == stamp
        for index, pieces in zip(indices, found, strict=True):
            if not self.source.matches(index, pieces):
                raise PeerError(
                    f"{self.peer.system} gave other bytes for block {index} of round {stamp} than were put: sample void"
                )
        return len(indices) * self.source.block_bytes

    def _check_temperature(self, measure: Measure, expect: Expect) -> None:
        if expect == "hot" and measure.read_bytes > max(HOT_BYTES_MAX, HOT_SHARE_MAX * measure.bytes):
            raise PeerError(
                f"{self.peer.system}: {measure.read_bytes} of {measure.bytes} bytes of a hot read came from storage"
            )
        if expect == "cold":
            held = min(measure.bytes, meters.allocated_bytes(self.peer.files()))
            if measure.read_bytes < COLD_SHARE_MIN * held:
                raise PeerError(
                    f"{self.peer.system}: only {measure.read_bytes} of {held} bytes of a cold read came from storage"
                )


def _own_bytes(pieces: Sequence[Sequence[memoryview | bytes]], via: Via) -> int:
    """Bytes of objects that the system made for the caller: what others read into the target."""
    return sum(len(one) for some in pieces for one in some if isinstance(one, bytes)) if via == "copy" else 0
