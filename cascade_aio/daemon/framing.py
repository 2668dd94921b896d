"""Frames in a stream of bytes: cut what arrives, join what leaves. Pure.

A frame is a length (4 bytes, little-endian) and as many bytes. Lengths are checked before a byte of
the body is kept, so a peer cannot make us hold more than one frame of the allowed size.
"""

from __future__ import annotations

from collections.abc import Iterator

from cascade_aio.daemon.protocol import FRAME_BYTES_MAX
from cascade_aio.errors import ProtocolError

LENGTH_BYTES = 4


class FrameCutter:
    """Feed it what arrives, take whole frames out. ``pending_bytes`` is what it holds."""

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()
        self._start = 0

    @property
    def pending_bytes(self) -> int:
        return len(self._buffer) - self._start

    def feed(self, chunk: bytes | memoryview) -> None:
        self._buffer += chunk

    def frames(self) -> Iterator[bytes]:
        """Whole frames, in order; stop taking at any time, the rest stays. Raises ``ProtocolError``."""
        while (frame := self.take()) is not None:
            yield frame

    def take(self) -> bytes | None:
        """The next whole frame, or ``None``. Raises ``ProtocolError`` for a length that is not allowed."""
        buffer, start = self._buffer, self._start
        body = start + LENGTH_BYTES
        if len(buffer) < body:
            self._compact()
            return None
        length = int.from_bytes(buffer[start:body], "little")
        if not 1 <= length <= self._frame_bytes_max:
            raise ProtocolError(f"a frame of {length} bytes is outside the allowed 1 to {self._frame_bytes_max}")
        if len(buffer) < body + length:
            self._compact()
            return None
        self._start = body + length
        return bytes(buffer[body : body + length])

    def _compact(self) -> None:
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
