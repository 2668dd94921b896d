"""The root directory: what makes it a store, and which writer directory is ours.

Writes two kinds of small JSON files, once each per root and session; no data path. What it must not
know: what is inside segments.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import posixpath
import uuid
from collections.abc import Collection
from typing import Any

import msgspec

from cascade_aio.abc.storage import Clock, FileEntry, Lock, Storage
from cascade_aio.errors import ConfigError
from cascade_aio.model import DIGEST_KINDS
from cascade_aio.segments.format import FORMAT_NAME, FORMAT_VERSION
from cascade_aio.segments.hosts import Host, why_a_free_lock_proves_nothing

ROOT_FILE = "cascade.json"
WRITERS = "writers"
SEGMENT_SUFFIX = ".seg"
WRITER_FILE = "writer.json"
CHECKPOINT_FILE = "checkpoint"
SEQUENCE_DIGITS = 10

SEQUENCES_RESERVED = 1024
"""Segment numbers that ``writer.json`` is ahead of use: one small write for so many segments."""

LEFT_SECONDS_MAX = 3600.0
"""A directory whose writer has closed it is kept for it so long; then it is taken for given up."""

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
    segments to be recovered, ``recovered`` is the adopter's note that this was done.
    """

    writer: bytes
    path: str
    host: Host
    sequence_next: int
    lock: Lock | None
    adopted: bool
    clock: Clock | None = None
    recovered: bool = False
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
        await self._record(storage, end, 0)
        self.reserved_end = max(self.reserved_end, end)

    async def save(self, storage: Storage) -> None:
        """At a clean end: record exactly the next number, and when that was. None may be taken any more."""
        await self._record(storage, self.sequence_next, 1 if self.clock is None else self.clock.wall_ns())
        self.reserved_end = self.sequence_next

    async def _record(self, storage: Storage, sequence: int, closed_ns: int) -> None:
        description = {
            "version": FORMAT_VERSION,
            "writer": self.writer.hex(),
            "host": self.host.name,
            "boot": self.host.boot,
            "sequence_next": sequence,
            "closed_ns": closed_ns,
        }
        await _write_json(storage, posixpath.join(self.path, WRITER_FILE), description)

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None


async def find_root(storage: Storage, root: str) -> Root:
    """The root as it is, of either digest; nothing is written. Raises ``ConfigError`` for what is no store."""
    try:
        found = await _read_json(storage, posixpath.join(root, ROOT_FILE))
    except FileNotFoundError:
        raise ConfigError(
            f"{root} holds no store (it has no {ROOT_FILE}); name the directory that a store was opened in"
        ) from None
    except NotADirectoryError:
        raise ConfigError(f"{root} is a file; name the directory of a store") from None
    except OSError as exc:
        raise ConfigError(f"{root} cannot be read: {exc.strerror}; check its permissions") from exc
    return _check_root(root, found, None)


async def look_at_root(storage: Storage, root: str, digest: str) -> Root | None:
    """What ``open_root`` would take or refuse: the root, ``None`` where it would make one. Writes nothing.

    Raises ``ConfigError`` as it does.
    """
    if digest not in DIGEST_KINDS:
        raise ConfigError(f"digest={digest!r} is unknown; use one of {', '.join(DIGEST_KINDS)}")
    names: set[str] = set()
    try:
        names = {entry.name for entry in await storage.list_directory(root)}
        if ROOT_FILE in names:
            return _check_root(root, await _read_json(storage, posixpath.join(root, ROOT_FILE)), digest)
    except NotADirectoryError:
        raise ConfigError(f"{root} is a file; name a directory for the store") from None
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise ConfigError(f"{root} cannot be read: {exc.strerror}; check its permissions") from exc
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
    return None


async def open_root(storage: Storage, root: str, digest: str, *, clock: Clock) -> Root:
    """Create the root or check that it is ours.

    Raises ``ConfigError`` for what is no store, another format version or digest kind, or a
    directory that cannot be created or written.
    """
    known = await look_at_root(storage, root, digest)
    if known is not None:
        return known
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


def _check_root(root: str, found: dict[str, Any], digest: str | None) -> Root:
    if found.get("format") != FORMAT_NAME:
        raise ConfigError(f"{root}/{ROOT_FILE} does not describe a {FORMAT_NAME} store: name another directory")
    if found.get("version") != FORMAT_VERSION:
        raise ConfigError(
            f"{root} was written by format {found.get('version')}, this version reads {FORMAT_VERSION}: open it with "
            "the version of cascade_aio that wrote it, or name another directory"
        )
    kind = found.get("digest")
    if kind not in DIGEST_KINDS:
        raise ConfigError(f"{root}/{ROOT_FILE} is damaged (digest {kind!r}): restore it from a copy of the root")
    if digest not in (None, kind):
        raise ConfigError(f'{root} names its blocks by {kind}, not {digest}: open it with digest="{kind}"')
    try:
        store = bytes.fromhex(str(found.get("store")))
    except ValueError:
        store = b""
    if len(store) != 16:
        raise ConfigError(f"{root}/{ROOT_FILE} is damaged (no store uuid): restore it from a copy of the root")
    return Root(root, store, str(kind), created=False)


async def claim_writer(storage: Storage, root: Root, host: Host, clock: Clock | None = None) -> WriterClaim:
    """Take over a writer directory whose writer is gone, the one closed last before all, else make a new one.

    The caller releases the claim. Raises ``ConfigError`` if the root is not writable.
    """
    try:
        found = [await _read_writer(storage, root, writer) for writer in await list_writers(storage, root)]
        known = [each for each in found if not isinstance(each, str)]
        for directory in sorted(known, key=lambda each: each.closed_ns, reverse=True):
            if why_a_free_lock_proves_nothing(directory.description, host) is None:
                claim = await _adopt(storage, root, directory.writer, host, clock)
                if claim is not None:
                    return claim
        return await _new_writer(storage, root, host, clock)
    except OSError as exc:
        raise ConfigError(f"{root.path} is not writable: {exc.strerror}; check its permissions and free space") from exc


@dataclasses.dataclass(slots=True)
class DeadWriters:
    """What ``claim_dead`` found: the claims it made, and why other directories with segments were left alone."""

    claims: list[WriterClaim] = dataclasses.field(default_factory=list)
    left: dict[bytes, str] = dataclasses.field(default_factory=dict)


async def claim_dead(
    storage: Storage,
    root: Root,
    host: Host,
    clock: Clock,
    *,
    except_for: Collection[bytes],
    closed_too: bool = False,
    vouched_for: Collection[bytes] = (),
) -> DeadWriters:
    """Claim every directory that holds segments and whose writer is provably dead; the lock decides races.

    One that was closed is left for ``LEFT_SECONDS_MAX`` to whoever comes back for it, unless ``closed_too``.
    ``vouched_for`` are writers that somebody knows to be dead. The caller releases the claims. Raises
    ``OSError``; what was claimed before is released then.
    """
    found = DeadWriters()
    try:
        for writer in await list_writers(storage, root):
            if writer in except_for:
                continue
            directory = await _read_writer(storage, root, writer)
            try:
                if not list_segments(await storage.list_directory(_writer_path(root, writer))):
                    continue
            except FileNotFoundError:
                continue
            if isinstance(directory, str):
                if writer not in vouched_for:
                    found.left[writer] = directory
                    continue
                directory = _Directory(writer, {})
            age_ns = clock.wall_ns() - directory.closed_ns
            if (
                directory.closed_ns and not closed_too and abs(age_ns) < LEFT_SECONDS_MAX * 1e9
            ):  # ahead: a clock was set
                continue
            doubt = why_a_free_lock_proves_nothing(directory.description, host)
            if doubt is not None and writer not in vouched_for:
                found.left[writer] = doubt
                continue
            claim = await _adopt(storage, root, writer, host, clock)
            if claim is None:
                found.left[writer] = "its lock is held: its writer is alive"
            else:
                found.claims.append(claim)
    except BaseException:
        for claim in found.claims:
            claim.release()
        raise
    return found


async def is_abandoned(storage: Storage, root: Root, writer: bytes, host: Host) -> bool:
    """Whether a directory holds no segment and provably nobody is about to write one. Raises ``OSError``."""
    directory = await _read_writer(storage, root, writer)
    if isinstance(directory, str) or why_a_free_lock_proves_nothing(directory.description, host) is not None:
        return False
    claim = await _adopt(storage, root, writer, host, None)
    if claim is None:
        return False
    try:
        return not list_segments(await storage.list_directory(claim.path))
    finally:
        claim.release()


@dataclasses.dataclass(frozen=True, slots=True)
class _Directory:
    writer: bytes
    description: dict[str, Any]

    @property
    def closed_ns(self) -> int:
        """When its writer closed it; 0: it did not."""
        closed_ns = self.description.get("closed_ns")
        return closed_ns if isinstance(closed_ns, int) else 0

    @property
    def sequence_next(self) -> int:
        sequence = self.description.get("sequence_next")
        return sequence if isinstance(sequence, int) else 1


def _writer_path(root: Root, writer: bytes) -> str:
    return posixpath.join(root.writers_path, writer.hex())


async def _read_writer(storage: Storage, root: Root, writer: bytes) -> _Directory | str:
    """What ``writer.json`` says, or why it cannot be told whose directory this is: then its segments are read
    like those of others. Raises ``OSError``."""
    try:
        description = await _read_json(storage, posixpath.join(_writer_path(root, writer), WRITER_FILE))
    except FileNotFoundError:
        return f"it has no {WRITER_FILE}"
    except ConfigError:
        return f"its {WRITER_FILE} is damaged"
    if description.get("writer") != writer.hex():
        return f"its {WRITER_FILE} is that of another directory"
    if (version := description.get("version")) != FORMAT_VERSION:
        return f"its {WRITER_FILE} is of format {version}, this version reads {FORMAT_VERSION}"
    return _Directory(writer, description)


async def _adopt(storage: Storage, root: Root, writer: bytes, host: Host, clock: Clock | None) -> WriterClaim | None:
    """The claim of a directory that is nobody's; ``None`` if somebody has it, or is quicker. Raises ``OSError``."""
    path = _writer_path(root, writer)
    try:
        lock = await storage.try_lock(posixpath.join(path, "lock"))
    except OSError as exc:
        if exc.errno in _LOCKS_UNKNOWN or isinstance(exc, FileNotFoundError):
            return None
        raise
    if lock is None:
        return None
    try:
        directory = await _read_writer(storage, root, writer)  # of now: others may have had it since it was seen
        entries = await storage.list_directory(path)
        await _remove_temporary(storage, path, entries)
        recorded = 1 if isinstance(directory, str) else directory.sequence_next
        following = max([recorded, *(sequence + 1 for sequence, _ in list_segments(entries))])
        return WriterClaim(writer, path, host, following, lock, adopted=True, clock=clock)
    except FileNotFoundError:
        lock.release()
        return None
    except BaseException:
        lock.release()
        raise


async def _remove_temporary(storage: Storage, path: str, entries: list[FileEntry]) -> None:
    """Remove what processes that were killed within ``write_small`` left in a directory nobody else writes."""
    for entry in entries:
        if entry.name.startswith(".") and entry.name.endswith(".tmp") and not entry.is_dir:
            await storage.unlink(posixpath.join(path, entry.name))


async def _new_writer(storage: Storage, root: Root, host: Host, clock: Clock | None) -> WriterClaim:
    writer = uuid.uuid4().bytes
    path = _writer_path(root, writer)
    await storage.make_directory(path)
    await storage.sync_directory(root.writers_path)
    try:
        lock = await storage.try_lock(posixpath.join(path, "lock"))
    except OSError as exc:
        if exc.errno not in _LOCKS_UNKNOWN:
            raise
        lock = None
    claim = WriterClaim(writer, path, host, 1, lock, adopted=False, clock=clock)
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
    try:
        entries = await storage.list_directory(root.writers_path)
    except FileNotFoundError:
        return []
    ids = [_writer_id(entry.name) for entry in entries if entry.is_dir]
    return sorted(writer for writer in ids if writer is not None)


def _writer_id(name: str) -> bytes | None:
    try:
        raw = bytes.fromhex(name)
    except ValueError:
        return None
    return raw if len(raw) == 16 and raw.hex() == name else None


async def largest_checkpoint(storage: Storage, root: Root) -> str | None:
    """Path of the checkpoint that says most, for one who only looks. Raises ``OSError``."""
    found: list[tuple[int, str]] = []
    for writer in await list_writers(storage, root):
        path = _writer_path(root, writer)
        with contextlib.suppress(FileNotFoundError):
            entries = await storage.list_directory(path)
            found += [
                (entry.size_bytes, posixpath.join(path, CHECKPOINT_FILE))
                for entry in entries
                if entry.name == CHECKPOINT_FILE
            ]
    return max(found)[1] if found else None


async def _read_json(storage: Storage, path: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(await storage.read_small(path), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is damaged ({exc}): restore it, or move the directory away") from exc


async def _write_json(storage: Storage, path: str, value: dict[str, Any]) -> None:
    await storage.write_small(path, [msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"])
