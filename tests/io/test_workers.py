"""``ByteWorkers`` against plain reference code, under cancellation, and at its end."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import crc32c
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_aio import _native
from cascade_aio.abc.storage import Ingested
from cascade_aio.errors import ClosedError, ConfigError
from cascade_aio.io import ingest as blocking
from cascade_aio.io.clock import SystemClock
from cascade_aio.io.platform import open_platform
from cascade_aio.io.workers import COPY_INLINE_BYTES_MAX, INLINE_BYTES_MAX, SPLIT_BYTES, ByteWorkers
from cascade_aio.model import compute_digest
from cascade_aio.testing.storage import page_buffer

MIB = 1 << 20
PAGE = 4096

EDGES = [0, 1, 63, 64, 65, PAGE, INLINE_BYTES_MAX, blocking.PIECE_BYTES - 1, blocking.PIECE_BYTES, MIB, MIB + 1]


@pytest.fixture
async def workers() -> AsyncIterator[ByteWorkers]:
    workers = ByteWorkers(2)
    yield workers
    await workers.aclose()


def layout(key_bytes: int, value_bytes: int) -> tuple[int, int]:
    """(value_offset, payload_bytes): the value at the next multiple of 64, all padded to pages."""
    value_offset = -(-key_bytes // 64) * 64
    return value_offset, -(-(value_offset + value_bytes) // PAGE) * PAGE


def reference(key: bytes, value: bytes, chunk_bytes: int, digest: str) -> tuple[bytes, Ingested]:
    value_offset, payload_bytes = layout(len(key), len(value))
    payload = (key.ljust(value_offset, b"\0") + value).ljust(payload_bytes, b"\0")
    crcs = tuple(crc32c.crc32c(payload[i : i + chunk_bytes]) for i in range(0, payload_bytes, chunk_bytes))
    return payload, Ingested(compute_digest(key, value, digest), crcs)


def block(key_bytes: int, value_bytes: int, seed: int) -> tuple[bytes, bytes]:
    rng = random.Random(seed)
    return rng.randbytes(key_bytes), rng.randbytes(value_bytes)


sizes = st.one_of(st.sampled_from(EDGES), st.integers(0, 3 * MIB))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key_bytes=sizes,
    value_bytes=sizes,
    chunk_bytes=st.sampled_from([PAGE, 3 * PAGE, MIB]),
    kind=st.sampled_from(["sha256 in C", "sha256", "blake3"]),
    shift=st.integers(0, 63),
)
def test_ingest_copies_digests_and_checksums(
    key_bytes: int, value_bytes: int, chunk_bytes: int, kind: str, shift: int
) -> None:
    in_c = kind == "sha256 in C"
    if in_c and not _native.sha256_available():
        return  # test_the_c_path_is_there tells
    with mock.patch.object(_native, "sha256_available", return_value=in_c):
        check_ingest(key_bytes, value_bytes, chunk_bytes, kind.partition(" ")[0], shift)


def test_the_c_path_is_there() -> None:
    if not _native.sha256_available():
        pytest.skip("no libcrypto.so.3 or .1.1 on this machine: SHA-256 runs through hashlib")
    assert _native.ingest_sha256(b"", b"", bytearray(0), 0, 4096) == (hashlib.sha256().digest(), ())


def check_ingest(key_bytes: int, value_bytes: int, chunk_bytes: int, digest: str, shift: int) -> None:
    key, value = block(key_bytes, value_bytes, key_bytes ^ value_bytes)
    expected_payload, expected = reference(key, value, chunk_bytes, digest)
    value_offset, payload_bytes = layout(key_bytes, value_bytes)
    payload = page_buffer(payload_bytes)
    payload[:] = b"\xee" * payload_bytes
    unaligned_key = memoryview(bytes(shift) + key)[shift:]
    unaligned_value = memoryview(bytes(shift) + value)[shift:]
    assert blocking.ingest(unaligned_key, unaligned_value, payload, value_offset, chunk_bytes, digest) == expected
    assert payload == expected_payload
    payload[key_bytes:value_offset] = b"\xee" * (value_offset - key_bytes)
    payload[value_offset + value_bytes :] = b"\xee" * (payload_bytes - value_offset - value_bytes)
    in_place = blocking.digest_in_place(payload, key_bytes, value_offset, value_bytes, chunk_bytes, digest)
    assert in_place == expected
    assert payload == expected_payload
    assert blocking.chunk_checksums(payload, chunk_bytes) == expected.chunk_crcs


@pytest.mark.parametrize("value_bytes", [0, 1000, INLINE_BYTES_MAX, 3 * MIB])
async def test_inline_and_threaded_work_agree(workers: ByteWorkers, value_bytes: int) -> None:
    key, value = block(500, value_bytes, 1)
    expected_payload, expected = reference(key, value, MIB, "sha256")
    value_offset, payload_bytes = layout(500, value_bytes)
    payload = page_buffer(payload_bytes)
    arguments = (memoryview(key), memoryview(value), payload, value_offset, MIB, "sha256")
    assert await workers.ingest(*arguments) == expected
    assert payload == expected_payload
    assert await workers.digest(payload, 500, value_offset, value_bytes, MIB, "sha256") == expected
    assert await workers.checksum(payload, MIB) == expected.chunk_crcs


async def test_many_blocks_at_once(workers: ByteWorkers) -> None:
    blocks = [block(70_000, 200_000, seed) for seed in range(40)]
    value_offset, payload_bytes = layout(70_000, 200_000)
    found = await asyncio.gather(
        *(
            workers.ingest(memoryview(k), memoryview(v), page_buffer(payload_bytes), value_offset, MIB, "blake3")
            for k, v in blocks
        )
    )
    assert found == [reference(k, v, MIB, "blake3")[1] for k, v in blocks]


@pytest.mark.parametrize("sizes", [(), (1,), (4096, 0, 65_537), (MIB, 2 * MIB, 4096, 6 * MIB, 3 * MIB, MIB + 1)])
async def test_checksums_of_several_payloads_are_those_of_each(workers: ByteWorkers, sizes: tuple[int, ...]) -> None:
    payloads = [memoryview(bytes([n + 1]) * size) for n, size in enumerate(sizes)]
    assert await workers.checksums(payloads, MIB) == [await workers.checksum(payload, MIB) for payload in payloads]


async def test_checksums_of_large_memory_keep_their_order(workers: ByteWorkers) -> None:
    memory = page_buffer(3 * SPLIT_BYTES + PAGE)
    memory[:] = random.Random(2).randbytes(len(memory))
    for chunk_bytes in (MIB, 3 * MIB, 2 * SPLIT_BYTES, 100 * MIB):
        expected = [crc32c.crc32c(memory[i : i + chunk_bytes]) for i in range(0, len(memory), chunk_bytes)]
        assert await workers.checksum(memory, chunk_bytes) == tuple(expected)


@pytest.mark.parametrize("nbytes", [0, 1, COPY_INLINE_BYTES_MAX, 2 * SPLIT_BYTES + 12345])
async def test_copies(workers: ByteWorkers, nbytes: int) -> None:
    source = random.Random(3).randbytes(nbytes)
    first, second = bytearray(nbytes), bytearray(nbytes + 1)
    await workers.copy([(memoryview(first), memoryview(source)), (memoryview(second)[1:], memoryview(source))])
    assert first == source
    assert second[1:] == source


async def test_a_copy_of_unequal_lengths_moves_nothing(workers: ByteWorkers) -> None:
    good, bad = bytearray(10), bytearray(10)
    with pytest.raises(ValueError, match="10 bytes"):
        await workers.copy([(memoryview(good), memoryview(b"x" * 10)), (memoryview(bad), memoryview(b"y" * 9))])
    assert not any(good + bad)


@pytest.mark.parametrize("payload_bytes", [PAGE, MIB])
async def test_parts_that_do_not_fit_are_refused(workers: ByteWorkers, payload_bytes: int) -> None:
    payload = page_buffer(payload_bytes)
    part = memoryview(bytes(payload_bytes))
    with pytest.raises(ValueError, match="do not fit"):
        await workers.ingest(part, part, payload, payload_bytes, MIB, "sha256")
    with pytest.raises(ValueError, match="do not fit"):
        await workers.digest(payload, 100, 64, 0, MIB, "sha256")
    assert not any(payload)


async def test_prefault_changes_no_byte(workers: ByteWorkers) -> None:
    memory = page_buffer(2 * MIB)
    memory[5000] = 7
    await workers.prefault(memory)
    assert memory[5000] == 7
    assert sum(memory[:10000]) == 7


async def test_a_cancelled_call_has_left_its_buffers(workers: ByteWorkers) -> None:
    key, value = block(4 * MIB, 4 * MIB, 4)
    rng = random.Random(5)
    for _ in range(10):
        payloads = [page_buffer(8 * MIB) for _ in range(4)]
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(workers.ingest(memoryview(key), memoryview(value), payload, 4 * MIB, MIB, "blake3"))
            for payload in payloads
        ]
        tasks.append(asyncio.ensure_future(workers.copy([(payloads[0], memoryview(key + value))])))
        await asyncio.sleep(rng.random() * 0.004)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for payload in payloads:
            payload[:] = bytes(8 * MIB)
        await asyncio.sleep(0.002)
        assert not any(any(payload[::1024]) for payload in payloads)


async def test_closing_waits_joins_and_ends_use() -> None:
    def threads() -> int:
        return sum(thread.name.startswith("cascade-bytes") for thread in threading.enumerate())

    workers = ByteWorkers(3, nice=0)
    assert threads() == 3
    memory = page_buffer(16 * MIB)
    running = asyncio.ensure_future(workers.checksum(memory, MIB))
    await asyncio.sleep(0)
    await workers.aclose()
    await workers.aclose()
    assert running.done()
    assert len(running.result()) == 16
    for size in (PAGE, MIB):
        with pytest.raises(ClosedError):
            await workers.checksum(memory[:size], MIB)
    assert not threads()


async def test_another_loop_is_refused(workers: ByteWorkers) -> None:
    def elsewhere() -> None:
        asyncio.run(workers.checksum(page_buffer(MIB), MIB))

    with pytest.raises(RuntimeError, match="another event loop"):
        await asyncio.to_thread(elsewhere)


async def test_settings_are_checked() -> None:
    assert len(os.sched_getaffinity(0)) >= 1
    with pytest.raises(ConfigError, match="threads=0"):
        ByteWorkers(0)
    with pytest.raises(ConfigError, match="nice=20"):
        ByteWorkers(1, nice=20)


async def test_the_platform_bundles_all_three() -> None:
    platform = open_platform(io_backend="threads", worker_threads=1)
    assert platform.storage.statistics()["backend"] == "threads"
    assert await platform.engine.checksum(memoryview(b"123456789"), MIB) == (0xE3069283,)
    assert isinstance(platform.clock, SystemClock)
    first = platform.clock.monotonic_s()
    assert platform.clock.monotonic_s() >= first
    assert platform.clock.wall_ns() > 1_600_000_000 * 10**9
    await platform.engine.aclose()
    await platform.storage.aclose()
