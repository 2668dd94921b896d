"""Errors on the wire: a kind, a message and details out; the same exception in.

Only what is an error of the operation travels as itself. A bug of the service arrives as
``InternalError`` and is logged there with its traceback.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cascade_aio import errors
from cascade_aio.daemon.protocol import TEXT_BYTES_MAX, Failed
from cascade_aio.errors import CascadeError, CorruptionError, InternalError

KINDS: dict[str, type[CascadeError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, CascadeError)
}
_CORRUPTION_FIELDS = ("path", "segment", "offset", "expected", "found")


def to_failed(request: int, error: BaseException) -> Failed:
    """The answer that carries ``error``."""
    if isinstance(error, CorruptionError):
        details = {name: _plain(getattr(error, name)) for name in _CORRUPTION_FIELDS}
        return Failed(request, "CorruptionError", str(error)[:TEXT_BYTES_MAX], details)
    if isinstance(error, CascadeError):
        kind = type(error).__name__
        return Failed(request, kind if kind in KINDS else "CascadeError", str(error)[:TEXT_BYTES_MAX], {})
    if isinstance(error, OSError):
        details = {"errno": error.errno, "filename": _plain(error.filename)}
        return Failed(request, "OSError", str(error.strerror or error)[:TEXT_BYTES_MAX], details)
    if isinstance(error, asyncio.CancelledError):
        return Failed(request, "CascadeError", "the request was cancelled", {})
    text = f"{type(error).__name__} in the service (its log has more): {error}"
    return Failed(request, "InternalError", text[:TEXT_BYTES_MAX], {})


def to_error(failed: Failed) -> CascadeError | OSError:
    """The exception that ``failed`` carries; an unknown kind is a ``CascadeError``."""
    if failed.kind == "OSError":
        number, filename = failed.details.get("errno"), failed.details.get("filename")
        return OSError(number, failed.message, filename) if isinstance(number, int) else OSError(failed.message)
    if failed.kind == "CorruptionError":
        error = CorruptionError.__new__(CorruptionError, failed.message)
        for name in _CORRUPTION_FIELDS:
            setattr(error, name, failed.details.get(name))
        return error  # not through __init__: the message is complete already
    kind = KINDS.get(failed.kind)
    if kind is None:
        return CascadeError(f"{failed.kind}: {failed.message}")
    return kind(failed.message)


def is_bug(error: BaseException) -> bool:
    """Whether the service should log ``error`` with its traceback."""
    return isinstance(error, InternalError) or not isinstance(error, CascadeError | OSError | asyncio.CancelledError)


def _plain(value: Any) -> str | int | None:
    return value if value is None or isinstance(value, int) else str(value)
