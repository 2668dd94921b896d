"""The bytes of an arena's directory and of its pin tables: geometry, headers, names. ``DIRECTORY.md`` specifies them.

Pure codec. Geometry is a function of the arena's size alone, so a file either fits its arena or is not
used; decoders give a value or a reason, whatever bytes they are shown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import crc32c

from cascade_aio._native.directory import BUCKET_BYTES, NAME_BYTES, SLOT_BYTES
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import ConfigError
from cascade_aio.model import BLOCK_ID_BYTES, PREFIX_KEY_BYTES

VERSION = 1
DIRECTORY_SUFFIX = ".dir"
PIN_INFIX = ".pin-"

SLOT_ARENA_BYTES = 128 << 10
"""One slot for so much arena: an arena of smaller blocks serves those beyond by message. 0.23 % of the arena."""

SLOTS_MIN = 1024
SLOTS_MAX = 1 << 20
"""Blocks that clients can find without asking: 1 TiB of 1 MiB blocks. A pin table then takes 5 MiB."""

_DIRECTORY_MAGIC = b"cscdADIR"
_PINS_MAGIC = b"cscdPINS"
_SUPERBLOCK = struct.Struct("<8sIIQII16s8s")
_PINS = struct.Struct("<8sIIQ")
_CRC = struct.Struct("<I")
_CRC_AT = 124

SESSION_AT = 128
BLOCKS_AT = 144
OPEN_AT = 152
CELLS_AT = PAGE_BYTES

TOUCHES_AT = 64
REVOKED_AT = 128
COUNTS_AT = PAGE_BYTES

_NAME_PREFIX = b"cascade_aio directory\0"


@dataclasses.dataclass(frozen=True, slots=True)
class DirectoryIdentity:
    """What a directory belongs to: ``store`` is the root's uuid (16 bytes), ``digest`` its kind."""

    arena_bytes: int
    store: bytes
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Where things are in a directory and in a pin table, in bytes from the start of the file."""

    slots: int
    buckets: int

    @property
    def slots_at(self) -> int:
        return CELLS_AT + BUCKET_BYTES * self.buckets

    @property
    def directory_bytes(self) -> int:
        return self.slots_at + SLOT_BYTES * self.slots

    @property
    def touched_at(self) -> int:
        return COUNTS_AT + 4 * self.slots

    @property
    def pins_bytes(self) -> int:
        return -(-(self.touched_at + self.slots) // PAGE_BYTES) * PAGE_BYTES


def geometry_of(arena_bytes: int) -> Geometry:
    """Slots for an arena, and buckets of eight cells each: four cells a slot."""
    slots = min(SLOTS_MAX, max(SLOTS_MIN, arena_bytes // SLOT_ARENA_BYTES)) // 16 * 16
    return Geometry(slots, 1 << (slots // 2 - 1).bit_length())


def encode_superblock(page: memoryview, identity: DirectoryIdentity) -> None:
    """Fill the checksummed part of a directory's first page."""
    geometry = geometry_of(identity.arena_bytes)
    _SUPERBLOCK.pack_into(
        page, 0, _DIRECTORY_MAGIC, VERSION, SLOT_BYTES, identity.arena_bytes, geometry.slots, geometry.buckets,
        identity.store, identity.digest.encode(),
    )  # fmt: skip
    _CRC.pack_into(page, _CRC_AT, crc32c.crc32c(page[:_CRC_AT]))


def decode_superblock(page: memoryview) -> DirectoryIdentity | str:
    """What a directory belongs to, or why it is none of this version."""
    magic, version, slot_bytes, arena_bytes, slots, buckets, store, digest = _SUPERBLOCK.unpack_from(page)
    if magic != _DIRECTORY_MAGIC:
        return "it is no directory"
    if _CRC.unpack_from(page, _CRC_AT)[0] != crc32c.crc32c(page[:_CRC_AT]):
        return "its first page is damaged"
    if (version, slot_bytes) != (VERSION, SLOT_BYTES):
        return f"it has format {version}, this version uses {VERSION}"
    if geometry_of(arena_bytes) != Geometry(slots, buckets):
        return "its geometry is not that of its arena"
    return DirectoryIdentity(arena_bytes, store, digest.rstrip(b"\0").decode("ascii", "replace"))


def encode_pins(page: memoryview, geometry: Geometry, quota_bytes: int) -> None:
    """Fill a pin table's first page."""
    _PINS.pack_into(page, 0, _PINS_MAGIC, VERSION, geometry.slots, quota_bytes)


def decode_pins(page: memoryview) -> tuple[int, int] | str:
    """(slots, quota in bytes) of a pin table, or why it is none."""
    magic, version, slots, quota_bytes = _PINS.unpack_from(page)
    if magic != _PINS_MAGIC:
        return "it is no pin table"
    if version != VERSION:
        return f"it has format {version}, this version uses {VERSION}"
    return slots, quota_bytes


def directory_name(name: bytes) -> bytes:
    """The 16 bytes by which a directory knows a name: of a BlockId itself, of a prefix key a hash.

    Everybody who maps the directory can read it, so it must not tell prefix keys, which are the right to
    ask for a block. Raises ``ConfigError`` for what is no name.
    """
    if len(name) == BLOCK_ID_BYTES:
        return name
    if len(name) != PREFIX_KEY_BYTES:
        raise ConfigError(f"{name!r:.100} names no block; pass a BlockId or a PrefixKey")
    return hashlib.sha256(_NAME_PREFIX + name).digest()[:NAME_BYTES]
