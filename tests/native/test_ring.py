"""``NativeRing`` against real files and pipes; skipped, with the reason, where io_uring cannot be opened."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade_aio import _native
from cascade_aio._native import OP, NativeRing, OpCode, OpFlag, RingFeature
from cascade_aio.errors import ClosedError

ENTRIES = 16
WAIT_MS = 20_000
IOVEC = struct.Struct("=QQ")


@pytest.fixture
def event_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def ring(event_fd: int) -> Iterator[NativeRing]:
    try:
        opened = NativeRing(ENTRIES, event_fd)
    except OSError as error:
        pytest.skip(f"{error}; a container needs a seccomp profile that allows io_uring_setup")
    yield opened
    opened.close()


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    mapped = mmap.mmap(-1, 1 << 20)
    yield mapped
    mapped.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    yield opened
    os.close(opened)


@pytest.fixture
def fixed(ring: NativeRing) -> NativeRing:
    if not ring.features & RingFeature.REGISTER_SPARSE:
        pytest.skip("this kernel has no sparse buffer tables (needs 5.19)")
    try:
        ring.register_buffer_table(4)
    except OSError as error:
        pytest.skip(f"{error}; raise the memlock limit")
    return ring


def op(
    code: OpCode,
    *,
    token: int = 1,
    address: int = 0,
    offset: int = 0,
    length: int = 0,
    fd: int = -1,
    flags: int = 0,
    buffer_index: int = 0,
) -> bytes:
    return OP.pack(token, address, offset, length, fd, code, flags, buffer_index, 0)


def complete(ring: NativeRing, *ops: bytes) -> dict[int, int]:
    """Submit ``ops`` and return the result of each by its token."""
    assert ring.submit(bytearray(b"".join(ops)), len(ops)) == len(ops)
    results: dict[int, int] = {}
    while len(results) < len(ops):
        assert ring.wait(WAIT_MS)
        results.update(ring.reap())
    return results


def test_the_ring_says_what_it_has(ring: NativeRing) -> None:
    assert ring.features & RingFeature.NODROP
    assert ring.entries == ENTRIES
    assert _native.uring_version() >= (2, 3)


def test_written_bytes_are_read_back(ring: NativeRing, memory: mmap.mmap, fd: int) -> None:
    address = _native.address_of(memory)
    memory[:8192] = os.urandom(8192)
    assert complete(ring, op(OpCode.WRITE, address=address, length=8192, fd=fd, offset=4096)) == {1: 8192}
    assert complete(ring, op(OpCode.FDATASYNC, fd=fd)) == {1: 0}
    assert complete(ring, op(OpCode.READ, address=address + 65536, length=8192, fd=fd, offset=4096)) == {1: 8192}
    assert memory[65536 : 65536 + 8192] == memory[:8192] == os.pread(fd, 8192, 4096)


def test_many_operations_take_one_call_and_the_eventfd_tells(
    ring: NativeRing, event_fd: int, memory: mmap.mmap, fd: int
) -> None:
    os.pwrite(fd, bytes(range(ENTRIES)), 0)
    address = _native.address_of(memory)
    reads = [op(OpCode.READ, token=i, address=address + i, length=1, fd=fd, offset=i) for i in range(ENTRIES)]
    assert complete(ring, *reads) == dict.fromkeys(range(ENTRIES), 1)
    assert memory[:ENTRIES] == bytes(range(ENTRIES))
    assert os.eventfd_read(event_fd) >= 1
    assert ring.reap() == []


def test_vectored_write_and_read(ring: NativeRing, memory: mmap.mmap, fd: int) -> None:
    address = _native.address_of(memory)
    memory[:10] = b"0123456789"
    parts = bytearray(IOVEC.pack(address + 5, 5) + IOVEC.pack(address, 3))
    vector = _native.address_of(parts)
    assert complete(ring, op(OpCode.WRITEV, address=vector, length=2, fd=fd)) == {1: 8}
    assert os.pread(fd, 100, 0) == b"56789012"
    assert complete(ring, op(OpCode.READV, address=vector, length=2, fd=fd)) == {1: 8}
    assert memory[5:10] + memory[:3] == b"56789012"


def test_a_full_submission_queue_takes_a_part(ring: NativeRing) -> None:
    count = ENTRIES + 3
    ops = bytearray(b"".join(op(OpCode.NOP, token=i) for i in range(count)))
    taken = ring.submit(ops, count)
    assert taken == ENTRIES
    assert ring.submit(ops, count - taken, start=taken) == count - taken
    seen: list[int] = []
    while len(seen) < count:
        assert ring.wait(WAIT_MS)
        seen += [token for token, _ in ring.reap()]
    assert sorted(seen) == list(range(count))


def test_kernel_errors_come_back_as_results(ring: NativeRing, memory: mmap.mmap) -> None:
    read = op(OpCode.READ, address=_native.address_of(memory), length=1)
    assert complete(ring, read) == {1: -errno.EBADF}


def test_a_malformed_operation_is_refused_with_all_its_neighbours(ring: NativeRing) -> None:
    bad = OP.pack(2, 0, 0, 0, -1, 200, 0, 0, 0)
    with pytest.raises(OSError, match="refused") as caught:
        ring.submit(bytearray(op(OpCode.NOP) + bad), 2)
    assert caught.value.errno == errno.EINVAL
    assert ring.reap() == []


def test_operations_outside_of_the_array_are_refused(ring: NativeRing) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        ring.submit(bytearray(OP.size), 1, start=1)


def test_cancel_ends_a_read_that_waits(ring: NativeRing, memory: mmap.mmap) -> None:
    receive, send = os.pipe()
    try:
        pending = op(OpCode.READ, token=7, address=_native.address_of(memory), length=1, fd=receive, offset=2**64 - 1)
        assert ring.submit(bytearray(pending), 1) == 1
        assert not ring.wait(1)
        assert ring.submit(bytearray(op(OpCode.CANCEL, token=8, address=7)), 1) == 1
        results: dict[int, int] = {}
        while len(results) < 2:
            assert ring.wait(WAIT_MS)
            results.update(ring.reap())
        assert results == {7: -errno.ECANCELED, 8: 0}
        assert complete(ring, op(OpCode.CANCEL, address=7)) == {1: -errno.ENOENT}
    finally:
        os.close(receive)
        os.close(send)


def test_fixed_buffers(fixed: NativeRing, memory: mmap.mmap, fd: int) -> None:
    address = _native.address_of(memory)
    fixed.register_buffer(2, address, len(memory))
    memory[:4096] = os.urandom(4096)
    write = op(OpCode.WRITE_FIXED, address=address, length=4096, fd=fd, buffer_index=2)
    assert complete(fixed, write) == {1: 4096}
    read = op(OpCode.READ_FIXED, address=address + 8192, length=4096, fd=fd, buffer_index=2)
    assert complete(fixed, read) == {1: 4096}
    assert memory[8192:12288] == memory[:4096]
    outside = op(OpCode.READ_FIXED, address=address + len(memory), length=4096, fd=fd, buffer_index=2)
    assert complete(fixed, outside) == {1: -errno.EFAULT}
    fixed.unregister_buffers()
    with pytest.raises(OSError, match="unregister") as caught:
        fixed.unregister_buffers()
    assert caught.value.errno == errno.ENXIO


def test_a_fixed_buffer_above_one_gib_is_refused(fixed: NativeRing, memory: mmap.mmap) -> None:
    with pytest.raises(ValueError, match="register pieces"):
        fixed.register_buffer(0, _native.address_of(memory), _native.FIXED_BUFFER_BYTES_MAX + 1)
    with pytest.raises(OSError, match="fixed buffer 9"):
        fixed.register_buffer(9, _native.address_of(memory), 4096)


def test_registration_from_another_thread(fixed: NativeRing, memory: mmap.mmap) -> None:
    failures: list[BaseException] = []

    def register() -> None:
        try:
            fixed.register_buffer(0, _native.address_of(memory), len(memory))
        except OSError as error:
            failures.append(error)

    worker = threading.Thread(target=register)
    worker.start()
    assert complete(fixed, op(OpCode.NOP)) == {1: 0}
    worker.join()
    assert failures == []


def test_fixed_files(ring: NativeRing, memory: mmap.mmap, fd: int) -> None:
    if not ring.features & RingFeature.REGISTER_SPARSE:
        pytest.skip("this kernel has no sparse file tables (needs 5.19)")
    os.pwrite(fd, b"hello", 0)
    ring.register_file_table(4)
    ring.register_file(3, fd)
    read = op(OpCode.READ, address=_native.address_of(memory), length=5, fd=3, flags=OpFlag.FIXED_FILE)
    assert complete(ring, read) == {1: 5}
    assert memory[:5] == b"hello"
    ring.register_file(3, -1)
    assert complete(ring, read) == {1: -errno.EBADF}


def test_closed_ring(ring: NativeRing) -> None:
    ring.close()
    ring.close()
    assert ring.closed
    with pytest.raises(ClosedError):
        ring.reap()
    with pytest.raises(ClosedError):
        ring.submit(bytearray(op(OpCode.NOP)), 1)


@pytest.mark.parametrize("entries", [0, 1 << 20])
def test_impossible_sizes(event_fd: int, entries: int) -> None:
    with pytest.raises(OSError, match="cannot be opened") as caught:
        NativeRing(entries, event_fd)
    assert caught.value.errno == errno.EINVAL
