"""The cache of open files: bounded, shared, patient, and modest when the process is short of descriptors."""

from __future__ import annotations

import asyncio
import errno
import resource

import pytest

from cascade_aio.segments.handles import DESCRIPTORS_SHARE, HANDLES_MAX, FileHandles
from cascade_aio.testing.memory import MemoryStorage, Operation

FILES = 12


async def make_storage() -> MemoryStorage:
    storage = MemoryStorage()
    await storage.make_directory("/kv")
    for number in range(FILES):
        await (await storage.create(f"/kv/{number}")).close()
    return storage


async def test_a_newcomer_waits_while_all_files_are_being_read() -> None:
    storage = await make_storage()
    handles = FileHandles(storage, handles_max=3)
    most = 0

    async def use(number: int) -> None:
        nonlocal most
        async with handles.opened(number, f"/kv/{number}") as file:
            assert file.path == f"/kv/{number}"
            most = max(most, len(storage.open_files))
            await asyncio.sleep(0)

    await asyncio.gather(*(use(number) for number in range(FILES)))
    assert most == 3
    waiter: asyncio.Task[None] | None = None
    async with handles.opened(0, "/kv/0"), handles.opened(1, "/kv/1"), handles.opened(2, "/kv/2"):
        waiter = asyncio.create_task(use(5))
        given_up = asyncio.create_task(use(6))
        await asyncio.sleep(0.001)
        assert not waiter.done()
        given_up.cancel()
    await waiter
    with pytest.raises(asyncio.CancelledError):
        await given_up
    await handles.aclose()
    assert not storage.open_files


async def test_when_descriptors_run_out_the_cache_makes_do_with_fewer() -> None:
    storage = await make_storage()
    allowed = 8

    def hook(operation: Operation) -> BaseException | None:
        if operation.name == "open" and not operation.after and len(storage.open_files) >= allowed:
            return OSError(errno.EMFILE, "too many open files", operation.path)
        return None

    storage.hooks.append(hook)
    handles = FileHandles(storage, handles_max=FILES)

    async def use(number: int) -> None:
        async with handles.opened(number, f"/kv/{number}") as file:
            await asyncio.sleep(0)
            assert file.path == f"/kv/{number}"

    for number in range(FILES):
        await use(number)
    assert len(handles) <= 4, "half is left to others"
    await asyncio.gather(*(use(number) for number in range(FILES)))
    allowed = 0
    await handles.aclose()
    with pytest.raises(OSError, match="too many open files"):
        await use(0)
    assert len(handles) == 0


async def test_the_bound_follows_the_limit_of_the_process() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    storage = await make_storage()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (10 * DESCRIPTORS_SHARE, hard))
        handles = FileHandles(storage)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for number in range(FILES):
        async with handles.opened(number, f"/kv/{number}"):
            pass
    assert len(handles) == 10 < HANDLES_MAX
    await handles.aclose()


@pytest.mark.parametrize("turns", range(12))
async def test_a_file_whose_closing_is_cancelled_is_closed_all_the_same(turns: int) -> None:
    """A compaction that was cut short: the file was being opened, forgotten, and left open for good."""
    storage = await make_storage()
    handles = FileHandles(storage)

    async def use() -> None:
        async with handles.opened(0, "/kv/0"):
            await asyncio.sleep(1)

    async def forget() -> None:
        await handles.forget(0)

    using = asyncio.create_task(use())
    await asyncio.sleep(0)
    using.cancel()
    await asyncio.wait((using,))
    forgetting = asyncio.create_task(forget())
    for _ in range(turns):
        await asyncio.sleep(0)
    forgetting.cancel()
    await asyncio.wait((forgetting,))
    await handles.aclose()
    assert not storage.open_files
    assert not len(handles)
