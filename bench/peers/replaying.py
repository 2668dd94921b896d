"""Requests replayed as an inference server makes them: look up the prefix, get it, put the rest.

A block is a number; its bytes are a base block with the number stamped into its head, so that any block can be made and
checked without keeping it. The clock runs around ``contains``, ``get`` and ``put`` alone. A miss ends a prefix and is
an outcome, wrong bytes are a ``PeerError``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.peers import driving
from bench.peers.content import same_bytes
from bench.peers.protocol import Job, PeerError

if TYPE_CHECKING:
    from bench.peers.session import Measure, Session

_HEAD = struct.Struct("<8sQ")
_MARK = b"replayed"
REPLAY_ROUND = -7
"""Round number of the names of replayed blocks."""


class Replay:
    """The first half of the source is what blocks are made from, the second half where a request's blocks are made."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._source = session.source
        self.longest = session.source.count // 2
        self._source.stamp(0)

    def name(self, block: int) -> str:
        return self._source.name(REPLAY_ROUND, block)

    def make(self, slot: int, block: int) -> memoryview:
        """The bytes of ``block``, made in ``slot`` of the second half."""
        view = self._source.block(self.longest + slot)
        view[:] = self._source.block(block % self.longest)
        _HEAD.pack_into(view, 0, _MARK, block)
        return view

    def check(self, slot: int, block: int, found: memoryview | bytes) -> None:
        if not same_bytes(self.make(slot, block), [found]):
            raise PeerError(f"{self._session.peer.system} gave other bytes for block {block} of the trace")

    async def prefix(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` are there, from the first on."""
        for length, block in enumerate(blocks):
            if not await driving.call(self._session.peer, "contains", self.name(block)):
                return length
        return len(blocks)


async def replay(session: Session, measure: Measure, requests: Sequence[Sequence[int]], in_flight: int) -> None:
    """Do ``requests`` one after the other. ``measure.seconds`` is the time in calls; ``extra`` tells hits and stalls.

    Longest request: half of the blocks that the session has memory for.
    """
    one = Replay(session)
    asked = hit = 0
    lookup_s = get_s = put_s = 0.0
    for blocks in requests:
        assert len(blocks) <= one.longest, "a request is longer than the memory for it"
        with session.counted(measure):
            began = driving.clock()
            length = await one.prefix(blocks)
            lookup_s += driving.clock() - began
        rooms = [Job(one.name(block), session.room(slot)) for slot, block in enumerate(blocks[:length])]
        if rooms:
            session.spoil(length)
            with session.counted(measure):
                ran = await driving.get_all(session.peer, rooms, min(in_flight, len(rooms)))
            get_s += ran.ended_s - ran.began_s
            session.add(measure, ran, length)
            for slot, (block, found) in enumerate(zip(blocks, ran.results, strict=False)):
                one.check(slot, block, found)
            measure.verified_bytes += length * session.source.block_bytes
            del ran
        rest = [Job(one.name(block), one.make(slot, block)) for slot, block in enumerate(blocks[length:])]
        if rest:
            with session.counted(measure):
                ran = await driving.put_all(session.peer, rest, min(in_flight, len(rest)))
            put_s += ran.ended_s - ran.began_s
            session.add(measure, ran, len(rest))
        asked += len(blocks)
        hit += length
    measure.seconds += lookup_s
    measure.misses = asked - hit
    measure.extra = {
        "requests": len(requests),
        "hit_rate_blocks": hit / asked if asked else 0.0,
        "hit_bytes": hit * session.source.block_bytes,
        "lookup_s": lookup_s,
        "get_s": get_s,
        "put_s": put_s,
    }
