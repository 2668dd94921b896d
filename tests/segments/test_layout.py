"""Roots and writer directories: what is refused, who may write where, what is never reused."""

from __future__ import annotations

import asyncio
import errno

import pytest

from cascade_aio.errors import ConfigError
from cascade_aio.segments.format import SegmentIdentity
from cascade_aio.segments.hosts import Host, why_a_free_lock_proves_nothing
from cascade_aio.segments.layout import (
    LEFT_SECONDS_MAX,
    SEQUENCES_RESERVED,
    claim_dead,
    claim_writer,
    find_root,
    list_writers,
    open_root,
)
from cascade_aio.segments.table import SegmentTable
from cascade_aio.testing.clock import ManualClock
from cascade_aio.testing.memory import MemoryDisk, MemoryStorage, Operation

CLOCK = ManualClock()


async def test_a_root_is_created_once_and_opened_by_all() -> None:
    storage = MemoryStorage()
    first = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    again = await open_root(MemoryStorage(storage.disk), "/kv", "sha256", clock=CLOCK)
    assert first.created
    assert not again.created
    assert first.store == again.store
    survivor = await open_root(storage.crash(), "/kv", "sha256", clock=CLOCK)
    assert survivor.store == first.store


async def test_two_processes_creating_one_root_agree() -> None:
    storage = MemoryStorage()
    roots = await asyncio.gather(
        *(open_root(MemoryStorage(storage.disk), "/kv", "sha256", clock=CLOCK) for _ in range(5))
    )
    assert len({root.store for root in roots}) == 1
    assert sum(root.created for root in roots) == 1


async def test_what_is_no_usable_root_is_refused_clearly() -> None:
    storage = MemoryStorage()
    with pytest.raises(ConfigError, match="digest='md5'"):
        await open_root(storage, "/kv", "md5", clock=CLOCK)
    with pytest.raises(ConfigError, match="holds no store"):
        await find_root(storage, "/kv")
    await storage.write_small("/file", [b"x"])
    with pytest.raises(ConfigError, match="is a file"):
        await open_root(storage, "/file", "sha256", clock=CLOCK)
    await storage.make_directory("/home")
    await storage.write_small("/home/thesis.tex", [b"x"])
    with pytest.raises(ConfigError, match=r"not empty \(it holds thesis.tex\)"):
        await open_root(storage, "/home", "sha256", clock=CLOCK)
    await open_root(storage, "/kv", "sha256", clock=CLOCK)
    with pytest.raises(ConfigError, match='digest="sha256"'):
        await open_root(storage, "/kv", "blake3", clock=CLOCK)
    text = storage.disk.content("/kv/cascade.json")
    await storage.write_small("/kv/cascade.json", [text.replace(b'"version": 1', b'"version": 7')])
    with pytest.raises(ConfigError, match="written by format 7, this version reads 1"):
        await open_root(storage, "/kv", "sha256", clock=CLOCK)
    await storage.write_small("/kv/cascade.json", [text[:20]])
    with pytest.raises(ConfigError, match="is damaged"):
        await open_root(storage, "/kv", "sha256", clock=CLOCK)
    await storage.write_small("/kv/cascade.json", [b'{"format": "other"}'])
    with pytest.raises(ConfigError, match="does not describe"):
        await open_root(storage, "/kv", "sha256", clock=CLOCK)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
async def test_a_root_that_cannot_be_written_is_refused(code: int) -> None:
    storage = MemoryStorage()
    storage.hooks.append(lambda op: OSError(code, "no way") if op.name == "make_directory" else None)
    with pytest.raises(ConfigError, match="not writable: no way"):
        await open_root(storage, "/kv", "sha256", clock=CLOCK)


async def test_writer_directories_are_adopted_by_the_same_host_one_at_a_time() -> None:
    storage = MemoryStorage()
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    first = await claim_writer(storage, root, Host("a", "boot of a"))
    second = await claim_writer(storage, root, Host("a", "boot of a"))
    assert first.writer != second.writer
    assert await first.take_sequence(storage) == 1
    await first.save(storage)
    first.release()
    other_host = await claim_writer(storage, root, Host("b", "boot of b"))
    assert other_host.writer not in (first.writer, second.writer), "a lock proves nothing about another node"
    adopted = await claim_writer(storage, root, Host("a", "boot of a"))
    assert (adopted.writer, adopted.adopted, adopted.sequence_next) == (first.writer, True, 2)
    assert len(await list_writers(storage, root)) == 3


async def test_a_crashed_writer_directory_is_adopted_above_its_files() -> None:
    storage = MemoryStorage()
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    claim = await claim_writer(storage, root, Host("a", "boot of a"))
    await storage.create(f"{claim.path}/0000000041.seg")
    await storage.create(f"{claim.path}/notes.txt")
    after = storage.kill()
    adopted = await claim_writer(after, root, Host("a", "boot of a"))
    assert adopted.sequence_next == 1 + SEQUENCES_RESERVED, "what the killed process may have used"
    adopted.release()
    await after.create(f"{claim.path}/0000009999.seg")
    assert (await claim_writer(after.kill(), root, Host("a", "boot of a"))).sequence_next == 10_000


async def test_numbers_are_never_reused_even_when_a_killed_process_removed_its_segments() -> None:
    storage = MemoryStorage()
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    used: list[int] = []
    for session in range(4):
        claim = await claim_writer(storage, root, Host("a", "boot of a"))
        used += [await claim.take_sequence(storage) for _ in range(1 + session * SEQUENCES_RESERVED * 2 // 3)]
        if session == 1:
            await claim.save(storage)
            claim.release()
        else:
            storage = storage.kill()
    assert used == sorted(set(used))
    assert used[1] > used[0] + 1, "a batch is left out after a kill"


async def test_a_number_that_cannot_be_reserved_is_not_given_out() -> None:
    storage = MemoryStorage()
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    claim = await claim_writer(storage, root, Host("a", "boot of a"))
    for _ in range(SEQUENCES_RESERVED):
        await claim.take_sequence(storage)
    storage.hooks.append(lambda op: OSError(errno.ENOSPC, "full") if op.name == "write_small" else None)
    with pytest.raises(OSError, match="full"):
        await claim.take_sequence(storage)


async def test_every_directory_that_was_created_is_synced() -> None:
    storage = MemoryStorage()
    root = await open_root(storage, "/data/team/kv", "sha256", clock=CLOCK)
    await claim_writer(storage, root, Host("a", "boot of a"))
    survivor = storage.crash()
    assert (await open_root(survivor, "/data/team/kv", "sha256", clock=CLOCK)).store == root.store


async def test_without_locks_every_opener_gets_its_own_directory() -> None:
    storage = MemoryStorage(MemoryDisk(locks=False))
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    claims = [await claim_writer(storage, root, Host("a", "boot of a")) for _ in range(3)]
    assert len({claim.writer for claim in claims}) == 3
    assert all(claim.lock is None and not claim.adopted for claim in claims)


async def test_descriptors_are_bounded_and_shared() -> None:
    storage = MemoryStorage()
    table = SegmentTable(storage, "/kv", handles_max=3)
    await storage.make_directory(f"/kv/writers/{bytes(16).hex()}")
    for sequence in range(10):
        entry = table.add(SegmentIdentity(bytes(16), sequence), own=False)
        await storage.create(entry.path)
    for created in list(storage.open_files):
        await created.close()
    assert [entry.number for entry in table] == list(range(10)), "dense, in order"

    async def use(number: int) -> None:
        async with table.opened(number) as file:
            assert file.path == table[number].path
            await asyncio.sleep(0.001)

    await asyncio.gather(*(use(number % 2) for number in range(20)))
    assert storage.counts["open"] == 2, "concurrent readers share one descriptor"
    for number in range(10):
        await use(number)
    assert len(storage.open_files) == table.open_handles == 3
    async with table.opened(9) as file:
        await table.forget(9)
        assert file in storage.open_files, "a reader keeps what it holds"
    assert file not in storage.open_files
    with pytest.raises(FileNotFoundError):
        await use(9)
    again = table.add(SegmentIdentity(bytes(16), 9), own=False)
    assert again.number == 10, "numbers are not reused"
    await storage.unlink(table[1].path)
    table2 = SegmentTable(storage, "/kv")
    table2.add(SegmentIdentity(bytes(16), 1), own=False)
    with pytest.raises(FileNotFoundError):
        async with table2.opened(0):
            pass
    assert table2.open_handles == 0, "a failed open leaves nothing"
    await table.aclose()
    assert not storage.open_files


def test_a_free_lock_proves_death_only_within_one_kernel() -> None:
    here = Host("a", "boot-1")
    assert why_a_free_lock_proves_nothing({"host": "a", "boot": "boot-1"}, here) is None
    assert why_a_free_lock_proves_nothing({"host": "container", "boot": "boot-1"}, here) is None
    assert "host b" in str(why_a_free_lock_proves_nothing({"host": "b", "boot": "boot-2"}, here))
    assert "another boot" in str(why_a_free_lock_proves_nothing({"host": "a", "boot": "boot-2"}, here))
    assert "another boot" in str(why_a_free_lock_proves_nothing({"host": "a"}, Host("a", "")))
    local = Host("a", "boot-1", sees_all_locks=True)
    assert why_a_free_lock_proves_nothing({"host": "b", "boot": "boot-2"}, local) is None


async def test_the_directory_that_was_closed_last_is_taken_first() -> None:
    storage, clock, host = MemoryStorage(), ManualClock(tick_ns=1000), Host("a", "boot")
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    claims = [await claim_writer(storage, root, host, clock) for _ in range(4)]
    for claim in (claims[0], claims[3], claims[1]):
        await claim.save(storage)
        claim.release()
    claims[2].release()  # as if killed
    taken = [(await claim_writer(storage, root, host, clock)).writer for _ in range(4)]
    assert taken == [claims[number].writer for number in (1, 3, 0, 2)]


async def test_numbers_that_others_used_between_the_look_and_the_lock_are_not_used_again() -> None:
    storage, host = MemoryStorage(), Host("a", "boot")
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    first = await claim_writer(storage, root, host)
    first.release()

    async def quicker(operation: Operation) -> None:
        if operation.name == "try_lock" and not operation.after:
            storage.hooks.clear()
            other = await claim_writer(storage, root, host)
            assert [await other.take_sequence(storage) for _ in range(3)] == [1025, 1026, 1027]
            await other.save(storage)
            other.release()

    storage.hooks.append(quicker)
    assert (await claim_writer(storage, root, host)).sequence_next == 1028


async def test_dead_writers_with_segments_are_claimed_and_others_are_named() -> None:
    storage, clock, here = MemoryStorage(), ManualClock(), Host("a", "boot")
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    hosts = {"alive": here, "dead": here, "closed": here, "empty": here, "far": Host("b", "other"), "nameless": here}
    claims = {name: await claim_writer(storage, root, host, clock) for name, host in hosts.items()}
    for name, claim in claims.items():
        if name != "empty":
            await storage.create(f"{claim.path}/0000000001.seg")
        if name == "closed":
            await claim.save(storage)
        if name != "alive":
            claim.release()
    await storage.unlink(f"{claims['nameless'].path}/writer.json")
    mine = {claims["alive"].writer}
    found = await claim_dead(storage, root, here, clock, except_for=mine)
    assert [claim.writer for claim in found.claims] == [claims["dead"].writer]
    assert found.left.keys() == {claims["far"].writer, claims["nameless"].writer}
    clock.advance(LEFT_SECONDS_MAX)
    later = await claim_dead(storage, root, here, clock, except_for=mine, vouched_for={claims["far"].writer})
    assert {claim.writer for claim in later.claims} == {claims["closed"].writer, claims["far"].writer}
    assert "alive" in later.left[claims["dead"].writer], "claimed already"


async def test_a_writer_that_was_closed_in_the_future_is_adopted() -> None:
    """Its clock was ahead, or ours was set back: nobody waits years for it to come back for its directory."""
    storage, clock, here = MemoryStorage(), ManualClock(), Host("a", "boot")
    root = await open_root(storage, "/kv", "sha256", clock=CLOCK)
    ahead = ManualClock()
    ahead.advance(2 * LEFT_SECONDS_MAX)
    claim = await claim_writer(storage, root, here, ahead)
    await storage.create(f"{claim.path}/0000000001.seg")
    await claim.save(storage)
    claim.release()
    found = await claim_dead(storage, root, here, clock, except_for=())
    assert [claim.writer for claim in found.claims] == [claim.writer]
