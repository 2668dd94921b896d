"""The public face of an embedded store: every call checks, delegates, and says what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, overload

from cascade_aio.abc.storage import ByteEngine
from cascade_aio.config import parse_size
from cascade_aio.errors import ConfigError
from cascade_aio.model import BlockId, BlockMeta, PrefixKey, Tier, as_bytes_view
from cascade_aio.store.adopting import AdoptionReport
from cascade_aio.store.block import Block, BlockSource, GetRequest, LeaseT, Readiness, is_early
from cascade_aio.store.closing import close_store
from cascade_aio.store.context import StoreContext
from cascade_aio.store.device_block import DeviceBlock, stream_handle
from cascade_aio.store.devices import Devices, DeviceSource
from cascade_aio.store.getting import Getter, PrefixLookup
from cascade_aio.store.paging import gather, scatter
from cascade_aio.store.prefetching import Prefetcher, PrefetchHandle, PrefetchPriority
from cascade_aio.store.putting import Putter, ReserveRequest, Slot
from cascade_aio.store.recovering import refresh
from cascade_aio.store.space import CompactionReport, SpaceKeeper
from cascade_aio.store.streaming import BlockStream
from cascade_aio.store.verifying import VerifyReport, verify_root

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclasses.dataclass(frozen=True, slots=True)
class BlockInfo:
    """One block of the store as ``blocks()`` lists it; lengths in bytes, tiers fastest first."""

    block_id: BlockId
    key_bytes: int
    value_bytes: int
    tiers: tuple[Tier, ...]
    prefixes: int


class BlockListing:
    """What ``store.blocks`` returns: iterate over it, or ``async for`` as on a client of a service."""

    __slots__ = ("_infos",)

    def __init__(self, infos: Iterator[BlockInfo]) -> None:
        self._infos = infos

    def __iter__(self) -> Iterator[BlockInfo]:
        return self

    def __next__(self) -> BlockInfo:
        return next(self._infos)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BlockInfo:
        for info in self._infos:
            return info
        raise StopAsyncIteration


class Statistics(dict[str, Any]):
    """What ``store.statistics`` returns: a JSON-ready dict. ``await`` it for the full answer: on an embedded
    store this one, on a client that of its service."""

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        return self._full().__await__()

    async def _full(self) -> dict[str, Any]:
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class StoreParts:
    """What an open store is made of, for a service that lends it to other processes."""

    context: StoreContext
    getter: Getter
    putter: Putter


class PrefixRequest(Generic[LeaseT]):
    """What ``store.get_prefix`` returns: ``await`` it for leases, or ``async with`` it for scoped ones."""

    __slots__ = ("_blocks", "_getter", "_keys")

    def __init__(self, getter: BlockSource[LeaseT], keys: Sequence[PrefixKey]) -> None:
        self._getter = getter
        self._keys = keys
        self._blocks: list[LeaseT] = []

    def __await__(self) -> Generator[Any, None, list[LeaseT]]:
        return self._getter.load_prefix(self._keys).__await__()

    async def __aenter__(self) -> list[LeaseT]:
        self._blocks = await self._getter.load_prefix(self._keys)
        return self._blocks

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        blocks, self._blocks = self._blocks, []
        for block in blocks:
            if not block.released:
                block.release()


class Store:
    """A tiered block store, opened by ``open_store``; belongs to the event loop that opened it.

    Calls may be made by any number of tasks of that loop. Every coroutine may be cancelled at any
    await without losing a lease, an extent, a request or a descriptor; a cancelled ``put`` stores
    nothing. All raise ``ClosedError`` after ``aclose``.
    """

    def __init__(
        self, context: StoreContext, getter: Getter, putter: Putter, space: SpaceKeeper, prefetcher: Prefetcher
    ) -> None:
        self._context = context
        self._getter = getter
        self._putter = putter
        self._space = space
        self._prefetcher = prefetcher

    @property
    def parts(self) -> StoreParts:
        """For the layers above: not part of the interface that stores and clients share."""
        return StoreParts(self._context, self._getter, self._putter)

    @overload
    def get(self, name: BlockId | PrefixKey | str, *, ready: Readiness = "whole") -> GetRequest: ...

    @overload
    def get(
        self, name: BlockId | PrefixKey | str, *, ready: Readiness = "whole", device: int, stream: object = None
    ) -> GetRequest[DeviceBlock]: ...

    def get(
        self,
        name: BlockId | PrefixKey | str,
        *,
        ready: Readiness = "whole",
        device: int | None = None,
        stream: object = None,
    ) -> GetRequest | GetRequest[DeviceBlock]:
        """A lease on a block: ``async with store.get(h) as block`` or ``block = await store.get(h)``.

        In the arena: no copy, no suspension, microseconds. On disk, or before that in another rank's arena: one
        verified read into the arena, shared by all who ask meanwhile. Raises ``BlockNotFoundError`` (unknown, or
        read later than ``read_seconds_max``), ``ConfigError`` (malformed name), ``CorruptionError`` (damaged
        record: it is forgotten, put the block again), ``TierFullError`` (arena full of leases and unwritten
        blocks), ``OSError`` (the disk).

        With ``ready="first-bytes"`` the lease is given while the block is still being read, as soon as its
        header and first bytes are verified: ``await block.ready("key", start, stop)`` and ``block.layers(n)``
        give its bytes as they arrive, the first of key and value first; errors of the rest come from there.

        With ``device`` the lease is a ``DeviceBlock`` in that device's memory. Given a ``stream``, it comes as soon
        as the copies are enqueued: what is enqueued in the stream from then on finds the bytes, and what is
        enqueued there before ``release`` may use them. Without, the bytes are there, and their use has ended before
        ``release``. Also raises ``BrokenTierError`` (the device is lost; the store goes on without it).
        """
        if device is None:
            return GetRequest(self._getter, name, early=is_early(ready))
        return GetRequest(self._on_device(device, stream), name, early=is_early(ready))

    @overload
    def get_prefix(self, keys: Sequence[PrefixKey]) -> PrefixRequest: ...

    @overload
    def get_prefix(
        self, keys: Sequence[PrefixKey], *, device: int, stream: object = None
    ) -> PrefixRequest[DeviceBlock]: ...

    def get_prefix(
        self, keys: Sequence[PrefixKey], *, device: int | None = None, stream: object = None
    ) -> PrefixRequest | PrefixRequest[DeviceBlock]:
        """Leases on the longest cached prefix of ``keys``, in order; a miss is an empty list.

        Blocks on disk are read in parallel. The prefix ends before the first block that is damaged, late
        or does not fit in the arena beside the others; such blocks are counted in ``statistics()``. ``device``
        and ``stream`` as in ``get``; what the arena has is copied there in one call of the driver.
        """
        if device is None:
            return PrefixRequest(self._getter, keys)
        return PrefixRequest(self._on_device(device, stream), keys)

    def _on_device(self, device: int, stream: object) -> DeviceSource:
        devices = self._devices()
        return DeviceSource(devices, devices.device(device), stream_handle(stream))

    def _devices(self) -> Devices:
        self._context.check()
        if self._context.devices is None:
            raise ConfigError(
                f"the store on {self._context.config.root} has no GPU tier; open it with gpu_bytes, such as "
                "gpu_bytes='8GiB'"
            )
        return self._context.devices

    def lookup(self, keys: Sequence[PrefixKey]) -> PrefixLookup:
        """How many leading keys are cached (``len``) and in which tier each. No I/O; does not suspend.

        With a communicator that is what this rank knows; ``await`` it for what the other ranks have, too.
        """
        return self._getter.lookup(keys)

    def __contains__(self, name: BlockId | PrefixKey | str) -> bool:
        self._context.check()
        return self._getter.find(name) >= 0

    async def contains(self, name: BlockId | PrefixKey | str) -> bool:
        """Whether any tier holds the block. ``in`` does not ask: on a client it sees shared memory only, with a
        communicator not what other ranks have."""
        return name in self or await self._getter.is_elsewhere(name)

    def __len__(self) -> int:
        """Blocks known to this store."""
        self._context.check()
        return len(self._context.catalog.index)

    async def put(
        self,
        key: Buffer,
        value: Buffer,
        *,
        prefix: PrefixKey | None = None,
        parent: PrefixKey | None = None,
        meta: BlockMeta | None = None,
    ) -> BlockId:
        """Store a block and return its id once it is readable; ``flush`` makes it durable.

        ``key`` and ``value`` are any C-contiguous buffers; they must not change until the call returns. A bound
        ``prefix`` returns at once without touching them: the first writer wins. Equal content is stored once.
        Waits for arena room up to ``put_wait_seconds_max``. Raises ``ConfigError`` (not contiguous, no
        buffer, bad prefix), ``BlockTooLargeError``, ``TierFullError``, ``DigestConflictError``.
        """
        self._context.check_writable()
        return await self._putter.put(key, value, prefix, parent, meta)

    def reserve(
        self,
        *,
        key_bytes: int,
        value_bytes: int,
        prefix: PrefixKey | None = None,
        parent: PrefixKey | None = None,
        meta: BlockMeta | None = None,
    ) -> ReserveRequest:
        """Memory in the arena to be filled in place: ``async with store.reserve(...) as slot``.

        Fill ``slot.key`` and ``slot.value``. A clean exit digests and seals (``slot.block_id``), an exception
        aborts. Arrays of the slot that are still referenced then cost one copy. Errors as in ``put``.
        """
        self._context.check_writable()
        return ReserveRequest(self._context, self._putter, key_bytes, value_bytes, prefix, parent, meta)

    async def scatter(
        self,
        name: BlockId | PrefixKey | str,
        keys: Sequence[object],
        values: Sequence[object],
        *,
        device: int,
        stream: object = None,
    ) -> None:
        """Copy a block's layers straight to memory of the caller's own on ``device``: paged KV tensors.

        ``keys`` and ``values`` have one entry per equal layer of the part: a device address, or an array of just
        that size. The copies run behind what ``stream`` has now, and what is enqueued there from then on behind them;
        the call returns when they are enqueued. Without a stream it returns when they have ended. Needs no room in
        the device's arena. The targets stay allocated until the copies have ended, also if the call is cancelled.
        Raises as ``get``, ``ConfigError`` for layers that do not fit.
        """
        devices = self._devices()
        await scatter(devices, devices.device(device), name, keys, values, stream_handle(stream))

    async def gather(
        self, slot: Slot, keys: Sequence[object], values: Sequence[object], *, device: int, stream: object = None
    ) -> None:
        """Fill a reservation with layers from memory of the caller's own on ``device``: the way back of ``scatter``.

        Runs behind what ``stream`` has now, and returns when the bytes are in ``slot.key`` and ``slot.value``; a
        cancelled call waits until nobody touches them any more. Raises ``ConfigError``, ``BrokenTierError``.
        """
        await gather(self._devices().device(device), slot, keys, values, stream_handle(stream))

    async def read_into(self, name: BlockId | PrefixKey | str, key_buffer: Buffer, value_buffer: Buffer) -> None:
        """Copy a block into the caller's buffers, whose lengths must be those of its parts exactly.

        The copy runs in worker threads. Raises as ``get``, and ``ConfigError`` for buffers that are read-only,
        not contiguous or of another length.
        """
        self._context.check()
        targets = writable_targets(key_buffer, value_buffer)
        block = self._getter.try_hot(name)
        if block is None:
            block = await self._getter.load(name)
        await copy_and_release(self._context.platform.engine, block, targets)

    async def flush(self) -> None:
        """Return once everything put, bound or deleted before this call is on stable storage.

        Concurrent calls share one fdatasync. Raises ``TierFullError`` (disk full) or ``BrokenTierError``
        (disk broken); the blocks stay readable from memory while the store is open.
        """
        self._context.check()
        await self._context.disk.flush()

    async def refresh(self) -> int:
        """Learn of blocks that other writers of this root stored (and deleted); returns how many are new.

        Own segments are read at opening only: what could not be read then is a miss until the next one.
        """
        self._context.check()
        return await self._context.while_open(refresh(self._context))

    async def adopt(self) -> AdoptionReport:
        """Make the segments of writers that died this store's own: their open segments are recovered and
        sealed, their space counts in ``disk_bytes``. Done every ``adopt_seconds`` anyway.

        Of several stores that try, one adopts. What is not provably dead is left alone; the report says
        why. May be cancelled and called again. Raises ``OSError``.
        """
        self._context.check_writable()
        return await self._context.while_open(self._context.adopter.adopt())

    async def delete(self, name: BlockId | PrefixKey | str) -> None:
        """Forget a block and all of its names; after ``flush`` it does not come back.

        Leases on it stay valid. Raises ``BlockNotFoundError`` if it is unknown.
        """
        self._context.check_writable()
        row = self._getter.resolve(name)
        block_id = self._context.catalog.index.block_id(row)
        self._context.counters.deletes += 1
        stamp = self._context.merger.delete(row, self._context.disk.stamp())
        self._context.disk.append_tombstone(block_id, stamp)

    def prefetch(
        self,
        keys: Sequence[BlockId | PrefixKey | str],
        *,
        priority: PrefetchPriority = "low",
        deadline_s: float | None = None,
    ) -> PrefetchHandle:
        """Promote blocks from disk and other ranks to the arena, first key first. Returns at once; the handle may
        be dropped.

        Room is taken from free memory and from copies that nobody used since this call and that the policy
        would evict next, never from hotter ones; what finds none within ``put_wait_seconds_max`` is given
        up. I/O waits behind that of gets, with "low" also behind writes. What has not landed after
        ``deadline_s`` seconds is given up. Unknown and damaged blocks are counted, not raised. Raises
        ``ConfigError`` (a malformed key).
        """
        self._context.check()
        return self._prefetcher.prefetch(keys, priority, deadline_s)

    def stream(
        self,
        keys: Sequence[BlockId | PrefixKey | str],
        *,
        window_bytes: int | str | None = None,
        priority: PrefetchPriority = "low",
        keep: bool = False,
        ready: Readiness = "whole",
    ) -> BlockStream:
        """Leases on ``keys`` in order: ``async with store.stream(keys) as blocks: async for block in blocks``.

        While one block is used, the next ones are promoted, as many bytes ahead as measured bandwidth and
        consumption call for and at most ``window_bytes`` (default: half of the arena; one block in any
        case). A lease is released when the next is asked for; with ``keep=True`` the caller releases them.
        ``ready="first-bytes"`` gives blocks that may still be arriving, see ``get``. Ends before the first
        block that is missing, damaged or finds no room; ``ended_because`` tells. Room as in ``prefetch``, and
        from what this stream has consumed. Raises ``ConfigError``; iterating raises ``ClosedError``.
        """
        self._context.check()
        early = is_early(ready)
        size = None if window_bytes is None else parse_size(window_bytes)
        if size == 0:
            raise ConfigError("window_bytes=0 is no window; use at least one block's bytes, or leave it out")
        names = self._prefetcher.checked(keys)
        return BlockStream(self._prefetcher, names, window_bytes=size, priority=priority, keep=keep, early=early)

    def blocks(self) -> BlockListing:
        """All blocks known now, for ``for`` or ``async for``. Await nothing else meanwhile: the store may
        change under the iterator."""
        self._context.check()
        return BlockListing(info for _, info in list_blocks(self._context))

    async def verify(self, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every record of the root and check it; ``on_progress(bytes_done, bytes_total)``.

        Also footers, checkpoints and the index against the records, and that every segment file is there.
        Reads in the background class, in bounded memory; damaged blocks are reported and forgotten
        (written again where the arena has them), so that they can be put anew; what could not be read is
        reported and kept. May be cancelled.
        """
        self._context.check()
        return await self._context.while_open(verify_root(self._context, on_progress))

    async def compact(
        self, on_progress: Callable[[int, int], None] | None = None, *, bandwidth: int | str | None = None
    ) -> CompactionReport:
        """Bring all dead bytes of this writer's segments back, now; ``on_progress(bytes_done, bytes_total)``.

        What is live in a segment with dead bytes is copied into new ones, each durable before an old one is
        removed; small segments are merged, deletions that nothing needs any more are dropped. Runs in the lowest
        class of I/O, at most ``bandwidth`` bytes per second if given. May be cancelled at any point and called
        again. Damaged records are reported and their segments stay. Raises ``TierFullError`` (no room for a
        copy), ``BrokenTierError``, ``OSError``; nothing is lost then.
        """
        self._context.check_writable()
        limit = None if bandwidth is None else parse_size(bandwidth)
        return await self._context.while_open(self._space.compact(on_progress, bandwidth=limit))

    async def wait_ready(self) -> None:
        """Return once the whole arena is populated. Not needed before anything; benchmarks use it."""
        self._context.check()
        await self._context.prefaulted.wait()
        self._context.check()

    def statistics(self) -> Statistics:
        """Counters and sizes by tier since opening, JSON-ready. Synchronous, no I/O."""
        return Statistics(self._statistics())

    def _statistics(self) -> dict[str, Any]:
        context = self._context
        catalog = context.catalog
        return {
            "root": context.config.root,
            "digest": context.config.digest,
            "blocks": len(catalog.index),
            "index_bytes": catalog.index.nbytes,
            "store": dataclasses.asdict(context.counters),
            "gpu": None if context.devices is None else context.devices.statistics(),
            "shm": {
                **context.shm.statistics(),
                "blocks": len(catalog.copies),
                "copy_bytes": catalog.copy_bytes,
                "pinned_bytes": catalog.pinned_bytes,
                "leases": context.desk.leases,
                "leased_bytes": context.desk.leased_bytes,
                "leases_outlived": context.desk.outlived,
                "evicted_blocks": catalog.evicted_blocks,
                "evicted_bytes": catalog.evicted_bytes,
                "waits_for_room": context.room.waited,
                "dormant_blocks": len(catalog.dormant),
                "directory": None if context.publisher is None else context.publisher.statistics(),
                "rewarmed": None if context.publisher is None else dataclasses.asdict(context.rewarmed),
                "loading": self._getter.loading,
            },
            "remote": None if context.sharing is None else context.sharing.statistics(),
            "disk": {
                **context.disk.statistics(),
                **self._space.statistics(),
                **context.adopter.statistics(),
                **self._getter.loader.slow.statistics(),
                "stripe": context.stripe,
                "conflicts": context.merger.conflicts,
                "facts_refused": context.facts_refused,
                "scrub": None if context.scrubber is None else context.scrubber.statistics(),
                "recovery": dataclasses.asdict(context.recovery.report),
            },
            "prefetch": self._prefetcher.statistics(),
            "io": context.platform.storage.statistics(),
            "damage": [str(error) for error in context.damage],
        }

    async def aclose(self) -> None:
        """Flush, seal, stop and give everything back. Repeated calls do nothing.

        Leases still out keep their memory readable until they are released; a warning names them.
        Raises what ``flush`` raises, after everything is closed.
        """
        if not self._context.closed:
            await close_store(self._context)


def list_blocks(context: StoreContext, first_row: int = 0) -> Iterator[tuple[int, BlockInfo]]:
    """Every block in a row from ``first_row`` on, with its row."""
    catalog = context.catalog
    index = catalog.index
    for row in index.rows(first_row):
        tiers: tuple[Tier, ...] = (Tier.GPU,) if context.devices is not None and context.devices.holds(row) else ()
        if catalog.is_in_arena(row):
            tiers += (Tier.SHM,)
        if index.location(row) is not None:
            tiers += (Tier.DISK,)
        key_bytes, value_bytes = index.lengths(row)
        yield row, BlockInfo(index.block_id(row), key_bytes, value_bytes, tiers, len(index.bindings(row)))


def writable_targets(key_buffer: Buffer, value_buffer: Buffer) -> tuple[memoryview, memoryview]:
    """Flat views of the buffers of ``read_into``. Raises ``ConfigError`` for one that cannot be written to."""
    return _writable(key_buffer, "key_buffer"), _writable(value_buffer, "value_buffer")


async def copy_and_release(engine: ByteEngine, block: Block, targets: tuple[memoryview, memoryview]) -> None:
    """The copying of ``read_into``. Raises ``ConfigError`` for buffers of another length; releases in any case."""
    try:
        sources = block.views()
        for target, source, part in zip(targets, sources, ("key", "value"), strict=True):
            if len(target) != len(source):
                raise ConfigError(
                    f"{part}_buffer has {len(target)} bytes and the {part} of block {block.block_id} has "
                    f"{len(source)}; give buffers of exactly these lengths"
                )
        await engine.copy(list(zip(targets, sources, strict=True)))
    finally:
        block.release()


def _writable(buffer: Buffer, name: str) -> memoryview:
    view = as_bytes_view(buffer, name)
    if view.readonly and view.nbytes:
        raise ConfigError(f"{name} is read-only; pass a writable buffer")
    return view
