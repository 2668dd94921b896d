"""A store that is opened on the arena of one that ended, in whatever way."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import cascade_aio
from cascade_aio import Store, open_store
from cascade_aio.model import PrefixKey, Tier, prefix_keys
from cascade_aio.store.publishing import Publisher
from cascade_aio.store.rewarming import extent_bytes_of, judge_slots
from cascade_aio.tiers.arena import remove_arena
from cascade_aio.tiers.directory import ClientPins, DirectoryEntry, SlotState
from cascade_aio.tiers.directory_format import DIRECTORY_SUFFIX
from cascade_aio.tiers.view import DirectoryView

KEYS = prefix_keys(range(16 * 12), 16)
PART_BYTES = 60_000

CHILD = """
import asyncio, os, signal, sys
import cascade_aio
from cascade_aio.model import prefix_keys

async def main(root, shm_dir, unflushed):
    keys = prefix_keys(range(16 * 12), 16)
    store = await cascade_aio.open_store(root, shm_bytes="4MiB", shm_dir=shm_dir, arena="kept", warm_restart=True,
        tail_seconds_max=3600)
    for number, key in enumerate(keys):
        if number == len(keys) - unflushed:
            await store.flush()
        parent = keys[number - 1] if number else None
        meta = cascade_aio.BlockMeta(tokens=number)
        await store.put(bytes([number]) * 60_000, bytes([255 - number]) * 60_000, prefix=key, parent=parent, meta=meta)
    if not unflushed:
        await store.flush()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.fixture
def shm_dir(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "shm"
    directory.mkdir()
    yield directory
    remove_arena(str(directory / "kept"))
    assert list(directory.iterdir()) == []


async def reopened(tmp_path: Path, **settings: object) -> Store:
    options: dict[str, object] = {"shm_bytes": "4MiB", "arena": "kept", "warm_restart": True, **settings}
    return await open_store(tmp_path / "root", shm_dir=str(tmp_path / "shm"), **options)


def killed(tmp_path: Path, unflushed: int = 0) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "root"), str(tmp_path / "shm"), str(unflushed)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def publisher_of(store: Store) -> Publisher:
    publisher = store.parts.context.publisher
    assert publisher is not None
    return publisher


def connect(store: Store, quota_bytes: int = 1 << 30) -> tuple[ClientPins, DirectoryView]:
    publisher = publisher_of(store)
    client = publisher.open_client(quota_bytes)
    fds = (publisher.directory_fd(), client.take_fd())
    view = DirectoryView(*fds)
    for fd in fds:
        os.close(fd)
    return client, view


async def check_all(store: Store, keys: list[PrefixKey] = KEYS) -> None:
    for number, key in enumerate(keys):
        async with store.get(key) as block:
            assert bytes(block.key) == bytes([number]) * PART_BYTES
            assert bytes(block.value) == bytes([255 - number]) * PART_BYTES
            assert block.meta == cascade_aio.BlockMeta(tokens=number)


async def until(condition: object, seconds: float = 60) -> None:
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # another process or a look in its own time: no event


@pytest.fixture
async def store(tmp_path: Path, shm_dir: Path) -> AsyncIterator[Store]:
    """Filled, closed cleanly, and opened again."""
    first = await reopened(tmp_path)
    for number, key in enumerate(KEYS):
        meta = cascade_aio.BlockMeta(tokens=number)
        await first.put(
            bytes([number]) * PART_BYTES, bytes([255 - number]) * PART_BYTES, prefix=key, meta=meta,
            parent=KEYS[number - 1] if number else None,
        )  # fmt: skip
    await first.aclose()
    again = await reopened(tmp_path)
    yield again
    await again.aclose()


async def test_after_a_clean_end_everything_is_served_without_a_disk_read(store: Store) -> None:
    assert set(store.lookup(KEYS).tiers) == {Tier.SHM}
    await check_all(store)
    statistics = store.statistics()
    assert statistics["disk"]["records_read"] == 0
    assert statistics["shm"]["rewarmed"]["blocks"] == statistics["shm"]["rewarmed"]["verified"] == len(KEYS)
    assert statistics["store"]["shm_hits"] == len(KEYS)
    _, view = connect(store)
    assert view.lookup(KEYS) == len(KEYS)
    view.close()


@pytest.mark.parametrize("unflushed", [0, 5])
async def test_after_a_kill_everything_is_served_and_the_rest_is_written(
    tmp_path: Path, shm_dir: Path, unflushed: int
) -> None:
    killed(tmp_path, unflushed)
    store = await reopened(tmp_path)
    rewarmed = store.statistics()["shm"]["rewarmed"]
    assert rewarmed["blocks"] == len(KEYS)
    assert rewarmed["unwritten"] <= unflushed
    await check_all(store)
    assert store.statistics()["disk"]["records_read"] == 0
    await store.aclose()
    remove_arena(str(shm_dir / "kept"))
    store = await reopened(tmp_path)  # from the disk alone, with all names
    assert len(store.lookup(KEYS)) == len(KEYS)
    await check_all(store)
    assert store.statistics()["disk"]["records_read"] == len(KEYS)
    await store.aclose()


async def test_damage_in_the_arena_is_never_handed_out(tmp_path: Path, shm_dir: Path) -> None:
    killed(tmp_path, unflushed=1)
    path = shm_dir / "kept"
    content = bytearray(path.read_bytes())
    for number in (2, 3, 11):  # 11 is nowhere else
        place = content.index(bytes([number]) * PART_BYTES)
        content[place + 1234] ^= 1
    place = content.index(bytes([4]) * PART_BYTES)
    content[place - 4096 : place] = bytes(4096)  # its header
    with open(path, "r+b") as file:
        file.write(content)
    store = await reopened(tmp_path)
    with pytest.raises(cascade_aio.BlockNotFoundError):
        await store.get(KEYS[11])
    await check_all(store, KEYS[:11])
    statistics = store.statistics()
    assert statistics["disk"]["records_read"] == 3
    assert statistics["shm"]["rewarmed"]["damaged"] == 4
    await store.aclose()


async def test_what_was_deleted_stays_deleted(store: Store, tmp_path: Path) -> None:
    await store.delete(KEYS[5])
    await store.flush()
    await store.aclose()
    again = await reopened(tmp_path)
    assert len(again.lookup(KEYS)) == 5
    assert again.statistics()["shm"]["rewarmed"]["blocks"] == len(KEYS) - 1
    await again.aclose()


async def test_dormant_blocks_make_room_like_others(store: Store) -> None:
    for number in range(60):
        await store.put(random.Random(number).randbytes(100_000), b"")
    await store.flush()
    assert store.statistics()["shm"]["evicted_blocks"] > len(KEYS)
    await check_all(store)


async def test_many_who_ask_at_once_for_a_dormant_block_cost_one_look(store: Store) -> None:
    blocks = await asyncio.gather(*(store.get(KEYS[3]) for _ in range(20)))
    assert store.statistics()["shm"]["rewarmed"]["verified"] == 1
    for block in blocks:
        assert bytes(block.key[:1]) == bytes([3])
        block.release()


async def test_a_dormant_block_that_is_put_again_or_deleted_meanwhile(store: Store) -> None:
    getting = asyncio.ensure_future(_get(store, KEYS[7]))
    await asyncio.sleep(0)
    await store.delete(KEYS[7])
    with pytest.raises(cascade_aio.BlockNotFoundError):
        await getting
    same = bytes([8]) * PART_BYTES, bytes([247]) * PART_BYTES
    block_id = await store.put(*same)
    async with store.get(block_id) as block:
        assert bytes(block.key) == same[0]
    await check_all(store, KEYS[:7])


async def _get(store: Store, key: PrefixKey) -> bytes:
    async with store.get(key) as block:
        return bytes(block.key)


@pytest.mark.parametrize(("settings", "reason"), [({"shm_bytes": "8MiB"}, "8 MiB are configured")])
async def test_an_arena_of_another_size_starts_empty_and_says_so(
    store: Store, tmp_path: Path, settings: dict[str, object], reason: str
) -> None:
    await store.aclose()
    again = await reopened(tmp_path, **settings)
    assert reason in again.statistics()["shm"]["rewarmed"]["empty_because"]
    await check_all(again)
    await again.aclose()


async def test_an_arena_that_is_still_read_is_not_taken_over(tmp_path: Path, shm_dir: Path) -> None:
    first = await reopened(tmp_path)
    await first.put(b"", bytes([1]) * PART_BYTES, prefix=KEYS[0])
    async with first.get(KEYS[0]) as block:
        kept = block.value
    del block
    with pytest.warns(ResourceWarning, match="1 leases"):
        await first.aclose()
    again = await reopened(tmp_path)
    for number in range(2, 82):  # more than the arena holds
        await again.put(b"", bytes([number]) * PART_BYTES)
    assert bytes(kept) == bytes([1]) * PART_BYTES
    async with again.get(KEYS[0]) as block:
        assert bytes(block.value) == bytes([1]) * PART_BYTES
        assert block.tier is Tier.DISK
    await again.aclose()


async def test_an_arena_of_another_root_starts_empty(store: Store, tmp_path: Path) -> None:
    await store.aclose()
    options: dict[str, object] = {"shm_bytes": "4MiB", "arena": "kept", "warm_restart": True}
    other = await open_store(tmp_path / "other", shm_dir=str(tmp_path / "shm"), **options)
    assert "another root" in other.statistics()["shm"]["rewarmed"]["empty_because"]
    assert len(other) == 0
    await other.aclose()


@pytest.mark.parametrize("seed", range(8))
async def test_a_garbled_directory_never_gives_wrong_bytes(store: Store, tmp_path: Path, seed: int) -> None:
    await store.aclose()
    chance = random.Random(seed)
    path = tmp_path / "shm" / f"kept{DIRECTORY_SUFFIX}"
    content = bytearray(path.read_bytes())
    for _ in range(3000):
        content[chance.randrange(4096, len(content))] = chance.randrange(256)
    if seed == 0:
        content[:] = bytes(len(content))
    with open(path, "r+b") as file:
        file.write(content)
    again = await reopened(tmp_path)
    await check_all(again)
    for number in range(20):
        await again.put(chance.randbytes(100_000 + number), b"")
    await check_all(again)
    await again.aclose()


# -- clients ------------------------------------------------------------------------------------


async def test_a_clients_pin_is_not_evicted_and_its_use_counts(store: Store) -> None:
    await check_all(store)
    _, view = connect(store)
    publisher = publisher_of(store)
    pinned = view.pin(KEYS[11])
    assert pinned is not None
    publisher.tick()
    assert publisher.used == 1

    async def press(number: int) -> None:
        await store.put(random.Random(number).randbytes(100_000), b"")

    for number in range(400):
        await press(number)
        assert KEYS[11] in view
    statistics = store.statistics()["shm"]["directory"]
    assert statistics["vetoes"] > 0
    assert statistics["lent_blocks"] == 1
    view.unpin(pinned.slot, pinned.nbytes)
    publisher.tick()
    assert store.statistics()["shm"]["directory"]["lent_blocks"] == 0
    for number in range(400, 800):
        await press(number)
    assert KEYS[11] not in view
    view.close()


async def test_a_deleted_block_keeps_its_bytes_until_the_client_lets_go(store: Store) -> None:
    await check_all(store)
    _, view = connect(store)
    pinned = view.pin(KEYS[11])
    assert pinned is not None
    before = store.statistics()["shm"]["allocated_bytes"]
    await store.delete(KEYS[11])
    assert view.pin(KEYS[11]) is None
    assert store.statistics()["shm"]["allocated_bytes"] == before
    memory = store.parts.context.shm._arena.memory
    start = pinned.offset + pinned.header_bytes
    for number in range(60):
        await store.put(random.Random(number).randbytes(100_000), b"")
    assert bytes(memory[start : start + PART_BYTES]) == bytes([11]) * PART_BYTES
    view.unpin(pinned.slot, pinned.nbytes)
    publisher_of(store).tick()
    assert store.statistics()["shm"]["directory"]["lent_blocks"] == 0
    del memory
    view.close()


async def test_what_a_gone_client_had_comes_back_at_once(store: Store) -> None:
    await check_all(store)
    client, view = connect(store)
    assert view.pin(KEYS[11]) is not None
    await store.delete(KEYS[11])
    before = store.statistics()["shm"]["allocated_bytes"]
    publisher_of(store).close_client(client)
    assert store.statistics()["shm"]["allocated_bytes"] < before
    assert view.revoked
    view.abandon()


async def test_names_follow_the_index(store: Store) -> None:
    await check_all(store)
    _, view = connect(store)
    other = prefix_keys(range(1000, 1016), 16)[0]
    assert other not in view
    await store.put(bytes([1]) * PART_BYTES, bytes([254]) * PART_BYTES, prefix=other)
    assert other in view
    assert store.parts.context.catalog.index.unbind(other)
    assert other not in view
    await until(lambda: view.blocks == len(store))
    view.close()


async def test_a_client_over_its_quota_is_named(store: Store) -> None:
    await check_all(store)
    named: list[ClientPins] = []
    publisher = publisher_of(store)
    publisher.on_over_quota = named.append
    client, view = connect(store, quota_bytes=200_000)
    for key in KEYS[:4]:  # one does not count, whichever is the largest
        slot = publisher.slot_of(store.parts.context.catalog.copies[store.parts.getter.find(key)])
        client.table.add(slot)  # as a client does that writes into its table itself
    await until(lambda: named)
    assert named[0] is client
    publisher.close_client(client)
    view.abandon()


async def test_a_pin_outlives_the_owner_and_even_a_reservation_is_left_alone(store: Store, tmp_path: Path) -> None:
    await check_all(store)
    context = store.parts.context
    client, view = connect(store)
    pinned = view.pin(KEYS[11])
    assert pinned is not None
    extent = await context.room.reserve(8192, demand=False, wait_s=1)
    filling = publisher_of(store).begin_filling(client, extent)
    assert filling >= 0
    offset = extent.offset
    await store.delete(KEYS[11])
    await store.flush()
    await store.aclose()
    again = await reopened(tmp_path)
    directory = again.statistics()["shm"]["directory"]
    assert (directory["former_clients"], directory["fenced_extents"]) == (1, 2)
    for number in range(80):
        await again.put(random.Random(number).randbytes(100_000), b"")
    memory = again.parts.context.shm._arena.memory
    start = pinned.offset + pinned.header_bytes
    assert bytes(memory[start : start + PART_BYTES]) == bytes([11]) * PART_BYTES
    used = {copy.extent.offset for copy in again.parts.context.catalog.copies.values()}
    assert offset not in used
    del memory
    view.unpin(pinned.slot, pinned.nbytes)
    publisher_of(again).tick()
    assert again.statistics()["shm"]["directory"]["fenced_extents"] == 1
    view.abandon()
    await until(lambda: again.statistics()["shm"]["directory"]["clients"] == 0)
    await until(lambda: again.statistics()["shm"]["directory"]["fenced_extents"] == 0)
    await again.aclose()


async def test_a_reservation_that_ended_leaves_nothing(store: Store) -> None:
    context = store.parts.context
    client, view = connect(store)
    extent = await context.room.reserve(8192, demand=False, wait_s=1)
    publisher = publisher_of(store)
    slot = publisher.begin_filling(client, extent)
    assert list(client.pinned()) == [slot]
    publisher.end_filling(client, slot)
    assert list(client.pinned()) == []
    context.shm.free(extent)
    assert store.statistics()["shm"]["directory"]["fenced_extents"] == 0
    view.close()


# -- the judgement ------------------------------------------------------------------------------


def judged(offset: int, nbytes: int, **changes: object) -> DirectoryEntry:
    payload = nbytes - 4096
    plain = DirectoryEntry(0, offset, payload, 0, payload, 0, 4096, False, bytes(32), b"")
    return plain._replace(**changes)  # type: ignore[arg-type]


def test_extents_that_overlap_or_lie_outside_are_never_taken() -> None:
    entries = [
        judged(0, 8192),
        judged(4096, 8192),  # overlaps the first
        judged(8192, 8192),
        judged(1 << 20, 8192),  # outside
        judged((1 << 20) - 4096, 8192),  # partly
        judged(100, 8192),
        judged(40960, 8192, header_bytes=0),
        judged(40960, 8192, header_bytes=1 << 20),
        judged(40960, 8192, value_offset=1),
        judged(40960, 8192, key_bytes=1 << 63),
        judged((1 << 64) - 4096, 8192),
    ]
    slots = [(number, SlotState.SEALED, entry) for number, entry in enumerate(entries)]
    judgement = judge_slots(slots, pinned=set(), capacity_bytes=1 << 20)
    assert [entry.slot for entry in judgement.sealed] == [0, 2]
    assert sorted(judgement.discarded) == [1, *range(3, 11)]


def test_what_a_client_has_pinned_goes_before_what_overlaps_it() -> None:
    slots = [
        (0, SlotState.SEALED, judged(0, 8192)),
        (1, SlotState.RETIRED, judged(4096, 8192)),
        (2, SlotState.RETIRED, judged(16384, 8192)),
        (3, None, judged(32768, 8192)),
        (4, SlotState.EVICTING, judged(65536, 8192)),
        (5, SlotState.FILLING, judged(131072, 4096, header_bytes=0, key_bytes=4096, value_offset=4096)),
    ]
    judgement = judge_slots(slots, pinned={1, 3, 4, 5}, capacity_bytes=1 << 20)
    assert [entry.slot for entry in judgement.fenced] == [1, 4, 5]
    assert judgement.sealed == []
    assert sorted(judgement.discarded) == [0, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_random_slots_give_extents_apart(seed: int) -> None:
    chance = random.Random(seed)
    states = [*SlotState, None]
    slots = [
        (
            number,
            chance.choice([state for state in states if state is not SlotState.FREE]),
            judged(chance.randrange(300) * 4096, chance.randrange(1, 40) * 4096),
        )
        for number in range(200)
    ]
    pinned = {chance.randrange(200) for _ in range(40)}
    judgement = judge_slots(slots, pinned=pinned, capacity_bytes=1 << 20)
    taken = sorted([*judgement.sealed, *judgement.fenced], key=lambda entry: entry.offset)
    for before, after in itertools.pairwise(taken):
        assert before.offset + extent_bytes_of(before) <= after.offset
    assert all(entry.offset + extent_bytes_of(entry) <= 1 << 20 for entry in taken)
    assert len(taken) + len(judgement.discarded) == 200
