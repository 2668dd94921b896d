"""Roots of every format version that ever was: this version reads them, byte by byte and as a store."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.io.platform import open_platform
from cascade_aio.segments import format as fmt
from cascade_aio.segments.checkpoint import Checkpoint, read_checkpoint
from cascade_aio.segments.footer import FooterTables
from tests.data import make_golden
from tests.data.golden import GOLDEN, GoldenRoot, take_apart, unpack

KINDS = {"open", "sealed", "block", "bound block", "note", "tombstone", "meta", "empty part", "two checksums"}
GOLDEN_BYTES_MAX = 300_000


@pytest.fixture(params=GOLDEN)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> GoldenRoot:
    return unpack(str(request.param), tmp_path)


def open_golden(golden: GoldenRoot) -> Any:
    return ca.open_store(
        golden.root,
        digest=golden.expected["digest"],
        shm_bytes="4MiB",
        segment_bytes="2MiB",
        arena=f"cascade-golden-{uuid.uuid4().hex[:12]}",
        io_backend="threads",
        workers=1,
    )


async def expect_everything(store: ca.Store, expected: dict[str, Any]) -> None:
    for block_id, parts in expected["blocks"].items():
        async with store.get(ca.BlockId.from_hex(block_id)) as block:
            for part, found in (("key", block.key), ("value", block.value)):
                assert len(found) == parts[part]["bytes"]
                assert hashlib.sha256(found).hexdigest() == parts[part]["sha256"]
            meta = block.meta
            told = meta and {"dtype": meta.dtype, "shape": list(meta.shape or ()), "extra": meta.extra.hex()}
            assert told == parts["meta"]
        for name in parts["names"]:
            async with store.get(ca.PrefixKey.from_hex(name)) as block:
                assert str(block.block_id) == block_id
    for block_id in expected["deleted"]:
        assert ca.BlockId.from_hex(block_id) not in store


async def test_a_store_reads_everything_and_goes_on_from_there(golden: GoldenRoot) -> None:
    async with open_golden(golden) as store:
        await expect_everything(store, golden.expected)
        assert len(store) == len(golden.expected["blocks"])
        report = await store.verify()
        assert report.damage == ()
        assert store.statistics()["damage"] == []
        added = await store.put(b"new", b"block")
    async with open_golden(golden) as store:
        await expect_everything(store, golden.expected)
        assert added in store
        assert (await store.verify()).damage == ()


async def test_without_checkpoints_the_segments_say_the_same(golden: GoldenRoot) -> None:
    for checkpoint in golden.root.glob("writers/*/checkpoint"):
        checkpoint.unlink()
    async with open_golden(golden) as store:
        await expect_everything(store, golden.expected)
        assert len(store) == len(golden.expected["blocks"])


def test_every_byte_of_a_segment_is_what_the_encoders_write(golden: GoldenRoot) -> None:
    if golden.expected["format"] != fmt.FORMAT_VERSION:
        pytest.skip(f"format {golden.expected['format']} is read, {fmt.FORMAT_VERSION} is written")
    kinds = set()
    for path in golden.segments():
        parts = take_apart(memoryview(path.read_bytes()), str(path))
        page = memoryview(bytearray(PAGE_BYTES))
        fmt.encode_segment_header(page, parts.header)
        assert page == parts.content[:PAGE_BYTES]
        tables = FooterTables()
        for record in parts.records:
            pages = memoryview(bytearray(record.header_pages * PAGE_BYTES))
            fmt.encode_record(pages, record, parts.header.identity)
            assert pages == parts.content[record.offset : record.offset + len(pages)]
            tables.add(record)
            kinds |= kinds_of(record)
        if parts.trailer is None:
            kinds.add("open")
            assert not any(parts.content[parts.records[-1].end :])
        else:
            kinds.add("sealed")
            footer = tables.encode(parts.header.identity, parts.trailer.data_end)
            assert footer == parts.content[parts.trailer.data_end :]
    assert kinds >= {
        "open",
        "sealed",
        "block",
        "bound block",
        "note",
        "tombstone",
        "meta",
        "empty part",
        "two checksums",
    }


def kinds_of(record: fmt.RecordHeader) -> set[str]:
    """What is special about a record."""
    found = {
        "block": record.kind == fmt.BLOCK,
        "bound block": bool(record.bindings),
        "note": bool(record.note_bindings),
        "tombstone": bool(record.tombstones),
        "meta": bool(record.meta),
        "empty part": record.kind == fmt.BLOCK and not (record.key_bytes and record.value_bytes),
        "two checksums": len(record.chunk_crcs) > 1,
    }
    return {kind for kind, there in found.items() if there}


async def test_small_files_are_what_they_were(golden: GoldenRoot) -> None:
    description = json.loads((golden.root / "cascade.json").read_text())
    assert description["version"] == golden.expected["format"]
    platform = open_platform(io_backend="threads", worker_threads=1)
    try:
        for path in golden.root.glob("writers/*/checkpoint"):
            store = bytes.fromhex(description["store"])
            found = await read_checkpoint(platform.storage, platform.engine, str(path), store=store)
            assert isinstance(found, Checkpoint)
            assert found.covers
    finally:
        await platform.storage.aclose()
        await platform.engine.aclose()
    for path in golden.root.glob("writers/*/writer.json"):
        assert json.loads(path.read_text())["version"] == golden.expected["format"]


@pytest.mark.parametrize("digest", make_golden.DIGESTS)
def test_this_version_has_its_golden_root(digest: str) -> None:
    """Whoever raises the format version generates a root of it, and keeps those that are there."""
    assert make_golden.name(digest) in GOLDEN, "run python -m tests.data.make_golden"
    assert sum(path.stat().st_size for path in Path(__file__).parent.glob("format-*")) < GOLDEN_BYTES_MAX
