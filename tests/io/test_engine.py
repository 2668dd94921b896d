"""What engines do beyond the conformance suite: order, bounds, resuming, failures, teardown, fallback."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cascade_aio._native import OP, NativeRing, OpCode
from cascade_aio.abc.storage import PAGE_BYTES, Priority
from cascade_aio.errors import ClosedError, ConfigError
from cascade_aio.io.engine import EngineLimits, TransferEngine
from cascade_aio.io.ring import KernelRing, Ring
from cascade_aio.io.storage import open_storage
from cascade_aio.io.threads import ThreadEngine
from cascade_aio.testing.storage import page_buffer, random_pages

MIB = 1 << 20
Opener = Callable[[EngineLimits | None], TransferEngine]


class PlainFile:
    """A descriptor as engines want it."""

    def __init__(self, path: str, flags: int = os.O_RDWR | os.O_CREAT, *, direct: bool = False) -> None:
        self.path = path
        self.direct = direct
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o600)


@pytest.fixture
def file(tmp_path: Path) -> PlainFile:
    return PlainFile(str(tmp_path / "file"))


@pytest.fixture(params=["uring", "threads"])
async def opener(request: pytest.FixtureRequest, file: PlainFile) -> AsyncIterator[Opener]:
    engines: list[TransferEngine] = []

    def opener(limits: EngineLimits | None = None) -> TransferEngine:
        engine = open_ring(limits) if request.param == "uring" else ThreadEngine.open(threads=4, limits=limits)
        engines.append(engine)
        return engine

    yield opener
    for engine in engines:
        await engine.aclose()
        assert engine.statistics()["requests_in_flight"] == 0
    os.close(file.fd)


def open_ring(limits: EngineLimits | None = None, factory: Callable[[int, int], KernelRing] | None = None) -> Ring:
    try:
        return Ring.open(limits=limits, ring_factory=factory)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


class InstrumentedRing:
    """A kernel ring whose answers and refusals a test bends."""

    def __init__(self, entries: int, event_fd: int) -> None:
        self._ring = NativeRing(entries, event_fd)
        self.bend: Callable[[int], int] = lambda result: result
        self.refuse_with: list[int] = []
        self.take_at_most = 1 << 30
        self.submitted: list[tuple[int, ...]] = []

    def submit(self, ops: bytearray, count: int, start: int = 0) -> int:
        if self.refuse_with:
            code = self.refuse_with.pop(0)
            raise OSError(code, os.strerror(code))
        taken = self._ring.submit(ops, min(count, self.take_at_most), start)
        self.submitted += [OP.unpack_from(ops, (start + i) * OP.size) for i in range(taken)]
        return taken

    def reap(self) -> list[tuple[int, int]]:
        return [(token, result if token == 2**64 - 1 else self.bend(result)) for token, result in self._ring.reap()]

    def wait(self, timeout_ms: int) -> bool:
        return self._ring.wait(timeout_ms)

    def register_buffer_table(self, slots: int) -> None:
        self._ring.register_buffer_table(slots)

    def register_buffer(self, slot: int, address: int, nbytes: int) -> None:
        self._ring.register_buffer(slot, address, nbytes)

    def close(self) -> None:
        self._ring.close()

    def codes(self) -> list[int]:
        return [op[5] for op in self.submitted]


def instrumented(limits: EngineLimits | None = None) -> tuple[Ring, InstrumentedRing]:
    made: list[InstrumentedRing] = []

    def factory(entries: int, event_fd: int) -> InstrumentedRing:
        made.append(InstrumentedRing(entries, event_fd))
        return made[0]

    return open_ring(limits, factory), made[0]


# -- order and bounds


async def test_a_demand_read_overtakes_background_reads(opener: Opener, file: PlainFile) -> None:
    os.ftruncate(file.fd, 64 * PAGE_BYTES)
    engine = opener(EngineLimits(requests_in_flight_max=4))
    finished: list[str] = []

    async def reading(name: str, priority: Priority) -> None:
        await engine.read(file, [page_buffer(PAGE_BYTES)], 0, priority=priority)
        finished.append(name)

    background = [asyncio.ensure_future(reading("background", Priority.BACKGROUND)) for _ in range(200)]
    await asyncio.sleep(0)
    await reading("demand", Priority.DEMAND)
    await asyncio.gather(*background)
    assert finished.index("demand") < 40


async def test_bounds_on_requests_and_bytes_hold(opener: Opener, file: PlainFile) -> None:
    os.ftruncate(file.fd, 8 * MIB)
    limits = EngineLimits(request_bytes_max=256 << 10, requests_in_flight_max=3, bytes_in_flight_max=512 << 10)
    engine = opener(limits)
    seen: list[tuple[object, object]] = []

    async def watch() -> None:
        while True:
            statistics = engine.statistics()
            seen.append((statistics["requests_in_flight"], statistics["bytes_in_flight"]))
            await asyncio.sleep(0)

    watching = asyncio.ensure_future(watch())
    sizes = await asyncio.gather(*(engine.read(file, [page_buffer(2 * MIB)], i * 2 * MIB) for i in range(4)))
    watching.cancel()
    assert sizes == [2 * MIB] * 4
    assert max(requests for requests, _ in seen if isinstance(requests, int)) <= 4
    assert max(nbytes for _, nbytes in seen if isinstance(nbytes, int)) <= 512 << 10
    requests_seen = engine.statistics()["requests_in_flight_seen"]
    assert isinstance(requests_seen, int)
    assert 1 < requests_seen <= 4


async def test_requests_of_one_turn_are_submitted_together(file: PlainFile) -> None:
    os.ftruncate(file.fd, 64 * PAGE_BYTES)
    ring = open_ring()
    await asyncio.gather(*(ring.read(file, [page_buffer(PAGE_BYTES)], i * PAGE_BYTES) for i in range(50)))
    statistics = ring.statistics()
    assert (statistics["requests"], statistics["submits"]) == (50, 1)
    await ring.aclose()
    os.close(file.fd)


async def test_one_turn_hands_over_a_bounded_number_of_bytes(file: PlainFile) -> None:
    os.ftruncate(file.fd, 8 * MIB)
    ring, native = instrumented(EngineLimits(request_bytes_max=MIB, turn_bytes_max=2 * MIB))
    assert await ring.read(file, [page_buffer(8 * MIB)], 0) == 8 * MIB
    statistics = ring.statistics()
    assert (statistics["requests"], statistics["submits"]) == (8, 4)
    assert [op[4] for op in native.submitted] == [file.fd] * 8
    await ring.aclose()
    os.close(file.fd)


# -- answers of the device


async def test_short_transfers_are_resumed(tmp_path: Path) -> None:
    file = PlainFile(str(tmp_path / "f"))
    content = random_pages(MIB, 1)
    ring, native = instrumented(EngineLimits(request_bytes_max=256 << 10))
    rng = random.Random(2)
    native.bend = lambda result: rng.randrange(1, result) if result > 1 and rng.random() < 0.8 else result
    await ring.write(file, [content[: 300 << 10], content[300 << 10 :]], 0)
    found = page_buffer(MIB)
    scattered = [found[i : i + 4096 * 10] for i in range(0, MIB, 4096 * 10)]
    assert await ring.read(file, scattered, 0) == MIB
    assert found == content
    resumed = ring.statistics()["resumed"]
    assert isinstance(resumed, int)
    assert resumed > 0
    await ring.aclose()
    os.close(file.fd)


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN])
async def test_interrupted_requests_are_given_again_a_bounded_number_of_times(file: PlainFile, code: int) -> None:
    os.ftruncate(file.fd, PAGE_BYTES)
    ring, native = instrumented()
    failures = iter([-code] * 3)
    native.bend = lambda result: next(failures, result)
    assert await ring.read(file, [page_buffer(PAGE_BYTES)], 0) == PAGE_BYTES
    assert ring.statistics()["retried"] == 3
    native.bend = lambda _result: -code
    with pytest.raises(OSError) as caught:  # noqa: PT011  (its errno is looked at)
        await ring.read(file, [page_buffer(PAGE_BYTES)], 0)
    assert caught.value.errno == code
    await ring.aclose()
    os.close(file.fd)


async def test_a_failed_piece_fails_the_transfer_after_all_pieces_ended(file: PlainFile) -> None:
    os.ftruncate(file.fd, 4 * MIB)
    ring, native = instrumented(EngineLimits(request_bytes_max=64 << 10, requests_in_flight_max=8))
    results = iter([-errno.EIO])
    native.bend = lambda result: next(results, result)
    found = page_buffer(4 * MIB)
    with pytest.raises(OSError, match=r"read of 4194304 bytes at offset 0 .* dmesg") as caught:
        await ring.read(file, [found], 0)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, file.path)
    statistics = ring.statistics()
    assert (statistics["requests_in_flight"], statistics["queued"]) == (0, 0)
    requests = statistics["requests"]
    assert isinstance(requests, int)
    assert requests < 64, "pieces were started after the failure"
    await ring.aclose()
    os.close(file.fd)


async def test_a_full_device_says_so(opener: Opener) -> None:
    full = PlainFile("/dev/full", os.O_RDWR)
    engine = opener(None)
    with pytest.raises(OSError, match=r"write of 4096 bytes .* free space") as caught:
        await engine.write(full, [page_buffer(PAGE_BYTES)], 0)
    assert caught.value.errno == errno.ENOSPC
    os.close(full.fd)


async def test_errors_of_the_kernel_keep_errno_and_path(opener: Opener, tmp_path: Path) -> None:
    path = str(tmp_path / "read-only")
    Path(path).write_bytes(bytes(PAGE_BYTES))
    file = PlainFile(path, os.O_RDONLY)
    engine = opener(None)
    with pytest.raises(OSError) as caught:  # noqa: PT011  (its errno is looked at)
        await engine.write(file, [page_buffer(PAGE_BYTES)], 0)
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, path)
    os.close(file.fd)


async def test_a_submission_refused_for_now_is_tried_again(file: PlainFile) -> None:
    os.ftruncate(file.fd, PAGE_BYTES)
    ring, native = instrumented()
    native.refuse_with = [errno.EAGAIN, errno.EBUSY]
    assert await ring.read(file, [page_buffer(PAGE_BYTES)], 0) == PAGE_BYTES
    await ring.aclose()
    os.close(file.fd)


async def test_a_partly_taken_submission_is_completed(file: PlainFile) -> None:
    os.ftruncate(file.fd, 32 * PAGE_BYTES)
    ring, native = instrumented()
    native.take_at_most = 3
    sizes = await asyncio.gather(*(ring.read(file, [page_buffer(PAGE_BYTES)], i * PAGE_BYTES) for i in range(32)))
    assert sizes == [PAGE_BYTES] * 32
    await ring.aclose()
    os.close(file.fd)


async def test_a_ring_that_takes_nothing_any_more_fails_its_transfers(file: PlainFile) -> None:
    os.ftruncate(file.fd, PAGE_BYTES)
    ring, native = instrumented()
    native.refuse_with = [errno.EBADF]
    with pytest.raises(OSError) as caught:  # noqa: PT011  (its errno is looked at)
        await ring.read(file, [page_buffer(PAGE_BYTES)], 0)
    assert caught.value.errno == errno.EBADF
    await ring.aclose()
    os.close(file.fd)


# -- cancellation and deadlines


async def test_cancelling_a_running_request_asks_the_kernel_and_waits(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    fifo = PlainFile(path, os.O_RDWR)
    ring, native = instrumented()
    found = page_buffer(PAGE_BYTES)
    task = asyncio.ensure_future(ring.read(fifo, [found], 0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert native.codes() == [int(OpCode.READ)]
    assert not task.done(), "an empty pipe was read"
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert int(OpCode.CANCEL) in native.codes()
    assert ring.statistics()["requests_in_flight"] == 0
    await ring.aclose()
    os.close(fifo.fd)


async def test_a_deadline_ends_a_request_that_hangs(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    fifo = PlainFile(path, os.O_RDWR)
    ring = open_ring()
    with pytest.raises(TimeoutError, match="deadline"):
        await ring.read(fifo, [page_buffer(PAGE_BYTES)], 0, deadline_s=0.01)
    assert ring.statistics()["timed_out"] == 1
    await ring.aclose()
    os.close(fifo.fd)


async def test_requests_not_yet_started_are_dropped(opener: Opener, file: PlainFile) -> None:
    os.ftruncate(file.fd, 8 * MIB)
    engine = opener(EngineLimits(request_bytes_max=64 << 10, requests_in_flight_max=2))
    tasks = [asyncio.ensure_future(engine.read(file, [page_buffer(4 * MIB)], 0)) for _ in range(10)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    requests = engine.statistics()["requests"]
    assert isinstance(requests, int)
    assert requests < 10 * 64
    assert await engine.read(file, [page_buffer(MIB)], 0) == MIB


# -- registered memory


async def test_requests_in_registered_memory_use_it(file: PlainFile) -> None:
    ring, native = instrumented(EngineLimits(request_bytes_max=MIB))
    memory = random_pages(3 * MIB, 3)
    if await ring.register_memory(memory, piece_bytes=MIB + PAGE_BYTES) < 3 * MIB:
        pytest.skip(f"memory cannot be registered here: {ring.statistics()['ring_notes']}")
    content = bytes(memory)
    await ring.write(file, [memory], 0)
    memory[:] = bytes(3 * MIB)
    assert await ring.read(file, [memory], 0) == 3 * MIB
    assert memory == content
    fixed = {int(OpCode.READ_FIXED), int(OpCode.WRITE_FIXED)}
    assert set(native.codes()) == fixed
    assert ring.statistics()["registered_bytes"] == 3 * MIB
    await ring.read(file, [page_buffer(MIB)], 0)
    assert native.codes()[-1] == int(OpCode.READ)
    await ring.aclose()
    os.close(file.fd)


async def test_memory_may_be_registered_while_it_is_being_read_into(file: PlainFile) -> None:
    content = random_pages(8 * MIB, 4)
    os.pwrite(file.fd, content, 0)
    ring = open_ring(EngineLimits(request_bytes_max=64 << 10, requests_in_flight_max=2))
    memory = page_buffer(8 * MIB)
    reading = asyncio.ensure_future(ring.read(file, [memory], 0))
    await asyncio.sleep(0)
    registered = await ring.register_memory(memory, piece_bytes=MIB + PAGE_BYTES)
    assert await reading == 8 * MIB
    assert memory == content
    if not registered:
        pytest.skip(f"memory cannot be registered here: {ring.statistics()['ring_notes']}")
    await ring.aclose()
    os.close(file.fd)


async def test_a_refused_registration_is_told_and_harmless(file: PlainFile) -> None:
    os.ftruncate(file.fd, MIB)
    ring, native = instrumented()

    def refuse(slot: int, address: int, nbytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    native.register_buffer = refuse  # type: ignore[method-assign]
    memory = page_buffer(MIB)
    assert await ring.register_memory(memory) == 0
    assert "ulimit -l" in str(ring.statistics()["ring_notes"])
    assert await ring.read(file, [memory], 0) == MIB
    assert native.codes() == [int(OpCode.READ)]
    await ring.aclose()
    os.close(file.fd)


# -- loops and ends


async def test_use_after_close_and_from_another_loop(opener: Opener, file: PlainFile) -> None:
    engine = opener(None)

    def elsewhere() -> None:
        asyncio.run(engine.read(file, [page_buffer(PAGE_BYTES)], 0))

    with pytest.raises(RuntimeError, match="another event loop"):
        await asyncio.to_thread(elsewhere)
    await engine.aclose()
    with pytest.raises(ClosedError):
        await engine.read(file, [page_buffer(PAGE_BYTES)], 0)


def test_a_ring_of_a_loop_torn_down_is_drained_and_freed(tmp_path: Path) -> None:
    async def probe() -> None:
        await open_ring().aclose()

    asyncio.run(probe())  # a skip must come from here: a loop that runs for ever would not hear of it
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    fifo = PlainFile(path, os.O_RDWR)
    gc.collect()  # what other tests left is not closed in the middle of this one
    before = len(os.listdir("/proc/self/fd"))

    async def abandon() -> None:
        ring = open_ring()
        task = asyncio.ensure_future(ring.read(fifo, [page_buffer(PAGE_BYTES)], 0))
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().stop()
        await task

    loop = asyncio.new_event_loop()
    task = loop.create_task(abandon())
    loop.run_forever()
    loop.close()
    del task, loop, abandon
    with pytest.warns(ResourceWarning, match="aclose"):
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fifo.fd)


# -- choosing a backend


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.ENOSYS, "upgrade"),
        (errno.EPERM, "kernel.io_uring_disabled"),
        (errno.ENOMEM, "ulimit -l"),
        (errno.ENOTSUP, "5.11"),
    ],
)
async def test_without_io_uring_the_reason_and_the_cure_are_told(code: int, cure: str) -> None:
    def factory(entries: int, event_fd: int) -> KernelRing:
        raise OSError(code, os.strerror(code))

    gc.collect()  # what other tests left is not closed in the middle of this one
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=cure):
        open_storage("uring", ring_factory=factory)
    storage = open_storage("auto", ring_factory=factory)
    statistics = storage.statistics()
    assert statistics["backend"] == "threads"
    assert cure in str(statistics["notes"])
    await storage.aclose()
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="io_backend='aio'"):
        open_storage("aio")


async def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="request_bytes_max=100"):
        EngineLimits(request_bytes_max=100)
    with pytest.raises(ConfigError, match="requests_in_flight_max"):
        EngineLimits(requests_in_flight_max=0)
