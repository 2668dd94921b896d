"""Unpacking golden roots, and walking their files with the parsers."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments import format as fmt
from cascade_aio.segments.footer import Trailer, decode_trailer

HERE = Path(__file__).parent
GOLDEN = sorted(path.name.removesuffix(".json") for path in HERE.glob("format-*.json"))


@dataclasses.dataclass(frozen=True)
class GoldenRoot:
    """An unpacked root and what must be read from it."""

    root: Path
    expected: dict[str, Any]

    def segments(self) -> list[Path]:
        return sorted(self.root.glob("writers/*/*.seg"))


def unpack(name: str, place: Path) -> GoldenRoot:
    """A fresh copy of a golden root below ``place``."""
    root = place / "kv"
    with tarfile.open(HERE / f"{name}.tar.gz") as archive:
        archive.extractall(root, filter="data")
    return GoldenRoot(root, json.loads((HERE / f"{name}.json").read_text()))


@dataclasses.dataclass(frozen=True)
class SegmentParts:
    """A segment taken apart."""

    content: memoryview
    header: fmt.SegmentHeader
    records: list[fmt.RecordHeader]
    trailer: Trailer | None


def take_apart(content: memoryview, path: str) -> SegmentParts:
    """Header, records back to back, and the trailer if it is sealed."""
    header = fmt.decode_segment_header(content, path=path)
    assert header is not None
    trailer = decode_trailer(content[-PAGE_BYTES:], header.identity, len(content), path=path)
    end = len(content) if trailer is None else trailer.data_end
    records: list[fmt.RecordHeader] = []
    position = PAGE_BYTES
    while position < end:
        record = fmt.decode_record(content[position:end], header.identity, path=path, offset=position)
        if record is None:
            break
        records.append(record)
        position = record.end
    return SegmentParts(content, header, records, trailer)
