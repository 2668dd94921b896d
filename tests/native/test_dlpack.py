"""Capsules: what a consumer gets, and that its release is told, also from a foreign thread or never consumed."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import numpy as np
import pytest

from cascade_aio._native import SharedTensor, address_of

CPU = (1, 0)


class Shown:
    """A DLPack producer as NumPy wants it."""

    def __init__(self, tensor: SharedTensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.capsule()

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU


def test_a_consumer_sees_the_memory_and_its_release_is_told() -> None:
    memory = bytearray(b"abcdef" * 100)
    event_fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        tensor = SharedTensor(address_of(memory), len(memory), CPU, event_fd)
        array = np.from_dlpack(Shown(tensor))
        assert array.dtype == np.uint8
        assert array.tobytes() == memory
        view = array[3:9]
        del array
        gc.collect()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event_fd)
        holder = [view]
        del view
        thread = threading.Thread(target=holder.clear)
        thread.start()
        thread.join()
        assert bool(tensor.released)
        assert os.eventfd_read(event_fd) == 1
    finally:
        os.close(event_fd)


def test_a_capsule_that_nobody_consumed_is_released() -> None:
    memory = bytearray(16)
    tensor = SharedTensor(address_of(memory), len(memory), CPU, -1)
    capsule = tensor.capsule()
    del capsule
    assert tensor.released


def test_no_bytes_at_all() -> None:
    tensor = SharedTensor(0, 0, CPU, -1)
    array = np.from_dlpack(Shown(tensor))
    assert array.shape == (0,)
    del array
    assert tensor.released
