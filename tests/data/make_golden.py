"""Writes the golden roots: ``python -m tests.data.make_golden``. Run it once per format version, never again.

A root of each digest as this version leaves it: sealed segments, a checkpoint, an open segment of a writer that was
killed, a second writer, further names, deletions, metadata, empty and odd parts, several checksums in
a record. Clocks, uuids and the host are fixed, so two runs write the same bytes. Beside each archive stands what
must be read from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cascade_aio as ca
from cascade_aio.segments.format import FORMAT_VERSION
from cascade_aio.segments.hosts import Host
from cascade_aio.testing.memory import MemoryDisk
from cascade_aio.testing.world import ROOT, World

HERE = Path(__file__).parent
DIGESTS = ("sha256", "blake3")
NAMES = ca.prefix_keys(range(64), block_tokens=2, namespace="golden")
HOST = Host("golden", "00000000-0000-0000-0000-000000000000")
LARGE = bytes(range(256)) * 5200
"""1.3 MiB: two checksums, and next to nothing once packed."""


def name(digest: str) -> str:
    """Of the files for one digest, without suffix."""
    return f"format-{FORMAT_VERSION}-{digest}"


class Script:
    """What happens to a root, and what must be read from it afterwards."""

    def __init__(self, digest: str) -> None:
        self.world = World(digest=digest, shm_bytes=8 << 20, segment_bytes=2 << 20, tail_seconds_max=3600.0)
        self.blocks: dict[str, dict[str, Any]] = {}
        self.deleted: list[str] = []

    async def put(
        self, store: ca.Store, key: bytes, value: bytes, *names: int, meta: ca.BlockMeta | None
    ) -> ca.BlockId:
        """Put under all names; the first belongs to the record, the others to a note."""
        parent = None
        for number in names or (None,):
            prefix = None if number is None else NAMES[number]
            block_id = await store.put(key, value, prefix=prefix, parent=parent, meta=meta)
            parent = prefix
            await store.flush()
        self.blocks[str(block_id)] = {
            "key": {"bytes": len(key), "sha256": hashlib.sha256(key).hexdigest()},
            "value": {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()},
            "names": [str(NAMES[number]) for number in names],
            "meta": None if meta is None else {"dtype": meta.dtype, "shape": meta.shape, "extra": meta.extra.hex()},
        }
        return block_id

    async def delete(self, store: ca.Store, block_id: ca.BlockId) -> None:
        await store.delete(block_id)
        await store.flush()
        del self.blocks[str(block_id)]
        self.deleted.append(str(block_id))

    async def run(self) -> MemoryDisk:
        """Three sessions: one that ends well, one beside another writer, one that is killed."""
        meta = ca.BlockMeta(dtype="float16", shape=(2, 3), extra=b"\x00\xff")
        store = await self.world.open()
        gone = await self.put(store, b"gone" * 50, b"away" * 50, 0, meta=None)
        await self.put(store, b"k" * 5000, b"v" * 3000, 1, meta=meta)
        await self.put(store, LARGE, b"odd-lengths", 2, 3, 4, meta=None)
        await self.put(store, b"", b"only a value", meta=meta)
        await self.put(store, b"only a key", b"", 5, meta=None)
        await self.delete(store, gone)
        await store.aclose()
        first = await self.world.open()
        second = await self.world.open()
        await self.put(second, b"second" * 100, b"writer" * 100, 6, meta=None)
        await second.aclose()
        later = await self.put(first, b"x" * 63, b"y" * 4097, 7, meta=None)
        await self.put(first, b"open segment", b"of a dead writer", 8, 9, meta=meta)
        await self.delete(first, later)
        disk = self.world.disk.kill()
        await first.aclose()
        return disk


@contextlib.contextmanager
def fixed_world() -> Iterator[None]:
    """No chance, no clock, no host."""
    uuids = [uuid.uuid5(uuid.NAMESPACE_OID, f"golden {number}") for number in range(1, 100)]
    with (
        mock.patch.object(uuid, "uuid4", side_effect=uuids),
        mock.patch("cascade_aio.store.opening.this_host", return_value=HOST),
    ):
        yield


def pack(disk: MemoryDisk) -> bytes:
    """The files below the root as a compressed archive, the same for the same files."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(disk.files):
            content = disk.content(path)
            member = tarfile.TarInfo(path.removeprefix(ROOT + "/"))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(raw.getvalue(), mtime=0)


def make(digest: str) -> tuple[bytes, str]:
    """Archive and description of one root."""
    with fixed_world():
        script = Script(digest)
        disk = asyncio.run(script.run())
    expected = {
        "format": FORMAT_VERSION,
        "digest": digest,
        "blocks": script.blocks,
        "deleted": script.deleted,
        "files": {
            path.removeprefix(ROOT + "/"): hashlib.sha256(disk.content(path)).hexdigest() for path in sorted(disk.files)
        },
    }
    return pack(disk), json.dumps(expected, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for digest in DIGESTS:
        archive, expected = make(digest)
        (HERE / f"{name(digest)}.tar.gz").write_bytes(archive)
        (HERE / f"{name(digest)}.json").write_text(expected)
        print(name(digest), len(archive), "bytes")
