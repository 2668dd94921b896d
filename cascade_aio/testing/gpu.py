"""A GPU of memory: a ``DeviceDriver`` that is as asynchronous as a real one, and notices what a real one forgives.

What it is: streams are queues whose heads run late, in an order drawn from a seed, so that two streams overtake each
other in every way that events allow. Device memory is host memory elsewhere, at its real address, so DLPack consumers
for the CPU can look at it. ``launch`` stands for a user's kernel. ``lose``, ``fail_next``, ``pause`` and the limits
make the device as bad as devices are.

What it notices (``violations``; the offending call raises ``AssertionError`` too, where there is one):

* two accesses to the same bytes, one of them a write, which no event, stream or observation by the host orders,
  whatever order they happened to run in (vector clocks);
* bytes of the host that change between the enqueueing of a copy and its end;
* copies from or to host memory that is not pinned, or across two pinned pieces;
* memory freed or unpinned, events and streams destroyed, while something enqueued refers to them.

Belongs to the event loop on which it is first used. Must not know: the tier that uses it.
"""

from __future__ import annotations

import asyncio
import collections
import ctypes
import dataclasses
import mmap
import os
import random
import threading
import zlib
from collections.abc import Sequence

from cascade_aio._native import address_of
from cascade_aio.abc.device import DeviceError, DeviceMemoryError, MemoryCopy

DLPACK_CPU = 1
"""DLPack's name for memory of the host, where this device's memory really is."""

LEGACY_STREAM = 0
_FRESH = 0xA5
_FREED = 0xDD
_STEPS_PER_TURN_MAX = 4
"""Operations done in one turn of the loop, at most."""

_Clock = dict[int, int]


@dataclasses.dataclass(slots=True, eq=False)
class Kernel:
    """A user's kernel: ``done`` when it has run, ``seen`` what it read then, one per range."""

    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, bytes], ...]
    done: bool = False
    seen: list[bytes] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, eq=False)
class _Event:
    recorded: int = 0
    done: int = 0
    clock: _Clock = dataclasses.field(default_factory=dict)
    """Of the last record."""


@dataclasses.dataclass(slots=True, eq=False)
class _Op:
    kind: str
    stream: int
    copies: tuple[MemoryCopy, ...] = ()
    sums: tuple[int, ...] = ()
    event: _Event | None = None
    version: int = 0
    event_fd: int = -1
    kernel: Kernel | None = None

    def ranges(self) -> list[tuple[int, int, bool]]:
        """(address, end, whether it is written)."""
        found = [(copy.source, copy.source + copy.nbytes, False) for copy in self.copies]
        found += [(copy.target, copy.target + copy.nbytes, True) for copy in self.copies]
        if self.kernel is not None:
            found += [(start, start + nbytes, False) for start, nbytes in self.kernel.reads]
            found += [(start, start + len(data), True) for start, data in self.kernel.writes]
        return found


@dataclasses.dataclass(slots=True)
class _Access:
    start: int
    end: int
    write: bool
    stream: int
    number: int


class FakeGpu:
    """One device. ``delay_s_max``: how late, at most, the next operation runs; 0: in the next turn of the loop.
    ``beside``: another device of the same host, for which the same memory is page-locked."""

    def __init__(
        self,
        ordinal: int = 0,
        *,
        memory_bytes: int = 64 << 20,
        pinned_bytes_max: int = 1 << 40,
        batches_copies: bool = True,
        delay_s_max: float = 0.0005,
        seed: int = 0,
        beside: FakeGpu | None = None,
    ) -> None:
        self.ordinal = ordinal
        self.description = "a device of memory"
        self.memory_bytes = memory_bytes
        self.dlpack_device = (DLPACK_CPU, 0)
        self.batches_copies = batches_copies
        self.pinned_bytes_max = pinned_bytes_max
        self.violations: list[str] = []
        self.calls: collections.Counter[str] = collections.Counter()
        self.copied_bytes = 0
        self.lost = False
        self.closed = False
        self._random = random.Random(seed)
        self._delay_s_max = delay_s_max
        self._failures: dict[str, list[DeviceError | None]] = collections.defaultdict(list)
        self._memory: dict[int, memoryview] = {}
        self._pinned: dict[int, int] = {} if beside is None else beside._pinned
        self._shares = beside is not None
        self._pinned_memory: dict[int, memoryview] = {}
        self._streams: dict[int, collections.deque[_Op]] = {LEGACY_STREAM: collections.deque()}
        self._dying_streams: set[int] = set()
        self._events: dict[int, _Event] = {}
        self._next_handle = 0x1000
        self._clocks: dict[int, _Clock] = collections.defaultdict(dict)
        self._host_clock: _Clock = {}
        self._accesses: list[_Access] = []
        self._paused = False
        self._scheduled = False
        self._thread = 0
        self._lock = threading.Lock()

    # -- what tests do to it ----------------------------------------------------------------------

    def lose(self) -> None:
        """The device falls off the bus: what is enqueued never ends, every call fails."""
        self.lost = True
        for queue in self._streams.values():
            queue.clear()

    def fail_next(
        self, call: str, *, after: int = 0, code: str = "CUDA_ERROR_INVALID_VALUE", memory: bool = False
    ) -> None:
        """The next ``call`` (a method's name) ``after`` so many more that go well is refused; the device stays."""
        kind = DeviceMemoryError if memory else DeviceError
        self._failures[call] += [None] * after
        self._failures[call].append(kind(f"{call} was refused: {code}", code=code))

    def pause(self) -> None:
        """Nothing runs until ``resume``."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._schedule()

    @property
    def pinned_bytes(self) -> int:
        return sum(self._pinned.values())

    @property
    def pending(self) -> int:
        """Operations enqueued and not done."""
        return sum(len(queue) for queue in self._streams.values())

    def launch(
        self, stream: int, *, reads: Sequence[tuple[int, int]] = (), writes: Sequence[tuple[int, bytes]] = ()
    ) -> Kernel:
        """Enqueue a kernel that reads (address, bytes) and writes (address, data)."""
        self._enter("launch")
        kernel = Kernel(tuple(reads), tuple(writes))
        self._enqueue(_Op("kernel", stream, kernel=kernel))
        return kernel

    async def idle(self) -> None:
        """Return once all that is enqueued has run."""
        while self.pending:  # noqa: ASYNC110 - what runs next is drawn by lot, there is nothing to wait for
            await asyncio.sleep(0.0005)

    # -- memory -----------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        return self.memory_bytes - sum(len(memory) for memory in self._memory.values())

    def allocate(self, nbytes: int) -> int:
        self._enter("allocate")
        if nbytes > self.free_bytes():
            raise DeviceMemoryError(
                f"device {self.ordinal} has {self.free_bytes()} bytes free, {nbytes} were asked for",
                code="CUDA_ERROR_OUT_OF_MEMORY",
            )
        memory = memoryview(mmap.mmap(-1, nbytes))
        _fill(memory, _FRESH)
        pointer = address_of(memory)
        self._memory[pointer] = memory
        return pointer

    def free(self, pointer: int) -> None:
        self._enter("free")
        memory = self._memory.pop(pointer, None)
        if memory is None:
            raise self._wrong(f"free of {pointer:#x}, which is not allocated")
        self._untouched(pointer, len(memory), "freed")
        _fill(memory, _FREED)

    def pin(self, address: int, nbytes: int) -> None:
        self._enter("pin")
        with self._lock:
            if self.pinned_bytes + nbytes > self.pinned_bytes_max:
                raise DeviceMemoryError(
                    f"{nbytes} bytes cannot be pinned beside {self.pinned_bytes}", code="CUDA_ERROR_OUT_OF_MEMORY"
                )
            if any(start < address + nbytes and address < start + size for start, size in self._pinned.items()):
                raise DeviceError("memory is pinned already", code="CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED")
            self._pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        self._enter("unpin")
        with self._lock:
            nbytes = self._pinned.pop(address, 0)
        if not nbytes:
            raise self._wrong(f"unpin of {address:#x}, which is not pinned")
        self._untouched(address, nbytes, "unpinned")

    def allocate_pinned(self, nbytes: int) -> memoryview:
        self._enter("allocate_pinned")
        memory = memoryview(mmap.mmap(-1, nbytes))
        address = address_of(memory)
        self._pinned_memory[address] = memory
        self._pinned[address] = nbytes
        return memory

    def free_pinned(self, memory: memoryview) -> None:
        address = address_of(memory)
        if self._pinned_memory.pop(address, None) is None:
            raise self._wrong(f"free_pinned of {address:#x}, which is not such memory")
        self.unpin(address)

    # -- streams and events -----------------------------------------------------------------------

    def create_stream(self) -> int:
        self._enter("create_stream")
        self._next_handle += 16
        self._streams[self._next_handle] = collections.deque()
        return self._next_handle

    def destroy_stream(self, stream: int) -> None:
        self._enter("destroy_stream", even_lost=True)
        if stream == LEGACY_STREAM or stream not in self._streams:
            raise self._wrong(f"destroy of stream {stream:#x}, which does not exist")
        self._dying_streams.add(stream)
        self._bury()

    def create_event(self) -> int:
        self._enter("create_event")
        self._next_handle += 16
        self._events[self._next_handle] = _Event()
        return self._next_handle

    def destroy_event(self, event: int) -> None:
        self._enter("destroy_event", even_lost=True)
        self._event(event)
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        self._enter("record")
        found = self._event(event)
        found.recorded += 1
        op = _Op("record", stream, event=found, version=found.recorded)
        self._enqueue(op)
        found.clock = dict(self._clocks[stream])

    def wait(self, stream: int, event: int) -> None:
        self._enter("wait")
        found = self._event(event)
        if not found.recorded:
            return
        _join(self._clocks[stream], found.clock)
        self._enqueue(_Op("wait", stream, event=found, version=found.recorded))

    def is_done(self, event: int) -> bool:
        self._enter("is_done")
        found = self._event(event)
        if found.done < found.recorded:
            return False
        _join(self._host_clock, found.clock)
        known = self._host_clock
        self._accesses = [a for a in self._accesses if known.get(a.stream, 0) < a.number]
        return True

    def copy(self, copies: Sequence[MemoryCopy], stream: int) -> None:
        self._enter("copy")
        for copy in copies:
            self._check_address(copy.target, copy.nbytes)
            self._check_address(copy.source, copy.nbytes)
        if self.batches_copies:
            self.calls["copies"] += 1
        else:
            self.calls["copies"] += len(copies)
        sums = tuple(_checksum(copy.source, copy.nbytes) if self._is_host(copy.source) else 0 for copy in copies)
        self._enqueue(_Op("copy", stream, copies=tuple(copies), sums=sums))

    def notify(self, stream: int, event_fd: int) -> None:
        self._enter("notify")
        self._enqueue(_Op("notify", stream, event_fd=event_fd))

    def close(self) -> None:
        """Raises ``AssertionError`` if anything was done wrong with it, or something was left behind."""
        if self.closed:
            return
        self.closed = True
        left = {
            "device memory": len(self._memory),
            "pinned memory": len(self._pinned_memory) if self._shares else len(self._pinned),
            "events": len(self._events),
            "streams": len(self._streams) - 1 - len(self._dying_streams),
        }
        if not self.lost and any(left.values()):
            self.violations.append(f"left behind at close: { ({what: n for what, n in left.items() if n}) }")
        assert not self.violations, self.violations

    # -- running ----------------------------------------------------------------------------------

    def _enter(self, call: str, *, even_lost: bool = False) -> None:
        self.calls[call] += 1
        if self._failures[call]:
            failure = self._failures[call].pop(0)
            if failure is not None:
                raise failure
        if self.lost and not even_lost:
            raise DeviceError(f"device {self.ordinal} is lost", code="CUDA_ERROR_DEVICE_UNAVAILABLE", lost=True)

    def _enqueue(self, op: _Op) -> None:
        thread = threading.get_ident()
        if self._thread and thread != self._thread:
            raise self._wrong(f"{op.kind} enqueued from another thread than the event loop's")
        self._thread = thread
        if op.stream not in self._streams or op.stream in self._dying_streams:
            raise self._wrong(f"{op.kind} in stream {op.stream:#x}, which does not exist")
        clock = self._clocks[op.stream]
        _join(clock, self._host_clock)
        clock[op.stream] = number = clock.get(op.stream, 0) + 1
        for start, end, write in op.ranges():
            for access in self._accesses:
                apart = access.end <= start or end <= access.start or not (write or access.write)
                if not apart and clock.get(access.stream, 0) < access.number:
                    does, did = ("writes" if it else "reads" for it in (write, access.write))
                    self.violations.append(
                        f"race: {op.kind} in stream {op.stream:#x} {does} {end - start} bytes that stream "
                        f"{access.stream:#x} {did}, in no order"
                    )
            self._accesses.append(_Access(start, end, write, op.stream, number))
        self._streams[op.stream].append(op)
        self._schedule()

    def _schedule(self) -> None:
        if self._scheduled or self._paused:
            return
        self._scheduled = True
        loop = asyncio.get_running_loop()
        loop.call_later(self._random.uniform(0, self._delay_s_max), self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        if self._paused:
            return
        ran = False
        for _ in range(self._random.randint(1, _STEPS_PER_TURN_MAX)):
            heads = [queue for queue in self._streams.values() if queue and _may_run(queue[0])]
            if not heads:
                break
            queue = self._random.choice(heads)
            self._run(queue.popleft())
            ran = True
        self._bury()
        if ran:
            self._schedule()

    def _run(self, op: _Op) -> None:
        for copy, before in zip(op.copies, op.sums, strict=True):
            self._check_address(copy.target, copy.nbytes)
            self._check_address(copy.source, copy.nbytes)
            if self._is_host(copy.source) and _checksum(copy.source, copy.nbytes) != before:
                self.violations.append(f"{copy.nbytes} bytes of the host changed before the copy of them was done")
            ctypes.memmove(copy.target, copy.source, copy.nbytes)
            self.copied_bytes += copy.nbytes
        if op.kernel is not None:
            op.kernel.seen = [ctypes.string_at(start, nbytes) for start, nbytes in op.kernel.reads]
            for start, data in op.kernel.writes:
                ctypes.memmove(start, data, len(data))
            op.kernel.done = True
        if op.kind == "record" and op.event is not None:
            op.event.done = max(op.event.done, op.version)
        if op.kind == "notify":
            os.eventfd_write(op.event_fd, 1)

    def _bury(self) -> None:
        for stream in [stream for stream in self._dying_streams if not self._streams[stream]]:
            self._dying_streams.discard(stream)
            del self._streams[stream]

    # -- checks -----------------------------------------------------------------------------------

    def _is_host(self, address: int) -> bool:
        return not any(start <= address < start + len(memory) for start, memory in self._memory.items())

    def _check_address(self, address: int, nbytes: int) -> None:
        for start, memory in self._memory.items():
            if start <= address < start + len(memory):
                if address + nbytes > start + len(memory):
                    raise self._wrong(f"{nbytes} bytes at {address:#x} leave the device memory they begin in")
                return
        if not any(start <= address and address + nbytes <= start + size for start, size in self._pinned.items()):
            raise self._wrong(f"{nbytes} bytes at {address:#x} are neither device memory nor within one pinned piece")

    def _untouched(self, start: int, nbytes: int, what: str) -> None:
        for queue in self._streams.values():
            for op in queue:
                if any(low < start + nbytes and start < high for low, high, _ in op.ranges()):
                    raise self._wrong(f"{nbytes} bytes were {what} while a {op.kind} of them was enqueued")
        # Whoever gets these addresses next has nothing to do with what was done here.
        self._accesses = [a for a in self._accesses if a.end <= start or start + nbytes <= a.start]

    def _event(self, event: int) -> _Event:
        found = self._events.get(event)
        if found is None:
            raise self._wrong(f"event {event:#x} does not exist")
        return found

    def _wrong(self, what: str) -> AssertionError:
        self.violations.append(what)
        return AssertionError(what)


def _may_run(op: _Op) -> bool:
    return op.kind != "wait" or op.event is None or op.event.done >= op.version


def _join(clock: _Clock, other: _Clock) -> None:
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number


def _fill(memory: memoryview, byte: int) -> None:
    ctypes.memset(address_of(memory), byte, len(memory))


def _checksum(address: int, nbytes: int) -> int:
    return zlib.crc32(ctypes.string_at(address, nbytes))
