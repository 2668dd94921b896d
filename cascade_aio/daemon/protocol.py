"""The words that client and service exchange: typed MessagePack messages with bounded fields.

What is written here is what ``PROTOCOL.md`` says; the two change together. A message is a MessagePack
array whose first element is its number. Decoding checks types, lengths and ranges of every field: what
passes is well formed, whether it makes sense (a lease that exists, an id that is new) is for the
session to say. Pure: no sockets, no loop, no clock.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from cascade_aio.errors import ProtocolError

_T = TypeVar("_T")

MAGIC = "cascade-aio"
VERSION_MIN = 1
VERSION_MAX = 1
"""Versions this code speaks; the highest that both sides speak is used."""

FRAME_BYTES_MAX = 4 << 20
"""Longest message: the largest list of names (2.2 MiB), doubled."""
HELLO_BYTES_MAX = 4096
"""Longest message before the peer is known."""
NAMES_MAX = 1 << 16
"""Names in one message; as many as ``store.prefetch`` takes."""
GRANTS_MAX = 1 << 11
"""Blocks that one ``GetPrefix`` of our client asks for: their grants, with the longest metadata, fit a frame."""
LOOKUPS_MAX = 1 << 11
"""Names that one ``Lookup`` of our client asks for: a millisecond of the service's event loop."""
RELEASES_MAX = 1 << 16
"""Leases that one message gives back."""
LISTED_MAX = 1 << 12
"""Blocks in one part of a listing."""
CHUNKS_MAX = 1 << 16
"""Checksums that a client may send with a block: 64 GiB of it."""
TEXT_BYTES_MAX = 4096
"""Longest text in an error."""
SIZE_MAX = 1 << 62
REPORTED_MAX = 1 << 32
"""Look-ups in one report: sums of them stay numbers that a message can carry."""
SECONDS_MAX = 86400.0

Count = Annotated[int, Meta(ge=0, le=SIZE_MAX)]
Number = Annotated[int, Meta(ge=1, le=SIZE_MAX)]
"""Of a request, a lease, a reservation or a stream; each counts from 1 within its connection."""
Tally = Annotated[int, Meta(ge=0, le=REPORTED_MAX)]
Slot = Annotated[int, Meta(ge=-1, le=1 << 40)]
"""Of the shared directory; -1: none."""
Name = Annotated[bytes, Meta(min_length=16, max_length=32)]
Names = Annotated[list[Name], Meta(max_length=NAMES_MAX)]
Prefix = Annotated[bytes, Meta(min_length=32, max_length=32)]
Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Encoded = Annotated[bytes, Meta(max_length=1024)]
"""A ``BlockMeta`` as it is stored; empty: none."""
Text = Annotated[str, Meta(max_length=TEXT_BYTES_MAX)]
Word = Annotated[str, Meta(max_length=64)]
Seconds = Annotated[float, Meta(ge=0, le=SECONDS_MAX)]


class Message(Struct, array_like=True, forbid_unknown_fields=True):
    """Base of all messages."""


# -- handshake ------------------------------------------------------------------------------------


class Hello(Message, tag=1):
    """First message of a client. ``client`` is free text for the service's log."""

    magic: Word
    version_min: Count
    version_max: Count
    client: Annotated[str, Meta(max_length=256)]


class Welcome(Message, tag=2):
    """The service's answer; the arena's file descriptors travel beside it (``PROTOCOL.md``)."""

    version: Count
    session: Number
    generation: Word
    """Names this run of the service: another one after each start."""
    root: Text
    digest: Word
    arena_bytes: Count
    verifies: bool
    """The service digests a block when it is sealed; else the client does and is believed."""
    requests_in_flight_max: Count
    lookup_shared: bool
    """The third and fourth descriptor are the shared directory and this client's pin table."""


class Refused(Message, tag=3):
    """Instead of a welcome: why not. The connection is closed behind it."""

    kind: Word
    message: Text


# -- requests: ``request`` is a number larger than that of any request before on this connection ---------


class Get(Message, tag=10):
    request: Number
    name: Name
    early: bool


class GetPrefix(Message, tag=11):
    request: Number
    names: Names


class Lookup(Message, tag=12):
    request: Number
    names: Names


class Contains(Message, tag=13):
    request: Number
    name: Name


class Reserve(Message, tag=14):
    """Room for a block. ``put``: a prefix that is bound already is answered with its block, without room."""

    request: Number
    key_bytes: Count
    value_bytes: Count
    prefix: Prefix | None
    parent: Prefix | None
    meta: Encoded
    put: bool


class Seal(Message, tag=15):
    """The reservation is filled, and the client does not write into it any more.

    ``digest`` and ``chunk_crcs`` only where the service does not verify.
    """

    request: Number
    reservation: Number
    digest: Digest | None
    chunk_crcs: Annotated[list[Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]], Meta(max_length=CHUNKS_MAX)]


class Ready(Message, tag=16):
    """Wait for bytes of the payload of an early lease."""

    request: Number
    lease: Number
    start: Count
    stop: Count


class Flush(Message, tag=17):
    request: Number


class Refresh(Message, tag=18):
    request: Number


class Delete(Message, tag=19):
    request: Number
    name: Name


class Prefetch(Message, tag=20):
    request: Number
    names: Names
    urgent: bool
    deadline_s: Seconds | None


class OpenStream(Message, tag=21):
    request: Number
    names: Names
    window_bytes: Count | None
    urgent: bool
    early: bool


class NextBlock(Message, tag=22):
    request: Number
    stream: Number


class ListBlocks(Message, tag=23):
    request: Number
    after: Count
    """Where to go on: what the part before said, 0 at first."""


class Verify(Message, tag=24):
    request: Number


class Statistics(Message, tag=25):
    request: Number


class WaitReady(Message, tag=26):
    request: Number


class Announce(Message, tag=27):
    """A prompt with these prefix keys will be computed in ``deadline_s`` seconds."""

    request: Number
    names: Names
    deadline_s: Seconds


# -- notes of a client: no answer ------------------------------------------------------------------


class Release(Message, tag=40):
    leases: Annotated[list[Number], Meta(max_length=RELEASES_MAX)]


class Abort(Message, tag=41):
    """The client does not write into the reservation any more and does not want it."""

    reservation: Number


class Cancel(Message, tag=42):
    """Nobody waits for this request any more. It is answered all the same."""

    request: Number


class CloseStream(Message, tag=43):
    stream: Number


class Settled(Message, tag=44):
    """Nothing of an earlier session of this process is in use any more: see "End of a connection"."""

    session: Number


class Report(Message, tag=45):
    """What this client found in the shared directory since its last report."""

    lookups: Tally
    hits: Tally


# -- answers ---------------------------------------------------------------------------------------


class Grant(Struct, array_like=True, forbid_unknown_fields=True):
    """A lease: where the block lies in the arena. ``header_bytes`` before the payload belong to the service.

    Either ``lease`` is its number, to be given back with Release; or ``lease`` is 0 and the block is pinned in
    ``slot`` of this client's pin table, to be given back there.
    """

    lease: Count
    slot: Slot
    block_id: Id
    offset: Count
    header_bytes: Count
    key_bytes: Count
    value_offset: Count
    value_bytes: Count
    meta: Encoded
    tier: Word
    complete: bool


class Leased(Message, tag=60):
    request: Number
    grants: list[Grant]


class Reserved(Message, tag=61):
    """``bound``: the block that the prefix names already; then ``reservation`` is 0 unless room was given anyway.

    ``slot`` (or -1) is pinned for this client until the reservation ends: should the service die, its successor
    leaves the extent alone until the client, who writes no more, has unpinned it.
    """

    request: Number
    reservation: Count
    slot: Slot
    offset: Count
    nbytes: Count
    header_bytes: Count
    value_offset: Count
    bound: Id | None


class Sealed(Message, tag=62):
    request: Number
    block_id: Id


class Answer(Message, tag=63):
    """Everything else; what ``value`` is depends on the request (``PROTOCOL.md``)."""

    request: Number
    value: Any


class Failed(Message, tag=64):
    """``kind`` is the name of an error class of ``cascade_aio.errors``, or ``OSError``; see ``faults``."""

    request: Number
    kind: Word
    message: str
    details: dict[str, Any]


class Progress(Message, tag=65):
    """Of a request that is not answered yet."""

    request: Number
    values: list[int]


class Goodbye(Message, tag=66):
    """The service ends. Nothing more comes."""

    reason: Text


Request = (
    Get | GetPrefix | Lookup | Contains | Reserve | Seal | Ready | Flush | Refresh | Delete | Prefetch | OpenStream
    | NextBlock | ListBlocks | Verify | Statistics | WaitReady | Announce
)  # fmt: skip
Note = Release | Abort | Cancel | CloseStream | Settled | Report
Reply = Leased | Reserved | Sealed | Answer | Failed | Progress | Goodbye


def _plain(value: Any) -> Any:
    """``BlockId``, ``PrefixKey`` and the like are bytes and texts on the wire."""
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, str):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no place in a message")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_request_decoder: msgspec.msgpack.Decoder[Request | Note] = msgspec.msgpack.Decoder(Request | Note)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_hello_decoder: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
_welcome_decoder: msgspec.msgpack.Decoder[Welcome | Refused] = msgspec.msgpack.Decoder(Welcome | Refused)


def encode(message: Message) -> bytes:
    """The frame of ``message``: its length, then its bytes. Raises ``ProtocolError`` for one that is too long."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise ProtocolError(
            f"a {type(message).__name__} of {len(body)} bytes is longer than the {FRAME_BYTES_MAX} that one message "
            "may have; ask for less at once"
        )
    return len(body).to_bytes(4, "little") + body


def decode_request(body: bytes | memoryview) -> Request | Note:
    """What a client says after its hello. Raises ``ProtocolError``."""
    return _decode(_request_decoder, body)


def decode_reply(body: bytes | memoryview) -> Reply:
    """What the service says after its welcome. Raises ``ProtocolError``."""
    return _decode(_reply_decoder, body)


def decode_hello(body: bytes | memoryview) -> Hello:
    """Raises ``ProtocolError`` for what is no hello of this protocol, whatever its version."""
    hello = _decode(_hello_decoder, body)
    if hello.magic != MAGIC or hello.version_min > hello.version_max:
        raise ProtocolError("the first message is no hello of cascade-aio; this socket speaks nothing else")
    return hello


def decode_welcome(body: bytes | memoryview) -> Welcome | Refused:
    """Raises ``ProtocolError``."""
    return _decode(_welcome_decoder, body)


def choose_version(hello: Hello) -> int:
    """The highest version both sides speak. Raises ``ProtocolError`` if there is none."""
    version = min(hello.version_max, VERSION_MAX)
    if version < max(hello.version_min, VERSION_MIN):
        raise ProtocolError(
            f"the client speaks versions {hello.version_min} to {hello.version_max} of the protocol, the service "
            f"{VERSION_MIN} to {VERSION_MAX}; install the same cascade_aio on both sides"
        )
    return version


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes | memoryview) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise ProtocolError(f"a message of {len(body)} bytes is malformed: {str(error)[:200]}") from None
