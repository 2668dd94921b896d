"""Who dies, and what becomes of what it held: clients, services, and both faces of a restart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import cascade_aio as ca
from cascade_aio.daemon import Service, connect
from cascade_aio.errors import BlockNotFoundError, ConfigError, LeaseError, ServiceUnavailableError, TierFullError
from cascade_aio.testing.service_child import DEEDS
from cascade_aio.testing.store import block_bytes, eventually
from tests.service.conftest import KEYS, forget_arena, running, served

START_SECONDS_MAX = 60.0
LONG_META = ca.BlockMeta(extra=bytes(800))
"""Blocks with so much of it are not listed in shared memory: their leases are numbers."""


@contextlib.asynccontextmanager
async def child(path: str, deed: str) -> AsyncIterator[tuple[Process, str]]:
    """A client process that has said what it does; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cascade_aio.testing.service_child", path, deed, stdout=PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS_MAX):
            line = await process.stdout.readline()
        yield process, line.decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def held(service: Service) -> dict[str, int]:
    """What anybody holds of the service's store, besides the store itself."""
    statistics = service.node.statistics()
    shm, node = statistics["shm"], statistics["service"]
    return {
        "clients": node["clients"],
        "leases": shm["leases"],
        "pinned": shm["pinned_bytes"],
        "reserved": node["reserved_bytes"],
        "in flight": node["requests_in_flight"],
        "lingering": node["lingering"],
        "extents": shm["allocated_bytes"] - shm["copy_bytes"],
    }


@pytest.mark.shm(96)
@pytest.mark.parametrize("deed", DEEDS)
async def test_a_killed_client_gives_everything_back(tmp_path: Path, deed: str) -> None:
    async with running(tmp_path / "kv", shm_bytes="64MiB") as service, connect(service.socket_path) as other:
        ids = [await other.put(*block_bytes(i)) for i in range(6)]
        await other.flush()
        async with child(service.socket_path, deed) as (process, said):
            assert said, "the child could not connect"
            await eventually(lambda: service.clients == 2)
            process.kill()
            await process.wait()
            await eventually(lambda: service.clients == 1)
        await other.flush()
        await eventually(lambda: not any({**held(service), "clients": 0}.values()))
        for i, name in enumerate(ids):
            async with other.get(name) as block:
                assert bytes(block.key) == block_bytes(i)[0]


async def test_two_clients_share_one_copy(tmp_path: Path) -> None:
    async with (
        running(tmp_path / "kv") as service,
        connect(service.socket_path) as one,
        connect(service.socket_path) as two,
    ):
        name = await one.put(*block_bytes(1, 1 << 20, 1 << 20), prefix=KEYS[0])
        async with one.get(name) as mine, two.get(KEYS[0]) as yours:
            assert bytes(mine.value) == bytes(yours.value) == block_bytes(1, 1 << 20, 1 << 20)[1]
            shm = service.node.statistics()["shm"]
            assert shm["blocks"] == 1
            assert shm["allocated_bytes"] == shm["copy_bytes"]
        assert await two.put(*block_bytes(1, 1 << 20, 1 << 20)) == name
        await two.delete(name)
        assert not await one.contains(KEYS[0])


async def test_a_client_reconnects_and_goes_on(tmp_path: Path) -> None:
    arena = f"cascade-test-{uuid.uuid4().hex[:12]}"
    async with contextlib.AsyncExitStack() as scopes:
        async with running(tmp_path / "kv", arena=arena) as service:
            path = service.socket_path
            store = await scopes.enter_async_context(connect(path))
            name = await store.put(*block_bytes(1))
            await store.flush()
            await store.put(*block_bytes(2))
            lease = await store.get(name)
            kept = lease.key
            numbered = await store.get(await store.put(b"not", b"listed", meta=LONG_META))
        putting = asyncio.ensure_future(store.put(*block_bytes(3)))
        getting = asyncio.ensure_future(_get(store, name))
        assert bytes(lease.value) == block_bytes(1)[1]  # pins outlive the service
        assert bytes(kept) == block_bytes(1)[0]
        del kept
        lease.release()
        async with store.get(name) as block:  # hot, without a service
            assert bytes(block.value) == block_bytes(1)[1]
        with pytest.raises(LeaseError, match="get the block again"):
            _ = numbered.value
        numbered.release()
        async with running(tmp_path / "kv", arena=arena):
            with await getting as block:
                assert bytes(block.value) == block_bytes(1)[1]
            assert await putting == ca.compute_block_id(*block_bytes(3))
            with pytest.raises(ServiceUnavailableError, match="put it again"):
                await store.flush()
            await store.put(*block_bytes(2))
            await store.flush()
            assert store.statistics()["reconnects"] == 1
    forget_arena(arena)


async def _get(store: ca.ServiceStore, name: ca.BlockId) -> ca.Block:
    return await store.get(name)


async def test_a_service_that_stays_away(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service:
        store = await connect(service.socket_path, reconnect_seconds_max=0.2)
        stuck = await store.reserve(key_bytes=10, value_bytes=10).__aenter__()
        stuck.key[:] = 1
        path = service.socket_path
    with pytest.raises(ServiceUnavailableError, match=path):
        await store.get(KEYS[0])
    with pytest.raises(ServiceUnavailableError):
        await store.flush()
    assert not store.statistics()["connected"]
    await store.aclose()
    with pytest.raises(ServiceUnavailableError, match="cascade-aio serve"):
        await connect(path, wait_seconds=0)


async def test_one_service_per_socket_and_stale_sockets_are_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with running(tmp_path / "kv", service={"socket": path}) as service:
        assert os.stat(path).st_mode & 0o777 == 0o600
        with pytest.raises(ConfigError, match="another service"):
            async with running(tmp_path / "other", service={"socket": path}):
                pass
        async with connect(path) as store:
            await store.put(b"a", b"b")
        assert service.socket_path == path
    assert not os.path.exists(path)
    assert not os.path.exists(path + ".lock")
    for stale in (path, path + ".lock"):
        Path(stale).touch()
    with pytest.raises(ConfigError, match="something else"):
        async with running(tmp_path / "kv", service={"socket": path}):
            pass
    with pytest.raises(ConfigError, match="107"):
        connect("/" + "x" * 200)


async def test_a_socket_left_by_a_dead_service_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    code = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, path)
    assert await process.wait() == 0
    async with running(tmp_path / "kv", service={"socket": path}), connect(path) as store:
        await store.put(b"a", b"b")


async def test_a_living_process_keeps_its_bytes_when_it_is_cut_off(tmp_path: Path) -> None:
    """Arrays of a client whose connection is lost are not overwritten while it may read them."""
    async with (
        running(tmp_path / "kv", service={"linger_seconds_max": 60.0}) as service,
        connect(service.socket_path) as store,
        connect(service.socket_path) as other,
    ):
        key, value = block_bytes(1, 1 << 20, 1 << 20)
        name = await store.put(key, value)
        await store.flush()
        lease = await store.get(name)
        kept = lease.value
        session = min(service._sessions)
        service._sessions[session].say_goodbye("cut off by the test")
        await eventually(lambda: service.node.statistics()["service"]["lingering"] == 1)
        for i in range(20):  # more than the arena holds
            await other.put(*block_bytes(100 + i, 1 << 20, 1 << 19))
        assert bytes(kept) == value
        await store.contains(name)  # connected again
        del kept
        lease.release()
        await eventually(lambda: service.node.statistics()["service"]["lingering"] == 0)


async def test_limits_of_one_client(tmp_path: Path) -> None:
    quota = {"leases_per_client_max": 4, "pinned_bytes_per_client_max": 3 << 20, "streams_per_client_max": 1}
    async with (
        running(tmp_path / "kv", service=quota) as service,
        connect(service.socket_path) as store,
        connect(service.socket_path) as other,
    ):
        small = [await store.put(*block_bytes(i, 10, 10), meta=LONG_META) for i in range(6)]
        large = [await store.put(*block_bytes(10 + i, 1 << 20, 1 << 19)) for i in range(3)]
        leases = [await store.get(name) for name in small[:4]]
        with pytest.raises(LeaseError, match="4 leases"):
            await store.get(small[4])
        async with other.get(small[4]):
            pass
        for lease in leases:
            lease.release()
        one = await store.get(large[0])
        with pytest.raises(TierFullError, match="pinned_bytes_per_client_max"):
            await asyncio.gather(*(store.get(name) for name in large[1:]))
        one.release()
        first = await store.stream(small).__aenter__()
        with pytest.raises(ca.ThrottledError, match="streams"):
            await store.stream(small).__aenter__()
        await first.aclose()


async def test_a_client_that_pins_past_its_quota_is_cut_off_and_its_pins_are_void(tmp_path: Path) -> None:
    """Its library would not do that: whoever writes into the pin table himself."""
    async with (
        running(tmp_path / "kv", service={"pinned_bytes_per_client_max": 1 << 20}) as service,
        connect(service.socket_path) as store,
        connect(service.socket_path) as other,
    ):
        names = [await store.put(*block_bytes(i, 600_000, 600_000)) for i in range(4)]
        sight = store._connector.sight
        assert sight is not None
        assert sight.view is not None
        lease = await store.get(names[0])
        sight.view.quota_bytes = 1 << 40
        more = [await store.get(name) for name in names[1:]]
        await eventually(lambda: sight.lost)
        with pytest.raises(LeaseError, match="get the block again"):
            _ = lease.key
        for block in (lease, *more):
            block.release()
        async with other.get(names[0]) as block:
            assert bytes(block.key) == block_bytes(0, 600_000, 600_000)[0]
        async with store.get(names[1]) as block:  # connected again
            assert bytes(block.key) == block_bytes(1, 600_000, 600_000)[0]


async def test_a_hot_prefix_takes_no_message_and_ends_at_the_quota(tmp_path: Path) -> None:
    async with served(tmp_path / "kv", service={"pinned_bytes_per_client_max": 3 << 20}) as store:
        for i in range(4):
            await store.put(*block_bytes(i, 500_000, 500_000), prefix=KEYS[i], parent=KEYS[i - 1] if i else None)
        asked = store.statistics()["gets"]
        async with store.get_prefix(KEYS[:2]) as blocks:
            assert [bytes(block.key) for block in blocks] == [block_bytes(i, 500_000, 500_000)[0] for i in range(2)]
        assert store.statistics()["gets"] == asked
        async with store.get_prefix(KEYS[:4]) as blocks:
            assert len(blocks) == 3
        assert store.statistics()["leases"] == 0
        async with store.get_prefix([KEYS[0], KEYS[7]]) as blocks:
            assert len(blocks) == 1


async def test_reservations_beyond_the_limit_wait_their_turn(tmp_path: Path) -> None:
    settings = {"put_wait_seconds_max": 4.0}
    async with served(tmp_path / "kv", service={"reserved_bytes_per_client_max": 1 << 20}, **settings) as store:
        blocks = [block_bytes(i, 300_000, 300_000) for i in range(8)]
        assert len(await asyncio.gather(*(store.put(*block) for block in blocks))) == 8
        async with store.reserve(key_bytes=2 << 20, value_bytes=0):  # one is always allowed
            with pytest.raises(TierFullError, match="reserved_bytes_per_client_max"):
                await store.put(*block_bytes(9))
        await store.put(*block_bytes(9))


async def test_many_pipelined_requests_wait_in_the_socket(tmp_path: Path) -> None:
    async with served(tmp_path / "kv", service={"requests_per_client_max": 2}) as store:
        name = await store.put(*block_bytes(1))
        leases = await asyncio.gather(*(store.get(name) for _ in range(500)), store.flush(), store.refresh())
        for lease in leases[:500]:
            assert isinstance(lease, ca.Block)
            lease.release()


async def test_too_many_clients_are_told_so(tmp_path: Path) -> None:
    async with running(tmp_path / "kv", service={"clients_max": 1}) as service, connect(service.socket_path) as store:
        with pytest.raises(ca.ThrottledError, match="1 clients"):
            await connect(service.socket_path)
        await store.put(b"still", b"works")


async def test_two_services_on_one_root_see_each_other_soon(tmp_path: Path) -> None:
    async with (
        running(tmp_path / "kv") as one,
        running(tmp_path / "kv", service={"refresh_seconds": 3600.0}) as two,  # only misses look
        connect(one.socket_path) as writer,
        connect(two.socket_path) as reader,
    ):
        await writer.put(*block_bytes(1), prefix=KEYS[0])
        await writer.flush()
        await eventually(lambda: reader.contains(KEYS[0]))
        async with reader.get_prefix(KEYS) as blocks:
            assert bytes(blocks[0].value) == block_bytes(1)[1]
        await writer.put(*block_bytes(2), prefix=KEYS[1])
        await writer.flush()

        async def found() -> bool:  # misses look at most every 50 ms, and a look may have begun before the flush
            with contextlib.suppress(BlockNotFoundError):
                async with reader.get(KEYS[1]) as block:
                    return bytes(block.value) == block_bytes(2)[1]
            return False

        await eventually(found)
        with pytest.raises(BlockNotFoundError):
            await reader.get(KEYS[2])


async def test_announced_prompts_are_promoted(tmp_path: Path) -> None:
    async with served(tmp_path / "kv") as store:
        for i in range(4):
            await store.put(*block_bytes(i), prefix=KEYS[i], parent=KEYS[i - 1] if i else None)
        await store.flush()
    async with served(tmp_path / "kv") as store:
        progress = await store.announce(KEYS, deadline_s=20.0).wait()
        assert (progress.landed, progress.unknown, progress.pending) == (4, 4, 0)
        assert (await store.lookup(KEYS)).tiers == ("shm",) * 4
        late = await store.announce(KEYS, deadline_s=0.0).wait()
        assert late.pending == 0
        with pytest.raises(ConfigError):
            store.announce(KEYS, deadline_s=-1.0)


async def test_sigterm_under_load_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    arena = f"cascade-test-{uuid.uuid4().hex[:12]}"
    command = [sys.executable, "-m", "cascade_aio", "serve", str(tmp_path / "kv"), "--shm", "32MiB", "--arena", arena]
    process = await asyncio.create_subprocess_exec(*command, "--socket", path, stdout=PIPE, stderr=PIPE)
    try:
        async with connect(path, wait_seconds=START_SECONDS_MAX, reconnect_seconds_max=0.1) as store:
            ids = [await store.put(*block_bytes(i)) for i in range(8)]
            await store.flush()

            async def load(seed: int) -> None:
                with contextlib.suppress(ServiceUnavailableError):
                    while True:
                        await store.put(*block_bytes(seed))
                        seed += 10
                        async with store.get(ids[seed % 8]) as block:
                            assert bytes(block.key) == block_bytes(seed % 8)[0]

            tasks = [asyncio.ensure_future(load(100 + i)) for i in range(4)]
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(START_SECONDS_MAX):
                out, log = await process.communicate()
                await asyncio.gather(*tasks)
        assert process.returncode == 0, log.decode()
        assert b"are safe in" in out
        assert f"rm /dev/shm/{arena}*" in out.decode()
        assert not os.path.exists(path)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        forget_arena(arena)
    async with ca.open_store(tmp_path / "kv", shm_bytes="32MiB", arena=arena + "-b") as embedded:
        for i, name in enumerate(ids):
            async with embedded.get(name) as block:
                assert bytes(block.key) == block_bytes(i)[0]
