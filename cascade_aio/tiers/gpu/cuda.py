"""A real device: ``DeviceDriver`` on CUDA's driver API, by cuda-python (``cuda.bindings`` 12.6 and later, 13).

Why the driver API and not ``cuda.core``: host registration, host functions with a C address, batched copies and events
of foreign streams are all here and not all there. The device's *primary* context is used, the one that PyTorch and the
CUDA runtime use, so their streams, events and pointers are good here and ours there. A call makes the context current
only if it is not, and leaves the thread as it found it.

The package is imported when a device is opened, never before; what is missing then (package, driver, device) is a
``ConfigError`` that names it. Must not know extents, blocks or the loop.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from cascade_aio._native import address_of, notify_address
from cascade_aio.abc.device import DeviceError, DeviceMemoryError, MemoryCopy
from cascade_aio.errors import ConfigError

DLPACK_CUDA = 2

NAME_BYTES_MAX = 256

BATCH_DRIVER_MIN = {12: 12080, 13: 13000}
"""Version of the driver that has the batched copy which cuda-python of this major version calls: its signature
changed with CUDA 13."""

LOST = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ASSERT", "CONTAINED", "CONTEXT_IS_DESTROYED", "DEINITIALIZED", "DEVICE_UNAVAILABLE", "ECC_UNCORRECTABLE",
        "EXTERNAL_DEVICE", "HARDWARE_STACK_ERROR", "ILLEGAL_ADDRESS", "ILLEGAL_INSTRUCTION", "INVALID_ADDRESS_SPACE",
        "INVALID_PC", "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "MISALIGNED_ADDRESS", "MPS_CLIENT_TERMINATED",
        "MPS_RPC_FAILURE", "NVLINK_UNCORRECTABLE", "TENSOR_MEMORY_LEAK", "UNKNOWN",
    )
)  # fmt: skip
"""Errors after which the context is of no use: CUDA returns them again from every later call."""

_CURE = "leave gpu_bytes out to go on without a GPU"


def load_bindings() -> Any:
    """The module ``cuda.bindings.driver``. Raises ``ConfigError`` without the package."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ConfigError(
            f"gpu_bytes needs the package cuda-python, which cannot be imported ({error}): "
            f"pip install 'cascade_aio[gpu]', or {_CURE}"
        ) from error


def open_device(ordinal: int) -> CudaDriver:
    """The device that CUDA and PyTorch call ``ordinal``. Blocks while CUDA starts (up to seconds).

    Raises ``ConfigError`` naming what is missing: package, driver or device; ``DeviceError``.
    """
    cuda = load_bindings()
    try:
        started = cuda.cuInit(0)[0]
    except Exception as error:  # cuda-python has raised several kinds, one a release
        raise ConfigError(
            f"gpu_bytes needs NVIDIA's driver (libcuda.so.1), which cannot be loaded ({error}): install it, "
            f"give the container the GPU (--gpus all), or {_CURE}"
        ) from error
    if started:
        raise ConfigError(f"gpu_bytes: CUDA does not start ({_name_of(cuda, started)}): look at nvidia-smi, or {_CURE}")
    failed, count = cuda.cuDeviceGetCount()
    if failed or not 0 <= ordinal < count:
        raise ConfigError(
            f"gpu_devices names device {ordinal}, and CUDA shows {count or 0} (CUDA_VISIBLE_DEVICES limits them): "
            f"name one from 0 to {max(0, (count or 0) - 1)}, or {_CURE}"
        )
    return CudaDriver(cuda, ordinal)


class CudaDriver:
    """One device. ``cuda`` is ``cuda.bindings.driver``, or what tests put in its place."""

    def __init__(self, cuda: Any, ordinal: int) -> None:
        self._cuda = cuda
        self.ordinal = ordinal
        self._context: Any = None
        self._device = self._value(cuda.cuDeviceGet(ordinal), "cuDeviceGet")
        name = self._value(cuda.cuDeviceGetName(NAME_BYTES_MAX, self._device), "cuDeviceGetName")
        version = self._value(cuda.cuDriverGetVersion(), "cuDriverGetVersion")
        self.memory_bytes = int(self._value(cuda.cuDeviceTotalMem(self._device), "cuDeviceTotalMem"))
        model = bytes(name).partition(b"\0")[0].decode(errors="replace").strip()
        self.description = f"{model}, driver for CUDA {version // 1000}.{version % 1000 // 10}"
        self.dlpack_device = (DLPACK_CUDA, ordinal)
        least = BATCH_DRIVER_MIN.get(min(cuda.CUDA_VERSION // 1000, max(BATCH_DRIVER_MIN)))
        self.batches_copies = hasattr(cuda, "cuMemcpyBatchAsync") and least is not None and version >= least
        self._order: Any = None
        if self.batches_copies:
            self._order = cuda.CUmemcpyAttributes()
            self._order.srcAccessOrder = cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._bell = cuda.CUhostFn(notify_address())
        self._pinned: dict[int, memoryview] = {}
        self._context = self._value(cuda.cuDevicePrimaryCtxRetain(self._device), "cuDevicePrimaryCtxRetain")
        self._context_number = int(self._context)

    # -- memory -----------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        return int(self._call("cuMemGetInfo", self._cuda.cuMemGetInfo)[0])

    def allocate(self, nbytes: int) -> int:
        return int(self._call(f"cuMemAlloc of {nbytes} bytes", self._cuda.cuMemAlloc, nbytes)[0])

    def free(self, pointer: int) -> None:
        self._call("cuMemFree", self._cuda.cuMemFree, pointer)

    def pin(self, address: int, nbytes: int) -> None:
        flags = self._cuda.CU_MEMHOSTREGISTER_PORTABLE
        self._call(f"cuMemHostRegister of {nbytes} bytes", self._cuda.cuMemHostRegister, address, nbytes, flags)

    def unpin(self, address: int) -> None:
        self._call("cuMemHostUnregister", self._cuda.cuMemHostUnregister, address)

    def allocate_pinned(self, nbytes: int) -> memoryview:
        flags = self._cuda.CU_MEMHOSTALLOC_PORTABLE
        address = int(self._call(f"cuMemHostAlloc of {nbytes} bytes", self._cuda.cuMemHostAlloc, nbytes, flags)[0])
        memory = memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
        self._pinned[address] = memory
        return memory

    def free_pinned(self, memory: memoryview) -> None:
        address = address_of(memory)
        assert self._pinned.pop(address, None) is not None, "memory of allocate_pinned"
        self._call("cuMemFreeHost", self._cuda.cuMemFreeHost, address)

    # -- streams and events -----------------------------------------------------------------------

    def create_stream(self) -> int:
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("cuStreamCreate", self._cuda.cuStreamCreate, flags)[0])

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", self._cuda.cuStreamDestroy, stream)

    def create_event(self) -> int:
        flags = self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return int(self._call("cuEventCreate", self._cuda.cuEventCreate, flags)[0])

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", self._cuda.cuEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", self._cuda.cuEventRecord, event, self._named(stream))

    def wait(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", self._cuda.cuStreamWaitEvent, self._named(stream), event, 0)

    def is_done(self, event: int) -> bool:
        result = self._within(self._cuda.cuEventQuery, event)
        if result[0] == self._cuda.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._value(result, "cuEventQuery")
        return True

    def copy(self, copies: Sequence[MemoryCopy], stream: int) -> None:
        cuda = self._cuda
        if len(copies) == 1 or not self.batches_copies:
            for target, source, nbytes in copies:
                self._call(f"cuMemcpyAsync of {nbytes} bytes", cuda.cuMemcpyAsync, target, source, nbytes, stream)
            return
        pointer, count = cuda.CUdeviceptr, len(copies)
        targets = [pointer(copy.target) for copy in copies]
        sources = [pointer(copy.source) for copy in copies]
        sizes = [copy.nbytes for copy in copies]
        what = f"cuMemcpyBatchAsync of {count} copies"
        self._call(what, cuda.cuMemcpyBatchAsync, targets, sources, sizes, count, [self._order], [0], 1, stream)

    def notify(self, stream: int, event_fd: int) -> None:
        self._call("cuLaunchHostFunc", self._cuda.cuLaunchHostFunc, stream, self._bell, event_fd)

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            self._value(self._cuda.cuDevicePrimaryCtxRelease(self._device), "cuDevicePrimaryCtxRelease")

    # -- calls ------------------------------------------------------------------------------------

    def _named(self, stream: int) -> int:
        """0 means the legacy default stream, whatever cuda-python was told about default streams."""
        return stream or int(self._cuda.CU_STREAM_LEGACY)

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns beside its status. Raises ``DeviceError``."""
        result = self._within(function, *arguments)
        if result[0]:
            self._value(result, what)
        return result[1:]

    def _within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call with the device's context current, and leave the thread's as it was."""
        cuda = self._cuda
        if self._context is None:
            raise DeviceError(f"device {self.ordinal} was closed", lost=True)
        if int(cuda.cuCtxGetCurrent()[1] or 0) == self._context_number:
            return function(*arguments)
        self._value(cuda.cuCtxPushCurrent(self._context), "cuCtxPushCurrent")
        try:
            return function(*arguments)
        finally:
            cuda.cuCtxPopCurrent()

    def _value(self, result: Any, what: str) -> Any:
        """The first value behind the status, if any. Raises ``DeviceError`` for a bad status."""
        if result[0]:
            code = _name_of(self._cuda, result[0])
            kind = DeviceMemoryError if code == "CUDA_ERROR_OUT_OF_MEMORY" else DeviceError
            raise kind(f"{what} on device {self.ordinal}: {code}", code=code, lost=code in LOST)
        return result[1] if len(result) > 1 else None


def _name_of(cuda: Any, status: Any) -> str:
    failed, name = cuda.cuGetErrorName(status)
    return f"CUDA error {int(status)}" if failed or name is None else bytes(name).decode()
