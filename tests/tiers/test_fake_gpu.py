"""The fake device: the conformance suite, and that it notices what it says it notices."""

from __future__ import annotations

import mmap

import pytest

from cascade_aio._native import address_of
from cascade_aio.abc.device import DeviceError, MemoryCopy
from cascade_aio.testing.device import DeviceDriverConformance, until_done
from cascade_aio.testing.gpu import FakeGpu


class TestFakeGpu(DeviceDriverConformance):
    @pytest.fixture(autouse=True, params=[0, 1, 2])
    def _seed(self, request: pytest.FixtureRequest) -> None:
        self.seed = int(request.param)

    def open_driver(self) -> FakeGpu:
        return FakeGpu(seed=self.seed, batches_copies=self.seed != 1)


def host_memory(gpu: FakeGpu, nbytes: int = 4096) -> memoryview:
    memory = memoryview(mmap.mmap(-1, nbytes))
    gpu.pin(address_of(memory), nbytes)
    return memory


async def test_reading_before_the_event_is_a_race_however_it_went() -> None:
    gpu = FakeGpu()
    host, pointer = host_memory(gpu), gpu.allocate(4096)
    a, b = gpu.create_stream(), gpu.create_stream()
    gpu.copy([MemoryCopy(pointer, address_of(host), 4096)], a)
    await gpu.idle()  # it has happened, and nobody has seen that it did
    gpu.launch(b, reads=[(pointer, 16)])
    assert "race" in gpu.violations[0]


async def test_what_an_event_orders_is_no_race() -> None:
    gpu = FakeGpu()
    host, pointer = host_memory(gpu), gpu.allocate(4096)
    a, b, event = gpu.create_stream(), gpu.create_stream(), gpu.create_event()
    host[:] = b"x" * 4096
    gpu.copy([MemoryCopy(pointer, address_of(host), 4096)], a)
    gpu.record(event, a)
    gpu.wait(b, event)
    kernel = gpu.launch(b, reads=[(pointer, 4)])
    await gpu.idle()
    assert kernel.seen == [b"xxxx"]
    assert not gpu.violations


async def test_what_the_host_has_seen_end_is_no_race() -> None:
    gpu = FakeGpu()
    host, pointer = host_memory(gpu), gpu.allocate(4096)
    a, b, event = gpu.create_stream(), gpu.create_stream(), gpu.create_event()
    gpu.copy([MemoryCopy(pointer, address_of(host), 4096)], a)
    gpu.record(event, a)
    await until_done(gpu, event)
    gpu.launch(b, writes=[(pointer, b"y")])
    assert not gpu.violations


async def test_overwriting_what_a_kernel_may_still_read_is_a_race() -> None:
    gpu = FakeGpu()
    host, pointer = host_memory(gpu), gpu.allocate(4096)
    a, b = gpu.create_stream(), gpu.create_stream()
    gpu.launch(b, reads=[(pointer, 4096)])
    gpu.copy([MemoryCopy(pointer, address_of(host), 4096)], a)
    assert "race" in gpu.violations[0]
    await gpu.idle()  # it reads the host's memory until then


async def test_host_bytes_that_change_during_a_copy() -> None:
    gpu = FakeGpu()
    host, pointer = host_memory(gpu), gpu.allocate(4096)
    gpu.pause()
    gpu.copy([MemoryCopy(pointer, address_of(host), 4096)], gpu.create_stream())
    host[7] = 1
    gpu.resume()
    await gpu.idle()
    assert "changed" in gpu.violations[0]
    with pytest.raises(AssertionError):
        gpu.close()


async def test_memory_that_is_not_pinned_or_pinned_in_two_pieces() -> None:
    gpu = FakeGpu()
    memory = memoryview(mmap.mmap(-1, 8192))
    pointer, stream = gpu.allocate(8192), gpu.create_stream()
    copy = MemoryCopy(pointer, address_of(memory), 8192)
    with pytest.raises(AssertionError, match="pinned piece"):
        gpu.copy([copy], stream)
    gpu.pin(address_of(memory), 4096)
    gpu.pin(address_of(memory) + 4096, 4096)
    with pytest.raises(AssertionError, match="one pinned piece"):
        gpu.copy([copy], stream)
    with pytest.raises(AssertionError, match="leave the device memory"):
        gpu.copy([MemoryCopy(pointer + 4096, address_of(memory), 4097)], stream)


async def test_memory_freed_or_unpinned_under_a_copy() -> None:
    gpu = FakeGpu()
    host, pointer = host_memory(gpu), gpu.allocate(4096)
    gpu.pause()
    gpu.copy([MemoryCopy(pointer, address_of(host), 4096)], gpu.create_stream())
    with pytest.raises(AssertionError, match="freed"):
        gpu.free(pointer)
    with pytest.raises(AssertionError, match="unpinned"):
        gpu.unpin(address_of(host))


async def test_a_device_that_is_lost_does_nothing_any_more() -> None:
    gpu = FakeGpu()
    stream, event = gpu.create_stream(), gpu.create_event()
    gpu.record(event, stream)
    gpu.lose()
    with pytest.raises(DeviceError) as error:
        gpu.is_done(event)
    assert error.value.lost
    gpu.close()
