"""Limits of a process and of shared memory, missing rights, a kernel without io_uring."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cascade_aio as ca
from tests.faults.conftest import NOBODY, Child, fill, need_another_user
from tests.faults.harness import make_block, make_world, open_at, put

BLOCKS = [make_block(seed, 30_000, 40_000) for seed in range(6)]

_WORK = """
    from tests.faults.harness import make_block

    async def work():
        async with ca.open_store(arguments["root"], **arguments["settings"]) as store:
            if arguments.get("wait_ready", True):
                await store.wait_ready()
            for seed in range(6):
                block = make_block(seed, 30_000, 40_000)
                assert await store.put(block.key, block.value) == block.block_id
            await store.flush()
            io = store.statistics()["io"]
        async with ca.open_store(arguments["root"], **arguments["settings"]) as store:
            for seed in range(6):
                block = make_block(seed, 30_000, 40_000)
                async with store.get(block.block_id) as found:
                    assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)
        return io
"""


def settings_for(place: Path, **more: Any) -> dict[str, Any]:
    (place / "shm").mkdir(exist_ok=True)
    return {"shm_bytes": 8 << 20, "shm_dir": str(place / "shm"), "workers": 1, **more}


def open_to_all(place: Path) -> Path:
    """A directory that any user may write to, with every directory above it passable."""
    for directory in (place, *place.parents):
        if directory.stat().st_uid == os.geteuid() and not directory.stat().st_mode & 0o1:
            directory.chmod(directory.stat().st_mode | 0o711)
    place.chmod(0o777)
    return place


@pytest.fixture
def open_shm() -> Iterator[Path]:
    """A directory in shared memory that any user may write to."""
    with tempfile.TemporaryDirectory(prefix="cascade-faults-", dir="/dev/shm") as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


# -- shared memory ---------------------------------------------------------------------------------


async def test_shared_memory_too_small_at_open(small_shm: Path, tmp_path: Path) -> None:
    with pytest.raises(ca.TierFullError, match="shm_bytes"):
        await open_at(tmp_path / "kv", shm_dir=str(small_shm), shm_bytes="16MiB")
    assert list(small_shm.iterdir()) == []
    async with open_at(tmp_path / "kv", shm_dir=str(small_shm), shm_bytes="4MiB") as store:
        await put(store, BLOCKS[0])


async def test_shared_memory_that_fills_up_later_does_not_matter(small_shm: Path, tmp_path: Path) -> None:
    """The arena is really reserved: no page of it can be missing later (that would be a SIGBUS)."""
    async with open_at(tmp_path / "kv", shm_dir=str(small_shm), shm_bytes="6MiB") as store:
        fill(small_shm)
        await store.wait_ready()
        for seed in range(60):
            await put(store, make_block(seed, 100_000, 100_000))
        await store.flush()
        for seed in range(60):
            block = make_block(seed, 100_000, 100_000)
            async with store.get(block.block_id) as found:
                assert bytes(found.value) == block.value
        with pytest.raises(ca.TierFullError, match="shm_bytes"):
            await open_at(tmp_path / "other", shm_dir=str(small_shm), shm_bytes="4MiB")


async def test_the_memory_of_a_closed_store_is_room_for_the_next(small_shm: Path, tmp_path: Path) -> None:
    """Python frees its mapping when it looks for cycles; an opening that lacks room lets it look at once."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            async with open_at(tmp_path / "kv", shm_dir=str(small_shm), shm_bytes="5MiB") as store:
                await put(store, BLOCKS[0])
                cycle: list[Any] = [store.parts.context.shm.memory]
                cycle.append(cycle)  # as the traceback of a task that closing has cancelled
                del cycle
    finally:
        gc.enable()


async def test_no_such_shm_dir(tmp_path: Path) -> None:
    with pytest.raises(ca.ConfigError, match="shm_dir"):
        await open_at(tmp_path / "kv", shm_dir=str(tmp_path / "missing"))


# -- limits of the process -------------------------------------------------------------------------


@pytest.mark.parametrize("memlock_bytes", [0, 64 << 10])
def test_locked_memory_limit(child: Child, tmp_path: Path, open_shm: Path, memlock_bytes: int) -> None:
    """Plain buffers instead of registered ones, and statistics say why and what would help."""
    open_to_all(tmp_path)
    found = child(
        _WORK + "\n    print(json.dumps(asyncio.run(work())))",
        uid=NOBODY,
        limits={"RLIMIT_MEMLOCK": memlock_bytes},
        root=str(tmp_path / "kv"),
        settings=settings_for(tmp_path, io_backend="auto") | {"shm_dir": str(open_shm)},
    )
    if found["backend"] == "threads":
        assert any("ulimit -l" in note or "io_uring" in note for note in found["notes"])
    else:
        assert found["registered_bytes"] == 0
        assert any("ulimit -l" in note for note in found["ring_notes"])


async def make_many_segments(root: Path, count: int) -> list[Any]:
    some = [make_block(seed, 400_000, 400_000) for seed in range(count)]
    async with open_at(root, segment_bytes="1MiB", shm_bytes="16MiB") as store:
        for block in some:
            await put(store, block)
    return some


@pytest.mark.parametrize(("io_backend", "checkpoint"), [("auto", False), ("threads", True)])
def test_few_file_descriptors_and_many_segments(
    child: Child, tmp_path: Path, io_backend: str, checkpoint: bool
) -> None:
    asyncio.run(make_many_segments(tmp_path / "kv", 60))
    assert len(list((tmp_path / "kv").glob("writers/*/*.seg"))) >= 60
    if not checkpoint:
        for path in (tmp_path / "kv").glob("writers/*/checkpoint"):
            path.unlink()
    found = child(
        """
        from tests.faults.harness import make_block

        async def work():
            async with ca.open_store(arguments["root"], **arguments["settings"]) as store:
                assert len(store) == 60, len(store)
                some = [make_block(seed, 400_000, 400_000) for seed in range(60)]

                async def check(block):
                    async with store.get(block.block_id) as found:
                        assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)

                await asyncio.gather(*map(check, some))
                for block in some:
                    await check(block)
                report = await store.verify()
                await store.put(b"new", b"block")
                await store.flush()
                return [len(report.damage), store.statistics()["damage"], store.statistics()["store"]["read_errors"]]

        print(json.dumps(asyncio.run(work())))
        """,
        limits={"RLIMIT_NOFILE": 40},
        root=str(tmp_path / "kv"),
        settings=settings_for(tmp_path, io_backend=io_backend, segment_bytes=1 << 20),
    )
    assert found == [0, [], 0]


# -- rights ----------------------------------------------------------------------------------------


_REFUSED = """
    async def work():
        try:
            async with ca.open_store(arguments["root"], **arguments["settings"]) as store:
                return ["opened", len(store), store.statistics()["damage"]]
        except ca.ConfigError as error:
            return ["refused", str(error)]

    print(json.dumps(asyncio.run(work())))
"""


async def test_a_root_that_may_not_be_written(child: Child, tmp_path: Path, open_shm: Path) -> None:
    open_to_all(tmp_path)
    async with open_at(tmp_path / "kv") as store:
        await put(store, BLOCKS[0])
    arguments = {"root": str(tmp_path / "kv"), "settings": settings_for(tmp_path) | {"shm_dir": str(open_shm)}}
    what, why = await asyncio.to_thread(child, _REFUSED, uid=NOBODY, **arguments)
    assert what == "refused"
    assert "permission" in why, "what a root says of itself is private like what it holds"
    (tmp_path / "kv").chmod(0o700)
    what, why = await asyncio.to_thread(child, _REFUSED, uid=NOBODY, **arguments)
    assert what == "refused"
    assert "permission" in why
    (tmp_path / "closed").mkdir(mode=0o755)
    arguments["root"] = str(tmp_path / "closed" / "kv")
    what, why = await asyncio.to_thread(child, _REFUSED, uid=NOBODY, **arguments)
    assert what == "refused"
    assert "not writable" in why


async def test_a_segment_that_may_not_be_read(child: Child, tmp_path: Path, open_shm: Path) -> None:
    """It is told with its path; the rest of the root is usable, and nothing is removed."""
    need_another_user()
    open_to_all(tmp_path)
    world = await make_world(tmp_path, "footer")
    segment = world.only("writers/*/*.seg")
    segment.chmod(0)
    for path in (world.root, *world.root.rglob("*")):
        if path != segment:
            os.chown(path, NOBODY, NOBODY)
    what, count, damage = await asyncio.to_thread(
        child,
        _REFUSED,
        uid=NOBODY,
        root=str(world.root),
        settings=settings_for(tmp_path) | {"shm_dir": str(open_shm)},
    )
    assert (what, count) == ("opened", 0)
    assert any(str(segment) in told and "unreadable" in told for told in damage)
    segment.chmod(0o600)
    async with open_at(world.root) as store:
        assert len(store) == len(world.blocks)


# -- no io_uring -----------------------------------------------------------------------------------

_SECCOMP = """
    import ctypes, struct
    # seccomp(2): io_uring_setup (425 everywhere) answers EPERM, as container profiles do; all else is allowed.
    program = struct.pack("=HBBI", 0x20, 0, 0, 0)
    program += struct.pack("=HBBI", 0x15, 0, 1, 425)
    program += struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | 1)
    program += struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    code = ctypes.create_string_buffer(program)

    class Filter(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(code))), 0, 0) == 0, ctypes.get_errno()
"""


def test_auto_falls_back_where_io_uring_is_forbidden(child: Child, tmp_path: Path) -> None:
    found = child(
        _SECCOMP + _WORK + "\n    print(json.dumps(asyncio.run(work())))",
        root=str(tmp_path / "kv"),
        settings=settings_for(tmp_path, io_backend="auto"),
    )
    assert found["backend"] == "threads"
    assert any("seccomp" in note and "EPERM" in note for note in found["notes"])


def test_uring_fails_with_reason_and_cure_where_it_is_forbidden(child: Child, tmp_path: Path) -> None:
    what, why = child(
        _SECCOMP + _REFUSED,
        root=str(tmp_path / "kv"),
        settings=settings_for(tmp_path, io_backend="uring"),
    )
    assert what == "refused"
    assert "io_uring is forbidden" in why
    assert 'io_backend="threads"' in why
    assert not any((tmp_path / "shm").iterdir())
