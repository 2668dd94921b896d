"""The codec: round trips, pinned bytes, and no byte string that confuses the decoder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import BlockTooLargeError, ConfigError, CorruptionError
from cascade_aio.segments import format as fmt

IDENTITY = fmt.SegmentIdentity(bytes(range(16)), 7)
U64 = st.integers(0, 2**64 - 1)
KEYS = st.binary(min_size=32, max_size=32)
IDS = st.binary(min_size=16, max_size=16)
PARENTS = st.none() | KEYS.filter(any)
BINDINGS = st.lists(st.builds(fmt.Binding, KEYS, PARENTS, U64), max_size=70).map(tuple)
NOTE_BINDINGS = st.lists(st.builds(fmt.NoteBinding, IDS, KEYS, PARENTS, U64), max_size=60).map(tuple)
TOMBSTONES = st.lists(st.builds(fmt.Tombstone, IDS, U64), max_size=60).map(tuple)


@st.composite
def block_headers(draw: st.DrawFn) -> fmt.RecordHeader:
    key_bytes = draw(st.integers(0, 1 << 31))
    value_bytes = draw(st.integers(0, 1 << 31))
    meta = draw(st.binary(max_size=1024))
    bindings = draw(BINDINGS)
    payload = fmt.payload_bytes_of(key_bytes, value_bytes)
    if payload > fmt.PAYLOAD_BYTES_MAX:
        value_bytes, payload = 0, fmt.payload_bytes_of(key_bytes, 0)
    seed = draw(st.integers(0, 2**32 - 1))
    crcs = tuple((seed + i) % 2**32 for i in range(-(-payload // fmt.CHUNK_BYTES)))
    pages = fmt.header_pages_for(payload, len(meta), len(bindings))
    return fmt.RecordHeader(
        fmt.BLOCK, pages, pages * PAGE_BYTES + payload, draw(U64), draw(U64), draw(U64),
        draw(st.sampled_from(["sha256", "blake3"])), draw(KEYS), key_bytes, value_bytes,
        fmt.value_offset_of(key_bytes), crcs, bindings=bindings, meta=meta,
    )  # fmt: skip


def encoded(header: fmt.RecordHeader) -> memoryview:
    pages = memoryview(bytearray(b"\xff" * (header.header_pages * PAGE_BYTES)))
    fmt.encode_record(pages, header, IDENTITY)
    return pages


def decoded(pages: memoryview, offset: int) -> fmt.RecordHeader | None:
    return fmt.decode_record(pages, IDENTITY, path="x.seg", offset=offset)


def small_block(**changes: object) -> fmt.RecordHeader:
    fields: dict[str, object] = {
        "kind": fmt.BLOCK, "header_pages": 1, "record_bytes": 2 * PAGE_BYTES, "offset": 4096, "stamp": 5,
        "synced_bytes": 4096, "digest_kind": "sha256", "digest": bytes(range(32)), "key_bytes": 100,
        "value_bytes": 50, "value_offset": 128, "chunk_crcs": (0xDEADBEEF,),
        "bindings": (fmt.Binding(b"k" * 32, b"p" * 32, 9),), "meta": b"meta",
    }  # fmt: skip
    return fmt.RecordHeader(**{**fields, **changes})  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(block_headers())
def test_block_header_round_trip(header: fmt.RecordHeader) -> None:
    assert decoded(encoded(header), header.offset) == header


@settings(max_examples=60, deadline=None)
@given(NOTE_BINDINGS, TOMBSTONES, U64, U64)
def test_note_round_trip(
    bindings: tuple[fmt.NoteBinding, ...], tombstones: tuple[fmt.Tombstone, ...], offset: int, stamp: int
) -> None:
    pages = fmt.note_pages_for(len(bindings), len(tombstones))
    header = fmt.RecordHeader(
        fmt.NOTE, pages, pages * PAGE_BYTES, offset, stamp, 0, note_bindings=bindings, tombstones=tombstones
    )
    assert decoded(encoded(header), offset) == header


def test_every_flipped_bit_of_a_header_is_detected() -> None:
    pages = encoded(small_block())
    for bit in range(8 * PAGE_BYTES):
        pages[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptionError) as damage:
            decoded(pages, 4096)
        assert damage.value.offset == 4096
        assert damage.value.path == "x.seg"
        pages[bit // 8] ^= 1 << (bit % 8)
    assert decoded(pages, 4096) == small_block()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_arbitrary_bytes_never_confuse_the_decoder(data: st.DataObject) -> None:
    """Any fields whatsoever, with a valid checksum: a header, nothing, or CorruptionError."""
    count = data.draw(st.integers(1, 3))
    pages = memoryview(bytearray(data.draw(st.binary(max_size=160)).ljust(count * PAGE_BYTES, b"\0")))
    pages[:8] = fmt.RECORD_MAGIC
    for start, width in [(8, 2), (10, 1), (11, 1), (12, 2), (14, 2), (148, 4)]:
        if data.draw(st.booleans()):
            pages[start : start + width] = {8: b"\1\0", 10: b"\1", 11: b"\0", 12: b"\1\0", 14: b"\1\0", 148: bytes(4)}[
                start
            ]
    length = int.from_bytes(pages[12:14], "little")
    if 1 <= length <= count:
        fmt.seal_page(pages[: length * PAGE_BYTES])
    try:
        header = decoded(pages, 4096)
    except CorruptionError:
        return
    assert header is not None


@given(st.binary(max_size=9000))
def test_random_bytes_are_no_record(raw: bytes) -> None:
    view = memoryview(raw)
    try:
        assert decoded(view, 0) is None
    except CorruptionError:
        pass
    else:
        assert not any(raw[:PAGE_BYTES])


def test_a_record_of_another_segment_or_offset_is_refused() -> None:
    pages = encoded(small_block())
    with pytest.raises(CorruptionError, match="another place"):
        decoded(pages, 8192)
    with pytest.raises(CorruptionError, match="another place"):
        fmt.decode_record(pages, fmt.SegmentIdentity(IDENTITY.writer, 8), path="x", offset=4096)


def test_golden_bytes_of_a_record_header() -> None:
    """The format may not change unnoticed: these are the bytes of version 1."""
    pages = encoded(small_block())
    assert pages[:152].hex() == (
        "6373636452454344" "0100" "01" "00" "0100" "0100" "0020000000000000" "0010000000000000"
        "000102030405060708090a0b0c0d0e0f" "0700000000000000" "0500000000000000" "0010000000000000"
        "00001000" "01000000" "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
        "6400000000000000" "3200000000000000" "8000000000000000" "04000000" "01000000" "00000000" "00000000"
    )  # fmt: skip
    assert bytes(pages[152:156]) == bytes.fromhex("efbeadde")
    assert bytes(pages[156:228]) == b"k" * 32 + b"p" * 32 + (9).to_bytes(8, "little")
    assert bytes(pages[228:232]) == b"meta"
    assert hashlib.sha256(pages).hexdigest() == "15287390684a366d585d47e914d601b5b19e96c529f512b4af1e6745c9a1f70d"


def test_golden_bytes_of_a_segment_header() -> None:
    page = memoryview(bytearray(PAGE_BYTES))
    header = fmt.SegmentHeader(b"S" * 16, IDENTITY, "sha256", 1 << 30, 42)
    fmt.encode_segment_header(page, header)
    assert page[:80].hex() == (
        "637363645345474d" "0100" "0000" "00100000" + "53" * 16 + "000102030405060708090a0b0c0d0e0f"
        "0700000000000000" "7368613235360000" "0000004000000000" "2a00000000000000"
    )  # fmt: skip
    assert hashlib.sha256(page).hexdigest() == "d8e3ed50ad2de3caf4d0ed0132afda87bf0566a851f9a8552af66ad079844303"
    assert fmt.decode_segment_header(page, path="x") == header


def test_segment_header_of_another_version_is_refused_and_a_damaged_one_reported() -> None:
    page = memoryview(bytearray(PAGE_BYTES))
    assert fmt.decode_segment_header(page, path="x") is None
    fmt.encode_segment_header(page, fmt.SegmentHeader(b"S" * 16, IDENTITY, "sha256", 1 << 30, 42))
    page[8] = 2
    with pytest.raises(CorruptionError):
        fmt.decode_segment_header(page, path="x")
    fmt.seal_page(page)
    with pytest.raises(ConfigError, match="written by format 2"):
        fmt.decode_segment_header(page, path="x")
    page[8], page[10] = 1, 4
    fmt.seal_page(page)
    with pytest.raises(ConfigError, match="flags 0x4"):
        fmt.decode_segment_header(page, path="x")


def test_limits() -> None:
    assert fmt.header_pages_for(0, 0, 0) == 1
    assert fmt.header_pages_for(320 << 20, 1024, 20) == 1
    assert fmt.header_pages_for(fmt.PAYLOAD_BYTES_MAX, 1024, 0) == 5
    for too_much in [(fmt.PAYLOAD_BYTES_MAX + 4096, 0, 0), (0, 1025, 0), (0, 0, 1000)]:
        with pytest.raises(BlockTooLargeError):
            fmt.header_pages_for(*too_much)
    assert fmt.note_pages_for(fmt.NOTE_ENTRIES_MAX, 0) == fmt.HEADER_PAGES_MAX


def test_composing_a_header_is_quick_enough_for_the_loop() -> None:
    """Compared with hashing 256 KiB on this machine, so that it holds on any: about 15 µs against 150 µs."""
    header, pages = small_block(), memoryview(bytearray(PAGE_BYTES))
    data = bytes(1 << 18)

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(lambda: fmt.encode_record(pages, header, IDENTITY)) < best(lambda: hashlib.sha256(data).digest())
