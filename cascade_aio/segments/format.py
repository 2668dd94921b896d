"""The bytes of a segment: header page and records. FORMAT.md is the specification.

Pure codec. Encoders write straight into the caller's page-aligned memory. Decoders take any bytes and
give a value, "nothing here" or ``CorruptionError``: never another exception, never an allocation
larger than the header they were given. The footer has its own module.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import NamedTuple

import crc32c

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import BlockTooLargeError, ConfigError, CorruptionError
from cascade_aio.model import BLOCK_ID_BYTES, DIGEST_BYTES, META_BYTES_MAX
from cascade_aio.segments.buffers import page_padded

FORMAT_NAME = "cascade_aio"
FORMAT_VERSION = 1

CHUNK_BYTES = 1 << 20
"""What one payload CRC covers: damage is reported this precisely, and checked in parallel."""

VALUE_ALIGNMENT = 64
"""The value starts on a cache line, so that NumPy and SIMD kernels get aligned arrays."""

HEADER_PAGES_MAX = 16
"""A header never exceeds 64 KiB: what a scanner must be able to hold to decode any record."""

PAYLOAD_BYTES_MAX = 4 << 30
"""Largest padded payload: its CRC table then takes a quarter of the largest header."""

BLOCK = 1
NOTE = 2

SEGMENT_MAGIC = b"cscdSEGM"
RECORD_MAGIC = b"cscdRECD"
NO_PARENT = bytes(DIGEST_BYTES)

_SEGMENT = struct.Struct("<8sHHI16s16sQ8sQQ")
_RECORD = struct.Struct("<8sHBBHHQQ16sQQQII32sQQQIIII")
_BINDING = struct.Struct("<32s32sQ")
_NOTE_BINDING = struct.Struct("<16s32s32sQ")
_TOMBSTONE = struct.Struct("<16sQ")
_CRC = struct.Struct("<I")
_ZEROS = bytes(HEADER_PAGES_MAX * PAGE_BYTES)
_ZERO_PAGE = bytes(PAGE_BYTES)
_DIGEST_CODES = {"": 0, "sha256": 1, "blake3": 2}
_DIGEST_NAMES = {code: name for name, code in _DIGEST_CODES.items()}
_CRC_TABLES = [struct.Struct(f"<{count}I") for count in range(321)]


class SegmentIdentity(NamedTuple):
    """Which segment bytes belong to: writer uuid (16 bytes) and sequence number."""

    writer: bytes
    sequence: int

    @property
    def name(self) -> str:
        """Path of the segment within the root's ``writers`` directory, without suffix."""
        return f"{self.writer.hex()}/{self.sequence:010d}"


class Binding(NamedTuple):
    """A prefix key bound to a block. ``parent`` is the key before it in the prompt, if any."""

    key: bytes
    parent: bytes | None
    stamp: int


class NoteBinding(NamedTuple):
    """A binding recorded after the block's own record."""

    block_id: bytes
    key: bytes
    parent: bytes | None
    stamp: int


class Tombstone(NamedTuple):
    """Everything of ``block_id`` not newer than ``stamp`` is deleted."""

    block_id: bytes
    stamp: int


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Page 0 of a segment."""

    store: bytes
    identity: SegmentIdentity
    digest: str
    capacity_bytes: int
    created_stamp: int


@dataclasses.dataclass(slots=True)
class RecordHeader:
    """What a record says about itself. ``offset`` and lengths in bytes; see FORMAT.md."""

    kind: int
    header_pages: int
    record_bytes: int
    offset: int
    stamp: int
    synced_bytes: int
    digest_kind: str = ""
    digest: bytes = NO_PARENT
    key_bytes: int = 0
    value_bytes: int = 0
    value_offset: int = 0
    chunk_crcs: tuple[int, ...] = ()
    chunk_bytes: int = CHUNK_BYTES
    bindings: tuple[Binding, ...] = ()
    note_bindings: tuple[NoteBinding, ...] = ()
    tombstones: tuple[Tombstone, ...] = ()
    meta: bytes = b""

    @property
    def payload_bytes(self) -> int:
        return self.record_bytes - self.header_pages * PAGE_BYTES

    @property
    def end(self) -> int:
        return self.offset + self.record_bytes


def value_offset_of(key_bytes: int) -> int:
    """Where the value starts in a payload whose key has ``key_bytes``."""
    return -(-key_bytes // VALUE_ALIGNMENT) * VALUE_ALIGNMENT


def payload_bytes_of(key_bytes: int, value_bytes: int) -> int:
    """Padded size of the payload, a multiple of the page; 0 for an empty block."""
    return page_padded(value_offset_of(key_bytes) + value_bytes)


def header_pages_for(payload_bytes: int, meta_bytes: int, bindings: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Header pages of a BLOCK record. Raises ``BlockTooLargeError`` beyond the format's limits."""
    chunks = -(-payload_bytes // chunk_bytes)
    pages = _pages_of(_RECORD.size + 4 * chunks + _BINDING.size * bindings + meta_bytes)
    if payload_bytes > PAYLOAD_BYTES_MAX or meta_bytes > META_BYTES_MAX or pages > HEADER_PAGES_MAX:
        raise BlockTooLargeError(
            f"a record with {payload_bytes} payload bytes, {meta_bytes} bytes of metadata and {bindings} prefix keys "
            f"exceeds the format ({PAYLOAD_BYTES_MAX} bytes, {META_BYTES_MAX} bytes, {HEADER_PAGES_MAX} header pages)"
        )
    return pages


def bindings_room(header_pages: int, chunks: int, meta_bytes: int) -> int:
    """How many prefix keys fit the header of a BLOCK record of so many pages."""
    return (header_pages * PAGE_BYTES - _RECORD.size - 4 * chunks - meta_bytes - _CRC.size) // _BINDING.size


def note_pages_for(bindings: int, tombstones: int) -> int:
    """Pages of a NOTE record."""
    return _pages_of(_RECORD.size + _NOTE_BINDING.size * bindings + _TOMBSTONE.size * tombstones)


NOTE_ENTRIES_MAX = (HEADER_PAGES_MAX * PAGE_BYTES - _RECORD.size - _CRC.size) // _NOTE_BINDING.size
"""Bindings and tombstones together that always fit one NOTE."""


def encode_segment_header(page: memoryview, header: SegmentHeader) -> None:
    """Fill ``page`` (4096 writable bytes)."""
    page[:] = _ZERO_PAGE
    digest = header.digest.encode()
    identity = header.identity
    _SEGMENT.pack_into(
        page, 0, SEGMENT_MAGIC, FORMAT_VERSION, 0, PAGE_BYTES, header.store, identity.writer, identity.sequence,
        digest, header.capacity_bytes, header.created_stamp,
    )  # fmt: skip
    seal_page(page)


def decode_segment_header(page: memoryview, *, path: str) -> SegmentHeader | None:
    """The header in ``page``; ``None`` for a page of zeros (never written).

    Raises ``CorruptionError``, and ``ConfigError`` for a sound header of another format version.
    """
    if len(page) < PAGE_BYTES or page[:PAGE_BYTES] == _ZERO_PAGE:
        return None
    page = page[:PAGE_BYTES]
    magic, version, flags, header_bytes, store, writer, sequence, digest, capacity, created = _SEGMENT.unpack_from(page)
    if magic != SEGMENT_MAGIC:
        raise CorruptionError("no segment header", path=path, offset=0, expected=SEGMENT_MAGIC, found=magic)
    check_page(page, "segment header", path=path, offset=0)
    if version != FORMAT_VERSION or flags or header_bytes != PAGE_BYTES:
        raise refusal(path, "segment header", version, flags)
    name = digest.rstrip(b"\0").decode("ascii", "replace")
    return SegmentHeader(store, SegmentIdentity(writer, sequence), name, capacity, created)


def refusal(path: str, what: str, version: int, flags: int) -> ConfigError:
    """Why sound bytes of another format are not read: they may say what this version would take for damage."""
    return ConfigError(
        f"{path} was written by format {version} (flags {flags:#x} in its {what}), this version reads {FORMAT_VERSION} "
        "without flags: open the root with the version of cascade_aio that wrote it"
    )


def seal_page(page: memoryview) -> None:
    """Put the CRC of a page (or of several header pages) into its last four bytes."""
    _CRC.pack_into(page, len(page) - 4, crc32c.crc32c(page[:-4]))


def check_page(page: memoryview, what: str, *, path: str, offset: int) -> None:
    """Raise ``CorruptionError`` unless the page carries its own CRC."""
    (stored,) = _CRC.unpack_from(page, len(page) - 4)
    found = crc32c.crc32c(page[:-4])
    if stored != found:
        raise CorruptionError(
            f"checksum of the {what} is wrong", path=path, offset=offset, expected=f"{stored:08x}", found=f"{found:08x}"
        )


def encode_record(pages: memoryview, header: RecordHeader, identity: SegmentIdentity) -> None:
    """Fill ``pages``: exactly ``header.header_pages`` writable pages, all of which are overwritten."""
    assert len(pages) == header.header_pages * PAGE_BYTES, (len(pages), header.header_pages)
    crcs = header.chunk_crcs
    notes = header.note_bindings
    _RECORD.pack_into(
        pages, 0, RECORD_MAGIC, FORMAT_VERSION, header.kind, 0, header.header_pages, _DIGEST_CODES[header.digest_kind],
        header.record_bytes, header.offset, identity.writer, identity.sequence, header.stamp, header.synced_bytes,
        header.chunk_bytes, len(crcs), header.digest, header.key_bytes, header.value_bytes, header.value_offset,
        len(header.meta), len(header.bindings) + len(notes), len(header.tombstones), 0,
    )  # fmt: skip
    position = _RECORD.size
    _crc_table(len(crcs)).pack_into(pages, position, *crcs)
    position += 4 * len(crcs)
    for key, parent, stamp in header.bindings:
        _BINDING.pack_into(pages, position, key, parent or NO_PARENT, stamp)
        position += _BINDING.size
    for block_id, key, parent, stamp in notes:
        _NOTE_BINDING.pack_into(pages, position, block_id, key, parent or NO_PARENT, stamp)
        position += _NOTE_BINDING.size
    for tombstone in header.tombstones:
        _TOMBSTONE.pack_into(pages, position, *tombstone)
        position += _TOMBSTONE.size
    end = position + len(header.meta)
    pages[position:end] = header.meta
    pages[end:-4] = _ZEROS[: len(pages) - 4 - end]
    seal_page(pages)


def header_pages_at(page: memoryview, *, path: str, offset: int) -> int:
    """How many pages must be read to decode the record that starts with ``page``; 0 for a page of zeros.

    Raises ``CorruptionError`` if no record can start here.
    """
    if page[:8] != RECORD_MAGIC:
        if page[:PAGE_BYTES] == _ZERO_PAGE:
            return 0
        raise CorruptionError(
            "no record header", path=path, offset=offset, expected=RECORD_MAGIC, found=bytes(page[:8])
        )
    pages = int.from_bytes(page[12:14], "little")
    if not 1 <= pages <= HEADER_PAGES_MAX:
        raise CorruptionError(
            "impossible header length", path=path, offset=offset, expected=f"1..{HEADER_PAGES_MAX} pages", found=pages
        )
    return pages


def decode_record(view: memoryview, identity: SegmentIdentity, *, path: str, offset: int) -> RecordHeader | None:
    """The record header at the start of ``view`` (whole pages, at least the header), or ``None`` for a zero page.

    ``offset`` is where ``view`` starts in the file. Raises ``CorruptionError`` for anything that is
    not a sound header of *this* place in *this* segment, and ``ConfigError`` for one of another format.
    """
    if len(view) < PAGE_BYTES:
        raise CorruptionError("file ends within a record", path=path, offset=offset)
    count = header_pages_at(view, path=path, offset=offset)
    if count == 0:
        return None
    if len(view) < count * PAGE_BYTES:
        raise CorruptionError("file ends within a record header", path=path, offset=offset)
    pages = view[: count * PAGE_BYTES]
    check_page(pages, "record header", path=path, offset=offset)
    (version, flags, reserved), writer, sequence, own_offset = _origin(pages)
    if (version, flags, reserved) != (FORMAT_VERSION, 0, 0) and (writer, sequence, own_offset) == (*identity, offset):
        raise refusal(path, f"record at offset {offset}", version, flags or reserved)
    header, writer, sequence, problem = _unpack_record(pages)
    if header is None:
        raise CorruptionError(f"record header is unusable: {problem}", path=path, offset=offset)
    if (writer, sequence) != identity or header.offset != offset:
        found = f"{SegmentIdentity(writer, sequence).name} at {header.offset}"
        raise CorruptionError(
            "a record of another place", path=path, offset=offset, expected=f"{identity.name} at {offset}", found=found
        )
    return header


def decode_record_anywhere(view: memoryview, *, path: str) -> RecordHeader | None:
    """The header at the start of ``view``, whatever place it claims: in an arena, whose extents come from anywhere.

    ``None`` where no record starts; else errors as ``decode_record``.
    """
    if len(view) < PAGE_BYTES or view[:8] != RECORD_MAGIC:
        return None
    _, writer, sequence, offset = _origin(view)
    return decode_record(view, SegmentIdentity(writer, sequence), path=path, offset=offset)


def _origin(pages: memoryview) -> tuple[tuple[int, int, int], bytes, int, int]:
    """(Version, flags, reserved), writer, sequence and own offset of a record: what later formats keep in place."""
    fields = _RECORD.unpack_from(pages)
    return (fields[1], fields[3], fields[-1]), fields[8], fields[9], fields[7]


def _unpack_record(pages: memoryview) -> tuple[RecordHeader | None, bytes, int, str]:
    (
        _, version, kind, flags, header_pages, digest_code, record_bytes, own_offset, writer, sequence, stamp,
        synced_bytes, chunk_bytes, chunk_count, digest, key_bytes, value_bytes, value_offset, meta_bytes,
        binding_count, tombstone_count, reserved,
    ) = _RECORD.unpack_from(pages)  # fmt: skip
    if version != FORMAT_VERSION or flags or reserved:
        return None, writer, sequence, f"format {version}, flags {flags:#x}; this version reads {FORMAT_VERSION}"
    if kind not in (BLOCK, NOTE) or digest_code not in _DIGEST_NAMES or (kind == NOTE) != (digest_code == 0):
        return None, writer, sequence, f"kind {kind} with digest kind {digest_code}"
    payload_bytes = payload_bytes_of(key_bytes, value_bytes)
    binding = _BINDING if kind == BLOCK else _NOTE_BINDING
    tables_bytes = 4 * chunk_count + binding.size * binding_count + _TOMBSTONE.size * tombstone_count
    sound = (
        payload_bytes <= PAYLOAD_BYTES_MAX
        and value_offset == value_offset_of(key_bytes)
        and record_bytes == header_pages * PAGE_BYTES + payload_bytes
        and chunk_bytes > 0
        and chunk_bytes % PAGE_BYTES == 0
        and chunk_count == -(-payload_bytes // chunk_bytes)
        and meta_bytes <= META_BYTES_MAX
        and _RECORD.size + tables_bytes + meta_bytes + _CRC.size <= len(pages)
        and (kind == BLOCK or payload_bytes == 0)
        and (kind == NOTE or tombstone_count == 0)
    )
    if not sound:
        return None, writer, sequence, "its lengths contradict each other"
    header = RecordHeader(
        kind, header_pages, record_bytes, own_offset, stamp, synced_bytes, _DIGEST_NAMES[digest_code], digest,
        key_bytes, value_bytes, value_offset, (), chunk_bytes,
    )  # fmt: skip
    position = _RECORD.size
    header.chunk_crcs = _crc_table(chunk_count).unpack_from(pages, position)
    position += 4 * chunk_count
    end = position + binding.size * binding_count
    rows = binding.iter_unpack(pages[position:end])
    if kind == BLOCK:
        header.bindings = tuple(Binding(key, _parent(parent), stamp) for key, parent, stamp in rows)
    else:
        header.note_bindings = tuple(NoteBinding(block, key, _parent(link), at) for block, key, link, at in rows)
    position, end = end, end + _TOMBSTONE.size * tombstone_count
    header.tombstones = tuple(Tombstone(*row) for row in _TOMBSTONE.iter_unpack(pages[position:end]))
    header.meta = bytes(pages[end : end + meta_bytes])
    return header, writer, sequence, ""


def _parent(raw: bytes) -> bytes | None:
    return None if raw == NO_PARENT else raw


def _pages_of(nbytes: int) -> int:
    return page_padded(nbytes + _CRC.size) // PAGE_BYTES


def _crc_table(count: int) -> struct.Struct:
    return _CRC_TABLES[count] if count < len(_CRC_TABLES) else struct.Struct(f"<{count}I")


assert (_RECORD.size, _SEGMENT.size, BLOCK_ID_BYTES) == (152, 80, 16)  # FORMAT.md says so
