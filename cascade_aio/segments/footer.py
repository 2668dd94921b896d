"""The footer of a sealed segment: what its records say, readable without visiting them.

Pure codec. A ``FooterTables`` grows with the segment by a packed row per record, so that sealing
costs the loop a concatenation and nothing more. FORMAT.md has the bytes.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

import crc32c
import numpy as np

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.core.index import PART_BYTES_MAX
from cascade_aio.errors import CorruptionError
from cascade_aio.model import BLOCK_ID_BYTES
from cascade_aio.segments import format as fmt
from cascade_aio.segments.buffers import page_buffer, page_padded
from cascade_aio.segments.facts import BindingFact, BlockFact, DamageFact, Fact, Location, TombstoneFact

TRAILER_MAGIC = b"cscdTAIL"
DAMAGED = 3
"""Kind of a footer row that stands for a range its sealer could not read."""

SEALED_DAMAGE = "damaged when the segment was sealed"
"""Why a ``DamageFact`` of such a row is told."""

FOOTER_BYTES_MAX = 1 << 30
"""A longer footer is damage: a segment of 1 TiB of 64 KiB records has as much."""

_RECORD_ROW = struct.Struct("<BBHIQQQQ32s")
_BINDING_ROW = struct.Struct("<II16s32s32sQ")
_TOMBSTONE_ROW = struct.Struct("<II16sQ")
_TRAILER = struct.Struct("<8sHHI16sQQQIIII")
_NO_DIGEST = bytes(32)
_RECORD_DTYPE = np.dtype("u1,u1,<u2,<u4,<u8,<u8,<u8,<u8,V32")
"""``_RECORD_ROW`` as columns f0 (kind), f1 (header pages), f3 (page), f4 (record bytes), f5 and f6 (key and value)."""
assert _RECORD_DTYPE.itemsize == _RECORD_ROW.size


def footer_bytes(records: int, bindings: int, tombstones: int) -> int:
    """What footer and trailer of so many rows take in the file."""
    rows = records * _RECORD_ROW.size + bindings * _BINDING_ROW.size + tombstones * _TOMBSTONE_ROW.size
    return page_padded(rows) + PAGE_BYTES


class FooterTables:
    """The three tables under construction."""

    def __init__(self) -> None:
        self.count = 0
        self._records = bytearray()
        self._bindings = bytearray()
        self._tombstones = bytearray()

    def add(self, header: fmt.RecordHeader) -> None:
        """One row for the record, and its bindings and tombstones."""
        row = self.count
        self.count += 1
        self._records += _RECORD_ROW.pack(
            header.kind, header.header_pages, 0, header.offset // PAGE_BYTES, header.record_bytes, header.key_bytes,
            header.value_bytes, header.stamp, header.digest,
        )  # fmt: skip
        block_id = header.digest[:BLOCK_ID_BYTES]
        for key, parent, stamp in header.bindings:
            self._bindings += _BINDING_ROW.pack(row, 0, block_id, key, parent or fmt.NO_PARENT, stamp)
        for note in header.note_bindings:
            self._bindings += _BINDING_ROW.pack(
                row, 0, note.block_id, note.key, note.parent or fmt.NO_PARENT, note.stamp
            )
        for tombstone in header.tombstones:
            self._tombstones += _TOMBSTONE_ROW.pack(row, 0, tombstone.block_id, tombstone.stamp)

    def add_damage(self, offset: int, nbytes: int) -> None:
        """Remember a damaged range, so that it stays known after sealing."""
        self.count += 1
        self._records += _RECORD_ROW.pack(DAMAGED, 0, 0, offset // PAGE_BYTES, nbytes, 0, 0, 0, _NO_DIGEST)

    def encode(self, identity: fmt.SegmentIdentity, data_end: int) -> memoryview:
        """Footer and trailer as one page-aligned buffer, to be written at ``data_end``, ending the file."""
        body = b"".join((self._records, self._bindings, self._tombstones))
        buffer = page_buffer(page_padded(len(body)) + PAGE_BYTES)
        buffer[: len(body)] = body
        footer_crc = crc32c.crc32c(buffer[:-PAGE_BYTES])
        trailer = buffer[-PAGE_BYTES:]
        _TRAILER.pack_into(
            trailer, 0, TRAILER_MAGIC, fmt.FORMAT_VERSION, 0, 0, identity.writer, identity.sequence, data_end,
            len(body), self.count, len(self._bindings) // _BINDING_ROW.size,
            len(self._tombstones) // _TOMBSTONE_ROW.size, footer_crc,
        )  # fmt: skip
        fmt.seal_page(trailer)
        return buffer


@dataclasses.dataclass(frozen=True, slots=True)
class Trailer:
    """Where the footer is and what it holds."""

    identity: fmt.SegmentIdentity
    data_end: int
    footer_bytes: int
    records: int
    bindings: int
    tombstones: int
    footer_crc: int


def decode_trailer(
    page: memoryview, identity: fmt.SegmentIdentity, file_bytes: int, *, path: str = ""
) -> Trailer | None:
    """The trailer in the last page of a file of ``file_bytes``, or ``None``: the segment is not sealed.

    Whatever is wrong with it, the answer is ``None``: records can always be scanned instead. But a sound one of
    another format raises ``ConfigError``: what it ends may be more than records.
    """
    if len(page) != PAGE_BYTES or page[:8] != TRAILER_MAGIC:
        return None
    try:
        fmt.check_page(page, "trailer", path="", offset=0)
    except CorruptionError:
        return None
    _, version, flags, _, writer, sequence, data_end, nbytes, records, bindings, tombstones, crc = _TRAILER.unpack_from(
        page
    )
    trailer = Trailer(fmt.SegmentIdentity(writer, sequence), data_end, nbytes, records, bindings, tombstones, crc)
    rows = records * _RECORD_ROW.size + bindings * _BINDING_ROW.size + tombstones * _TOMBSTONE_ROW.size
    if trailer.identity == identity and (version != fmt.FORMAT_VERSION or flags):
        raise fmt.refusal(path, "trailer", version, flags)
    sound = (
        trailer.identity == identity
        and nbytes == rows <= FOOTER_BYTES_MAX
        and data_end >= PAGE_BYTES
        and data_end + page_padded(nbytes) + PAGE_BYTES == file_bytes
    )
    return trailer if sound else None


def footer_facts(body: memoryview, trailer: Trailer, segment: int, path: str) -> Iterator[Fact]:
    """The facts of a footer, in record order. ``body`` is the padded footer.

    Raises ``CorruptionError`` at once if its checksum is wrong or its rows say what cannot be: then the records are
    to be asked themselves.
    """
    found = crc32c.crc32c(body)
    if found != trailer.footer_crc:
        raise CorruptionError(
            "checksum of the footer is wrong",
            path=path,
            segment=trailer.identity.name,
            offset=trailer.data_end,
            expected=f"{trailer.footer_crc:08x}",
            found=f"{found:08x}",
        )
    body = body[: trailer.footer_bytes]
    first = trailer.records * _RECORD_ROW.size
    second = first + trailer.bindings * _BINDING_ROW.size
    problem = _impossible(body, trailer, first, second)
    if problem:
        raise CorruptionError(
            f"footer says what cannot be: {problem}", path=path, segment=trailer.identity.name, offset=trailer.data_end
        )
    return _facts(body, trailer, segment, path, first, second)


def _facts(body: memoryview, trailer: Trailer, segment: int, path: str, first: int, second: int) -> Iterator[Fact]:
    """The tables, the second from byte ``first`` on and the third from ``second``, walked side by side."""
    bindings = _BINDING_ROW.iter_unpack(body[first:second])
    tombstones = _TOMBSTONE_ROW.iter_unpack(body[second:])
    binding, tombstone = next(bindings, None), next(tombstones, None)
    for row, fields in enumerate(_RECORD_ROW.iter_unpack(body[:first])):
        kind, pages, _, page, record_bytes, key_bytes, value_bytes, stamp, digest = fields
        location = Location(segment, page, pages)
        if kind == fmt.BLOCK:
            yield BlockFact(location, record_bytes, digest, key_bytes, value_bytes, stamp, False)
        elif kind == DAMAGED:
            yield DamageFact(path, trailer.identity.name, page * PAGE_BYTES, record_bytes, SEALED_DAMAGE)
        while binding is not None and binding[0] == row:
            _, _, block_id, key, parent, at = binding
            yield BindingFact(location, block_id, key, None if parent == fmt.NO_PARENT else parent, at, False)
            binding = next(bindings, None)
        while tombstone is not None and tombstone[0] == row:
            yield TombstoneFact(location, tombstone[2], tombstone[3], False)
            tombstone = next(tombstones, None)


def _impossible(body: memoryview, trailer: Trailer, first: int, second: int) -> str:
    """What contradicts itself in the tables, or nothing. A sound checksum says who wrote them, not that they are right.

    The index and the reader rely on it: places within the file that do not overlap, lengths that fit.
    """
    rows = np.frombuffer(body[:first], dtype=_RECORD_DTYPE)
    for table, size in ((body[first:second], _BINDING_ROW.size), (body[second:], _TOMBSTONE_ROW.size)):
        owners = np.frombuffer(table, dtype="<u4")[:: size // 4].astype(np.int64)
        if (owners >= len(rows)).any() or (np.diff(owners) < 0).any():
            return "entries of no record"
    kind, pages, record_bytes = rows["f0"], rows["f1"].astype(np.int64), rows["f4"]
    key_bytes, value_bytes = rows["f5"], rows["f6"]
    if not np.isin(kind, (fmt.BLOCK, fmt.NOTE, DAMAGED)).all():
        return "records of an unknown kind"
    if (record_bytes > trailer.data_end).any() or (record_bytes % PAGE_BYTES != 0).any() or (record_bytes == 0).any():
        return "lengths of records"
    starts = rows["f3"].astype(np.int64) * PAGE_BYTES
    ends = starts + record_bytes.astype(np.int64)
    if len(rows) and (starts[0] < PAGE_BYTES or ends[-1] > trailer.data_end or (starts[1:] < ends[:-1]).any()):
        return "places of records"
    if (key_bytes > PART_BYTES_MAX).any() or (value_bytes > PART_BYTES_MAX).any():
        return "lengths of blocks"
    values_at = -(-key_bytes.astype(np.int64) // fmt.VALUE_ALIGNMENT) * fmt.VALUE_ALIGNMENT
    payloads = -(-(values_at + value_bytes.astype(np.int64)) // PAGE_BYTES) * PAGE_BYTES
    headers = record_bytes.astype(np.int64) - np.where(kind == fmt.BLOCK, payloads, 0)
    sound = (headers == pages * PAGE_BYTES) & (pages >= 1) & (pages <= fmt.HEADER_PAGES_MAX)
    return "" if (sound | (kind == DAMAGED)).all() else "lengths of headers"


def record_facts(header: fmt.RecordHeader, segment: int, *, provisional: bool) -> Iterator[Fact]:
    """The facts of one record: the same that a footer would give for it."""
    location = Location(segment, header.offset // PAGE_BYTES, header.header_pages)
    if header.kind == fmt.BLOCK:
        yield BlockFact(
            location,
            header.record_bytes,
            header.digest,
            header.key_bytes,
            header.value_bytes,
            header.stamp,
            provisional,
        )
    block_id = header.digest[:BLOCK_ID_BYTES]
    for key, parent, stamp in header.bindings:
        yield BindingFact(location, block_id, key, parent, stamp, provisional)
    for note in header.note_bindings:
        yield BindingFact(location, note.block_id, note.key, note.parent, note.stamp, provisional)
    for tombstone in header.tombstones:
        yield TombstoneFact(location, tombstone.block_id, tombstone.stamp, provisional)
