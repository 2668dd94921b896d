"""Valid bytes of every kind, from the golden roots."""

from __future__ import annotations

import dataclasses
import functools
import json
import tarfile

from cascade_aio.abc.storage import PAGE_BYTES
from tests.data.golden import GOLDEN, HERE, SegmentParts, take_apart


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Files of one golden root by kind, with the segments also taken apart."""

    files: dict[str, bytes]
    segments: dict[str, SegmentParts]
    store: bytes
    digest: str

    def of(self, name: str) -> list[bytes]:
        """Contents of the files with this name."""
        return [content for path, content in self.files.items() if path.rpartition("/")[2] == name]


@functools.cache
def golden_seeds() -> Seeds:
    """The newest root with SHA-256."""
    name = [name for name in GOLDEN if name.endswith("sha256")][-1]
    files: dict[str, bytes] = {}
    with tarfile.open(HERE / f"{name}.tar.gz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            files[member.name] = _without_tail(file.read()) if member.name.endswith(".seg") else file.read()
    segments = {path: take_apart(memoryview(content), path) for path, content in files.items() if path.endswith(".seg")}
    root = json.loads(files["cascade.json"])
    return Seeds(files, segments, bytes.fromhex(root["store"]), root["digest"])


def _without_tail(content: bytes) -> bytes:
    """The preallocated zeros of an open segment, all but a few pages: a fuzzer has better things to do."""
    used = len(content.rstrip(b"\0"))
    return content[: -(-used // PAGE_BYTES) * PAGE_BYTES + 4 * PAGE_BYTES] if len(content) - used > 16384 else content
