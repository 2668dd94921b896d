"""``cuda.bindings.driver`` as far as ``tiers.gpu.cuda`` calls it, on the fake device: names, types, tuples as there.

A test compares its signatures with those of the real package where that is installed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from cascade_aio._native import address_of, notify_address
from cascade_aio.abc.device import DeviceError, DeviceMemoryError, MemoryCopy
from cascade_aio.testing.gpu import FakeGpu


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712


class _Handle:
    def __init__(self, number: int = 0) -> None:
        self.number = int(number)

    def __int__(self) -> int:
        return self.number


class CUdeviceptr(_Handle): ...


class CUhostFn(_Handle): ...


class CUcontext(_Handle): ...


class CUmemcpyAttributes:
    srcAccessOrder: Any = None


CONTEXT = 0xC0
OTHER_CONTEXT = 0xAA
NO_MORE = (CUresult.CUDA_SUCCESS,)


class StubCuda:
    """One device, ``gpu``. ``current`` is the context that the calling thread has."""

    CUresult = CUresult
    CUdeviceptr = CUdeviceptr
    CUhostFn = CUhostFn
    CUmemcpyAttributes = CUmemcpyAttributes
    CUmemcpySrcAccessOrder = SimpleNamespace(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CU_STREAM_LEGACY = 1
    CU_MEMHOSTREGISTER_PORTABLE = 1
    CU_MEMHOSTALLOC_PORTABLE = 1

    def __init__(self, gpu: FakeGpu, *, cuda_version: int = 13000, driver_version: int = 13000) -> None:
        self.gpu = gpu
        self.CUDA_VERSION = cuda_version
        self.driver_version = driver_version
        self.init_result = CUresult.CUDA_SUCCESS
        self.contexts = [OTHER_CONTEXT]
        self.retained = 0
        self.pinned: dict[int, memoryview] = {}
        self.batches: list[int] = []

    def _do(self, call: Callable[[], Any]) -> tuple[Any, ...]:
        assert self.contexts[-1] == CONTEXT, "the device's context is current in every call"
        try:
            value = call()
        except DeviceMemoryError:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        except DeviceError as error:
            return CUresult[error.code], None
        return (CUresult.CUDA_SUCCESS,) if value is None else (CUresult.CUDA_SUCCESS, value)

    def cuInit(self, Flags: int) -> tuple[Any, ...]:
        return (self.init_result,)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, 1

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDeviceGetName(self, length: int, dev: Any) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, b"Stub\0".ljust(length, b"\0")

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self.driver_version

    def cuDeviceTotalMem(self, dev: Any) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self.gpu.memory_bytes

    def cuDevicePrimaryCtxRetain(self, dev: Any) -> tuple[Any, ...]:
        self.retained += 1
        return CUresult.CUDA_SUCCESS, CUcontext(CONTEXT)

    def cuDevicePrimaryCtxRelease(self, dev: Any) -> tuple[Any, ...]:
        self.retained -= 1
        return NO_MORE

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, CUcontext(self.contexts[-1])

    def cuCtxPushCurrent(self, ctx: Any) -> tuple[Any, ...]:
        self.contexts.append(int(ctx))
        return NO_MORE

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, CUcontext(self.contexts.pop())

    def cuGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, error.name.encode()

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self.gpu.free_bytes(), self.gpu.memory_bytes

    def cuMemAlloc(self, bytesize: int) -> tuple[Any, ...]:
        return self._do(lambda: CUdeviceptr(self.gpu.allocate(bytesize)))

    def cuMemFree(self, dptr: Any) -> tuple[Any, ...]:
        return self._do(lambda: self.gpu.free(int(dptr)))

    def cuMemHostRegister(self, p: int, bytesize: int, Flags: int) -> tuple[Any, ...]:
        assert Flags == self.CU_MEMHOSTREGISTER_PORTABLE
        return self._do(lambda: self.gpu.pin(p, bytesize))

    def cuMemHostUnregister(self, p: int) -> tuple[Any, ...]:
        return self._do(lambda: self.gpu.unpin(p))

    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> tuple[Any, ...]:
        def allocate() -> int:
            memory = self.gpu.allocate_pinned(bytesize)
            self.pinned[address_of(memory)] = memory
            return address_of(memory)

        return self._do(allocate)

    def cuMemFreeHost(self, p: int) -> tuple[Any, ...]:
        return self._do(lambda: self.gpu.free_pinned(self.pinned.pop(p)))

    def cuStreamCreate(self, Flags: int) -> tuple[Any, ...]:
        return self._do(lambda: _Handle(self.gpu.create_stream()))

    def cuStreamDestroy(self, hStream: Any) -> tuple[Any, ...]:
        return self._do(lambda: self.gpu.destroy_stream(int(hStream)))

    def cuEventCreate(self, Flags: int) -> tuple[Any, ...]:
        return self._do(lambda: _Handle(self.gpu.create_event()))

    def cuEventDestroy(self, hEvent: Any) -> tuple[Any, ...]:
        return self._do(lambda: self.gpu.destroy_event(int(hEvent)))

    def cuEventRecord(self, hEvent: Any, hStream: Any) -> tuple[Any, ...]:
        return self._do(lambda: self.gpu.record(int(hEvent), self._stream(hStream)))

    def cuStreamWaitEvent(self, hStream: Any, hEvent: Any, Flags: int) -> tuple[Any, ...]:
        return self._do(lambda: self.gpu.wait(self._stream(hStream), int(hEvent)))

    def cuEventQuery(self, hEvent: Any) -> tuple[Any, ...]:
        result = self._do(lambda: self.gpu.is_done(int(hEvent)))
        return (CUresult.CUDA_ERROR_NOT_READY,) if result[-1] is False else result[:1]

    def cuMemcpyAsync(self, dst: Any, src: Any, ByteCount: int, hStream: Any) -> tuple[Any, ...]:
        return self._do(lambda: self.gpu.copy([MemoryCopy(int(dst), int(src), ByteCount)], int(hStream)))

    def cuMemcpyBatchAsync(
        self, dsts: list[Any], srcs: list[Any], sizes: list[int], count: int,
        attrs: list[Any], attrsIdxs: list[int], numAttrs: int, hStream: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert all(isinstance(pointer, CUdeviceptr) for pointer in (*dsts, *srcs))
        assert len(dsts) == len(srcs) == len(sizes) == count
        assert (attrsIdxs, numAttrs, attrs[0].srcAccessOrder) == ([0], 1, 1)
        assert int(hStream) != 0, "the legacy stream is refused"
        self.batches.append(count)
        copies = [MemoryCopy(int(t), int(s), n) for t, s, n in zip(dsts, srcs, sizes, strict=True)]
        result = self._do(lambda: self.gpu.copy(copies, int(hStream)))
        return result[:1] if self.CUDA_VERSION >= 13000 else (result[0], 0)

    def cuLaunchHostFunc(self, hStream: Any, fn: Any, userData: Any) -> tuple[Any, ...]:
        assert isinstance(fn, CUhostFn)
        assert int(fn) == notify_address()
        return self._do(lambda: self.gpu.notify(int(hStream), userData))

    def _stream(self, stream: Any) -> int:
        """The fake's name of the legacy stream is 0."""
        assert int(stream) != 0, "it is named, not left to cuda-python's defaults"
        return 0 if int(stream) == self.CU_STREAM_LEGACY else int(stream)
