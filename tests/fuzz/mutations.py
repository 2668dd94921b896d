"""From valid bytes to nearly valid ones, driven by a string of bytes, so that any fuzzer can steer.

``mutated(seeds, data)`` reads decisions from ``data``: which seed, how many edits, which. The same decisions
give the same bytes. What it must not know: what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Sequence

EDITS_MAX = 12
INTERESTING = (0, 1, 2, 3, 16, 127, 128, 255, 4095, 4096, 4097, 65535, 1 << 20, 1 << 31, (1 << 32) - 1, (1 << 64) - 1)
"""Numbers at which parsers go wrong."""


class Decisions:
    """Numbers drawn from a string of bytes; zeros once it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def below(self, limit: int) -> int:
        """A number from 0 to ``limit - 1``; 0 where there is no choice."""
        nbytes = max(1, (max(limit, 2) - 1).bit_length() + 7 >> 3)
        return self.number(nbytes) % limit if limit > 1 else 0

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def take(self, nbytes: int) -> bytes:
        piece = self._data[self._position : self._position + nbytes]
        self._position += nbytes
        return piece + bytes(nbytes - len(piece))


def mutated(seeds: Sequence[bytes], decisions: Decisions) -> bytearray:
    """One of ``seeds``, edited."""
    content = bytearray(seeds[decisions.below(len(seeds))])
    for _ in range(decisions.below(EDITS_MAX)):
        _edit(content, seeds, decisions)
    return content


def _edit(content: bytearray, seeds: Sequence[bytes], decisions: Decisions) -> None:
    kind = decisions.below(8)
    if not content:
        content += decisions.take(1 + decisions.below(64))
        return
    at = _place(content, decisions)
    if kind == 0:
        content[at] ^= 1 << decisions.below(8)
    elif kind == 1:
        content[at] = decisions.below(256)
    elif kind in (2, 3):  # fields of headers and tables
        nbytes = (1, 2, 4, 8)[decisions.below(4)]
        value = INTERESTING[decisions.below(len(INTERESTING))] % (1 << 8 * nbytes)
        content[at : at + nbytes] = value.to_bytes(nbytes, "little")[: len(content) - at]
    elif kind == 4:
        del content[at:]
    elif kind == 5:
        content[at:at] = bytes(1 + decisions.below(4096))
    elif kind == 6:  # a piece of another seed, or of the same elsewhere
        other = seeds[decisions.below(len(seeds))]
        start, nbytes = decisions.below(len(other)), 1 + decisions.below(8192)
        content[at : at + nbytes] = other[start : start + nbytes]
    else:
        del content[at : at + 1 + decisions.below(512)]


def _place(content: bytearray, decisions: Decisions) -> int:
    """Near the beginning as often as anywhere: that is where the lengths are."""
    limit = min(len(content), 256) if decisions.below(2) else len(content)
    at = decisions.below(limit)
    return at if decisions.below(2) else at // 8 * 8


NUMBERS: tuple[object, ...] = (
    *INTERESTING,
    -1,
    -4096,
    1 << 70,
    0.5,
    None,
    True,
    "",
    "O",
    "V0",
    "<U4",
    "i4,i4",
    "(2,)i4",
    "{",
    ">u8",
    "|S0",
    [],
    {},
)
"""What stands where a number or a word is expected."""


def mutated_json(value: object, decisions: Decisions) -> object:
    """A JSON value with some of its leaves replaced, removed or repeated."""
    if isinstance(value, dict):
        kept = {key: mutated_json(part, decisions) for key, part in value.items() if decisions.below(64) != 2}
        return {**kept, "unknown": 1} if decisions.below(64) == 1 else kept
    if isinstance(value, list):
        kept_items = [mutated_json(part, decisions) for part in value if decisions.below(64) != 2]
        return kept_items + kept_items[:1] if decisions.below(64) == 1 else kept_items
    return value if decisions.below(24) != 1 else NUMBERS[decisions.below(len(NUMBERS))]
