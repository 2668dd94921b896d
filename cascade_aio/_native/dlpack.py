"""DLPack capsules of memory that is not ours to free: the consumer's release only sets a flag and tells an eventfd.

The release is C, because consumers call it from any thread, with or without the GIL, and at the end of the process.
The capsule's own destructor runs under the GIL and matters only for capsules that nobody consumed.
"""

from __future__ import annotations

import ctypes
from typing import Any

from cascade_aio._native._library import ffi, lib

_NAME = b"dltensor"

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype = ctypes.c_int
_is_valid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = (ctypes.c_void_p, ctypes.c_char_p)

_shown: set[SharedTensor] = set()
"""Whose capsule has not been seen released: the consumer refers to them."""


class SharedTensor:
    """``length`` bytes at the address ``data``, shown to one DLPack consumer. ``event_fd`` is told of its release."""

    __slots__ = ("__weakref__", "_managed")

    def __init__(self, data: int, length: int, device: tuple[int, int], event_fd: int) -> None:
        self._managed = ffi.new("struct cascade_dlpack *")
        lib.cascade_dlpack_init(self._managed, data, length, device[0], device[1], event_fd)

    @property
    def released(self) -> bool:
        """Whether the consumer has let go, or the capsule died unused."""
        if not lib.cascade_dlpack_released(self._managed):
            return False
        _shown.discard(self)
        return True

    def capsule(self) -> Any:
        """What ``__dlpack__`` returns. Once."""
        _shown.add(self)
        return _new_capsule(int(ffi.cast("uintptr_t", self._managed)), _NAME, _destructor)


def _destroy(
    capsule: int,
    name: bytes = _NAME,
    is_valid: Any = _is_valid,
    pointer_of: Any = _pointer_of,
    cast: Any = ffi.cast,
    release: Any = lib.cascade_dlpack_release,
) -> None:
    """Release a capsule that nobody consumed. The defaults are still there when the module's names are not."""
    if is_valid(capsule, name):
        release(cast("struct cascade_dlpack *", pointer_of(capsule, name)))


_callback = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy)
_destructor = ctypes.cast(_callback, ctypes.c_void_p)
for _kept in (_callback, _shown):  # consumers may outlive the interpreter's modules
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))
