"""The root directory: what makes it a store, and which writer directory is ours.

Writes two kinds of small JSON files, once each per root and session; no data path. What it must not
know: what is inside segments.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import posixpath
import uuid
from typing import Any

import msgspec

from cascade_aio.abc.storage import Clock, FileEntry, Lock, Storage
from cascade_aio.errors import ConfigError
from cascade_aio.model import DIGEST_KINDS
from cascade_aio.segments.format import FORMAT_NAME, FORMAT_VERSION

ROOT_FILE = "cascade.json"
WRITERS = "writers"
SEGMENT_SUFFIX = ".seg"
CHECKPOINT_FILE = "checkpoint"
SEQUENCE_DIGITS = 10

SEQUENCES_RESERVED = 1024
"""Segment numbers that ``writer.json`` is ahead of use: one small write for so many segments."""

CREATE_SECONDS_MAX = 30.0
"""How long to wait for another process that creates the same root."""

_LOCKS_UNKNOWN = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK})
_FOREIGN_NAMES = frozenset({"lost+found", ".snapshot", ".nfs"})
"""Names that file systems put into empty directories by themselves."""


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """An opened root. ``store`` is its uuid (16 bytes)."""

    path: str
    store: bytes
    digest: str
    created: bool

    @property
    def writers_path(self) -> str:
        return posixpath.join(self.path, WRITERS)


@dataclasses.dataclass(slots=True)
class WriterClaim:
    """The right to write in one writer directory, until ``release``.

    ``sequence_next`` is the number of the next segment; all below ``reserved_end`` are kept from being
    given out again, by ``writer.json``, even if this process is killed and its segments are removed.
    ``lock`` is ``None`` on a file system without locks. ``adopted`` tells that the directory may hold
    segments to be recovered.
    """

    writer: bytes
    path: str
    host: str
    sequence_next: int
    lock: Lock | None
    adopted: bool
    reserved_end: int = 0
    reserving: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock, repr=False)

    async def take_sequence(self, storage: Storage) -> int:
        """A number that no segment of this writer ever had or will have. Raises ``OSError``.

        Rarely writes. A number that was taken and not used is lost, which harms nobody.
        """
        sequence = self.sequence_next
        self.sequence_next += 1
        async with self.reserving:
            if sequence >= self.reserved_end:
                await self.reserve(storage)
        return sequence

    async def reserve(self, storage: Storage) -> None:
        """Record that the next numbers may be in use. Raises ``OSError``.

        An adopted directory does so with the first number: a full disk can be opened.
        """
        end = self.sequence_next + SEQUENCES_RESERVED
        await self._record(storage, end)
        self.reserved_end = max(self.reserved_end, end)

    async def save(self, storage: Storage) -> None:
        """At a clean end: record exactly the next number. None may be taken any more."""
        await self._record(storage, self.sequence_next)
        self.reserved_end = self.sequence_next

    async def _record(self, storage: Storage, sequence: int) -> None:
        description = {"writer": self.writer.hex(), "host": self.host, "sequence_next": sequence}
        await _write_json(storage, posixpath.join(self.path, "writer.json"), description)

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None


async def open_root(storage: Storage, root: str, digest: str, *, clock: Clock, create: bool = True) -> Root:
    """Create the root or check that it is ours.

    Raises ``ConfigError`` for what is no store, another format version or digest kind, or a
    directory that cannot be created or written.
    """
    if digest not in DIGEST_KINDS:
        raise ConfigError(f"digest={digest!r} is unknown; use one of {', '.join(DIGEST_KINDS)}")
    try:
        names = {entry.name for entry in await storage.list_directory(root)}
    except NotADirectoryError:
        raise ConfigError(f"{root} is a file; name a directory for the store") from None
    except FileNotFoundError:
        names = set()
    except OSError as exc:
        raise ConfigError(f"{root} cannot be read: {exc.strerror}; check its permissions") from exc
    if ROOT_FILE in names:
        return _check_root(root, await _read_json(storage, posixpath.join(root, ROOT_FILE)), digest)
    if WRITERS in names and await _holds_segments(storage, root):
        raise ConfigError(
            f"{root} has lost its {ROOT_FILE} although {WRITERS}/ holds segments: restore that file from a copy (a new "
            "one would orphan every block), or name another directory"
        )
    strangers = sorted(name for name in names - _FOREIGN_NAMES if not _is_of_a_creation(name))
    if strangers:
        raise ConfigError(
            f"{root} is no store and not empty (it holds {', '.join(strangers[:3])}): name an empty or new directory"
        )
    if not create:
        raise ConfigError(f"{root} holds no store; open it once with create=True")
    try:
        changed = await _directories_to_change(storage, root)
        await storage.make_directory(posixpath.join(root, WRITERS))
        for path in changed:
            await storage.sync_directory(path)
        return await _create_root(storage, root, digest, clock)
    except OSError as exc:
        raise ConfigError(f"{root} is not writable: {exc.strerror}; check its permissions and free space") from exc


async def _directories_to_change(storage: Storage, root: str) -> list[str]:
    """The root and its parents, up to the first that exists: each gets a new name, which a sync makes durable."""
    path = posixpath.normpath(root)
    changed = [path]
    while (parent := posixpath.dirname(path) or ".") != path:
        changed.append(parent)
        try:
            await storage.list_directory(parent)
            break
        except FileNotFoundError:
            path = parent
        except PermissionError:
            break  # it is there: whether it can be written shows soon
    return changed


def _is_of_a_creation(name: str) -> bool:
    """Whether a root that is being created, or whose creation was cut short, holds such a name."""
    return name == WRITERS or name.startswith((ROOT_FILE, "." + ROOT_FILE))


async def _create_root(storage: Storage, root: str, digest: str, clock: Clock) -> Root:
    """Write the root file unless another process is quicker; a lock decides who does."""
    lock_path = posixpath.join(root, ROOT_FILE + ".lock")
    lock: Lock | None = None
    try:
        async with asyncio.timeout(CREATE_SECONDS_MAX):
            while (lock := await storage.try_lock(lock_path)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # another process holds it: no event
    except TimeoutError:
        raise ConfigError(
            f"{lock_path} has been locked for {CREATE_SECONDS_MAX:g} s; end the process that holds it"
        ) from None
    except OSError as exc:
        if exc.errno not in _LOCKS_UNKNOWN:
            raise
    try:
        entries = await storage.list_directory(root)
        if any(entry.name == ROOT_FILE for entry in entries):
            return _check_root(root, await _read_json(storage, posixpath.join(root, ROOT_FILE)), digest)
        if lock is not None:
            await _remove_temporary(storage, root, entries)
        return await _write_root(storage, root, digest, clock)
    finally:
        if lock is not None:
            lock.release()


async def _write_root(storage: Storage, root: str, digest: str, clock: Clock) -> Root:
    store = uuid.uuid4()
    description = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "store": store.hex,
        "digest": digest,
        "created_ns": clock.wall_ns(),
    }
    await _write_json(storage, posixpath.join(root, ROOT_FILE), description)
    return Root(root, store.bytes, digest, created=True)


def _check_root(root: str, found: dict[str, Any], digest: str) -> Root:
    if found.get("format") != FORMAT_NAME:
        raise ConfigError(f"{root}/{ROOT_FILE} does not describe a {FORMAT_NAME} store: name another directory")
    if found.get("version") != FORMAT_VERSION:
        raise ConfigError(
            f"{root} was written by format {found.get('version')}, this version reads {FORMAT_VERSION}: open it with "
            "the version of cascade_aio that wrote it, or name another directory"
        )
    if found.get("digest") != digest:
        kind = found.get("digest")
        raise ConfigError(f'{root} names its blocks by {kind}, not {digest}: open it with digest="{kind}"')
    try:
        store = bytes.fromhex(str(found.get("store")))
    except ValueError:
        store = b""
    if len(store) != 16:
        raise ConfigError(f"{root}/{ROOT_FILE} is damaged (no store uuid): restore it from a copy of the root")
    return Root(root, store, digest, created=False)


async def claim_writer(storage: Storage, root: Root, host: str) -> WriterClaim:
    """Adopt an unlocked writer directory of this host, else make a new one.

    The caller releases the claim. Raises ``ConfigError`` if the root is not writable.
    """
    try:
        for entry in await storage.list_directory(root.writers_path):
            if entry.is_dir and (writer := _writer_id(entry.name)) is not None:
                claim = await _adopt(storage, root, writer, host)
                if claim is not None:
                    return claim
        return await _new_writer(storage, root, host)
    except OSError as exc:
        raise ConfigError(f"{root.path} is not writable: {exc.strerror}; check its permissions and free space") from exc


async def _adopt(storage: Storage, root: Root, writer: bytes, host: str) -> WriterClaim | None:
    path = posixpath.join(root.writers_path, writer.hex())
    try:
        description = await _read_json(storage, posixpath.join(path, "writer.json"))
    except (FileNotFoundError, ConfigError):
        return None  # whose directory it is cannot be told; its segments are read like those of others
    if description.get("host") != host or description.get("writer") != writer.hex():
        return None
    try:
        lock = await storage.try_lock(posixpath.join(path, "lock"))
    except OSError as exc:
        if exc.errno in _LOCKS_UNKNOWN:
            return None
        raise
    if lock is None:
        return None
    try:
        entries = await storage.list_directory(path)
        await _remove_temporary(storage, path, entries)
        sequences = [sequence for sequence, _ in list_segments(entries)]
        recorded = description.get("sequence_next")
        following = max([recorded if isinstance(recorded, int) else 1, *(sequence + 1 for sequence in sequences)])
        claim = WriterClaim(writer, path, host, following, lock, adopted=True)
    except BaseException:
        lock.release()
        raise
    return claim


async def _remove_temporary(storage: Storage, path: str, entries: list[FileEntry]) -> None:
    """Remove what processes that were killed within ``write_small`` left in a directory nobody else writes."""
    for entry in entries:
        if entry.name.startswith(".") and entry.name.endswith(".tmp") and not entry.is_dir:
            await storage.unlink(posixpath.join(path, entry.name))


async def _new_writer(storage: Storage, root: Root, host: str) -> WriterClaim:
    writer = uuid.uuid4().bytes
    path = posixpath.join(root.writers_path, writer.hex())
    await storage.make_directory(path)
    await storage.sync_directory(root.writers_path)
    try:
        lock = await storage.try_lock(posixpath.join(path, "lock"))
    except OSError as exc:
        if exc.errno not in _LOCKS_UNKNOWN:
            raise
        lock = None
    claim = WriterClaim(writer, path, host, 1, lock, adopted=False)
    try:
        await claim.reserve(storage)
    except BaseException:
        claim.release()
        raise
    return claim


async def _holds_segments(storage: Storage, root: str) -> bool:
    writers = posixpath.join(root, WRITERS)
    try:
        for entry in await storage.list_directory(writers):
            if entry.is_dir and list_segments(await storage.list_directory(posixpath.join(writers, entry.name))):
                return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    return False


def list_segments(entries: list[FileEntry]) -> list[tuple[int, int]]:
    """(sequence, bytes) of the segment files in a writer directory's listing, ascending."""
    found = []
    for entry in entries:
        stem = entry.name.removesuffix(SEGMENT_SUFFIX)
        if (
            not entry.is_dir
            and stem != entry.name
            and len(stem) == SEQUENCE_DIGITS
            and stem.isascii()
            and stem.isdigit()
        ):
            found.append((int(stem), entry.size_bytes))
    return sorted(found)


async def list_writers(storage: Storage, root: Root) -> list[bytes]:
    """Ids of all writer directories, ascending."""
    entries = await storage.list_directory(root.writers_path)
    ids = [_writer_id(entry.name) for entry in entries if entry.is_dir]
    return sorted(writer for writer in ids if writer is not None)


def _writer_id(name: str) -> bytes | None:
    try:
        raw = bytes.fromhex(name)
    except ValueError:
        return None
    return raw if len(raw) == 16 and raw.hex() == name else None


async def _read_json(storage: Storage, path: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await storage.read_small(path), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is damaged ({exc}): restore it, or move the directory away") from exc


async def _write_json(storage: Storage, path: str, value: dict[str, Any]) -> None:
    await storage.write_small(path, [msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"])
