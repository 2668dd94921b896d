"""What a later version wrote is refused by name, in every kind of file: never ignored, never taken for damage."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import crc32c
import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.config import make_config
from cascade_aio.segments import format as fmt
from cascade_aio.store.repairing import repair_root
from tests.data.golden import GOLDEN, GoldenRoot, SegmentParts, take_apart, unpack
from tests.data.test_golden import expect_everything, open_golden

LATER = fmt.FORMAT_VERSION + 1
FLAG = 1

Edit = Callable[[bytearray, SegmentParts], None]


@pytest.fixture
def golden(tmp_path: Path) -> GoldenRoot:
    return unpack(GOLDEN[-1], tmp_path)


def version_at(place: Callable[[SegmentParts], tuple[int, int]], offset: int, layout: str, value: int) -> Edit:
    """Put a number into the pages that ``place`` names (offset, bytes), and make their checksum right again."""

    def edit(content: bytearray, parts: SegmentParts) -> None:
        start, nbytes = place(parts)
        struct.pack_into(layout, content, start + offset, value)
        fmt.seal_page(memoryview(content)[start : start + nbytes])

    return edit


def header_of(parts: SegmentParts) -> tuple[int, int]:
    return 0, PAGE_BYTES


def last_record_of(parts: SegmentParts) -> tuple[int, int]:
    return parts.records[-1].offset, parts.records[-1].header_pages * PAGE_BYTES


def trailer_of(parts: SegmentParts) -> tuple[int, int]:
    return len(parts.content) - PAGE_BYTES, PAGE_BYTES


EDITS = {
    "segment header, version": ("sealed", version_at(header_of, 8, "<H", LATER), "segment header"),
    "segment header, flags": ("sealed", version_at(header_of, 10, "<H", FLAG), "segment header"),
    "record, version": ("open", version_at(last_record_of, 8, "<H", LATER), "record at offset"),
    "record, flags": ("open", version_at(last_record_of, 11, "<B", FLAG), "record at offset"),
    "record, reserved": ("open", version_at(last_record_of, 148, "<I", FLAG), "record at offset"),
    "trailer, version": ("sealed", version_at(trailer_of, 8, "<H", LATER), "trailer"),
    "trailer, flags": ("sealed", version_at(trailer_of, 10, "<H", FLAG), "trailer"),
}


@pytest.mark.parametrize("what", EDITS)
async def test_in_a_segment(golden: GoldenRoot, what: str) -> None:
    """The record is the last one of an open segment: taken for a torn write it would be cut off."""
    state, edit, where = EDITS[what]
    for checkpoint in golden.root.glob("writers/*/checkpoint"):
        checkpoint.unlink()
    path, content, parts = next(
        (path, content, parts)
        for path in golden.segments()
        for content in [bytearray(path.read_bytes())]
        for parts in [take_apart(memoryview(bytes(content)), str(path))]
        if (parts.trailer is None) is (state == "open")
    )
    edit(content, parts)
    path.write_bytes(content)
    with pytest.raises(ca.ConfigError) as caught:
        await open_golden(golden)
    message = str(caught.value)
    assert str(path) in message
    assert where in message
    version, flags = (LATER, 0) if what.endswith("version") else (fmt.FORMAT_VERSION, FLAG)
    assert f"format {version} (flags {flags:#x}" in message
    assert path.read_bytes() == content, "and left as it is"


async def test_in_the_root_file(golden: GoldenRoot) -> None:
    change_json(golden.root / "cascade.json", version=LATER)
    with pytest.raises(ca.ConfigError, match=f"format {LATER}, this version reads {fmt.FORMAT_VERSION}") as caught:
        await open_golden(golden)
    assert str(golden.root) in str(caught.value)


async def test_in_a_writer_directory(golden: GoldenRoot) -> None:
    """Its segments say themselves whether they can be read; but nobody of this version takes the directory over."""
    for path in golden.root.glob("writers/*/writer.json"):
        change_json(path, version=LATER)
    before = {path: path.read_bytes() for path in golden.root.glob("writers/*/*")}
    async with open_golden(golden) as store:
        await expect_everything(store, golden.expected)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("offset", "layout", "value"), [(8, "<H", LATER), (10, "<H", FLAG)], ids=["version", "flags"])
async def test_in_a_checkpoint(
    golden: GoldenRoot, offset: int, layout: str, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is never needed: the reason is told, the segments are read."""
    for path in golden.root.glob("writers/*/checkpoint"):
        content = bytearray(path.read_bytes())
        struct.pack_into(layout, content, offset, value)
        struct.pack_into("<I", content, 28, crc32c.crc32c(bytes(content[:28])))
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        async with open_golden(golden) as store:
            await expect_everything(store, golden.expected)
            assert store.statistics()["disk"]["recovery"]["covered"] == 0
    version, flags = (value, 0) if offset == 8 else (1, value)
    assert any(f"format {version} (flags {flags:#x})" in record.getMessage() for record in caplog.records)


async def test_bytes_of_another_place_are_no_refusal(golden: GoldenRoot) -> None:
    """A sound record of a later version, copied to where it does not belong, is what it always was: damage."""
    path = next(path for path in golden.segments() if take_apart(memoryview(path.read_bytes()), "").trailer is None)
    content = bytearray(path.read_bytes())
    parts = take_apart(memoryview(bytes(content)), str(path))
    start, nbytes = last_record_of(parts)
    moved = content[start : start + nbytes]
    struct.pack_into("<H", moved, 8, LATER)
    fmt.seal_page(memoryview(moved))
    with pytest.raises(ca.CorruptionError):
        fmt.decode_record(memoryview(moved), parts.header.identity, path=str(path), offset=start + PAGE_BYTES)


async def test_every_small_file_of_this_version_says_so(golden: GoldenRoot) -> None:
    """Also what repair sets aside, which people read and programs do not."""
    path = next(path for path in golden.segments() if take_apart(memoryview(path.read_bytes()), "").trailer is not None)
    content = bytearray(path.read_bytes())
    content[PAGE_BYTES + 100] ^= 1  # the first record's header
    path.write_bytes(content)
    await repair_root(make_config(str(golden.root), io_backend="threads", shm_bytes="4MiB"))
    small = [
        *golden.root.glob("quarantine/*.json"),
        *golden.root.glob("writers/*/writer.json"),
        golden.root / "cascade.json",
    ]
    assert len(small) >= 3
    assert [json.loads(path.read_text())["version"] for path in small] == [fmt.FORMAT_VERSION] * len(small)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
