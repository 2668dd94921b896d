"""Which reads become one: the planner of ranges. It decides, the caller performs.

Records of neighbouring blocks usually lie next to each other, because they were written together.
One request of 8 MiB costs less than eight of 1 MiB, and reading a small hole costs less than a second
request. Pure: knows segments by number, no file, no buffer.

Everything is in bytes and in whole pages of ``PAGE_BYTES``. Invariants: a run lies in one segment;
its requests are in offset order and do not overlap; each request is in exactly one run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from cascade_aio.abc.storage import PAGE_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class ReadRequest:
    """Bytes wanted: ``nbytes`` at ``offset`` of ``segment``. ``token`` is the caller's, never looked at."""

    segment: int
    offset: int
    nbytes: int
    token: object = None

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Requests served by one read or write. Between two requests there may be a gap.

    ``nbytes`` counts gaps too; ``gap_bytes[i]`` lie before ``requests[i]`` and are read into scratch
    (``gap_bytes[0]`` is 0).
    """

    segment: int
    offset: int
    nbytes: int
    requests: tuple[ReadRequest, ...]
    gap_bytes: tuple[int, ...]


def coalesce(
    requests: Sequence[ReadRequest], *, gap_bytes_max: int, run_bytes_max: int, run_requests_max: int
) -> list[Run]:
    """Plan ``requests`` as few runs.

    Two requests share a run if at most ``gap_bytes_max`` lie between them and the run stays within
    ``run_bytes_max`` bytes and ``run_requests_max`` requests; a request larger than ``run_bytes_max``
    is a run of its own (``split`` it). Runs are ordered by the first of their requests in the input:
    what was asked for first is read first. Overlapping requests, unaligned and empty ones are
    assertions. O(n log n).
    """
    assert gap_bytes_max >= 0, "gap_bytes_max is a size"
    assert run_bytes_max > 0, "a run has at least one byte"
    assert run_requests_max > 0, "a run has at least one request"
    order = sorted(range(len(requests)), key=lambda i: (requests[i].segment, requests[i].offset))
    ranked: list[tuple[int, Run]] = []
    members: list[ReadRequest] = []
    first_asked = 0
    for position in order:
        request = requests[position]
        _check(request)
        if members:
            last = members[-1]
            joined = request.segment == last.segment
            gap = request.offset - last.end
            assert not joined or gap >= 0, f"{request} overlaps {last}: ask for a record once"
            if (
                joined
                and gap <= gap_bytes_max
                and len(members) < run_requests_max
                and request.end - members[0].offset <= run_bytes_max
            ):
                members.append(request)
                first_asked = min(first_asked, position)
                continue
            ranked.append((first_asked, _make_run(members)))
        members, first_asked = [request], position
    if members:
        ranked.append((first_asked, _make_run(members)))
    ranked.sort(key=lambda entry: entry[0])
    return [run for _, run in ranked]


def split(nbytes: int, piece_bytes_max: int) -> list[tuple[int, int]]:
    """Cut ``nbytes`` into the fewest ``(offset, nbytes)`` pieces of at most ``piece_bytes_max``.

    Pieces are whole pages and differ by at most one page, so that none of them is a straggler; a
    last partial page stays with the last piece. ``piece_bytes_max`` is a multiple of ``PAGE_BYTES``.
    """
    assert nbytes >= 0, "sizes are not negative"
    assert piece_bytes_max > 0, "a piece has at least one page"
    assert piece_bytes_max % PAGE_BYTES == 0, "pieces are whole pages"
    pages = -(-nbytes // PAGE_BYTES)
    count = -(-nbytes // piece_bytes_max)
    cuts = [pages * i // count * PAGE_BYTES for i in range(count)] + [nbytes] if count else []
    return [(start, end - start) for start, end in itertools.pairwise(cuts)]


def _check(request: ReadRequest) -> None:
    assert request.nbytes > 0, f"{request} is empty"
    assert request.offset >= 0, f"{request} starts before the file"
    assert (request.offset | request.nbytes) % PAGE_BYTES == 0, f"{request} is not made of whole pages"


def _make_run(members: list[ReadRequest]) -> Run:
    first = members[0]
    gaps = [0] + [after.offset - before.end for before, after in itertools.pairwise(members)]
    return Run(first.segment, first.offset, members[-1].end - first.offset, tuple(members), tuple(gaps))
