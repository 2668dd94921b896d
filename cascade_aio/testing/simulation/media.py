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
    count: int = 0
    """How often the medium was damaged, whatever it hit."""
    _unnamed: dict[str, list[tuple[str, set[int]]]] = dataclasses.field(default_factory=dict)
    """By path: damaged pages in which no record was known. A record is written in pieces, its header perhaps last."""

    def of_block(self, block: int) -> list[Injury]:
        return [injury for injury in self.found if block in injury.blocks]

    def reaches(self, offset: int | None, injury: Injury) -> bool:
        """Whether a report of damage in its file, from ``offset`` on, speaks of it: in it, or in damaged records before
        it without a sound one between, which is one gap to who reads."""
        start = injury.start
        while offset is not None and offset < start:
            before = [other.start for other in self.found if other.path == injury.path and other.end == start]
            if not before:
                return False
            start = min(before)
        return offset is None or offset < injury.end

    def add(self, disk: MemoryDisk, what: str, path: str, offset: int, nbytes: int) -> list[Injury]:
        """These bytes were damaged just now; the records that they hit."""
        self.count += 1
        self.paths.add(path)
        if path not in disk.files:
            return []
        nbytes = min(nbytes, disk.files[path].size - offset)
        self._unnamed.setdefault(path, []).append((what, _pages(offset, nbytes)))
        return self._name(disk, path)

    def written(self, disk: MemoryDisk, path: str, offset: int, nbytes: int) -> list[Injury]:
        """These bytes were written just now, which heals them; the records that earlier damage has hit, as it turns
        out."""
        if path not in self._unnamed:
            return []
        for _, pages in self._unnamed[path]:
            pages -= _pages(offset, nbytes)
        return self._name(disk, path)

    def _name(self, disk: MemoryDisk, path: str) -> list[Injury]:
        """The records in damaged pages that are not known yet."""
        new = []
        records, sealed = _records(disk, path)
        for what, pages in self._unnamed[path]:
            hit = [header for header in records if not pages.isdisjoint(_pages(header.offset, header.record_bytes))]
            # A header that is damaged itself testifies to nothing.
            synced = max((header.synced_bytes for header in records if header not in hit), default=0)
            for header in hit:
                new.append(_injury(what, path, header, promised=sealed or header.end <= synced))
                pages -= _pages(header.offset, header.record_bytes)
        self._unnamed[path] = [(what, pages) for what, pages in self._unnamed[path] if pages]
        if not self._unnamed[path]:
            del self._unnamed[path]
        self.found += new
        return new


def _pages(offset: int, nbytes: int) -> set[int]:
    return set(range(offset // PAGE_BYTES, -(-(offset + nbytes) // PAGE_BYTES)))


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
