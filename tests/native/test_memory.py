"""The byte functions of ``cascade_aio._native`` against independent implementations."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import crc32c as reference
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import Buffer

from cascade_aio import _native

STREAMED_BYTES = 1 << 20
"""Far above the cut-off below which a copy is a plain memcpy."""


@pytest.fixture(params=["avx512", "avx2", "sse2", "memcpy"])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.copy_variant()
    try:
        _native.select_copy(request.param)
    except OSError as error:
        pytest.skip(str(error))
    yield request.param
    _native.select_copy(before)


def random_bytes(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes)


def test_crc32c_of_the_check_string() -> None:
    assert _native.crc32c(b"123456789") == 0xE3069283
    assert _native.crc32c(b"") == 0


@given(data=st.binary(max_size=3000), start=st.integers(0, 64), crc=st.integers(0, 2**32 - 1))
def test_crc32c_agrees_with_the_crc32c_package(data: bytes, start: int, crc: int) -> None:
    view = memoryview(data)[start:]
    assert _native.crc32c(view, crc) == reference.crc32c(view, crc)


@given(data=st.binary(max_size=3000), cut=st.integers(0, 3000))
def test_crc32c_continues_from_a_part(data: bytes, cut: int) -> None:
    assert _native.crc32c(data[cut:], _native.crc32c(data[:cut])) == _native.crc32c(data)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 32767, 32768, 100_003, STREAMED_BYTES])
@pytest.mark.parametrize("shift", [0, 1, 63])
@pytest.mark.parametrize("fused", [False, True])
def test_copy_moves_exactly_these_bytes(variant: str, nbytes: int, shift: int, fused: bool) -> None:
    assert _native.copy_variant() == variant
    source = random_bytes(nbytes)
    target = bytearray(b"\xa5" * (nbytes + 128))
    part = memoryview(target)[shift : shift + nbytes]

    if fused:
        assert _native.copy_crc32c(part, source, 99) == reference.crc32c(source, 99)
    else:
        _native.copy(part, source)

    assert target[shift : shift + nbytes] == source
    assert set(target[:shift] + target[shift + nbytes :]) == {0xA5}


@pytest.mark.parametrize("operation", [_native.copy, _native.copy_crc32c])
class TestCopyRefuses:
    def test_other_lengths_before_a_byte_moves(self, operation: Callable[[Buffer, Buffer], object]) -> None:
        target = bytearray(10)
        with pytest.raises(ValueError, match=r"10 bytes.*9"):
            operation(target, b"x" * 9)
        assert target == bytearray(10)

    def test_a_read_only_target(self, operation: Callable[[Buffer, Buffer], object]) -> None:
        with pytest.raises((BufferError, TypeError)):
            operation(b"abc", b"xyz")

    def test_a_strided_buffer(self, operation: Callable[[Buffer, Buffer], object]) -> None:
        with pytest.raises((BufferError, ValueError)):
            operation(np.zeros(8, np.uint8)[::2], b"wxyz")


def test_copy_takes_any_contiguous_buffer() -> None:
    source = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    target = np.zeros_like(source)
    _native.copy(target, source)
    assert np.array_equal(target, source)


def test_unknown_copy_variant() -> None:
    with pytest.raises(ValueError, match="mmx"):
        _native.select_copy("mmx")


def test_address_of_agrees_with_numpy() -> None:
    array = np.arange(100, dtype=np.uint8)
    frozen = array[7:]
    frozen.flags.writeable = False
    assert _native.address_of(array) == array.ctypes.data
    assert _native.address_of(frozen) == array.ctypes.data + 7
    assert _native.address_of(memoryview(array)[3:]) == array.ctypes.data + 3


def resident_pages(memory: mmap.mmap) -> int:
    """Pages of ``memory`` that are present, read from the page map (bit 63 of each entry)."""
    first = _native.address_of(memory) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), 8 * (len(memory) // mmap.PAGESIZE), 8 * first)
    return int((np.frombuffer(entries, "<u8") >> np.uint64(63)).sum())


def test_prefault_makes_pages_present_and_keeps_bytes() -> None:
    with mmap.mmap(-1, 64 * mmap.PAGESIZE) as memory:
        memory[5 * mmap.PAGESIZE] = 77
        before = resident_pages(memory)
        _native.prefault(memory)
        assert before < 64
        assert resident_pages(memory) == 64
        assert memory[5 * mmap.PAGESIZE] == 77
        assert memory[: mmap.PAGESIZE] == bytes(mmap.PAGESIZE)


def test_prefault_refuses_unaligned_memory() -> None:
    unaligned = memoryview(mmap.mmap(-1, 2 * mmap.PAGESIZE))[1:]
    with pytest.raises(OSError, match="prefault") as caught:
        _native.prefault(unaligned)
    assert caught.value.errno == errno.EINVAL


SURVIVE_COLLECTION = """
import gc, mmap
from cascade_aio import _native

def fail(operation, *buffers):
    try:
        operation(*buffers)
    except (OSError, ValueError) as error:
        cycle = [error]  # error -> traceback -> this frame -> cycle
        cycle.append(cycle)

for _ in range(20):
    fail(_native.prefault, memoryview(mmap.mmap(-1, 8192))[1:])
    fail(_native.copy, memoryview(bytearray(10))[1:], memoryview(bytes(10))[2:])
    fail(_native.copy_crc32c, memoryview(bytearray(10))[1:], memoryview(bytes(10))[2:])
    gc.collect()
print("alive")
"""


def test_errors_about_memoryviews_survive_the_garbage_collector() -> None:
    """A cffi view kept by a traceback once crashed the collector; a process of its own, as it crashes."""
    done = subprocess.run([sys.executable, "-c", SURVIVE_COLLECTION], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_notify_counts_and_never_blocks() -> None:
    event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        _native.notify(event_fd)
        _native.notify(event_fd)
        assert os.eventfd_read(event_fd) == 2
        os.eventfd_write(event_fd, 2**64 - 2)
        _native.notify(event_fd)
        assert os.eventfd_read(event_fd) == 2**64 - 2
    finally:
        os.close(event_fd)
    assert _native.notify_address() != 0


def test_shared_mapping_is_aligned_and_lives_as_long_as_a_view(tmp_path: Path) -> None:
    nbytes = 5 << 20
    fd = os.open(tmp_path / "shared", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, nbytes)
    memory = _native.map_shared(fd, nbytes, 2 << 20)
    assert _native.address_of(memory) % (2 << 20) == 0
    assert len(memory) == nbytes
    tail = memory[-10:]
    tail[:] = b"0123456789"
    del memory
    gc.collect()
    assert bytes(tail) == os.pread(fd, 10, nbytes - 10) == b"0123456789"
    os.close(fd)


def test_a_mapping_of_a_part_is_aligned_as_the_part_is(tmp_path: Path) -> None:
    size = 2 << 20
    fd = os.open(tmp_path / "shared", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 3 * size)
    os.pwrite(fd, b"here", 5 * 4096)
    memory = _native.map_shared(fd, 2 * size, size, offset=5 * 4096)
    os.close(fd)
    assert _native.address_of(memory) % size == 5 * 4096
    _native.map_in(memory)
    assert bytes(memory[:4]) == b"here"
    memory[-4:] = b"more"
    with pytest.raises(OSError, match="cannot map in"):
        _native.map_in(memory[1:])


def test_a_bad_alignment_is_refused() -> None:
    with pytest.raises(OSError, match="cannot map"):
        _native.map_shared(-1, 4096, 3000)
    with pytest.raises(OSError, match="cannot map"):
        _native.map_shared(-1, 4096, 4096)


def test_collapse_keeps_the_bytes() -> None:
    size = 2 << 20
    fd = os.memfd_create("collapse")
    os.posix_fallocate(fd, 0, 4 * size)
    memory = _native.map_shared(fd, 4 * size, size)
    pattern = os.urandom(4096) * (4 * size // 4096)
    memory[:] = pattern
    try:
        _native.collapse(memory)
    except OSError as error:
        pytest.skip(f"no huge pages on demand here: {error}")
    finally:
        os.close(fd)
    assert memory == pattern
