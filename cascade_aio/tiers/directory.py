"""The owner's side of an arena's directory: slots, names, and the pin tables of its clients.

One process owns a directory: who holds the lock of its arena. It publishes sealed extents, withdraws
those that nobody has pinned, and gives every client a pin table of its own, a file beside the arena
that outlives the owner: the next one finds it, learns from the client's lock on it whether that client
lives, and honours its pins. So a client's bytes never change under it, whoever dies.

Must not know: what a block is worth, who wants it, where else it is. ``DIRECTORY.md`` has bytes, states
and the argument; ``view`` is the client's side.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cascade_aio._native import map_shared
from cascade_aio._native.directory import INLINE_META_BYTES_MAX, Entry, NativeDirectory, PinTable, PinTables
from cascade_aio._native.directory import SlotState as NativeSlotState
from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.errors import LeaseError, TierFullError
from cascade_aio.tiers import directory_format as fmt

DirectoryEntry = Entry
SlotState = NativeSlotState
"""What a slot says and is, for the layers above, which may not touch ``_native``."""

PIN_TABLES_MAX = 1024
"""Clients at once, those of former owners included: each is one more look at every eviction."""

PIN_FILES_SCANNED_MAX = 65536
"""Names in the arena's directory that an opening looks at for pin tables of former clients."""


class DirectoryUnusableError(Exception):
    """What lies at the directory's path cannot be taken over; the message says why. Never leaves the tier."""


@dataclasses.dataclass(slots=True, eq=False)
class ClientPins:
    """The pin table of one client. ``path`` is its file; ``former``: it belongs to a client of a former owner."""

    path: str
    table: PinTable
    quota_bytes: int
    former: bool
    _memory: memoryview
    _fd: int
    _seen_touches: int = 0
    _harvest_from: int = 0
    closed: bool = False
    given_bytes: int = 0
    _given: dict[int, int] = dataclasses.field(default_factory=dict)
    """Slots that the owner has pinned in the client's name, with the bytes that count; some may be let go by now."""

    def take_fd(self) -> int:
        """The descriptor for the client, once: send it and close it at once, then only the client has its lock."""
        assert self._fd >= 0, "taken before"
        fd, self._fd = self._fd, -1
        return fd

    def pin(self, slot: int, nbytes: int = 0) -> None:
        """One more pin in the client's name, on a slot that the caller knows to stay; the client ends it.

        ``nbytes`` of arena count against the quota.
        """
        self.table.add(slot)
        self.given_bytes += nbytes - self._given.get(slot, 0)
        self._given[slot] = nbytes

    def may_give(self, slot: int, nbytes: int) -> bool:
        """Whether one more pin is within the quota, as far as the owner gave them. One block always is.

        Near the quota it looks at the whole table.
        """
        fresh = nbytes - self._given.get(slot, 0)
        if self.given_bytes + fresh > self.quota_bytes:
            self._forget_let_go()
            fresh = nbytes - self._given.get(slot, 0)
        return not self.given_bytes or self.given_bytes + fresh <= self.quota_bytes

    def taken(self) -> npt.NDArray[np.intp]:
        """Slots that the client has pinned by itself: looks at the whole table."""
        pinned = self._forget_let_go()
        for slot in self._given:
            pinned[slot] = 0
        return np.flatnonzero(np.frombuffer(pinned, dtype=np.uint8))

    def _forget_let_go(self) -> bytearray:
        """Of every slot whether it is pinned; what was given and is not is forgotten."""
        mask = np.zeros(self.table.slots, dtype=np.uint8)
        mask[list(self.pinned())] = 1
        pinned = bytearray(mask)
        self._given = {slot: nbytes for slot, nbytes in self._given.items() if pinned[slot]}
        self.given_bytes = sum(self._given.values())
        return pinned

    def unpin(self, slot: int) -> None:
        """End a pin that the client did not learn of. Raises ``LeaseError`` if there is none."""
        self.given_bytes -= self._given.pop(slot, 0)
        try:
            self.table.drop(slot)
        except ValueError as error:
            raise LeaseError(str(error)) from None

    def pinned(self) -> Iterator[int]:
        """Slots that have a pin now: looks at the whole table."""
        start, slots = 0, self.table.slots
        while start < slots:
            found, start = self.table.held(start)
            yield from found

    def is_alive(self) -> bool:
        """Whether some process still has the client's descriptor, as far as can be told. One system call or two."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        except OSError:  # no descriptors left: who cannot be asked for may live
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def revoke(self) -> None:
        """Tell the client that its pins are void."""
        self._memory[fmt.REVOKED_AT] = 1


class ArenaDirectory:
    """A directory that this process owns. Open with ``create`` or ``take_over``; one thread."""

    def __init__(self, path: str, identity: fmt.DirectoryIdentity, memory: memoryview, fd: int) -> None:
        self.path = path
        self.identity = identity
        self.geometry = geometry = fmt.geometry_of(identity.arena_bytes)
        self._memory = memory
        self._fd = fd
        self._native = NativeDirectory(memory, geometry.slots, geometry.buckets, fmt.CELLS_AT, geometry.slots_at)
        self._free: list[int] = []
        self._unused = 0
        self._slot_bytes = array.array("Q", bytes(8 * geometry.slots))
        """Of the block in each slot, as far as this process has seen it: 100,000 of them are added up in some ms."""
        self._clients: list[ClientPins] = []
        self._tables = PinTables()
        self.published = 0
        self.unpublished = 0
        """Blocks that found no slot or no room in the table: served by message."""
        self.names_refused = 0
        self.vetoes = 0
        """Withdrawals that a client's pin refused."""

    @classmethod
    def create(cls, path: str, identity: fmt.DirectoryIdentity) -> ArenaDirectory:
        """A new, empty directory at ``path``; what was there is removed. Raises ``TierFullError``, ``OSError``."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        geometry = fmt.geometry_of(identity.arena_bytes)
        fd = _create_file(path, geometry.directory_bytes)
        try:
            memory = map_shared(fd, geometry.directory_bytes, PAGE_BYTES)
            fmt.encode_superblock(memory, identity)
            return cls(path, identity, memory, fd)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise

    @classmethod
    def take_over(cls, path: str, identity: fmt.DirectoryIdentity) -> ArenaDirectory:
        """The directory that a former owner left, with the pin tables of clients that live.

        The caller holds the arena's lock, looks at every slot (``inspect``) and tells what becomes of each:
        ``keep``, ``quarantine`` or ``discard``; then ``settle``. Raises ``DirectoryUnusableError``, ``OSError``.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise DirectoryUnusableError("the arena has no directory") from None
        except OSError as error:
            raise DirectoryUnusableError(f"its directory cannot be opened ({error.strerror})") from None
        try:
            geometry = fmt.geometry_of(identity.arena_bytes)
            if not _is_own_file(fd, geometry.directory_bytes):
                raise DirectoryUnusableError("its directory is not a file of ours of the right size")
            os.posix_fallocate(fd, 0, geometry.directory_bytes)  # holes would be a SIGBUS when memory runs out
            memory = map_shared(fd, geometry.directory_bytes, PAGE_BYTES)
            found = fmt.decode_superblock(memory)
            if isinstance(found, str):
                raise DirectoryUnusableError(f"its directory cannot be used: {found}")
            if found != identity:
                raise DirectoryUnusableError(
                    "it belongs to another root, digest or size "
                    f"(store {found.store.hex()}, {found.digest}, {found.arena_bytes} bytes)"
                )
            directory = cls(path, identity, memory, fd)
            directory._find_clients()
            directory._native.clear_names()
            directory._unused = geometry.slots
            return directory
        except BaseException:
            os.close(fd)
            raise

    # -- life -----------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        return self.geometry.slots

    @property
    def clients(self) -> int:
        """Pin tables, those of former owners' clients included."""
        return len(self._clients)

    @property
    def session(self) -> bytes:
        return bytes(self._memory[fmt.SESSION_AT : fmt.SESSION_AT + 16])

    def begin(self) -> None:
        """Ready: clients may tell from the session that this is another opening."""
        self._memory[fmt.SESSION_AT : fmt.SESSION_AT + 16] = uuid.uuid4().bytes
        self._native.set_word(fmt.OPEN_AT, 1)

    def set_blocks(self, blocks: int) -> None:
        """Tell clients how many blocks the store knows."""
        self._native.set_word(fmt.BLOCKS_AT, blocks)

    def reopen_fd(self) -> int:
        """A new read-only descriptor of the directory; the caller closes it."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go; the files stay for the next owner, but for tables of clients that are gone. Repeated calls do
        nothing."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self._native.set_word(fmt.OPEN_AT, 0)
        for client in list(self._clients):
            if client._fd >= 0:
                os.close(client.take_fd())  # nobody has got it
            if not client.is_alive():
                self.close_client(client)
        self._clients.clear()
        os.close(fd)

    # -- slots ----------------------------------------------------------------------------------

    def publish(self, entry: Entry, state: SlotState = SlotState.SEALED) -> int:
        """Give ``entry`` a slot (its own ``slot`` and ``word`` do not matter): the slot, or -1 for no room."""
        slot = self._free.pop() if self._free else self._unused
        if slot >= self.slots:
            self.unpublished += 1
            return -1
        if slot == self._unused:
            self._unused += 1
        by_message = len(entry.meta) > INLINE_META_BYTES_MAX
        entry = entry._replace(slot=slot, meta=b"" if by_message else entry.meta, by_message=by_message)
        if not self._native.publish(entry, state):
            self._free.append(slot)
            self.unpublished += 1
            return -1
        self.published += 1
        self._slot_bytes[slot] = _bytes_of(entry)
        return slot

    def bind(self, slot: int, key: bytes) -> None:
        """``key`` (a prefix key) names the block in ``slot`` too, if there is room for the name."""
        if not self._native.bind(slot, fmt.directory_name(key)):
            self.names_refused += 1

    def unbind(self, slot: int, key: bytes) -> None:
        self._native.unbind(slot, fmt.directory_name(key))

    def withdraw(self, slot: int) -> bool:
        """Free the slot, unless a client has it pinned: then ``False``, and all is as before."""
        if not self._native.withdraw(slot, self._tables):
            self.vetoes += 1
            return False
        self._freed(slot)
        return True

    def is_pinned(self, slot: int) -> bool:
        """Whether a client has the block pinned now."""
        return self._native.is_pinned(slot, self._tables)

    def retire(self, slot: int) -> bool:
        """Nobody may pin the block any more. ``True``: the slot is free. ``False``: pins are left; ask again."""
        if not self._native.retire(slot, self._tables):
            return False
        self._freed(slot)
        return True

    def entry(self, slot: int) -> Entry:
        """What the slot says."""
        return self._native.inspect(slot)[1]

    def _freed(self, slot: int) -> None:
        self.published -= 1
        self._free.append(slot)

    # -- what a former owner left ---------------------------------------------------------------

    def inspect(self, slot: int) -> tuple[SlotState | None, Entry]:
        """State (``None``: not sound) and entry of a slot that was taken over. The entry may say anything."""
        return self._native.inspect(slot)

    def keep(self, slot: int) -> None:
        """The block stays, hidden until ``awaken``."""
        self._slot_bytes[slot] = _bytes_of(self.entry(slot))
        self._native.mark(slot, SlotState.DORMANT)
        self.published += 1

    def quarantine(self, slot: int) -> None:
        """Nobody finds it, but a former client has it pinned: ``retire`` tells when it is free."""
        self._native.mark(slot, SlotState.RETIRED)
        self.published += 1

    def discard(self, slot: int) -> None:
        self._native.mark(slot, SlotState.FREE)
        self._free.append(slot)

    def noted_free(self, slot: int) -> None:
        """The slot is free already."""
        self._free.append(slot)

    def awaken(self, slot: int) -> bool:
        """A kept block has been verified: clients may find it. ``False``: no room in the table."""
        return self._native.mark(slot, SlotState.SEALED)

    def former_pins(self) -> set[int]:
        """Slots that clients of former owners have pinned now."""
        return {slot for client in self._clients if client.former for slot in client.pinned()}

    # -- clients --------------------------------------------------------------------------------

    def open_client(self, arena_path: str, quota_bytes: int) -> ClientPins:
        """A pin table for a new client. Raises ``TierFullError`` at the limit of clients or of memory."""
        if len(self._clients) >= PIN_TABLES_MAX:
            raise TierFullError(f"{len(self._clients)} clients have pin tables, the most there may be; close some")
        path = f"{arena_path}{fmt.PIN_INFIX}{uuid.uuid4().hex}"
        fd = _create_file(path, self.geometry.pins_bytes)
        try:
            # Not from ``fd``: a mapping keeps its file open, and with it the lock that is to be the client's alone.
            mapped = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                memory = map_shared(mapped, self.geometry.pins_bytes, PAGE_BYTES)
            finally:
                os.close(mapped)
            fmt.encode_pins(memory, self.geometry, quota_bytes)
            fcntl.flock(fd, fcntl.LOCK_SH)  # dies with the client's last descriptor or mapping
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        client = ClientPins(path, self._table(memory), quota_bytes, False, memory, fd)
        self._clients.append(client)
        self._tables = PinTables([each.table for each in self._clients])
        return client

    def close_client(self, client: ClientPins) -> None:
        """The client is gone, or has lost its right: its pins count no more. Repeated calls do nothing."""
        if client.closed:
            return
        client.closed = True
        client.revoke()
        if client._fd >= 0:
            os.close(client.take_fd())
        self._clients.remove(client)
        self._tables = PinTables([each.table for each in self._clients])
        with contextlib.suppress(FileNotFoundError):
            os.unlink(client.path)

    def reap_former(self) -> int:
        """Close the tables of former owners' clients that are gone; how many are left."""
        former = [client for client in self._clients if client.former]
        gone = [client for client in former if not client.is_alive()]
        for client in gone:
            self.close_client(client)
        return len(former) - len(gone)

    def harvest(self) -> Iterator[int]:
        """Slots that clients have used since they were last asked for; some of them, bounded, the rest next time."""
        for client in self._clients:
            touches = client.table.touches
            if touches == client._seen_touches and not client._harvest_from:
                continue
            if not client._harvest_from:
                client._seen_touches = touches
            found, following = client.table.harvested(client._harvest_from)
            client._harvest_from = following if following < self.slots else 0
            yield from found

    def live_clients(self) -> list[ClientPins]:
        """Clients of this owner."""
        return [client for client in self._clients if not client.former]

    def is_over_quota(self, client: ClientPins) -> bool:
        """Whether the client has pinned more by itself than its library lets it: looks at the whole table.

        What the owner gave it (and it may not have heard of yet) was bounded then. One block does not count: it is
        pinned before its size can be seen, and one may be larger than the quota.
        """
        sizes = np.frombuffer(self._slot_bytes, dtype=np.uint64)[client.taken()]
        return int(sizes.sum()) - int(sizes.max(initial=0)) > client.quota_bytes

    def _table(self, memory: memoryview) -> PinTable:
        return PinTable(memory, self.slots, fmt.TOUCHES_AT, fmt.COUNTS_AT, self.geometry.touched_at)

    def _find_clients(self) -> None:
        """Pin tables of clients that outlived the former owner; those of others are removed."""
        folder, name = os.path.split(self.path.removesuffix(fmt.DIRECTORY_SUFFIX))
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number >= PIN_FILES_SCANNED_MAX:
                    raise DirectoryUnusableError(f"{folder} holds too many files to find its clients")
                if entry.name.startswith(name + fmt.PIN_INFIX):
                    self._take_client(entry.path)
        self._tables = PinTables([client.table for client in self._clients])

    def _take_client(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES):
                return  # gone, or not of our making
            raise
        try:
            if not _is_own_file(fd, self.geometry.pins_bytes):
                return
            memory = map_shared(fd, self.geometry.pins_bytes, PAGE_BYTES)
        finally:
            os.close(fd)
        described = fmt.decode_pins(memory)
        sound = not isinstance(described, str) and described[0] == self.slots
        client = ClientPins(path, self._table(memory), 0, True, memory, -1)
        if not sound or not client.is_alive():
            os.unlink(path)
            return
        if len(self._clients) >= PIN_TABLES_MAX:
            raise DirectoryUnusableError(f"more than {PIN_TABLES_MAX} clients of its former owner live")
        self._clients.append(client)

    def statistics(self) -> dict[str, object]:
        """Counts, JSON-ready."""
        return {
            "slots": self.slots,
            "published": self.published,
            "unpublished": self.unpublished,
            "names_refused": self.names_refused,
            "clients": len(self._clients),
            "former_clients": sum(client.former for client in self._clients),
            "vetoes": self.vetoes,
        }


def _bytes_of(entry: Entry) -> int:
    return entry.header_bytes + entry.value_offset + entry.value_bytes


def remove_files(arena_path: str) -> None:
    """Unlink directory and pin tables of an arena that is being removed, or started anew."""
    folder, name = os.path.split(arena_path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(arena_path + fmt.DIRECTORY_SUFFIX)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(name + fmt.PIN_INFIX):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)


def _create_file(path: str, nbytes: int) -> int:
    """A new file of zeros, really allocated. Raises ``TierFullError``."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        os.close(fd)
        os.unlink(path)
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise TierFullError(f"shared memory ran out while making {path} of {nbytes} bytes; enlarge it") from error
        raise
    return fd


def _is_own_file(fd: int, nbytes: int) -> bool:
    """A plain file of ours, with one name and of exactly this size."""
    found = os.fstat(fd)
    return (
        stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1 and found.st_size == nbytes
    )
