"""Namespaces: what a client learns about names whose salt it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

import cascade_aio as ca
from cascade_aio.errors import BlockNotFoundError
from cascade_aio.testing.store import block_bytes
from cascade_aio.tiers.directory_format import DIRECTORY_SUFFIX
from tests.service.conftest import running

TOKENS = range(32)
BLOCK_TOKENS = 8


def keys_of(salt: str) -> list[ca.PrefixKey]:
    """The same prompt, as a tenant with ``salt`` names it."""
    namespace = ca.Namespace(model="m", dtype="bf16", layout="l", salt=salt)
    return list(ca.prefix_keys(TOKENS, block_tokens=BLOCK_TOKENS, namespace=namespace))


async def test_the_same_prompt_is_not_found_without_the_salt(tmp_path: Path) -> None:
    theirs, guessed = keys_of("theirs"), keys_of("guessed")
    assert not set(theirs) & set(guessed)
    async with running(tmp_path / "kv") as service, ca.connect(service.socket_path) as owner:
        for number, key in enumerate(theirs):
            await owner.put(*block_bytes(number), prefix=key, parent=theirs[number - 1] if number else None)
        async with ca.connect(service.socket_path) as other:
            assert len(other.lookup(guessed)) == len(await other.lookup(guessed)) == 0
            async with other.get_prefix(guessed) as blocks:
                assert blocks == []
            for key in guessed:
                assert key not in other
                assert not await other.contains(key)
                with pytest.raises(BlockNotFoundError):
                    await other.get(key)
            assert len(await other.lookup(theirs)) == len(theirs), "with the salt they are there"


async def test_no_message_and_no_shared_directory_tells_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = keys_of("theirs")
    heard: list[bytes] = []
    async with running(tmp_path / "kv") as service, ca.connect(service.socket_path) as owner:
        ids = [await owner.put(*block_bytes(n), prefix=key) for n, key in enumerate(theirs)]
        async with ca.connect(service.socket_path) as curious:
            link = curious._connector.link
            assert link is not None
            feed = link._cutter.feed

            def listen(chunk: bytes | memoryview) -> None:
                heard.append(bytes(chunk))
                feed(chunk)

            monkeypatch.setattr(link._cutter, "feed", listen)
            listed = [info async for info in curious.blocks()]
            assert {info.block_id for info in listed} == set(ids)
            for block_id in ids:
                async with curious.get(block_id):
                    pass
            await curious.statistics()
            await curious.verify()
            await curious.prefetch(ids).wait()
            assert len(await curious.lookup(keys_of("guessed"))) == 0
        directory = Path(str(service.node.statistics()["shm"]["arena"]) + DIRECTORY_SUFFIX).read_bytes()
    said = b"".join(heard)
    assert all(bytes(block_id) in said for block_id in ids), "it was listened to"
    assert not any(bytes(key) in said for key in theirs)
    assert any(bytes(block_id) in directory for block_id in ids)
    assert not any(bytes(key) in directory for key in theirs)
