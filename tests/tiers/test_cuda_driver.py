"""The real driver: its calls against a stub of cuda-python, its names against cuda-python, itself on a GPU."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from typing import Any

import pytest

from cascade_aio.abc.device import DeviceError
from cascade_aio.errors import ConfigError
from cascade_aio.testing.device import DeviceDriverConformance
from cascade_aio.testing.gpu import FakeGpu
from cascade_aio.tiers.gpu import cuda as cuda_module
from cascade_aio.tiers.gpu.cuda import LOST, CudaDriver, open_device
from tests.tiers.cuda_stub import OTHER_CONTEXT, CUresult, StubCuda


def bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        pytest.skip(f"cuda-python is not installed: {error}")


class StubbedDriver(CudaDriver):
    """Closes the fake behind the stub, too, which says what was left behind or done wrong."""

    def close(self) -> None:
        super().close()
        stub: StubCuda = self._cuda
        assert stub.retained == 0
        assert stub.contexts == [OTHER_CONTEXT], "the thread's own context was put back"
        stub.gpu.close()


class TestCudaDriverOnAStub(DeviceDriverConformance):
    @pytest.fixture(autouse=True, params=[(13000, 13000), (12090, 12080), (13000, 12090)])
    def _versions(self, request: pytest.FixtureRequest) -> None:
        self.cuda_version, self.driver_version = request.param

    def open_driver(self) -> CudaDriver:
        stub = StubCuda(FakeGpu(), cuda_version=self.cuda_version, driver_version=self.driver_version)
        driver = StubbedDriver(stub, 0)
        assert driver.description.startswith("Stub, driver for CUDA 1")
        assert driver.batches_copies is (self.driver_version != 12090)
        return driver


@pytest.mark.gpu
class TestCudaDriver(DeviceDriverConformance):
    def open_driver(self) -> CudaDriver:
        try:
            return open_device(0)
        except ConfigError as error:
            pytest.skip(str(error))


def test_every_name_that_is_used_is_in_cuda_python() -> None:
    cuda = bindings()
    tree = ast.parse(inspect.getsource(cuda_module))
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match(r"cu[A-Z]|CU", node.attr)
    }
    assert len(used) > 30
    enums = {name for name in used if re.match(r"CU_(STREAM_NON|EVENT_|MEMCPY_SRC)|CUDA_ERROR", name)}
    assert {name for name in used - enums if not hasattr(cuda, name)} == set()
    assert cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
    assert cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
    assert cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    assert {name for name in LOST if not hasattr(cuda.CUresult, name)} == set()


def test_the_stub_takes_what_cuda_python_takes() -> None:
    cuda = bindings()
    for name, method in inspect.getmembers(StubCuda, inspect.isfunction):
        if not name.startswith("cu"):
            continue
        first_line = (getattr(cuda, name).__doc__ or "").split("\n", 1)[0]
        listed = re.sub(r"\[[^\]]*\]", "", first_line.partition("(")[2].rpartition(")")[0])
        there = [part.partition(":")[0].split()[-1] for part in listed.split(",") if part.strip()]
        here = list(inspect.signature(method).parameters)[1:]
        assert here == there, f"{name}{first_line}"


def test_a_lost_device_is_told_from_a_refused_call() -> None:
    gpu = FakeGpu()
    driver = CudaDriver(StubCuda(gpu), 0)
    gpu.fail_next("create_stream")
    with pytest.raises(DeviceError, match=r"cuStreamCreate on device 0: CUDA_ERROR_INVALID_VALUE") as error:
        driver.create_stream()
    assert not error.value.lost
    gpu.lose()
    with pytest.raises(DeviceError) as error:
        driver.create_stream()
    assert error.value.lost
    driver.close()
    with pytest.raises(DeviceError, match="closed"):
        driver.create_stream()


@pytest.mark.parametrize(
    ("arranged", "told"),
    [
        ("no package", r"cascade_aio\[gpu\]"),
        ("no driver", r"libcuda\.so\.1"),
        ("no device", "CUDA_ERROR_NO_DEVICE"),
        ("another device", "names device 3"),
    ],
)
def test_what_is_missing_is_named(arranged: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubCuda(FakeGpu())

    def load(name: str) -> Any:
        if arranged == "no package":
            raise ModuleNotFoundError("No module named 'cuda'")
        return stub

    def no_driver(flags: int) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(importlib, "import_module", load)
    if arranged == "no driver":
        monkeypatch.setattr(stub, "cuInit", no_driver)
    if arranged == "no device":
        stub.init_result = CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(ConfigError, match=told) as error:
        open_device(3 if arranged == "another device" else 0)
    assert "without a GPU" in str(error.value)
