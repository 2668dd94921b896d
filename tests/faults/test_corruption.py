"""A flipped bit anywhere in a root: reported, mendable, and never returned as data."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cascade_aio as ca
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments import format as fmt
from tests.faults.harness import (
    STATES,
    Record,
    World,
    flip,
    look,
    make_world,
    mend,
    open_at,
    removed_afterwards,
    trailer_of,
    walk,
)

pytestmark = pytest.mark.shm(96)

BITS_PER_PLACE = int(os.environ.get("CASCADE_TEST_FLIPS", "1"))
"""Random bits flipped (one at a time) in each place. More take longer: a root is opened for each."""


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory in memory: these tests open hundreds of roots and do not care about syncs."""
    with tempfile.TemporaryDirectory(prefix="cascade-faults-", dir="/dev/shm") as place:
        yield Path(place)


@pytest.fixture(scope="module", params=STATES)
def world(request: pytest.FixtureRequest, memory: Path) -> Iterator[tuple[str, World]]:
    state = str(request.param)
    with tempfile.TemporaryDirectory(dir=memory) as place:  # made anew if the tests come in another order
        yield state, asyncio.run(make_world(Path(place), state))


@pytest.fixture
def place(memory: Path) -> Iterator[Path]:
    """An empty directory of this test, beside the pristine roots."""
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def header_places(record: Record) -> dict[str, tuple[int, int]]:
    """(offset, bytes) within the record of each field of its header."""
    crcs = 4 * len(record.header.chunk_crcs)
    tables = 72 * len(record.header.bindings) or 88 * len(record.header.note_bindings)
    places = {
        "magic": (0, 8), "version": (8, 2), "kind": (10, 1), "flags": (11, 1), "pages": (12, 2), "digest kind": (14, 2),
        "record bytes": (16, 8), "own offset": (24, 8), "writer": (32, 16), "sequence": (48, 8), "stamp": (56, 8),
        "synced": (64, 8), "chunk bytes": (72, 4), "chunks": (76, 4), "digest": (80, 32), "key bytes": (112, 8),
        "value bytes": (120, 8), "value offset": (128, 8), "meta bytes": (136, 4), "counts": (140, 12),
        "rest": (152 + crcs + tables + 64, 1000), "crc": (record.header.header_pages * PAGE_BYTES - 4, 4),
    }  # fmt: skip
    if crcs:
        places["chunk crcs"] = (152, crcs)
    if tables:
        places["bindings"] = (152 + crcs, tables)
    return places


def payload_places(record: Record) -> dict[str, tuple[int, int]]:
    """(offset, bytes) within the record: first, middle and last bytes, and what is neither key nor value."""
    header = record.header
    start, nbytes = header.header_pages * PAGE_BYTES, header.payload_bytes
    if not nbytes:
        return {}
    end = header.value_offset + header.value_bytes if header.value_bytes else header.key_bytes
    places = {"first": (start, 1), "middle": (start + nbytes // 2, 1), "last": (start + nbytes - 1, 1)}
    if end < nbytes:
        places["padding"] = (start + end, nbytes - end)
    if header.value_bytes and header.key_bytes < header.value_offset:
        places["gap"] = (start + header.key_bytes, header.value_offset - header.key_bytes)
    return places


def places_of(record: Record) -> dict[str, tuple[int, int]]:
    found = {f"header {name}": place for name, place in header_places(record).items()}
    return found | {f"payload {name}": place for name, place in payload_places(record).items()}


def positions(places: dict[str, tuple[int, int]], base: int, seed: int) -> list[tuple[str, int]]:
    """Bit numbers in the file: a few in each place."""
    rng = random.Random(seed)
    return [
        (name, 8 * (base + offset) + rng.randrange(8 * nbytes))
        for name, (offset, nbytes) in places.items()
        for _ in range(BITS_PER_PLACE)
    ]


async def test_flips_in_every_field_of_every_kind_of_record(world: tuple[str, World], place: Path) -> None:
    state, pristine = world
    segment = pristine.only("writers/*/*.seg")
    records = walk(segment)
    assert {record.header.kind for record in records} == {fmt.BLOCK, fmt.NOTE}
    ids = {bytes(block.block_id): block for block in pristine.blocks}
    firm = max(record.header.synced_bytes for record in records) if state == "scan" else records[-1].header.end
    # A large block, a small one, the last, and the NOTE: one bit after the other, in turn over the records.
    for number, record in enumerate(records):
        for turn, (name, bit) in enumerate(positions(places_of(record), record.header.offset, seed=number)):
            share = len(records) if record.header.kind == fmt.BLOCK else 2
            if name.startswith("header") and turn % share != number % share:
                continue
            told = f"{state}: {name} of record {number} at {record.header.offset}, bit {bit}"
            with removed_afterwards(place / "flipped") as copy:
                damaged = pristine.copy(copy)
                path = damaged.only("writers/*/*.seg")
                flip(path, bit)
                async with open_at(damaged.root) as store:
                    seen = await look(store, damaged)
                mine = ids.get(record.header.digest[:16])
                assert all(block is mine for block in seen.lost), f"{told}: another block was lost"
                if record.header.end <= firm:
                    assert any(str(path) in report for report in seen.reports), f"{told}: nobody was told"
                for error in seen.errors:
                    assert error.path == str(path), told
                    assert error.offset is not None, told
                    assert record.header.offset <= error.offset < record.header.end, told
                if turn % 8 == number:
                    await mend(damaged)


async def test_payload_damage_is_reported_to_the_chunk(world: tuple[str, World], place: Path) -> None:
    _, pristine = world
    (large,) = [r for r in walk(pristine.only("writers/*/*.seg")) if len(r.header.chunk_crcs) == 2]
    start = large.header.offset + PAGE_BYTES
    for chunk in range(2):
        with removed_afterwards(place / f"chunk{chunk}") as copy:
            damaged = pristine.copy(copy)
            path = damaged.only("writers/*/*.seg")
            flip(path, 8 * (start + chunk * fmt.CHUNK_BYTES + 12_345))
            async with open_at(damaged.root) as store:
                with pytest.raises(ca.CorruptionError) as caught:
                    await store.get(damaged.blocks[1].block_id)
                assert caught.value.path == str(path)
                assert caught.value.offset == start + chunk * fmt.CHUNK_BYTES
                assert store.statistics()["store"]["damaged"] == 1
                with pytest.raises(ca.BlockNotFoundError):  # forgotten: the caller recomputes it
                    await store.get(damaged.blocks[1].block_id)
                await mend_here(store, damaged)


async def mend_here(store: ca.Store, world: World) -> None:
    """The damaged block is put again in the session that found the damage."""
    block = world.blocks[1]
    assert await store.put(block.key, block.value) == block.block_id
    async with store.get(block.block_id) as found:
        assert bytes(found.key) == block.key


async def test_flips_in_a_footer_or_trailer_cost_nothing(world: tuple[str, World], place: Path) -> None:
    state, pristine = world
    segment = pristine.only("writers/*/*.seg")
    trailer = trailer_of(segment)
    if trailer is None:
        assert state == "scan"
        pytest.skip("an open segment has no footer")
    size = segment.stat().st_size
    places = {
        "records": (trailer.data_end, 72 * trailer.records),
        "bindings": (trailer.data_end + 72 * trailer.records, 96 * trailer.bindings),
        "tombstones": (trailer.data_end + trailer.footer_bytes - 32, 32),
        "padding": (trailer.data_end + trailer.footer_bytes, 100),
        **{f"trailer {at}": (size - PAGE_BYTES + at, 4) for at in (0, 8, 10, 16, 32, 40, 48, 56, 68, 72, 2000, 4092)},
    }
    for name, bit in positions(places, 0, seed=7):
        with removed_afterwards(place / "flipped") as copy:
            damaged = pristine.copy(copy)
            flip(damaged.only("writers/*/*.seg"), bit)
            for _ in range(2):  # the second opening sees what the first one made of it
                async with open_at(damaged.root) as store:
                    seen = await look(store, damaged)
                assert not seen.lost, name
                assert not seen.errors, name
                assert not seen.lost_names, name
                assert not seen.deleted_is_back, name


async def test_flips_in_the_segment_header(world: tuple[str, World], place: Path) -> None:
    _, pristine = world
    places = {str(at): (at, 4) for at in (0, 8, 10, 12, 16, 32, 48, 56, 64, 72, 80, 2000, 4092)}
    for name, bit in positions(places, 0, seed=8):
        with removed_afterwards(place / "flipped") as copy:
            damaged = pristine.copy(copy)
            flip(damaged.only("writers/*/*.seg"), bit)
            async with open_at(damaged.root) as store:
                seen = await look(store, damaged)
            assert not seen.lost, name  # the records speak for themselves
            assert not seen.deleted_is_back, name
            await mend(damaged)


async def test_flips_in_the_checkpoint_are_noticed(world: tuple[str, World], place: Path) -> None:
    state, pristine = world
    if state != "checkpoint":
        pytest.skip("this world has no checkpoint")
    nbytes = pristine.only("writers/*/checkpoint").stat().st_size
    rng = random.Random(9)
    bits = [*range(0, 8 * 36, 23), *(rng.randrange(8 * nbytes) for _ in range(30))]
    for bit in bits:
        with removed_afterwards(place / "flipped") as copy:
            damaged = pristine.copy(copy)
            flip(damaged.only("writers/*/checkpoint"), bit)
            async with open_at(damaged.root) as store:
                seen = await look(store, damaged)
                assert not seen.lost, bit
                assert not seen.errors, bit
                assert not seen.lost_names, bit
                assert not seen.deleted_is_back, bit


async def test_flips_in_the_root_and_writer_files(world: tuple[str, World], place: Path) -> None:
    """Either refused with a message that names the file, or everything is there (or told)."""
    state, pristine = world
    for pattern in ("cascade.json", "writers/*/writer.json"):
        content = pristine.only(pattern).read_bytes()
        rng = random.Random(10)
        for bit in sorted(rng.sample(range(8 * len(content)), 40 if state == "footer" else 12)):
            told = f"{pattern}, bit {bit}: {content[bit // 8 - 10 : bit // 8 + 10]!r}"
            with removed_afterwards(place / "flipped") as copy:
                damaged = pristine.copy(copy)
                flip(damaged.only(pattern), bit)
                refused = ""
                try:
                    async with open_at(damaged.root) as store:
                        seen = await look(store, damaged)
                except ca.ConfigError as error:
                    refused = str(error)
                if refused:
                    assert str(damaged.root) in refused, told
                else:
                    assert not seen.lost or seen.reports, told
                    assert not seen.deleted_is_back, told


Damage = Callable[[World, World, Path], None]


def cut_in_the_middle(world: World, other: World, segment: Path) -> None:
    end = walk(segment)[-1].header.end // 2 + 777
    with segment.open("r+b") as file:
        file.truncate(end)


def cut_to_nothing(world: World, other: World, segment: Path) -> None:
    segment.write_bytes(b"")


def replace_by_directory(world: World, other: World, segment: Path) -> None:
    segment.unlink()
    segment.mkdir()


def replace_by_another_stores(world: World, other: World, segment: Path) -> None:
    segment.write_bytes(other.only("writers/*/*.seg").read_bytes())


def swap_two(world: World, other: World, segment: Path) -> None:
    second = segment.with_name("0000000002.seg")
    content = segment.read_bytes()
    segment.unlink()
    second.write_bytes(content)


def remove(world: World, other: World, segment: Path) -> None:
    segment.unlink()


def overwrite_with_noise(world: World, other: World, segment: Path) -> None:
    segment.write_bytes(random.Random(1).randbytes(segment.stat().st_size))


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_the_middle,
        cut_to_nothing,
        replace_by_directory,
        replace_by_another_stores,
        swap_two,
        remove,
        overwrite_with_noise,
    ],
)
async def test_segment_files_that_are_not_what_they_were(world: tuple[str, World], place: Path, damage: Damage) -> None:
    _, pristine = world
    damaged = pristine.copy(place / "kv")
    segment = damaged.only("writers/*/*.seg")
    other = place / "other"
    other.mkdir()
    damage(damaged, await make_world(other, "footer"), segment)
    async with open_at(damaged.root) as store:
        seen = await look(store, damaged)
        assert seen.lost
        assert not seen.deleted_is_back
    await mend(damaged)


async def test_two_segments_that_changed_places(place: Path) -> None:
    first = await make_world(place, "footer")
    extra = first.blocks[2]
    async with open_at(first.root) as store:
        await store.delete(extra.block_id)
        await store.put(extra.key, extra.value)
    one, two = sorted(first.root.glob("writers/*/*.seg"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    for checkpoint in first.root.glob("writers/*/checkpoint"):
        checkpoint.unlink()
    async with open_at(first.root) as store:
        seen = await look(store, first)
        assert len(seen.lost) == len(first.blocks)
        assert {path for path in (str(one), str(two)) if any(path in report for report in seen.reports)} == {
            str(one),
            str(two),
        }
    await mend(first)


async def test_an_unreadable_segment_is_reported(world: tuple[str, World], place: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads files of mode 000: run the tests as another user")
    state, pristine = world
    damaged = pristine.copy(place / "kv")
    segment = damaged.only("writers/*/*.seg")
    segment.chmod(0)
    async with open_at(damaged.root) as store:
        if state == "checkpoint":  # which tells the blocks: the file is not opened before one of them is asked for
            with pytest.raises(PermissionError, match=str(segment)):
                await store.get(damaged.blocks[2].block_id)
            return
        seen = await look(store, damaged)
        assert seen.lost
        assert any(str(segment) in report for report in seen.reports)


@pytest.mark.parametrize("what", ["header", "payload"])
@pytest.mark.parametrize("warm", [False, True])
async def test_what_verify_found_damaged_is_not_relied_on(
    world: tuple[str, World], place: Path, what: str, warm: bool
) -> None:
    """Nobody had asked for the block: putting it again stores it, and a copy in the arena is written anew."""
    _, pristine = world
    damaged = pristine.copy(place / "kv")
    path = damaged.only("writers/*/*.seg")
    block = damaged.blocks[2]
    (record,) = [record for record in walk(path) if record.header.digest[:16] == block.block_id]
    bit = 8 * (record.header.offset + (100 if what == "header" else PAGE_BYTES + 50_000))
    if not warm:
        flip(path, bit)
    async with open_at(damaged.root) as store:
        if warm:
            async with store.get(block.block_id):
                flip(path, bit)
        report = await store.verify()
        told = [*report.damage, *store.statistics()["damage"]]  # a header in an open segment is told at opening
        assert any(str(path) in str(error) for error in told)
        if not warm:
            assert await store.put(block.key, block.value) == block.block_id
        await store.flush()
    for _ in range(2):
        async with open_at(damaged.root) as store, store.get(block.block_id) as found:
            assert (bytes(found.key), bytes(found.value)) == (block.key, block.value)
