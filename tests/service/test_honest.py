"""What an honest client does, however awkward the moment: it keeps its connection, its bytes and its order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import sys
import uuid
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cascade_aio import Block, BlockMeta, prefix_keys
from cascade_aio.daemon import Service, connect
from cascade_aio.daemon import protocol as p
from cascade_aio.errors import LeaseError, ProtocolError, ServiceUnavailableError, TierFullError
from cascade_aio.store.publishing import UPKEEP_TICKS
from cascade_aio.testing.store import eventually
from cascade_aio.tiers.directory import ClientPins
from tests.service.conftest import forget_arena, running, served


def looks(service: Service) -> None:
    """Let the service look at every client's quota, without waiting for the second in which it would."""
    for _ in range(4 * UPKEEP_TICKS):
        service._publisher.tick()


def fenced(service: Service) -> int:
    """Extents that nobody uses because a client of the service before may write into them."""
    return int(service.node.statistics()["shm"]["directory"]["fenced_extents"])


async def test_who_fills_an_extent_while_the_service_is_started_anew_writes_over_nobody(tmp_path: Path) -> None:
    arena = f"cascade-test-{uuid.uuid4().hex[:12]}"
    try:
        async with running(tmp_path / "kv", arena=arena) as service:
            slow = await connect(service.socket_path)
            filling = slow.reserve(key_bytes=0, value_bytes=6 << 20)
            slot = await filling.__aenter__()
        async with running(tmp_path / "kv", arena=arena) as service, connect(service.socket_path) as other:
            await eventually(lambda: service.clients == 2)
            names = [await other.put(b"", np.full(3 << 20, 50 + i, np.uint8)) for i in range(4)]
            slot.value[:] = 1
            for i, name in enumerate(names):
                async with other.get(name) as block:
                    assert set(np.unique(block.value)) == {50 + i}
            assert fenced(service) == 1
            with pytest.raises(ServiceUnavailableError, match="lost"):
                await filling.__aexit__(None, None, None)
            await eventually(lambda: not fenced(service))
            await slow.aclose()
    finally:
        forget_arena(arena)


async def test_a_stream_whose_wait_was_cancelled_goes_on_with_the_same_block(tmp_path: Path) -> None:
    async with served(tmp_path / "kv") as store:
        names = [await store.put(b"", bytes([i]) * 4096) for i in range(4)]
        async with store.stream(names) as blocks:
            assert (await anext(blocks)).block_id == names[0]
            link = store._connector.link
            assert link is not None
            asked = asyncio.ensure_future(anext(blocks))
            await asyncio.sleep(0)
            answer = link._take
            with pytest.MonkeyPatch.context() as patch:  # the answer comes, and in the same turn nobody waits
                patch.setattr(link, "_take", lambda reply: (asked.cancel(), answer(reply)))
                with pytest.raises(asyncio.CancelledError):
                    await asked
            rest = [block.block_id async for block in blocks]
        assert rest == names[1:]
        assert store.statistics()["leases"] == 0


async def test_a_stream_that_leased_too_much_goes_on_with_the_same_block(tmp_path: Path) -> None:
    async with served(tmp_path / "kv", service={"pinned_bytes_per_client_max": 2 << 20}) as store:
        names = [await store.put(b"", bytes([i]) * (1 << 20)) for i in range(4)]
        async with store.get(names[3]), store.stream(names) as blocks:
            with pytest.raises(TierFullError, match="release blocks"):
                await anext(blocks)
            assert blocks.position == 0
        async with store.stream(names) as blocks:
            one = await store.get(names[3])
            with pytest.raises(TierFullError):
                await anext(blocks)
            one.release()
            assert [block.block_id async for block in blocks] == names


async def test_a_flush_does_not_speak_for_what_was_put_while_it_was_under_way(tmp_path: Path) -> None:
    path = str(tmp_path / "kv.sock")
    async with contextlib.AsyncExitStack() as scopes:
        async with running(tmp_path / "kv", service={"socket": path}) as service:
            store = await scopes.enter_async_context(connect(path))
            await store.put(b"before", b"the flush")
            flush, under_way, goes_on = service.node.store.flush, asyncio.Event(), asyncio.Event()

            async def flush_slowly() -> None:
                await flush()
                under_way.set()
                await goes_on.wait()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(service.node.store, "flush", flush_slowly)
                flushing = asyncio.ensure_future(store.flush())
                await under_way.wait()
                await store.put(b"meanwhile", b"put")
                goes_on.set()
                await flushing
        async with running(tmp_path / "kv", service={"socket": path}):
            with pytest.raises(ServiceUnavailableError, match="put it again"):
                await store.flush()
            await store.put(b"meanwhile", b"put")
            await store.flush()
            await store.flush()


async def test_more_puts_at_once_than_requests_wait_for_each_other(tmp_path: Path) -> None:
    """What the first ones wait for, a seal, does not stand behind the last ones in the socket."""
    quota = {"requests_per_client_max": 8, "reserved_bytes_per_client_max": 1 << 20}
    async with served(tmp_path / "kv", service=quota, put_wait_seconds_max=60.0) as store:
        blocks = [bytes([i]) * 300_000 for i in range(64)]
        names = await asyncio.gather(*(store.put(b"", block) for block in blocks))
        assert len(set(names)) == 64


async def test_calls_that_wait_for_their_turn_are_cancelled_and_end_with_the_connection(tmp_path: Path) -> None:
    async with (
        running(tmp_path / "kv", service={"requests_per_client_max": 3}) as service,
        connect(service.socket_path, reconnect_seconds_max=0.0) as store,
    ):
        name = await store.put(b"a", b"b")
        ready, goes_on = service.node.store.wait_ready, asyncio.Event()

        async def wait_ready() -> None:
            await goes_on.wait()
            await ready()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.node.store, "wait_ready", wait_ready)
            under_way = [asyncio.ensure_future(store.wait_ready()) for _ in range(2)]
            waiting = [asyncio.ensure_future(store.contains(name)) for _ in range(5)]
            await asyncio.sleep(0)
            link = store._connector.link
            assert link is not None
            assert len(link._turns) == 5
            waiting[0].cancel()
            goes_on.set()
            await asyncio.sleep(0)
            waiting[1].cancel()
            assert await asyncio.gather(*under_way, *waiting[2:]) == [None, None, True, True, True]
            assert not link._turns
            goes_on.clear()
            under_way = [asyncio.ensure_future(store.wait_ready()) for _ in range(2)]
            waiting = [asyncio.ensure_future(store.contains(name)) for _ in range(5)]
            await asyncio.sleep(0)
            Path(service.socket_path).unlink()  # nobody comes back
            for session in list(service._sessions.values()):
                session.say_goodbye("cut off by the test")
            for call in (*under_way, *waiting):
                with pytest.raises(ServiceUnavailableError):
                    await call


async def test_what_a_client_fills_does_not_count_as_what_it_leases(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        names = [await store.put(b"", bytes([i]) * (1 << 20)) for i in range(7)]  # of 8 MiB that it may lease
        leases = [await store.get(name) for name in names]
        async with store.reserve(key_bytes=0, value_bytes=3 << 20) as slot:
            slot.value[:] = 1
            looks(service)
        assert bytes(leases[0].value[:1]) == b"\0"
        for lease in leases:
            lease.release()
        assert service.node.counters.protocol_errors == 0


async def test_one_block_larger_than_the_quota_may_be_leased(tmp_path: Path) -> None:
    quota = {"pinned_bytes_per_client_max": 1 << 20}
    async with running(tmp_path / "kv", service=quota) as service, connect(service.socket_path) as store:
        name = await store.put(b"", bytes(3 << 20))
        async with store.get(name):
            looks(service)
        assert service.node.counters.protocol_errors == 0


async def test_answers_on_their_way_are_within_the_quota(tmp_path: Path) -> None:
    """A client that does not come to read for a while is not cut off for what it was sent."""
    quota = {"pinned_bytes_per_client_max": 2 << 20}
    async with running(tmp_path / "kv", service=quota) as service, connect(service.socket_path) as store:
        names = [await store.put(b"", bytes([i]) * (900 << 10)) for i in range(6)]
        own = [await store.get(name) for name in names[:2]]
        link = store._connector.link
        assert link is not None
        assert link._transport is not None
        asked = [asyncio.ensure_future(store._getter.load(name)) for name in names]
        await asyncio.sleep(0)
        link._transport.pause_reading()
        await eventually(lambda: service.node.counters.failed_requests >= 3)
        looks(service)
        link._transport.resume_reading()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for lease in own:
            lease.release()
        for answer in answers:
            if isinstance(answer, BaseException):
                assert isinstance(answer, TierFullError)
            else:
                answer.release()
        assert service.node.counters.protocol_errors == 0
        async with store.get(names[5]) as block:
            assert bytes(block.value[:1]) == b"\5"
        pins = service._sessions[1].holdings.pins
        assert pins is not None
        assert not len(pins.taken())


async def test_a_prefix_whose_answer_would_be_too_long_is_asked_for_in_parts(tmp_path: Path) -> None:
    count = 40
    async with (
        running(tmp_path / "kv") as service,
        connect(service.socket_path) as store,
    ):
        keys = prefix_keys(range(count), block_tokens=1, namespace="long")
        for i, key in enumerate(keys):
            await store.put(b"", bytes([i]), prefix=key, meta=BlockMeta(extra=bytes(900)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(p, "FRAME_BYTES_MAX", 20_000)
            with pytest.raises(ProtocolError, match="ask for less at once"):
                await store.get_prefix(keys)
            assert service._statistics()["leases"] == 0  # what could not be told is not leased
            patch.setattr(p, "GRANTS_MAX", 16)
            async with store.get_prefix(keys) as blocks:
                assert [bytes(block.value) for block in blocks] == [bytes([i]) for i in range(count)]
        await eventually(lambda: service._statistics()["leases"] == 0)


async def test_a_prefix_of_blocks_that_are_leased_by_message_ends_at_the_quota(tmp_path: Path) -> None:
    async with served(tmp_path / "kv", service={"leases_per_client_max": 3}) as store:
        keys = prefix_keys(range(5), block_tokens=1, namespace="long")
        for i, key in enumerate(keys):
            await store.put(b"", bytes([i]), prefix=key, meta=BlockMeta(extra=bytes(900)))
        async with store.get_prefix(keys) as blocks:
            assert len(blocks) == 3
            with pytest.raises(LeaseError, match="3 leases"):
                await store.get_prefix(keys)


async def test_a_stream_that_is_closed_while_somebody_waits_for_it_costs_nothing_else(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        names = [await store.put(b"", bytes([i]) * 4096) for i in range(4)]
        blocks = store.stream(names)
        await anext(blocks)
        waiting = asyncio.ensure_future(anext(blocks))
        await asyncio.sleep(0)
        await blocks.aclose()
        with pytest.raises(StopAsyncIteration):
            await waiting
        await store.flush()
        assert service.node.counters.protocol_errors == 0


async def test_a_lease_that_is_released_while_somebody_waits_for_its_bytes_costs_nothing_else(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        lease = await store.get(await store.put(b"", b"numbered", meta=BlockMeta(extra=bytes(900))))
        link = store._connector.link
        assert link is not None
        waiting = asyncio.ensure_future(link.call(p.Ready(0, 1, 0, 8)))
        await asyncio.sleep(0)
        lease.release()
        reply = await waiting
        assert isinstance(reply, p.Answer)
        assert reply.value is True
        await store.flush()
        assert service.node.counters.protocol_errors == 0


async def test_what_one_client_reports_does_not_cost_another_its_connection(tmp_path: Path) -> None:
    async with (
        running(tmp_path / "kv") as service,
        connect(service.socket_path) as nonsense,
        connect(service.socket_path) as store,
    ):
        link = nonsense._connector.link
        assert link is not None
        link.note(p.Report(p.SIZE_MAX, p.SIZE_MAX))
        await eventually(lambda: service.node.counters.protocol_errors == 1)
        assert (await store.statistics())["service"]["shared_hits"] < p.SIZE_MAX
        assert store.statistics()["reconnects"] == 0


@pytest.mark.parametrize("why", ["no descriptors", "another pid namespace"])
async def test_a_process_that_cannot_be_watched_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def fail(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with (
        running(tmp_path / "kv") as service,
        connect(service.socket_path) as store,
        connect(service.socket_path) as other,
    ):
        lease = await store.get(await store.put(b"", bytes([1]) * (2 << 20)))
        kept = lease.value
        session = service._sessions[1]
        if why == "no descriptors":
            monkeypatch.setattr(os, "pidfd_open", fail)
        else:
            session.peer = dataclasses.replace(session.peer, pid=0)
        session.say_goodbye("cut off by the test")
        await eventually(lambda: 1 not in service._sessions)
        for i in range(8):  # more than the arena holds
            await other.put(b"", bytes([10 + i]) * (3 << 20))
        assert set(np.unique(kept)) == {1}
        del kept
        lease.release()


async def test_what_a_dead_process_held_is_free_although_a_process_that_it_forked_lives(tmp_path: Path) -> None:
    """As those of data loaders do: the child has inherited the connection, and never says a word."""
    code = """
import asyncio, os, sys
import cascade_aio as ca

async def main():
    async with ca.connect(sys.argv[1]) as store:
        lease = await store.get([info async for info in store.blocks()][0].block_id)
        child = os.fork()
        if not child:
            os.read(0, 1)  # until the test closes it
            os._exit(0)
        print("forked", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        name = await store.put(b"", b"leased")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, service.socket_path, stdin=PIPE, stdout=PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert await process.stdout.readline() == b"forked\n"
            process.kill()
            await eventually(lambda: service.clients == 1)
            assert service.node.statistics()["service"]["lingering"] == 0
            publisher = service._publisher
            looks(service)
            assert publisher.statistics()["clients"] == 1
            await store.delete(name)
        finally:
            process.stdin.close()
            await process.communicate()


async def test_what_is_pinned_at_the_moment_of_being_cut_off_stays(tmp_path: Path) -> None:
    """A pin needs no message, so it may come right after the service has looked for pins and found none."""
    async with (
        running(tmp_path / "kv") as service,
        connect(service.socket_path) as store,
        connect(service.socket_path) as other,
    ):
        name = await store.put(b"", bytes([1]) * (2 << 20))
        pins = service._sessions[1].holdings.pins
        assert pins is not None
        look, leases = type(pins).pinned, list[Block]()

        def look_and_be_late(self: ClientPins) -> Iterator[int]:
            found = list(look(self))
            if self is pins and not leases:
                lease = store._getter.try_hot(name)
                assert lease is not None
                leases.append(lease)
            return iter(found)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(pins), "pinned", look_and_be_late)
            service._sessions[1].say_goodbye("cut off by the test")
            await eventually(lambda: 1 not in service._sessions)
            lease = leases.pop() if leases else await store.get(name)
        kept = lease.value
        for i in range(8):  # more than the arena holds
            await other.put(b"", bytes([10 + i]) * (3 << 20))
        assert set(np.unique(kept)) == {1}
        del kept
        lease.release()
        await store.contains(name)
        await eventually(lambda: service.node.statistics()["service"]["lingering"] == 0)


async def test_clients_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    async with running(tmp_path / "kv") as service:
        for i in range(20):
            async with connect(service.socket_path) as store:
                lease = await store.get(await store.put(b"", bytes([i]) * 4096))
                lease.release()
            await eventually(lambda: not service.clients)
            assert service.node.statistics()["service"]["lingering"] == 0
        assert service._publisher.statistics()["clients"] == 0


async def test_a_service_without_descriptors_goes_on(tmp_path: Path) -> None:
    """Looking whether a client lives takes one; without, it is taken to live."""
    async with running(tmp_path / "kv") as service, connect(service.socket_path) as store:
        name = await store.put(b"", b"bytes")
        gone = service._sessions[1].holdings.pins
        assert gone is not None
        with pytest.MonkeyPatch.context() as patch:
            open_, path = os.open, gone.path

            def fail(file: str, *rest: int) -> int:
                if file == path:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                return open_(file, *rest)

            patch.setattr(os, "open", fail)
            assert gone.is_alive()
            service._sessions[1].say_goodbye("cut off by the test")
            await eventually(lambda: 1 not in service._sessions)
        assert not service.failed.is_set()
        async with store.get(name) as block:
            assert bytes(block.value) == b"bytes"
