"""What damage of the medium hits: which records, blocks and deletions lie where, from the bytes as they ought to be.

The one place of the simulation that knows the format; it reads it with the store's own parser, from bytes that
nothing has damaged.
"""

from __future__ import annotations

import dataclasses
import posixpath

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import CorruptionError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.footer import TRAILER_MAGIC
from cascade_aio.testing.memory import MemoryDisk
from cascade_aio.testing.simulation.contents import number_of


@dataclasses.dataclass(frozen=True, slots=True)
class Injury:
    """A record that the medium has damaged: its place, the blocks it concerns and the deletions it told.

    ``promised``: some later header says that it was on stable storage, or its segment is sealed; so its damage can
    be told from a write that a crash cut short.
    """

    what: str
    path: str
    start: int
    end: int
    blocks: frozenset[int]
    deletions: frozenset[int]
    promised: bool


@dataclasses.dataclass(slots=True)
class Injuries:
    """All damage of a run."""

    found: list[Injury] = dataclasses.field(default_factory=list)
    paths: set[str] = dataclasses.field(default_factory=set)
    """Files that were damaged anywhere, also between records."""

    def of_block(self, block: int) -> list[Injury]:
        return [injury for injury in self.found if block in injury.blocks]

    def add(self, disk: MemoryDisk, what: str, path: str, offset: int, nbytes: int) -> list[Injury]:
        """These bytes were damaged just now; the records that they hit."""
        self.paths.add(path)
        new = []
        records, sealed = _records(disk, path)
        # A header that is damaged itself testifies to nothing.
        sound = [header for header in records if header.end <= offset or header.offset >= offset + nbytes]
        synced = max((header.synced_bytes for header in sound), default=0)
        for header in records:
            if header.offset < offset + nbytes and offset < header.end:
                new.append(_injury(what, path, header, promised=sealed or header.end <= synced))
        self.found += new
        return new


def _injury(what: str, path: str, header: fmt.RecordHeader, *, promised: bool) -> Injury:
    numbers = number_of()
    ids = [header.digest[:16]] if header.kind == fmt.BLOCK else []
    ids += [binding.block_id for binding in header.note_bindings]
    deleted = [tombstone.block_id for tombstone in header.tombstones]
    return Injury(
        what,
        path,
        header.offset,
        header.end,
        frozenset(numbers[block_id] for block_id in ids),
        frozenset(numbers[block_id] for block_id in deleted),
        promised,
    )


def _records(disk: MemoryDisk, path: str) -> tuple[list[fmt.RecordHeader], bool]:
    """Headers of a segment, and whether it is sealed; nothing of any other file."""
    name = posixpath.basename(path)
    if not name.endswith(".seg") or path not in disk.files:
        return [], False
    writer = bytes.fromhex(posixpath.basename(posixpath.dirname(path)))
    identity = fmt.SegmentIdentity(writer, int(name.removesuffix(".seg")))
    view = memoryview(disk.files[path].intact())
    found = []
    position = PAGE_BYTES
    while position + PAGE_BYTES <= len(view):
        try:
            header = fmt.decode_record(
                view[position : position + fmt.HEADER_PAGES_MAX * PAGE_BYTES], identity, path=path, offset=position
            )
        except CorruptionError:
            header = None
        if header is None:
            position += PAGE_BYTES
            continue
        found.append(header)
        position = header.end
    return found, bytes(view[-PAGE_BYTES : -PAGE_BYTES + 8]) == TRAILER_MAGIC if len(view) else False
