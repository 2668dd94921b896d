"""A checkpoint: the index as columns in one file, so that opening scans only what is newer.

Sections of raw little-endian arrays, each with its CRC, behind a small JSON directory. A checkpoint
only speeds up opening: absent, damaged or foreign it is ignored, with the reason reported. It is
replaced atomically. CRCs are computed off the loop; the arrays handed back are read-only views of
the file's bytes, so that loading a million blocks copies nothing.

What it must not know: what the columns mean.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import crc32c
import msgspec
import numpy as np

from cascade_aio.abc.storage import ByteEngine, Storage
from cascade_aio.segments.format import SegmentIdentity
from cascade_aio.segments.table import SegmentTable

MAGIC = b"cscdCKPT"
CHECKPOINT_VERSION = 1
ALIGNMENT = 64
DIRECTORY_BYTES_MAX = 256 << 20
"""A longer directory is damage: 100 bytes for each of a million segments is well below."""

SECTION_CRC_BYTES = 16 << 20
"""What one section CRC covers, so that all workers can check a long section."""

_HEADER = struct.Struct("<8sHHIQII")
"""magic, version, flags, zero, bytes of the directory, its CRC, CRC of this header."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cover:
    """The checkpoint speaks for this segment up to the offset ``upto`` (the file's size if sealed)."""

    identity: SegmentIdentity
    upto: int
    sealed: bool
    record_bytes: int = 0
    live_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read. ``columns`` are read-only; segment numbers in them are positions in ``covers``."""

    columns: dict[str, np.ndarray[Any, np.dtype[Any]]]
    covers: list[Cover]
    notes: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointFailure:
    """Why a checkpoint is not used."""

    path: str
    reason: str


class _Section(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: list[int]
    offset: int
    nbytes: int
    crcs: list[int]


class _Directory(msgspec.Struct, forbid_unknown_fields=True):
    store: str
    sections: list[_Section]
    covers: list[tuple[str, int, int, bool, int, int]]
    notes: dict[str, Any]


def covers_of(table: SegmentTable) -> tuple[list[Cover], dict[int, int]]:
    """What a checkpoint of everything known now covers, and each segment number's position in it.

    Not a segment of which a part could not be read: its number has no position, the next opening reads it.
    """
    covers: list[Cover] = []
    positions: dict[int, int] = {}
    for entry in table:
        if entry.scanned_bytes and not entry.unreadable:
            positions[entry.number] = len(covers)
            upto = entry.size_bytes if entry.sealed else entry.scanned_bytes
            covers.append(Cover(entry.identity, upto, entry.sealed, entry.record_bytes, entry.live_bytes))
    return covers, positions


async def write_checkpoint(
    storage: Storage,
    engine: ByteEngine,
    path: str,
    *,
    store: bytes,
    columns: Mapping[str, np.ndarray[Any, np.dtype[Any]]],
    covers: Sequence[Cover],
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Replace ``path`` atomically; returns its bytes. ``notes`` is anything JSON can say. Raises ``OSError``.

    The columns must not change until it returns: pass copies or an index that is at rest. Object
    and Unicode arrays are refused by assertion.
    """
    sections: list[_Section] = []
    parts: list[bytes | memoryview] = []
    offset = 0
    for name, column in columns.items():
        assert column.dtype.kind in "biufSV", f"column {name} of {column.dtype} has no plain bytes"
        assert column.dtype.fields is None, f"column {name} is structured: split it"
        array = np.ascontiguousarray(column)
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        raw = memoryview(array.view(np.uint8).reshape(-1)) if array.nbytes else memoryview(b"")
        crcs = await _crcs(engine, raw)
        sections.append(_Section(name, array.dtype.str, list(array.shape), offset, len(raw), list(crcs)))
        padding = -len(raw) % ALIGNMENT
        parts += [raw, bytes(padding)]
        offset += len(raw) + padding
    rows = [
        (c.identity.writer.hex(), c.identity.sequence, c.upto, c.sealed, c.record_bytes, c.live_bytes) for c in covers
    ]
    directory = msgspec.json.encode(_Directory(store.hex(), sections, rows, dict(notes or {})))
    directory += b" " * (-(len(directory) + _HEADER.size) % ALIGNMENT)
    fields = (MAGIC, CHECKPOINT_VERSION, 0, 0, len(directory), crc32c.crc32c(directory))
    header = _HEADER.pack(*fields, 0)[:-4]
    header += crc32c.crc32c(header).to_bytes(4, "little")
    await storage.write_small(path, [header, directory, *parts])
    return len(header) + len(directory) + offset


async def read_checkpoint(
    storage: Storage, engine: ByteEngine, path: str, *, store: bytes
) -> Checkpoint | CheckpointFailure | None:
    """The checkpoint of ``store`` at ``path``, ``None`` if there is none, or why it cannot be used. Never raises
    for what the file holds or for an I/O error."""
    try:
        raw = memoryview(await storage.read_small(path))
    except FileNotFoundError:
        return None
    except OSError as exc:
        return CheckpointFailure(path, f"cannot be read: {exc.strerror}")
    try:
        return await _decode(engine, raw, store)
    except _DamageError as exc:
        return CheckpointFailure(path, str(exc))


class _DamageError(Exception):
    """Internal: the reason why the bytes are no usable checkpoint."""


async def _decode(engine: ByteEngine, raw: memoryview, store: bytes) -> Checkpoint:
    directory, base = _decode_directory(raw)
    if directory.store != store.hex():
        raise _DamageError("it belongs to another store")
    columns: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
    for section in directory.sections:
        start = base + section.offset
        body = raw[start : start + section.nbytes]
        if section.offset < 0 or len(body) != section.nbytes:
            raise _DamageError(f"column {section.name} is cut short")
        if list(await _crcs(engine, body)) != section.crcs:
            raise _DamageError(f"checksum of column {section.name} is wrong")
        try:
            columns[section.name] = np.frombuffer(body, dtype=np.dtype(section.dtype)).reshape(section.shape)
        except (TypeError, ValueError) as exc:
            raise _DamageError(f"column {section.name} is no array: {exc}") from exc
    try:
        covers = [
            Cover(SegmentIdentity(bytes.fromhex(writer), sequence), upto, sealed, record_bytes, live_bytes)
            for writer, sequence, upto, sealed, record_bytes, live_bytes in directory.covers
        ]
    except ValueError as exc:
        raise _DamageError(f"its list of segments is damaged: {exc}") from exc
    return Checkpoint(columns, covers, directory.notes)


def _decode_directory(raw: memoryview) -> tuple[_Directory, int]:
    if len(raw) < _HEADER.size or raw[:8] != MAGIC:
        raise _DamageError("no checkpoint header")
    _, version, flags, _, nbytes, crc, header_crc = _HEADER.unpack_from(raw)
    if crc32c.crc32c(raw[: _HEADER.size - 4]) != header_crc:
        raise _DamageError("checksum of the header is wrong")
    if version != CHECKPOINT_VERSION or flags:
        raise _DamageError(f"written by checkpoint format {version} (flags {flags:#x}), not {CHECKPOINT_VERSION}")
    body = raw[_HEADER.size : _HEADER.size + min(nbytes, DIRECTORY_BYTES_MAX)]
    if len(body) != nbytes or crc32c.crc32c(body) != crc:
        raise _DamageError("checksum of the directory is wrong")
    try:
        return msgspec.json.decode(body, type=_Directory), _HEADER.size + nbytes
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise _DamageError(f"its directory is damaged: {exc}") from exc


async def _crcs(engine: ByteEngine, raw: memoryview) -> tuple[int, ...]:
    return await engine.checksum(raw, SECTION_CRC_BYTES) if len(raw) else ()
