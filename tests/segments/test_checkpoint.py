"""Checkpoints round-trip, are refused when damaged, and load a million blocks quickly."""

from __future__ import annotations

import errno
import random
import time

import numpy as np
import pytest

from cascade_aio.segments.checkpoint import Checkpoint, CheckpointFailure, Cover, read_checkpoint, write_checkpoint
from cascade_aio.segments.format import SegmentIdentity
from cascade_aio.testing.memory import MemoryEngine, MemoryStorage

STORE = b"S" * 16
COLUMNS = {
    "digest": np.frombuffer(bytes(range(256)) * 2, dtype="S32"),
    "stamp": np.arange(16, dtype=np.uint64),
    "pages": np.arange(6, dtype=">u4").reshape(2, 3),
    "empty": np.zeros(0, dtype=np.int32),
}
COVERS = [Cover(SegmentIdentity(b"w" * 16, n), n * 4096, n % 2 == 0, n, n) for n in range(5)]


async def written(storage: MemoryStorage) -> int:
    return await write_checkpoint(
        storage, MemoryEngine(), "/checkpoint", store=STORE, columns=COLUMNS, covers=COVERS, notes={"clock": 17}
    )


async def test_round_trip() -> None:
    storage = MemoryStorage()
    nbytes = await written(storage)
    assert nbytes == len(storage.disk.content("/checkpoint"))
    found = await read_checkpoint(storage.crash(), MemoryEngine(), "/checkpoint", store=STORE)
    assert isinstance(found, Checkpoint)
    assert found.covers == COVERS
    assert found.notes == {"clock": 17}
    assert found.columns.keys() == COLUMNS.keys()
    for name, column in COLUMNS.items():
        assert np.array_equal(found.columns[name], column)
        assert not found.columns[name].flags.writeable


async def test_absent_foreign_or_unreadable() -> None:
    storage = MemoryStorage()
    assert await read_checkpoint(storage, MemoryEngine(), "/checkpoint", store=STORE) is None
    await written(storage)
    other = await read_checkpoint(storage, MemoryEngine(), "/checkpoint", store=b"T" * 16)
    assert isinstance(other, CheckpointFailure)
    assert "another store" in other.reason
    storage.hooks.append(lambda op: OSError(errno.EIO, "injected") if op.name == "read_small" else None)
    broken = await read_checkpoint(storage, MemoryEngine(), "/checkpoint", store=STORE)
    assert broken == CheckpointFailure("/checkpoint", "cannot be read: injected")


async def test_every_damaged_byte_outside_padding_is_noticed_and_any_cut() -> None:
    storage = MemoryStorage()
    await written(storage)
    good = storage.disk.content("/checkpoint")
    rng = random.Random(5)
    pristine = await read_checkpoint(storage, MemoryEngine(), "/checkpoint", store=STORE)
    assert isinstance(pristine, Checkpoint)
    for case in range(300):
        bad = bytearray(good)
        if case % 3:
            position = rng.randrange(len(bad))
            bad[position] ^= 1 << rng.randrange(8)
        else:
            del bad[rng.randrange(len(bad)) :]
        await storage.write_small("/checkpoint", [bytes(bad)])
        found = await read_checkpoint(storage, MemoryEngine(), "/checkpoint", store=STORE)
        if isinstance(found, Checkpoint):
            assert all(np.array_equal(found.columns[name], column) for name, column in COLUMNS.items())
            assert found.covers == COVERS
        else:
            assert isinstance(found, CheckpointFailure)
    for garbage in (b"", b"x" * 31, bytes(5000), b"cscdCKPT" + bytes(5000)):
        await storage.write_small("/checkpoint", [garbage])
        assert isinstance(await read_checkpoint(storage, MemoryEngine(), "/checkpoint", store=STORE), CheckpointFailure)


async def test_a_million_blocks_load_without_copying() -> None:
    """Time is compared with a plain copy of the same bytes, so that the test holds on any machine."""
    storage = MemoryStorage()
    count = 1_000_000
    columns = {
        "digest": np.frombuffer(random.Random(1).randbytes(32 * 1000) * (count // 1000), dtype="S32"),
        "stamp": np.arange(count, dtype=np.uint64),
        "page": np.arange(count, dtype=np.uint32),
    }
    await write_checkpoint(storage, MemoryEngine(), "/c", store=STORE, columns=columns, covers=COVERS)
    raw = storage.disk.content("/c")

    async def read_small(path: str) -> bytes:
        return raw

    storage.read_small = read_small  # type: ignore[method-assign]  # the fake's page joining is not what is measured
    start = time.perf_counter()
    for _ in range(10):
        bytes(bytearray(raw))
    copies_s = time.perf_counter() - start
    start = time.perf_counter()
    found = await read_checkpoint(storage, MemoryEngine(), "/c", store=STORE)
    load_s = time.perf_counter() - start
    assert isinstance(found, Checkpoint)
    assert np.array_equal(found.columns["stamp"], columns["stamp"])
    assert load_s < 5 * copies_s


async def test_columns_without_plain_bytes_are_refused() -> None:
    with pytest.raises(AssertionError, match="no plain bytes"):
        await write_checkpoint(
            MemoryStorage(), MemoryEngine(), "/c", store=STORE, columns={"x": np.array(["text"])}, covers=[]
        )
