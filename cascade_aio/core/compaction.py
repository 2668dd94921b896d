"""Which segments to compact: victims by cost and benefit. It decides, the caller copies.

The rule is the cost-benefit policy of log-structured file systems (Rosenblum and Ousterhout, "The
Design and Implementation of a Log-Structured File System", 1992, section 3.6): what comes back, times
how long the rest has been stable, divided by what it costs. Old segments with little dead in them go
before young ones with more, because the young ones will be emptier soon for nothing. There a segment
is read whole; here only its live records are, so the cost is theirs, and a constant for the files.

Pure: knows segments by number and size; no file, clock or block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

DEAD_SHARE_MAX = 0.3
"""Above this share of dead bytes in all segments together, space is worth the copying."""

DEAD_SHARE_MIN = 0.05
"""A segment with less than this dead is left alone: twenty bytes copied for each that comes back."""

FULL_DEAD_SHARE_MIN = 0.01
"""A compaction of everything rewrites for this share of dead bytes: headers of notes are always dead."""

CHEAP_LIVE_SHARE = 0.25
"""A segment with at most this share alive is a bargain whatever the others look like."""

SMALL_PART = 16
"""A segment smaller than this part of a full one costs more as a file than it holds."""

SMALL_GROUP = 8
"""So many small segments are worth merging into one."""

FIXED_COST_BYTES = 1 << 20
"""What a file costs to create, seal, sync and unlink, expressed in bytes copied."""


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentUse:
    """One segment that may be removed. ``live_bytes`` would have to be copied, the rest comes back.

    ``age`` is how long ago the newest of its live records was stored, in any unit, the same for all.
    """

    number: int
    size_bytes: int
    live_bytes: int
    age: float

    @property
    def dead_bytes(self) -> int:
        return max(0, self.size_bytes - self.live_bytes)

    @property
    def dead_share(self) -> float:
        return self.dead_bytes / self.size_bytes if self.size_bytes else 1.0

    @property
    def benefit(self) -> float:
        """Bytes that come back per byte copied, weighted with the age."""
        return self.dead_bytes * (1.0 + self.age) / (self.live_bytes + FIXED_COST_BYTES)


def dead_share(uses: Iterable[SegmentUse]) -> float:
    """Share of all bytes that is dead; 0 for no segment."""
    size = dead = 0
    for use in uses:
        size += use.size_bytes
        dead += use.dead_bytes
    return dead / size if size else 0.0


def is_due(uses: Sequence[SegmentUse], segment_bytes: int) -> bool:
    """Whether compaction is worth its bandwidth although nobody waits for space."""
    return (
        any(not use.live_bytes for use in uses)
        or dead_share(uses) > DEAD_SHARE_MAX
        or len(_small(uses, segment_bytes)) >= SMALL_GROUP
    )


def choose_victims(
    uses: Sequence[SegmentUse], *, output_bytes_max: int, need_bytes: int, segment_bytes: int
) -> list[int]:
    """Segments to compact together into one of at most ``output_bytes_max``, most beneficial first.

    As many as bring ``need_bytes`` back, or fewer if their live records fill the output before that; a
    group of small segments comes along where there is room. Empty: nothing is worth it.
    """
    chosen: list[int] = []
    live = freed = 0
    for use in sorted(uses, key=lambda use: (-use.benefit, use.number)):
        if freed >= need_bytes:
            break
        if use.dead_share < DEAD_SHARE_MIN or live + use.live_bytes > output_bytes_max:
            continue
        chosen.append(use.number)
        live += use.live_bytes
        freed += use.dead_bytes
    small = _small(uses, segment_bytes)
    if len(small) >= SMALL_GROUP:
        for use in sorted(small, key=lambda use: (use.live_bytes, use.number)):
            if use.number not in chosen and live + use.live_bytes <= output_bytes_max:
                chosen.append(use.number)
                live += use.live_bytes
    if not freed and len(chosen) < 2:
        return []  # one small segment made into another
    return chosen


def choose_group(uses: Sequence[SegmentUse], output_bytes_max: int) -> list[SegmentUse]:
    """For a compaction of everything: the next segments to go into one, oldest data first; the dead before all."""
    dead = [use for use in uses if not use.live_bytes]
    if dead:
        return dead
    group: list[SegmentUse] = []
    live = 0
    for use in sorted(uses, key=lambda use: (-use.age, use.number)):
        if group and live + use.live_bytes > output_bytes_max:
            break
        group.append(use)
        live += use.live_bytes
    return group


def is_worth_rewriting(group: Sequence[SegmentUse], output_bytes_max: int) -> bool:
    """Whether somebody who asks for all of the space gets anything for copying this group."""
    live = sum(use.live_bytes for use in group)
    merges = len(group) > 1 and live <= output_bytes_max
    return merges or dead_share(group) >= FULL_DEAD_SHARE_MIN


def _small(uses: Iterable[SegmentUse], segment_bytes: int) -> list[SegmentUse]:
    return [use for use in uses if use.size_bytes * SMALL_PART <= segment_bytes]
