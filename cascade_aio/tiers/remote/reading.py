"""One copy on its way from another rank's arena into an extent of ours, and whether its bytes count.

Two things must agree before anybody sees a byte: the copy's generation, which the other rank ends before it uses
the memory again, read before the first byte and after the last; and the record itself, whose header and
chunks carry checksums and whose digest is that of the block that was asked for.

Invariant: the extent is the transport's until ``when_settled`` says otherwise, whatever became of the outcome: a rank
that does not answer may still write to it.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from concurrent.futures import Future

from cascade_aio._native import crc32c_chunks
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.core.remote_directory import Listing
from cascade_aio.core.remote_operations import ReadEnd, read
from cascade_aio.errors import ConfigError, CorruptionError
from cascade_aio.segments.format import BLOCK, CHUNK_BYTES, RecordHeader, decode_record_anywhere
from cascade_aio.segments.pieces import Piece, plain_pieces
from cascade_aio.tiers.remote.group import Call, RmaGroup

PIECE_BYTES = 4 << 20
"""Of one get: a piece is verified while the next arrives, so the last one alone is waited for."""


def remote_pieces(header_bytes: int, record_bytes: int) -> list[Piece]:
    """In which pieces a record is taken."""
    return plain_pieces(header_bytes, record_bytes, PIECE_BYTES)


class Torn(enum.Enum):
    """The generation held, and the bytes are not the block's all the same."""

    HEADER = "header"
    PAYLOAD = "payload"


class RemoteRead:
    """One transfer of ``listing`` into ``memory``, exactly as long as the record. Loop thread only, but ``_landed``."""

    def __init__(self, group: RmaGroup, listing: Listing, memory: memoryview, digest: str) -> None:
        assert len(memory) == listing.record_bytes, (len(memory), listing)
        self._group = group
        self._listing = listing
        self._memory = memory
        self._digest = digest
        self._header_bytes = listing.header_pages * PAGE_BYTES
        self._checks: dict[int, Future[tuple[int, ...]] | tuple[int, ...]] = {}
        self._given_up = False
        pieces = remote_pieces(self._header_bytes, listing.record_bytes)
        self._in_one = len(pieces) == 1
        self.call: Call[ReadEnd] = group.submit(read(listing, memory, pieces, self._landed))

    def _landed(self, first: int, end: int) -> None:
        """In the group's thread: a piece is there. The next one is on its way while this one is looked at."""
        payload = self._memory[max(first, self._header_bytes) : end]
        if not len(payload) or self._given_up:
            return
        if self._in_one:  # nothing else comes meanwhile, and it is still in the cache
            self._checks[first] = crc32c_chunks(payload, CHUNK_BYTES)
        else:
            self._checks[first] = self._group.checks.submit(crc32c_chunks, payload, CHUNK_BYTES)

    async def judged(self) -> RecordHeader | Torn:
        """The verified header. After the call's outcome was ``VALID``: then all pieces have landed."""
        crcs: list[int] = []
        for first in sorted(self._checks):
            check = self._checks[first]
            if isinstance(check, Future):
                if not check.done():
                    await asyncio.wrap_future(check)
                check = check.result()
            crcs += check
        header = self._decoded()
        if header is None:
            return Torn.HEADER
        return header if header.chunk_crcs == tuple(crcs) else Torn.PAYLOAD

    def read_header_again(self) -> None:
        """A new ``call``, for the header pages alone: their owner writes them anew when the record goes to disk."""
        pieces = [(0, self._header_bytes)]
        self.call = self._group.submit(read(self._listing, self._memory, pieces, lambda first, end: None))

    def _decoded(self) -> RecordHeader | None:
        listing = self._listing
        where = f"arena of rank {listing.rank} at {listing.offset}"
        try:
            header = decode_record_anywhere(self._memory[: self._header_bytes], path=where)
        except (CorruptionError, ConfigError):
            return None
        if header is None or header.kind != BLOCK or header.digest[: len(listing.block_id)] != listing.block_id:
            return None
        told = (header.header_pages, header.record_bytes, header.chunk_bytes, header.digest_kind)
        expected = (listing.header_pages, listing.record_bytes, CHUNK_BYTES, self._digest)
        return header if told == expected else None

    def give_up(self) -> None:
        """Nobody wants it any more."""
        self._given_up = True
        self.call.abandon()

    def when_settled(self, then: Callable[[], None]) -> None:
        """Call ``then`` once nobody writes to the memory any more: at once, later, or never if a rank never answers.

        A check that is still under way only reads, and nobody hears its answer.
        """
        if self.call.settled.done():
            then()
        else:
            self.call.settled.add_done_callback(lambda _: then())
