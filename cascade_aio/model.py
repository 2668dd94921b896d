"""The words of the store: block ids, prefix keys, tiers, block metadata.

Pure values without I/O. A block has two names (DESIGN section 2): a ``BlockId`` is its content
address, a ``PrefixKey`` is what an inference server computes before it has the bytes.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import blake3
import msgspec
import numpy as np

from cascade_aio.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_ID_BYTES = 16
DIGEST_BYTES = 32
PREFIX_KEY_BYTES = 32
META_BYTES_MAX = 1024
"""Encoded ``BlockMeta`` larger than this is refused: metadata shares the record's header page."""

DIGEST_KINDS = ("sha256", "blake3")

_PREFIX_ROOT = b"cascade_aio prefix root v1\0"


class Tier(enum.StrEnum):
    """Where a copy of a block lives, fastest first."""

    GPU = "gpu"
    SHM = "shm"
    REMOTE = "remote"
    DISK = "disk"


class _Name(bytes):
    """A fixed-length byte string that prints as hex; hashes and compares at the speed of bytes."""

    __slots__ = ()
    LENGTH = 0

    def __new__(cls, raw: bytes | bytearray | memoryview) -> Self:
        self = super().__new__(cls, raw)
        if len(self) != cls.LENGTH:
            raise ConfigError(f"{cls.__name__} takes {cls.LENGTH} bytes, not {len(self)}")
        return self

    @classmethod
    def from_hex(cls, text: str) -> Self:
        """The name printed as ``text`` (hex digits, any case). Raises ``ConfigError`` if malformed."""
        try:
            raw = bytes.fromhex(text) if len(text) == 2 * cls.LENGTH else b""
        except ValueError:
            raw = b""
        if len(raw) != cls.LENGTH:
            raise ConfigError(f"{text[:80]!r} is not a {cls.__name__}: it takes {2 * cls.LENGTH} hex digits")
        return cls(raw)

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hex()})"


class BlockId(_Name):
    """Content address: the first 128 bits of the digest of ``key ‖ value``; ``str()`` is 32 hex digits."""

    __slots__ = ()
    LENGTH = BLOCK_ID_BYTES


class PrefixKey(_Name):
    """Chained SHA-256 over (namespace, parent key, token ids): names a position in a prompt."""

    __slots__ = ()
    LENGTH = PREFIX_KEY_BYTES


def is_prefix_key(name: object) -> bool:
    """Whether ``name`` can be a prefix key: 32 bytes (a ``PrefixKey``, or its raw bytes)."""
    return isinstance(name, bytes) and len(name) == PREFIX_KEY_BYTES


class BlockMeta(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Optional description of a block's bytes; stored with it and returned unchanged.

    ``dtype`` and ``shape`` describe key and value as the caller sees them (NumPy names, elements);
    ``layout`` is free text such as ``"KV_2LTD"``; ``tokens`` is how many tokens the block covers;
    ``extra`` is opaque. All of it encoded may take ``META_BYTES_MAX`` bytes.
    """

    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    layout: str | None = None
    tokens: int | None = None
    extra: bytes = b""


class Namespace(msgspec.Struct, frozen=True):
    """What must agree before two prompts may share KV bytes. ``salt`` separates tenants."""

    model: str
    revision: str = ""
    dtype: str = ""
    layout: str = ""
    rank: str = ""
    salt: str = ""

    def encode(self) -> bytes:
        """Injective encoding (msgpack array of the fields), the input of the root key's hash."""
        return msgspec.msgpack.encode(msgspec.structs.astuple(self))


def new_hasher(digest: str) -> hashlib._Hash:
    """A hash object of the store's digest kind. Raises ``ConfigError`` for an unknown kind."""
    if digest == "sha256":
        return hashlib.sha256()
    if digest == "blake3":
        return blake3.blake3()  # type: ignore[return-value]
    raise ConfigError(f"digest={digest!r} is unknown; use one of {', '.join(DIGEST_KINDS)}")


def compute_digest(key: Buffer, value: Buffer, digest: str = "sha256") -> bytes:
    """The 32-byte digest of ``key ‖ value``. Blocks for the time of hashing (SHA-256: ~0.6 ms per MiB)."""
    hasher = new_hasher(digest)
    hasher.update(as_bytes_view(key, "key"))
    hasher.update(as_bytes_view(value, "value"))
    return hasher.digest()


def compute_block_id(key: Buffer, value: Buffer, digest: str = "sha256") -> BlockId:
    """The content address of a block. Blocks for the time of hashing; see ``compute_digest``."""
    return BlockId(compute_digest(key, value, digest)[:BLOCK_ID_BYTES])


def as_bytes_view(buffer: Buffer, name: str) -> memoryview:
    """A flat byte view of ``buffer`` without copying.

    Raises ``ConfigError`` if ``buffer`` has no buffer protocol or is not C-contiguous.
    """
    try:
        view = memoryview(buffer)
    except TypeError:
        raise ConfigError(
            f"{name} is a {type(buffer).__name__}, which has no buffer protocol; pass bytes, a NumPy array "
            "or a memoryview (a CPU torch tensor: tensor.view(torch.uint8).numpy())"
        ) from None
    if not view.c_contiguous:
        raise ConfigError(f"{name} is not C-contiguous; pass numpy.ascontiguousarray({name})")
    if view.ndim == 1 and view.format == "B":
        return view
    if view.nbytes == 0:
        return memoryview(b"")
    return view.cast("B")


def prefix_root(namespace: str | bytes | Namespace) -> bytes:
    """The parent of a namespace's first blocks (32 bytes; not itself a ``PrefixKey`` of any block)."""
    if isinstance(namespace, Namespace):
        raw = b"\x01" + namespace.encode()
    else:
        raw = b"\x00" + (namespace.encode() if isinstance(namespace, str) else bytes(namespace))
    return hashlib.sha256(_PREFIX_ROOT + raw).digest()


def prefix_keys(
    token_ids: Iterable[int] | np.ndarray,
    block_tokens: int = 256,
    namespace: str | bytes | Namespace = "",
    *,
    parent: PrefixKey | None = None,
) -> list[PrefixKey]:
    """Names of the full blocks of a prompt, first block first; a partial last block has no name.

    ``key[i] = sha256(key[i-1] ‖ token ids of block i as little-endian uint32)``, ``key[-1]`` being
    ``parent`` or, without one, the namespace's root. Raises ``ConfigError`` for a token id that does
    not fit 32 bits or a ``block_tokens`` below 1.
    """
    if block_tokens < 1:
        raise ConfigError(f"block_tokens={block_tokens} must be at least 1")
    raw_ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids))
    if raw_ids.size and (raw_ids.dtype.kind not in "iu" or raw_ids.ndim != 1):
        raise ConfigError("token_ids must be a one-dimensional sequence of integers")
    if raw_ids.size and (int(raw_ids.min()) < 0 or int(raw_ids.max()) > 0xFFFFFFFF):
        raise ConfigError("token_ids must be between 0 and 2**32 - 1")
    packed = memoryview(raw_ids.astype("<u4").tobytes())
    block_bytes = 4 * block_tokens
    link = bytes(parent) if parent is not None else prefix_root(namespace)
    keys: list[PrefixKey] = []
    for start in range(0, len(packed) - block_bytes + 1, block_bytes):
        hasher = hashlib.sha256(link)
        hasher.update(packed[start : start + block_bytes])
        link = hasher.digest()
        keys.append(PrefixKey(link))
    return keys
