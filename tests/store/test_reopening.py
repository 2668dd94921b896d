"""Opening a root again: from the checkpoint, without it, with a damaged one, after other sessions."""

from __future__ import annotations

from pathlib import Path

import pytest

import cascade_aio as ca
from tests.store.conftest import OpenStore, block_bytes

KEYS = ca.prefix_keys(range(400), block_tokens=4, namespace="reopening")


async def fill(store: ca.Store, first: int, count: int) -> list[ca.BlockId]:
    ids = []
    for i in range(first, first + count):
        parent = KEYS[i - 1] if i else None
        ids.append(await store.put(*block_bytes(i, 3000, 2000), prefix=KEYS[i], parent=parent))
    return ids


async def check(store: ca.Store, ids: list[ca.BlockId]) -> None:
    assert len(store) == len(ids)
    for i, block_id in enumerate(ids):
        async with store.get(KEYS[i]) as block:
            assert block.block_id == block_id
            assert (bytes(block.key), bytes(block.value)) == block_bytes(i, 3000, 2000)


def checkpoint_of(root: Path) -> Path:
    (found,) = root.glob("writers/*/checkpoint")
    return found


async def test_a_clean_end_leaves_a_checkpoint_that_speaks_for_everything(open_small: OpenStore) -> None:
    async with open_small() as store:
        ids = await fill(store, 0, 40)
    async with open_small() as store:
        recovery = store.statistics()["disk"]["recovery"]
        assert recovery["covered"] == recovery["segments"] > 0
        assert recovery["scanned"] == recovery["from_footer"] == 0
        assert store.statistics()["disk"]["live_bytes"] == 40 * 3 * 4096
        await check(store, ids)


async def test_sessions_add_up(open_small: OpenStore, tmp_path: Path) -> None:
    ids: list[ca.BlockId] = []
    for session in range(4):
        async with open_small() as store:
            ids += await fill(store, 10 * session, 10)
    async with open_small() as store:
        assert store.statistics()["disk"]["recovery"]["from_footer"] == 0
        await check(store, ids)
    before = checkpoint_of(tmp_path / "kv").stat().st_mtime_ns
    async with open_small() as store:
        await check(store, ids)
    assert checkpoint_of(tmp_path / "kv").stat().st_mtime_ns == before  # nothing learnt, nothing written


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "foreign"])
async def test_without_a_sound_checkpoint_the_segments_tell_all(
    open_small: OpenStore, tmp_path: Path, damage: str
) -> None:
    async with open_small() as store:
        ids = await fill(store, 0, 30)
        await store.delete(ids.pop())
    path = checkpoint_of(tmp_path / "kv")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = next(at for at in range(len(content) // 2, len(content)) if content[at])  # what is zero may be padding
        content[middle] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(b"something else entirely" * 100)
    async with open_small() as store:
        assert store.statistics()["disk"]["recovery"]["from_footer"] > 0
        await check(store, ids)


async def test_a_checkpoint_older_than_the_last_session(open_small: OpenStore, tmp_path: Path) -> None:
    async with open_small() as store:
        ids = await fill(store, 0, 20)
    path = checkpoint_of(tmp_path / "kv")
    old = path.read_bytes()
    async with open_small() as store:
        await store.delete(ids.pop(0))
        ids += await fill(store, 20, 5)
    path.write_bytes(old)
    async with open_small() as store:
        assert len(store) == len(ids)
        assert KEYS[0] not in store
        for block_id in ids:
            assert block_id in store


async def test_a_deletion_survives_in_the_checkpoint(open_small: OpenStore) -> None:
    async with open_small() as store:
        (doomed,) = await fill(store, 0, 1)
    async with open_small() as store:
        await store.delete(doomed)
    for _ in range(2):
        async with open_small() as store:
            assert doomed not in store
            assert len(store) == 0


@pytest.mark.parametrize("checkpoint", [True, False])
async def test_names_deleted_with_their_block_stay_away_when_it_is_put_again(
    open_small: OpenStore, tmp_path: Path, checkpoint: bool
) -> None:
    """The block outlives its tombstone, its earlier names do not, in whatever order the segments are read."""
    async with open_small() as store:
        block_id = await store.put(*block_bytes(1), prefix=KEYS[0])
        await store.flush()
        assert await store.put(*block_bytes(1), prefix=KEYS[1]) == block_id
        await store.flush()
        await store.delete(block_id)
        await store.put(*block_bytes(1), prefix=KEYS[2])
        await store.put(*block_bytes(1), prefix=KEYS[1])
    if not checkpoint:
        checkpoint_of(tmp_path / "kv").unlink()
    for _ in range(2):
        async with open_small() as store:
            assert KEYS[0] not in store
            assert [len(store.lookup([key])) for key in KEYS[:3]] == [0, 1, 1]
