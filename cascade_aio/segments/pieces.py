"""In which pieces, and in which order, a large record is read. Pure.

Pieces end at chunk boundaries, so that each can be verified by itself; the header is always in the
first. *Plain* order is front to back in large pieces. *Layered* order serves a consumer that starts
with the first layers: key and value take turns, because a layer needs its part of both, and the first
pieces are single chunks and grow from there, so that the first layer is there after two chunks.
"""

from __future__ import annotations

import itertools

from cascade_aio.segments.format import CHUNK_BYTES

PIECE_BYTES_MAX = 8 << 20
"""A record is read in pieces of it, side by side; a multiple of ``CHUNK_BYTES``."""

Piece = tuple[int, int]
"""First byte and end within the record."""


def plain_pieces(header_bytes: int, record_bytes: int, piece_bytes: int = PIECE_BYTES_MAX) -> list[Piece]:
    """Front to back, as large as they may be: a multiple of ``CHUNK_BYTES``."""
    cuts = [0, *range(header_bytes + piece_bytes, record_bytes, piece_bytes), record_bytes]
    return list(itertools.pairwise(cuts))


def layered_pieces(header_bytes: int, record_bytes: int, value_offset: int) -> list[Piece]:
    """Key and value in turns, small pieces first. ``value_offset`` is of the payload."""
    end = record_bytes - header_bytes
    middle = value_offset // CHUNK_BYTES * CHUNK_BYTES
    if not 0 < middle < end:
        middle = end  # one part only, or both in one chunk: front to back
    pieces: list[Piece] = []
    sides = [(0, middle), (middle, end)]
    step = CHUNK_BYTES
    while any(start < stop for start, stop in sides):
        for number, (start, stop) in enumerate(sides):
            if start < stop:
                cut = min(start + step, stop)
                pieces.append((header_bytes + start if start else 0, header_bytes + cut))
                sides[number] = (cut, stop)
        step = min(2 * step, PIECE_BYTES_MAX)
    return pieces
