"""A root of a million blocks without a terabyte: sealed segments whose payloads are holes.

Headers, footers and trailers are written with the segment format's own code, one footer row and one
prefix key per block, as a real writer would have left them; only the payloads were never written.
Such a root opens like any other, and reading a block of it reports damage, as it should. Everything
about the index can be measured on it, nothing about bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

import cascade_aio as ca
from bench.results import BenchError
from cascade_aio.segments import format as fmt
from cascade_aio.segments.footer import FooterTables

PAGE_BYTES = 4096
BLOCK_BYTES = 1 << 20
SEGMENT_BYTES = 1 << 30
"""Blocks of 1 MiB in segments of 1 GiB: about a thousand segments for a million blocks."""
CHAIN_BLOCKS = 64
"""Prefix keys come in chains of this length, as prompts do."""


async def make_root(root: pathlib.Path, blocks: int, *, named: bool, **settings: object) -> None:
    """Make ``root`` a store that knows ``blocks`` blocks, each with a prefix key if ``named``.

    The store itself makes root and writer directory; the segments are then put into that directory.
    """
    async with ca.open_store(root, **settings):
        pass
    store = bytes.fromhex(json.loads((root / "cascade.json").read_bytes())["store"])
    folders = sorted(path for path in (root / "writers").iterdir() if path.is_dir())
    if len(folders) != 1:
        raise BenchError(f"a new root has {len(folders)} writer directories: the synthetic root does not fit the store")
    writer = bytes.fromhex(folders[0].name)
    header_pages = fmt.header_pages_for(BLOCK_BYTES, 0, int(named))
    record_bytes = header_pages * PAGE_BYTES + BLOCK_BYTES
    per_segment = (SEGMENT_BYTES - PAGE_BYTES) // record_bytes
    for number, first in enumerate(range(0, blocks, per_segment), start=1):
        identity = fmt.SegmentIdentity(writer, number)
        path = folders[0] / f"{number:010d}.seg"
        headers = [
            _record(index, PAGE_BYTES + place * record_bytes, record_bytes, header_pages, named=named)
            for place, index in enumerate(range(first, min(first + per_segment, blocks)))
        ]
        _write_segment(path, store, identity, headers)


def _record(index: int, offset: int, record_bytes: int, header_pages: int, *, named: bool) -> fmt.RecordHeader:
    stamp = index + 1
    bindings: tuple[fmt.Binding, ...] = ()
    if named:
        parent = _name(index - 1) if index % CHAIN_BLOCKS else None
        bindings = (fmt.Binding(_name(index), parent, stamp),)
    return fmt.RecordHeader(
        kind=fmt.BLOCK,
        header_pages=header_pages,
        record_bytes=record_bytes,
        offset=offset,
        stamp=stamp,
        synced_bytes=offset,
        digest_kind="sha256",
        digest=hashlib.sha256(b"synthetic block %d" % index).digest(),
        key_bytes=BLOCK_BYTES // 2,
        value_bytes=BLOCK_BYTES // 2,
        value_offset=fmt.value_offset_of(BLOCK_BYTES // 2),
        bindings=bindings,
    )


def _name(index: int) -> bytes:
    return hashlib.sha256(b"synthetic prefix %d" % index).digest()


def _write_segment(
    path: pathlib.Path, store: bytes, identity: fmt.SegmentIdentity, headers: list[fmt.RecordHeader]
) -> None:
    tables = FooterTables()
    for header in headers:
        tables.add(header)
    page = memoryview(bytearray(PAGE_BYTES))
    created = headers[0].stamp
    fmt.encode_segment_header(page, fmt.SegmentHeader(store, identity, "sha256", SEGMENT_BYTES, created))
    with path.open("xb") as file:
        file.write(page)
        file.seek(headers[-1].end)
        file.write(tables.encode(identity, headers[-1].end))
        file.flush()
        os.fsync(file.fileno())
