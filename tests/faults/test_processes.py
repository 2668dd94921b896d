"""Several processes on one root or one arena: openers that collide, forks, writers that die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import cascade_aio as ca
from tests.faults.conftest import Child
from tests.faults.harness import Known, make_block, open_at, put


async def expect(store: ca.Store, some: list[Known]) -> None:
    for block in some:
        async with store.get(block.block_id) as found:
            assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)


async def test_two_openers_of_one_arena(tmp_path: Path) -> None:
    first = make_block(1, 5000, 5000)
    arena = f"cascade-faults-{uuid.uuid4().hex[:12]}"
    async with open_at(tmp_path / "kv", arena=arena) as store:
        with pytest.raises(ca.ConfigError, match="in use"):
            await open_at(tmp_path / "kv", arena=arena)
        with pytest.raises(ca.ConfigError, match="in use"):
            await open_at(tmp_path / "other", arena=arena)
        await put(store, first)
        await store.flush()
        await expect(store, [first])
    async with open_at(tmp_path / "kv", arena=arena) as store:
        await expect(store, [first])


async def test_two_stores_of_one_root_write_and_read_each_other(tmp_path: Path) -> None:
    """Each in an arena of its own, both writing at once, segments sealed all the time."""
    small = {"segment_bytes": "1MiB", "shm_bytes": "4MiB"}
    mine = [make_block(seed, 20_000 * (seed % 5), 150_000) for seed in range(20)]
    yours = [make_block(seed, 20_000 * (seed % 5), 150_000) for seed in range(100, 120)]
    async with open_at(tmp_path / "kv", **small) as one, open_at(tmp_path / "kv", **small) as two:

        async def write(store: ca.Store, some: list[Known], other: ca.Store) -> None:
            for block in some:
                await put(store, block)
                if block.key and block.key[0] % 3 == 0:
                    await store.flush()
                await other.refresh()

        await asyncio.gather(write(one, mine, two), write(two, yours, one))
        await asyncio.gather(one.flush(), two.flush())
        await one.refresh()
        await two.refresh()
        await expect(one, mine + yours)
        await expect(two, mine + yours)
        await two.delete(mine[0].block_id)
        await two.flush()
        await one.refresh()
        assert mine[0].block_id not in one
        for store in (one, two):
            assert (await store.verify()).damage == ()
            assert store.statistics()["damage"] == []
    async with open_at(tmp_path / "kv", **small) as store:
        assert len(store) == 39
        await expect(store, mine[1:] + yours)
        assert mine[0].block_id not in store


_WRITER = """
import asyncio, json, sys
import cascade_aio as ca
from tests.faults.harness import make_block

async def work():
    async with ca.open_store(sys.argv[1], shm_dir=sys.argv[2], arena="writer", shm_bytes="4MiB") as store:
        for seed in range(8):
            block = make_block(seed, 100_000, 100_000)
            await store.put(block.key, block.value)
        await store.flush()
        print("flushed", flush=True)
        await asyncio.sleep(600)

asyncio.run(work())
"""


async def test_a_writer_that_dies_while_a_reader_holds_leases(tmp_path: Path) -> None:
    some = [make_block(seed, 100_000, 100_000) for seed in range(8)]
    (tmp_path / "shm").mkdir()
    arguments = [sys.executable, "-c", _WRITER, str(tmp_path / "kv"), str(tmp_path / "shm")]
    writer = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert await asyncio.to_thread(writer.stdout.readline) == b"flushed\n"
        async with open_at(tmp_path / "kv") as reader:
            assert len(reader) == 8
            leases = [await reader.get(block.block_id) for block in some[:4]]
            writer.send_signal(signal.SIGKILL)
            await asyncio.to_thread(writer.wait)
            await expect(reader, some[4:6])
            # Somebody takes over, deletes everything, and the budget has the files removed.
            async with open_at(
                tmp_path / "kv", shm_dir=str(tmp_path / "shm"), arena="writer", disk_bytes="8MiB"
            ) as heir:
                await expect(heir, some)
                for block in some:
                    await heir.delete(block.block_id)
                for seed in range(1000, 1060):
                    await put(heir, make_block(seed, 100_000, 100_000))
                    await heir.flush()
            for lease, block in zip(leases, some[:4], strict=True):
                with lease:
                    assert (bytes(lease.key), bytes(lease.value)) == (block.key, block.value)
            await reader.refresh()
            assert not any(block.block_id in reader for block in some)
            assert reader.statistics()["damage"] == []
    finally:
        writer.kill()
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()
    assert list((tmp_path / "shm").iterdir()) == []


@pytest.mark.parametrize("io_backend", ["auto", "threads"])
@pytest.mark.parametrize("way", ["_exit", "collected", "multiprocessing"])
def test_fork_in_the_middle(child: Child, tmp_path: Path, io_backend: str, way: str) -> None:
    """A forked child that ends without touching the store leaves its parent's store alone."""
    (tmp_path / "shm").mkdir()
    found = child(
        """
        import gc, multiprocessing, warnings
        from tests.faults.harness import make_block
        some = [make_block(seed, 100_000, 100_000) for seed in range(40)]

        def nothing():
            gc.collect()

        async def fork(holder):
            if arguments["way"] == "multiprocessing":
                process = multiprocessing.get_context("fork").Process(target=nothing)
                process.start()
                await asyncio.to_thread(process.join)
                return process.exitcode
            pid = os.fork()
            if pid == 0:
                if arguments["way"] == "collected":
                    warnings.simplefilter("ignore")
                    holder.clear()
                    gc.collect()
                os._exit(0)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            return os.waitstatus_to_exitcode(status)

        async def work():
            settings = arguments["settings"]
            holder = {"store": await ca.open_store(arguments["root"], **settings)}
            codes = []
            for number, block in enumerate(some):
                await holder["store"].put(block.key, block.value)
                flush = asyncio.ensure_future(holder["store"].flush())
                if number % 8 == 3:
                    await asyncio.sleep(0)
                    codes.append(await fork(holder))
                await flush
            report = await holder["store"].verify()
            assert report.damage == ()
            await holder["store"].aclose()
            async with ca.open_store(arguments["root"], **settings) as store:
                for block in some:
                    async with store.get(block.block_id) as found:
                        assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)
            return codes

        print(json.dumps(asyncio.run(work())))
        """,
        root=str(tmp_path / "kv"),
        way=way,
        settings={"shm_bytes": 4 << 20, "shm_dir": str(tmp_path / "shm"), "io_backend": io_backend, "workers": 1},
    )
    assert found == [0] * 5
    assert os.listdir(tmp_path / "shm") == []
