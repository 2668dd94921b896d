"""What every ``abc.Storage`` promises, as tests: subclass ``StorageConformance`` once per implementation.

A subclass provides two fixtures: ``storage`` (an open ``Storage``, closed by the fixture) and ``root``
(path of an existing empty directory on it). Nothing here looks behind the interface, so that the
ring, the threads and the fakes answer to the same suite.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import random

import pytest

from cascade_aio.abc.storage import PAGE_BYTES, File, FileEntry, Priority, Storage
from cascade_aio.errors import ClosedError

MIB = 1 << 20


def page_buffer(nbytes: int) -> memoryview:
    """Page-aligned zeroed memory, as O_DIRECT wants it."""
    return memoryview(mmap.mmap(-1, max(nbytes, PAGE_BYTES)))[:nbytes]


def random_pages(nbytes: int, seed: int) -> memoryview:
    """Page-aligned memory with content that depends on ``seed``."""
    view = page_buffer(nbytes)
    view[:] = random.Random(seed).randbytes(nbytes)
    return view


async def written(storage: Storage, path: str, content: memoryview) -> File:
    """A new file with ``content``, open for writing."""
    file = await storage.create(path)
    await storage.write(file, [content], 0)
    return file


class StorageConformance:
    """The suite. Sizes are small: it is run over every implementation in every test run."""

    # -- bytes

    async def test_what_was_written_is_read(self, storage: Storage, root: str) -> None:
        content = random_pages(MIB, 1)
        file = await written(storage, f"{root}/f", content)
        found = page_buffer(MIB)
        assert await storage.read(file, [found], 0) == MIB
        assert found == content

    async def test_several_buffers_are_filled_one_after_the_other(self, storage: Storage, root: str) -> None:
        content = random_pages(40 * PAGE_BYTES, 2)
        file = await storage.create(f"{root}/f")
        pieces = [content[: 3 * PAGE_BYTES], content[3 * PAGE_BYTES : 4 * PAGE_BYTES], content[4 * PAGE_BYTES :]]
        await storage.write(file, pieces, PAGE_BYTES)
        memory = page_buffer(200 * PAGE_BYTES)
        scattered = [memory[2 * i * PAGE_BYTES : (2 * i + 1) * PAGE_BYTES] for i in range(40)]
        assert await storage.read(file, scattered, PAGE_BYTES) == len(content)
        assert b"".join(scattered) == content
        untouched = [memory[(2 * i + 1) * PAGE_BYTES : (2 * i + 2) * PAGE_BYTES] for i in range(40)]
        assert not any(b"".join(untouched))

    async def test_many_small_buffers_in_one_transfer(self, storage: Storage, root: str) -> None:
        content = random_pages(300 * PAGE_BYTES, 3)
        file = await storage.create(f"{root}/f")
        await storage.write(file, [content[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in range(300)], 0)
        memory = page_buffer(600 * PAGE_BYTES)
        scattered = [memory[2 * i * PAGE_BYTES : (2 * i + 1) * PAGE_BYTES] for i in range(300)]
        assert await storage.read(file, scattered, 0) == len(content)
        assert b"".join(scattered) == content

    async def test_end_of_file_shortens_a_read(self, storage: Storage, root: str) -> None:
        content = random_pages(3 * PAGE_BYTES, 4)
        file = await written(storage, f"{root}/f", content)
        found = page_buffer(8 * PAGE_BYTES)
        assert await storage.read(file, [found[:PAGE_BYTES], found[PAGE_BYTES:]], PAGE_BYTES) == 2 * PAGE_BYTES
        assert found[: 2 * PAGE_BYTES] == content[PAGE_BYTES:]
        assert not any(found[2 * PAGE_BYTES :])
        assert await storage.read(file, [found], 3 * PAGE_BYTES) == 0
        assert await storage.read(file, [found], 100 * PAGE_BYTES) == 0

    async def test_end_of_file_within_a_page(self, storage: Storage, root: str) -> None:
        content = random_pages(2 * PAGE_BYTES, 5)
        file = await written(storage, f"{root}/f", content)
        await storage.truncate(file, PAGE_BYTES + 100)
        found = page_buffer(4 * PAGE_BYTES)
        assert await storage.read(file, [found], 0) == PAGE_BYTES + 100
        assert found[: PAGE_BYTES + 100] == content[: PAGE_BYTES + 100]

    async def test_nothing_to_transfer(self, storage: Storage, root: str) -> None:
        file = await storage.create(f"{root}/f")
        assert await storage.read(file, [], 0) == 0
        assert await storage.read(file, [memoryview(bytearray())], 0) == 0
        await storage.write(file, [], 0)
        assert await storage.size(file) == 0

    async def test_concurrent_writes_then_reads(self, storage: Storage, root: str) -> None:
        blocks = [random_pages(16 * PAGE_BYTES, seed) for seed in range(32)]
        file = await storage.create(f"{root}/f", preallocate_bytes=32 * 16 * PAGE_BYTES)
        await asyncio.gather(*(storage.write(file, [b], i * len(b)) for i, b in enumerate(blocks)))
        await storage.sync(file)
        found = [page_buffer(16 * PAGE_BYTES) for _ in blocks]
        priorities = [Priority.DEMAND, Priority.WRITE, Priority.BACKGROUND]
        sizes = await asyncio.gather(
            *(storage.read(file, [b], i * len(b), priority=priorities[i % 3]) for i, b in enumerate(found))
        )
        assert set(sizes) == {16 * PAGE_BYTES}
        assert found == blocks

    async def test_thousands_of_small_reads(self, storage: Storage, root: str) -> None:
        content = random_pages(64 * PAGE_BYTES, 6)
        file = await written(storage, f"{root}/f", content)
        memory = page_buffer(2000 * PAGE_BYTES)
        found = [memory[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in range(2000)]
        sizes = await asyncio.gather(*(storage.read(file, [page], i % 64 * PAGE_BYTES) for i, page in enumerate(found)))
        assert set(sizes) == {PAGE_BYTES}
        for i, page in enumerate(found):
            assert page == content[i % 64 * PAGE_BYTES : (i % 64 + 1) * PAGE_BYTES]

    async def test_registered_memory_reads_and_writes_the_same(self, storage: Storage, root: str) -> None:
        memory = random_pages(4 * MIB, 7)
        await storage.register_memory(memory)
        file = await storage.create(f"{root}/f")
        await storage.write(file, [memory[:MIB], memory[2 * MIB : 3 * MIB]], 0)
        found = memory[PAGE_BYTES : PAGE_BYTES + 2 * MIB]
        expected = bytes(memory[:MIB]) + bytes(memory[2 * MIB : 3 * MIB])
        assert await storage.read(file, [found], 0) == 2 * MIB
        assert found == expected

    # -- what is refused

    async def test_misaligned_requests_on_a_direct_file_are_refused(self, storage: Storage, root: str) -> None:
        content = random_pages(4 * PAGE_BYTES, 8)
        file = await written(storage, f"{root}/f", content)
        if not file.direct:
            pytest.skip("the file system refuses O_DIRECT: there is no alignment rule")
        with pytest.raises(OSError) as caught:  # noqa: PT011  (its errno is looked at)
            await storage.read(file, [page_buffer(PAGE_BYTES)], 512)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError) as caught:  # noqa: PT011  (its errno is looked at)
            await storage.write(file, [page_buffer(PAGE_BYTES)[:100]], 0)
        assert caught.value.errno == errno.EINVAL
        found = page_buffer(len(content))
        await storage.read(file, [found], 0)
        assert found == content

    async def test_reading_into_read_only_memory_is_refused(self, storage: Storage, root: str) -> None:
        file = await written(storage, f"{root}/f", random_pages(PAGE_BYTES, 9))
        with pytest.raises((ValueError, TypeError)):
            await storage.read(file, [page_buffer(PAGE_BYTES).toreadonly()], 0)

    async def test_writing_a_file_opened_for_reading_fails(self, storage: Storage, root: str) -> None:
        path = f"{root}/f"
        content = random_pages(PAGE_BYTES, 10)
        await (await written(storage, path, content)).close()
        file = await storage.open(path)
        with pytest.raises(OSError):  # noqa: PT011  (any refusal will do)
            await storage.write(file, [page_buffer(PAGE_BYTES)], 0)
        found = page_buffer(PAGE_BYTES)
        await storage.read(file, [found], 0)
        assert found == content

    async def test_missing_and_existing_names(self, storage: Storage, root: str) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            await storage.open(f"{root}/missing")
        assert caught.value.filename == f"{root}/missing"
        await storage.create(f"{root}/f")
        with pytest.raises(FileExistsError):
            await storage.create(f"{root}/f")
        with pytest.raises(FileNotFoundError):
            await storage.create(f"{root}/missing/f")
        with pytest.raises(FileNotFoundError):
            await storage.unlink(f"{root}/missing")
        with pytest.raises(FileNotFoundError):
            await storage.read_small(f"{root}/missing")
        with pytest.raises(FileNotFoundError):
            await storage.write_small(f"{root}/missing/f", [b"x"])
        with pytest.raises(FileNotFoundError):
            await storage.list_directory(f"{root}/missing")
        with pytest.raises(FileNotFoundError):
            await storage.sync_directory(f"{root}/missing")

    # -- files and names

    async def test_preallocated_file_has_its_size_and_reads_zeros(self, storage: Storage, root: str) -> None:
        file = await storage.create(f"{root}/f", preallocate_bytes=8 * PAGE_BYTES)
        assert await storage.size(file) == 8 * PAGE_BYTES
        found = random_pages(8 * PAGE_BYTES, 11)
        assert await storage.read(file, [found], 0) == 8 * PAGE_BYTES
        assert not any(found)

    async def test_writes_and_truncate_change_the_size(self, storage: Storage, root: str) -> None:
        content = random_pages(4 * PAGE_BYTES, 12)
        file = await written(storage, f"{root}/f", content)
        assert await storage.size(file) == 4 * PAGE_BYTES
        await storage.truncate(file, PAGE_BYTES)
        assert await storage.size(file) == PAGE_BYTES
        await storage.truncate(file, 3 * PAGE_BYTES)
        found = page_buffer(4 * PAGE_BYTES)
        assert await storage.read(file, [found], 0) == 3 * PAGE_BYTES
        assert found[:PAGE_BYTES] == content[:PAGE_BYTES]
        assert not any(found[PAGE_BYTES:])

    async def test_an_unlinked_file_stays_readable_while_open(self, storage: Storage, root: str) -> None:
        content = random_pages(PAGE_BYTES, 13)
        file = await written(storage, f"{root}/f", content)
        await storage.unlink(f"{root}/f")
        assert await storage.list_directory(root) == []
        found = page_buffer(PAGE_BYTES)
        assert await storage.read(file, [found], 0) == PAGE_BYTES
        assert found == content

    async def test_close_may_be_repeated_and_ends_use(self, storage: Storage, root: str) -> None:
        file = await written(storage, f"{root}/f", random_pages(PAGE_BYTES, 14))
        await file.close()
        await file.close()
        with pytest.raises((ClosedError, OSError)):
            await storage.read(file, [page_buffer(PAGE_BYTES)], 0)

    async def test_close_waits_for_requests_in_flight(self, storage: Storage, root: str) -> None:
        content = random_pages(8 * MIB, 15)
        file = await written(storage, f"{root}/f", content)
        found = page_buffer(8 * MIB)
        reading = asyncio.ensure_future(storage.read(file, [found], 0))
        await asyncio.sleep(0)
        await file.close()
        assert await reading == 8 * MIB
        assert found == content

    async def test_directories(self, storage: Storage, root: str) -> None:
        await storage.make_directory(f"{root}/b/c")
        await storage.make_directory(f"{root}/b/c")
        await written(storage, f"{root}/z", random_pages(2 * PAGE_BYTES, 16))
        await storage.create(f"{root}/a")
        assert await storage.list_directory(root) == [
            FileEntry("a", 0, False),
            FileEntry("b", 0, True),
            FileEntry("z", 2 * PAGE_BYTES, False),
        ]
        assert await storage.list_directory(f"{root}/b") == [FileEntry("c", 0, True)]
        await storage.sync_directory(root)

    async def test_small_files_are_replaced_whole(self, storage: Storage, root: str) -> None:
        path = f"{root}/small"
        await storage.write_small(path, [b"one", memoryview(b"two")])
        assert await storage.read_small(path) == b"onetwo"
        await storage.write_small(path, [])
        assert await storage.read_small(path) == b""
        assert [entry.name for entry in await storage.list_directory(root)] == ["small"]

    async def test_free_bytes(self, storage: Storage, root: str) -> None:
        assert await storage.free_bytes(root) > 0

    async def test_a_lock_is_exclusive_until_released(self, storage: Storage, root: str) -> None:
        path = f"{root}/lock"
        lock = await storage.try_lock(path)
        assert lock is not None
        assert await storage.try_lock(path) is None
        lock.release()
        again = await storage.try_lock(path)
        assert again is not None
        again.release()

    # -- time, cancellation, closing

    async def test_a_passed_deadline_is_a_timeout_and_frees_the_buffers(self, storage: Storage, root: str) -> None:
        content = random_pages(4 * MIB, 17)
        file = await written(storage, f"{root}/f", content)
        found = page_buffer(4 * MIB)
        with pytest.raises(TimeoutError):
            await storage.read(file, [found], 0, deadline_s=0)
        await assert_untouched(found)
        assert await storage.read(file, [found], 0, deadline_s=600) == 4 * MIB
        assert found == content

    async def test_cancelled_reads_leave_their_buffers_alone(self, storage: Storage, root: str) -> None:
        content = random_pages(4 * MIB, 18)
        file = await written(storage, f"{root}/f", content)
        rng = random.Random(19)
        for _ in range(30):
            buffers = [page_buffer(MIB // 2) for _ in range(8)]
            tasks = [
                asyncio.ensure_future(storage.read(file, [buffer], i * MIB // 2)) for i, buffer in enumerate(buffers)
            ]
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.002)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task, buffer in zip(tasks, buffers, strict=True):
                assert task.cancelled() or task.result() == MIB // 2
                await assert_untouched(buffer)

    async def test_a_second_cancellation_does_not_cut_the_drain_short(self, storage: Storage, root: str) -> None:
        file = await written(storage, f"{root}/f", random_pages(8 * MIB, 20))
        found = page_buffer(8 * MIB)
        task = asyncio.ensure_future(storage.read(file, [found], 0))
        await asyncio.sleep(0)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled()
        await assert_untouched(found)

    async def test_cancelled_writes_have_ended(self, storage: Storage, root: str) -> None:
        file = await storage.create(f"{root}/f", preallocate_bytes=4 * MIB)
        rng = random.Random(21)
        for turn in range(20):
            content = page_buffer(4 * MIB)
            content[:] = bytes([turn + 1]) * len(content)
            task = asyncio.ensure_future(storage.write(file, [content], 0))
            await asyncio.sleep(rng.random() * 0.002)
            task.cancel()
            await asyncio.wait([task])
            content[:] = b"\xff" * len(content)  # ours again: must not reach the file
            found = page_buffer(4 * MIB)
            assert await storage.read(file, [found], 0) == 4 * MIB
            assert 0xFF not in found[:: PAGE_BYTES // 2].tobytes()

    async def test_cancelled_opens_and_creations_leave_nothing_open(self, storage: Storage, root: str) -> None:
        await storage.create(f"{root}/f")
        for turns in range(6):
            opening = asyncio.ensure_future(storage.open(f"{root}/f"))
            creating = asyncio.ensure_future(storage.create(f"{root}/g", preallocate_bytes=PAGE_BYTES))
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            creating.cancel()
            await asyncio.wait([opening, creating])
            for task in (opening, creating):
                if not task.cancelled():
                    await task.result().close()
            names = {entry.name for entry in await storage.list_directory(root)}
            if "g" in names:
                assert not creating.cancelled()
                await storage.unlink(f"{root}/g")

    async def test_aclose_waits_for_transfers_and_ends_use(self, storage: Storage, root: str) -> None:
        content = random_pages(4 * MIB, 22)
        file = await written(storage, f"{root}/f", content)
        found = page_buffer(4 * MIB)
        reading = asyncio.ensure_future(storage.read(file, [found], 0))
        await asyncio.sleep(0)
        await storage.aclose()
        await storage.aclose()
        assert reading.done(), "aclose returned while a transfer was running"
        assert reading.result() == 4 * MIB
        assert found == content
        for call in (
            storage.open(f"{root}/f"),
            storage.create(f"{root}/g"),
            storage.list_directory(root),
            storage.read_small(f"{root}/f"),
            storage.try_lock(f"{root}/lock"),
        ):
            with pytest.raises(ClosedError):
                await call

    async def test_statistics_name_the_backend(self, storage: Storage, root: str) -> None:
        assert isinstance(storage.statistics()["backend"], str)


async def assert_untouched(buffer: memoryview) -> None:
    """The memory is its owner's: nobody writes to it any more."""
    buffer[:] = b"\xa5" * len(buffer)
    for _ in range(3):
        await asyncio.sleep(0.001)
    assert bytes(buffer) == b"\xa5" * len(buffer)
