"""The arena's directory between its owner and clients: what is found, what is pinned, what survives whom."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade_aio.errors import ConfigError, LeaseError, ProtocolError, TierFullError
from cascade_aio.model import PrefixKey
from cascade_aio.tiers import directory as directories
from cascade_aio.tiers.arena import SharedArena, open_arena, open_kept_arena, remove_arena
from cascade_aio.tiers.directory import ArenaDirectory, ClientPins, DirectoryEntry, SlotState
from cascade_aio.tiers.directory_format import DIRECTORY_SUFFIX, PIN_INFIX, DirectoryIdentity
from cascade_aio.tiers.view import DirectoryView, map_arena, map_extent

ARENA_BYTES = 1 << 20
IDENTITY = DirectoryIdentity(ARENA_BYTES, bytes(range(16)), "sha256")
QUOTA = 64 << 10


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "arena")
    remove_arena(str(tmp_path / "arena"))


def open_kept(path: str, identity: DirectoryIdentity = IDENTITY) -> tuple[SharedArena, ArenaDirectory, str | None]:
    arena, reason = asyncio.run(open_kept_arena(path, identity))
    assert arena.directory is not None
    arena.keep = True
    return arena, arena.directory, reason


def entry(number: int, *, offset: int = 0, nbytes: int = 4096, meta: bytes = b"") -> DirectoryEntry:
    digest = random.Random(number).randbytes(32)
    return DirectoryEntry(0, offset, nbytes, 0, -(-nbytes // 64) * 64, 0, 4096, False, digest, meta)


def key(number: int) -> PrefixKey:
    return PrefixKey(random.Random(-1 - number).randbytes(32))


def connect(directory: ArenaDirectory, path: str, quota: int = QUOTA) -> tuple[ClientPins, DirectoryView]:
    client = directory.open_client(path, quota)
    pin_fd, directory_fd = client.take_fd(), directory.reopen_fd()
    view = DirectoryView(directory_fd, pin_fd)
    os.close(pin_fd)
    os.close(directory_fd)
    return client, view


def test_a_published_block_is_found_by_its_id_and_its_names(path: str) -> None:
    arena, directory, reason = open_kept(path)
    assert reason == "there was no arena"
    described = entry(1, offset=8192, nbytes=1000, meta=b"metadata")
    slot = directory.publish(described)
    directory.bind(slot, key(1))
    _, view = connect(directory, path)
    for name in (described.digest[:16], key(1)):
        pinned = view.pin(name)
        assert pinned is not None
        assert (pinned.offset, pinned.header_bytes, pinned.key_bytes) == (8192, 4096, 1000)
        assert (pinned.digest, pinned.meta, pinned.nbytes) == (described.digest, b"metadata", 8192)
        view.unpin(pinned.slot, pinned.nbytes)
    assert view.lookup([key(1), described.digest[:16], key(2), key(1)]) == 2
    assert key(2) not in view
    assert view.pin(key(2)) is None
    directory.unbind(slot, key(1))
    assert key(1) not in view
    assert described.digest[:16] in view
    with pytest.raises(ConfigError, match="names no block"):
        view.pin(b"short")
    view.close()
    arena.close()


def test_prefix_keys_cannot_be_read_from_the_directory(path: str) -> None:
    arena, directory, _ = open_kept(path)
    directory.bind(directory.publish(entry(1)), key(1))
    assert key(1)[:8] not in Path(path + DIRECTORY_SUFFIX).read_bytes()
    assert all(os.stat(name).st_mode & 0o777 == 0o600 for name in (path, path + DIRECTORY_SUFFIX))
    arena.close()


def test_a_pin_refuses_withdrawal_and_keeps_a_retired_slot_from_reuse(path: str) -> None:
    arena, directory, _ = open_kept(path)
    slot = directory.publish(entry(1))
    name = entry(1).digest[:16]
    _, view = connect(directory, path)
    pinned = view.pin(name)
    assert pinned is not None
    assert not directory.withdraw(slot)
    assert name in view  # as before
    assert not directory.retire(slot)
    assert name not in view
    assert view.pin(name) is None
    assert not directory.retire(slot)
    view.unpin(pinned.slot, pinned.nbytes)
    assert directory.retire(slot)
    with pytest.raises(LeaseError, match="not pinned"):
        view.unpin(pinned.slot, pinned.nbytes)
    again = directory.publish(entry(2))
    assert again == slot
    assert directory.withdraw(again)
    view.close()
    arena.close()


def test_a_client_keeps_within_its_quota_and_a_closed_one_has_no_pins(path: str) -> None:
    arena, directory, _ = open_kept(path)
    slots = [directory.publish(entry(number, offset=number * 8192)) for number in range(9)]
    client, view = connect(directory, path, quota=3 * 8192)
    pins = [view.pin(entry(number).digest[:16]) for number in range(3)]
    with pytest.raises(LeaseError, match="quota"):
        view.pin(entry(4).digest[:16])
    assert sorted(client.pinned()) == sorted(pin.slot for pin in pins if pin is not None)
    with pytest.raises(LeaseError, match="still pinned"):
        view.close()
    before = (view.revoked, view.current)
    directory.close_client(client)
    assert (*before, view.revoked, view.current) == (False, True, True, False)
    assert all(directory.withdraw(slot) for slot in slots)
    view.abandon()
    arena.close()


def test_long_metadata_is_for_messages_and_more_blocks_than_slots_too(path: str) -> None:
    arena, directory, _ = open_kept(path)
    slot = directory.publish(entry(1, meta=bytes(500)))
    assert directory.entry(slot).by_message
    _, view = connect(directory, path)
    assert view.pin(entry(1).digest[:16]) is None
    published = [directory.publish(entry(number)) for number in range(2, directory.slots + 50)]
    assert published[-1] == -1
    refused = sum(one < 0 for one in published)
    assert refused >= 49
    assert directory.unpublished == refused
    kept = [number for number, one in zip(range(2, 10**9), published, strict=False) if one >= 0]
    assert view.lookup([entry(number).digest[:16] for number in kept]) == len(kept)
    view.close()
    arena.close()


def test_what_clients_used_is_told_once(path: str) -> None:
    arena, directory, _ = open_kept(path)
    slots = [directory.publish(entry(number)) for number in range(3)]
    _, view = connect(directory, path)
    assert list(directory.harvest()) == []
    for number in (2, 0, 2):
        pinned = view.pin(entry(number).digest[:16])
        assert pinned is not None
        view.unpin(pinned.slot, pinned.nbytes)
    assert sorted(directory.harvest()) == sorted([slots[0], slots[2]])
    assert list(directory.harvest()) == []
    view.close()
    arena.close()


def test_clients_are_limited_and_their_files_go_with_them(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "PIN_TABLES_MAX", 2)
    arena, directory, _ = open_kept(path)
    clients = [directory.open_client(path, QUOTA) for _ in range(2)]
    with pytest.raises(TierFullError, match="2 clients"):
        directory.open_client(path, QUOTA)
    directory.close_client(clients[0])
    directory.close_client(clients[0])
    directory.open_client(path, QUOTA)
    arena.close()
    assert not list(Path(path).parent.glob("*" + PIN_INFIX + "*"))  # nobody had got them


def test_pins_of_a_living_client_are_honoured_by_the_next_owner(path: str) -> None:
    arena, directory, _ = open_kept(path)
    slot = directory.publish(entry(1))
    _, view = connect(directory, path)
    pinned = view.pin(entry(1).digest[:16])
    assert pinned is not None
    arena.close()
    arena, directory, reason = open_kept(path)
    assert reason is None
    assert directory.clients == 1
    assert directory.former_pins() == {slot}
    for number in range(directory.slots):
        if directory.inspect(number)[0] is SlotState.SEALED:
            directory.keep(number)
    assert view.pin(entry(1).digest[:16]) is None  # not verified yet
    assert not directory.withdraw(slot)
    assert directory.awaken(slot)
    assert entry(1).digest[:16] in view
    directory.begin()
    assert not view.current
    assert directory.reap_former() == 1
    view.unpin(pinned.slot, pinned.nbytes)
    assert directory.withdraw(slot)
    view.close()
    assert directory.reap_former() == 0
    assert directory.clients == 0
    arena.close()


def test_only_one_of_two_gets_an_arena_and_another_root_starts_anew(path: str) -> None:
    arena, directory, _ = open_kept(path)
    directory.publish(entry(1))
    with pytest.raises(ConfigError, match="in use"):
        open_kept(path)
    with pytest.raises(ConfigError, match="in use"):
        remove_arena(path)
    mapped = map_arena(fd := arena.reopen_fd(writable=False), ARENA_BYTES)
    os.close(fd)
    arena.memory[:3] = b"old"
    arena.close()
    for identity, why in (
        (DirectoryIdentity(ARENA_BYTES, bytes(16), "sha256"), "another root"),
        (DirectoryIdentity(ARENA_BYTES, bytes(16), "blake3"), "another root"),
        (DirectoryIdentity(2 * ARENA_BYTES, bytes(16), "blake3"), "1 MiB, 2 MiB are configured"),
    ):
        arena, directory, reason = open_kept(path, identity)
        assert reason is not None
        assert why in reason
        arena.memory[:3] = b"new"
        arena.close()
    assert bytes(mapped[:3]) == b"old"  # a former client's mapping is never written
    remove_arena(path)
    assert os.listdir(os.path.dirname(path)) == []


def test_an_arena_opened_without_keeping_removes_everything(path: str) -> None:
    arena, directory, _ = open_kept(path)
    client = directory.open_client(path, QUOTA)
    fd = client.take_fd()
    arena.close()
    assert len(os.listdir(os.path.dirname(path))) == 3
    asyncio.run(open_arena(path, ARENA_BYTES)).close()
    assert os.listdir(os.path.dirname(path)) == []
    os.close(fd)


def test_the_arena_is_read_only_to_clients(path: str) -> None:
    arena, _, _ = open_kept(path)
    fd = arena.reopen_fd(writable=False)
    mapped = map_arena(fd, ARENA_BYTES)
    assert mapped.readonly
    with pytest.raises(OSError, match=r"cannot map"):
        map_extent(fd, 0, 4096)
    os.close(fd)
    fd = arena.reopen_fd(writable=True)
    extent = map_extent(fd, 8192, 4096)
    extent[:5] = b"hello"
    assert bytes(mapped[8192:8197]) == b"hello"
    os.close(fd)
    arena.close()


@pytest.mark.parametrize("seed", range(30))
def test_a_garbled_directory_is_refused_or_read_without_harm(path: str, seed: int) -> None:
    """Random bytes anywhere but in the first page: every slot can be looked at and used again."""
    chance = random.Random(seed)
    arena, directory, _ = open_kept(path)
    for number in range(20):
        directory.bind(directory.publish(entry(number, offset=number * 8192)), key(number))
    arena.close()
    content = bytearray(Path(path + DIRECTORY_SUFFIX).read_bytes())
    for _ in range(chance.choice((1, 10, 1000))):
        start = chance.randrange(0 if seed % 5 == 0 else 4096, len(content) - 64)
        content[start : start + 64] = chance.randbytes(64)
    if seed % 7 == 0:
        del content[-chance.randrange(1, 5000) :]
    Path(path + DIRECTORY_SUFFIX).write_bytes(content)
    arena, directory, reason = open_kept(path)
    for slot in range(directory.slots):
        state, found = directory.inspect(slot) if reason is None else (SlotState.FREE, entry(0))
        if state in (SlotState.SEALED, SlotState.DORMANT):
            assert reason is None
            assert found.digest in {entry(number).digest for number in range(20)}  # a checksum vouches for it
            directory.keep(slot)
            directory.awaken(slot)
        elif reason is None:
            directory.discard(slot)
    assert directory.publish(entry(77)) >= 0
    _, view = connect(directory, path)
    assert entry(77).digest[:16] in view
    view.close()
    arena.close()


def test_files_that_are_no_directory_or_pin_table_are_refused(path: str, tmp_path: Path) -> None:
    arena, directory, _ = open_kept(path)
    junk = tmp_path / "junk"
    junk.write_bytes(bytes(1 << 16))
    with open(junk, "r+b") as file:
        fd = directory.reopen_fd()
        with pytest.raises(ProtocolError, match="pin table"):
            DirectoryView(fd, file.fileno())
        with pytest.raises(ProtocolError, match="directory"):
            DirectoryView(file.fileno(), file.fileno())
        os.close(fd)
    junk.unlink()
    arena.close()


CLIENT = """
import os, random, sys
from cascade_aio.tiers.view import DirectoryView, map_arena
directory_fd, pin_fd, arena_fd, seed = map(int, sys.argv[1:])
view, arena = DirectoryView(directory_fd, pin_fd), map_arena(arena_fd, 1 << 20)
names = [random.Random(number).randbytes(32)[:16] for number in range(200)]
chance, pins, words = random.Random(seed), 0, [number.to_bytes(2, "little") * 2048 for number in range(200)]
print("ready", flush=True)
while pins < 1500:
    number = chance.randrange(200)
    pinned = view.pin(names[number])
    if pinned is None:
        continue
    start = pinned.offset + pinned.header_bytes
    for _ in range(2):
        assert arena[start : start + 4096] == words[number], "another block's bytes under a pin"
    view.unpin(pinned.slot, pinned.nbytes)
    pins += 1
held = [view.pin(names[number]) for number in range(200)][:5]
os._exit(0)  # with pins, as if killed
"""


def test_two_processes_never_see_another_blocks_bytes_while_slots_are_reused(path: str) -> None:
    arena, directory, _ = open_kept(path)
    places = [number * 8192 for number in range(12)]
    clients, children = [], []
    for seed in range(2):
        client = directory.open_client(path, ARENA_BYTES)
        fds = [directory.reopen_fd(), client.take_fd(), arena.reopen_fd(writable=False)]
        command = [sys.executable, "-c", CLIENT, *map(str, fds), str(seed)]
        children.append(subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE))
        for fd in fds:
            os.close(fd)
        clients.append(client)
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    chance, block_at = random.Random(5), dict[int, tuple[int, int]]()
    evictions = 0
    while any(child.poll() is None for child in children):
        offset = chance.choice(places)
        if offset in block_at:
            slot, _ = block_at[offset]
            if not directory.withdraw(slot):
                continue
            evictions += 1
            del block_at[offset]
        number = chance.randrange(200)
        if number in {known for _, known in block_at.values()}:
            continue
        arena.memory[offset + 4096 : offset + 8192] = number.to_bytes(2, "little") * 2048
        slot = directory.publish(entry(number, offset=offset))
        if slot >= 0:
            block_at[offset] = (slot, number)
    assert [child.wait() for child in children] == [0, 0]
    for child in children:
        assert child.stdout is not None
        child.stdout.close()
    assert evictions > 1000
    assert not any(client.is_alive() for client in clients)
    for client in clients:
        directory.close_client(client)
    assert all(directory.withdraw(slot) for slot, _ in block_at.values())  # what they left pinned counts no more
    arena.close()
