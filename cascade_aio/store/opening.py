"""Opening a store: every resource in order, each with the step that gives it back.

A failure or cancellation at any point closes what was opened so far, last first, and leaves the root
as it was but for an empty writer directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any

from cascade_aio.abc.eviction import EvictionPolicy
from cascade_aio.abc.storage import PAGE_BYTES, Platform, Storage
from cascade_aio.config import StoreConfig, arena_name, format_size, make_config
from cascade_aio.core.clock import HybridClock
from cascade_aio.core.eviction import PrefixLru
from cascade_aio.core.policies import HitDensity
from cascade_aio.errors import CascadeError, ConfigError, TierStalledError
from cascade_aio.io.engine import EngineLimits
from cascade_aio.io.platform import open_platform
from cascade_aio.segments.hosts import this_host
from cascade_aio.segments.layout import Root, WriterClaim, claim_writer, find_root, open_root
from cascade_aio.segments.reader import SegmentReader
from cascade_aio.segments.stripe import prepare_directory
from cascade_aio.segments.table import SegmentTable
from cascade_aio.segments.writer import SegmentWriter, WriterLimits
from cascade_aio.store.adopting import Adopter
from cascade_aio.store.catalog import Catalog, Copy
from cascade_aio.store.closing import run_all
from cascade_aio.store.context import StoreContext, TaskScope
from cascade_aio.store.devices import Devices, OpenDriver
from cascade_aio.store.getting import Getter
from cascade_aio.store.lending import LeaseDesk
from cascade_aio.store.prefetching import Prefetcher
from cascade_aio.store.publishing import Publisher
from cascade_aio.store.putting import Putter
from cascade_aio.store.recovering import recover, save_checkpoint
from cascade_aio.store.remoting import Joining
from cascade_aio.store.rewarming import rewarm, write_unwritten
from cascade_aio.store.scrubbing import Scrubber
from cascade_aio.store.space import SpaceKeeper
from cascade_aio.store.store import Store
from cascade_aio.tiers.arena import NO_ARENA, Arena, PrivateArena, SharedArena, open_arena, open_kept_arena
from cascade_aio.tiers.directory import ArenaDirectory
from cascade_aio.tiers.directory_format import DirectoryIdentity
from cascade_aio.tiers.disk import DiskTier
from cascade_aio.tiers.gpu.cuda import open_device
from cascade_aio.tiers.remote.group import RmaGroup
from cascade_aio.tiers.remote.mpi_group import MpiGroup
from cascade_aio.tiers.shm import ShmTier
from cascade_aio.tiers.stalls import StallWatch, in_progress, watched

logger = logging.getLogger("cascade_aio.store")

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"prefix-lru": PrefixLru, "hit-density": HitDensity}
"""By the name that the setting ``eviction`` gives them; each tier has its own."""

SEGMENTS_PER_BUDGET = 16
"""With a disk budget, segments are at most this part of it, so that space comes back in small steps."""

SEGMENTS_PER_BUDGET_MIN = 8
"""A budget of fewer of the smallest segments is refused."""

MARKS_PER_SEGMENT = 64
"""At most such a part of a segment is durable when a flush ends and has to be read again after a kill all the same."""

_SEGMENT_BYTES_MIN = 1 << 20

SYNC_BYTES_MIN = 256 << 20
"""A sync makes the device drop everything else for some milliseconds: without a flush that asks for
one, it is due only when half of what may be undurable waits for it, and this at least."""


def open_store(root: str | os.PathLike[str] | StoreConfig, *, comm: Any = None, **settings: Any) -> StoreOpening:
    """Open (or create) the store in the directory ``root``.

    ``async with open_store(root, shm_bytes="4GiB") as store`` closes it at the end; ``store = await
    open_store(root)`` leaves that to ``await store.aclose()``. Settings are the fields of
    ``StoreConfig``; sizes may be text. Instead of a root a complete ``StoreConfig`` may be given.

    Opening raises ``ConfigError`` (a wrong setting; a root that is no store, of another format or digest,
    not writable; an arena in use; ``io_backend="uring"`` without io_uring), ``TierFullError`` (shared
    memory too small), ``TierStalledError`` (the storage hangs) or ``OSError``. What earlier writers left is
    recovered meanwhile.

    With ``read_only=True`` nothing is created, written, locked or recovered: it works beside a writer and
    without write permission, takes either digest, needs no arena file (unless ``arena`` names one), and a
    directory that is no root is refused.

    With ``comm``, an intracommunicator of mpi4py, opening is collective, and the arenas of its ranks are a tier
    between this one's and the disk (docs/remote.md). No later call is collective. Also raises ``BrokenTierError``
    if another rank could not open its store, or did not try.
    """
    if isinstance(root, StoreConfig):
        if settings:
            raise ConfigError(f"{', '.join(settings)}: pass settings within the StoreConfig, not beside it")
        return StoreOpening(root, comm)
    return StoreOpening(make_config(root, **settings), comm)


class StoreOpening:
    """What ``open_store`` returns: ``await`` it, or use it as a scope."""

    def __init__(self, config: StoreConfig, comm: Any = None) -> None:
        self._config = config
        self._comm = comm
        self._store: Store | None = None

    def __await__(self) -> Generator[Any, None, Store]:
        return self._open().__await__()

    async def __aenter__(self) -> Store:
        self._store = await self._open()
        return self._store

    async def _open(self) -> Store:
        if self._comm is None:
            return await open_with(self._config)
        return await open_with(self._config, group=MpiGroup(self._comm, seconds_max=self._config.remote_seconds_max))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        store, self._store = self._store, None
        if store is not None:
            await store.aclose()


class _Unwinding:
    """Steps that give back what was opened. Kept for closing on success, run at once on failure."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Awaitable[None]]] = []
        self.storage: Storage | None = None
        """What is opened with, as soon as there is any."""

    def push(self, step: Callable[[], Awaitable[None]]) -> None:
        self.steps.insert(0, step)

    def push_sync(self, step: Callable[[], None]) -> None:
        async def run() -> None:
            step()

        self.push(run)


async def open_with(
    config: StoreConfig,
    *,
    platform: Platform | None = None,
    arena: Arena | None = None,
    group: RmaGroup | None = None,
    open_driver: OpenDriver = open_device,
) -> Store:
    """``open_store`` for a given world, which is closed with the store. For tests and simulations."""
    undo = _Unwinding()
    return await _unless_stuck(_open_or_undo(config, undo, platform, arena, group, open_driver), config, undo)


async def _unless_stuck(opening: Coroutine[Any, Any, Store], config: StoreConfig, undo: _Unwinding) -> Store:
    """Run it to its end; a storage that makes no progress for ``stall_seconds_max`` is given up, which ends it.

    A cancellation is passed on and its end is awaited, at most so long, too.
    """
    task = asyncio.ensure_future(opening)
    cancelled: asyncio.CancelledError | None = None
    abandoned = False
    before: object = None
    while not task.done():
        try:
            await asyncio.wait((task,), timeout=config.stall_seconds_max)
        except asyncio.CancelledError as error:
            cancelled = error
            task.cancel()
            continue
        now = None if task.done() or undo.storage is None else in_progress(undo.storage)
        if now is not None and now == before and undo.storage is not None:
            abandoned = True
            undo.storage.abandon()
            task.cancel()  # else what cannot be read now would be told as unreadable
        before = now
    failure = asyncio.CancelledError() if task.cancelled() else task.exception()
    if failure is None and not abandoned and cancelled is None:
        return task.result()
    if failure is None:  # it was open a moment before, or took what it could not read for unreadable
        with contextlib.suppress(CascadeError, OSError):
            await task.result().aclose()
    if cancelled is not None:
        raise cancelled
    if abandoned:
        raise TierStalledError(
            f"the storage of {config.root} did not answer for {config.stall_seconds_max:g} s while the store was being "
            "opened: check the device or the file system's servers"
        ) from failure
    assert failure is not None
    raise failure


async def _open_or_undo(
    config: StoreConfig,
    undo: _Unwinding,
    platform: Platform | None,
    arena: Arena | None,
    group: RmaGroup | None,
    open_driver: OpenDriver,
) -> Store:
    joining = None if group is None else Joining(group, config)
    try:
        if joining is not None:
            arena = await joining.arena(undo.push)
        return await _open(config, undo, platform, arena, joining, open_driver)
    except BaseException as error:
        if joining is not None:
            await joining.give_up(error)
        with contextlib.suppress(asyncio.CancelledError):  # the first one is raised again below
            await run_all(undo.steps)
        raise


async def _open(
    config: StoreConfig,
    undo: _Unwinding,
    platform: Platform | None,
    arena: Arena | None,
    joining: Joining | None,
    open_driver: OpenDriver,
) -> Store:
    config = _fitted(config)
    if platform is None:
        limits = EngineLimits(
            request_bytes_max=config.request_bytes_max,
            requests_in_flight_max=config.requests_in_flight_max,
            bytes_in_flight_max=config.bytes_in_flight_max,
        )
        platform = open_platform(io_backend=config.io_backend, worker_threads=config.workers, limits=limits)
    undo.push(platform.engine.aclose)
    undo.push(platform.storage.aclose)
    storage = undo.storage = platform.storage
    if config.read_only:
        root = await find_root(storage, config.root)
        config = dataclasses.replace(config, digest=root.digest, disk_bytes=None)  # type: ignore[arg-type]
    else:
        root = await open_root(storage, config.root, config.digest, clock=platform.clock)
    empty_because: str | None = None
    if arena is None and config.read_only and config.arena is None:
        arena = PrivateArena(config.shm_bytes)
    if arena is None:
        arena, empty_because = await _open_arena(config, root)
    undo.push_sync(arena.close)
    host = await asyncio.to_thread(this_host, config.root)
    if config.read_only:
        claim, stripe = WriterClaim(b"", config.root, host, 0, None, adopted=False), "nothing is written"
    else:
        claim = await claim_writer(storage, root, host, platform.clock)
        undo.push_sync(claim.release)
        stripe = await _stripe(config, claim.path)
    clock = HybridClock()
    table = SegmentTable(storage, config.root)
    undo.push(table.aclose)
    loop = asyncio.get_running_loop()
    shm = ShmTier(arena, platform.engine, storage, register=config.register_buffers)
    policy = POLICIES[config.eviction]
    evicts = config.disk_bytes is not None or config.when_full == "evict"
    disk_policy = policy() if evicts and not config.read_only else None
    catalog = Catalog(shm, table, policy(), disk_policy, blocks_max=config.index_blocks_max)
    backlog_bytes_max = config.shm_bytes // 2 if config.tail_bytes_max is None else config.tail_bytes_max
    watch = StallWatch(config.stall_seconds_max)
    undo.push_sync(watch.close)
    writer = SegmentWriter(
        watched(storage, watch),
        root,
        claim,
        table,
        lambda: clock.next(platform.clock.wall_ns()),
        WriterLimits(
            segment_bytes=config.segment_bytes,
            sync_bytes=max(SYNC_BYTES_MIN, backlog_bytes_max // 2),
            mark_bytes=config.segment_bytes // MARKS_PER_SEGMENT,
            tail_seconds_max=config.tail_seconds_max,
        ),
    )
    reader = SegmentReader(storage, platform.engine, table)
    disk = DiskTier(platform, table, reader, writer, clock, backlog_bytes_max=backlog_bytes_max, watch=watch)
    context = StoreContext(config, platform, loop, shm, disk, catalog, LeaseDesk(catalog, loop))
    context.store_id, context.writer = root.store, claim.writer
    await recover(context, root, None if config.read_only else claim)
    adopter = context.adopter = Adopter(context, root, host, platform.clock)
    undo.push_sync(adopter.release)
    if not config.read_only:
        undo.push(functools.partial(save_checkpoint, context, root, claim))
        background = TaskScope(context.fail)
        undo.push(background.close)
        undo.push(writer.aclose)
        background.spawn(writer.run(), "cascade-segment-writer")
    getter = Getter(context)
    prefetcher = Prefetcher(context, getter)
    space = SpaceKeeper(context, root, claim)
    if not config.read_only:
        background.spawn(space.run(), "cascade-space")
    devices = Devices(context, getter)
    undo.push(devices.close)  # after the tasks, which use them
    undo.push(context.tasks.close)
    undo.push_sync(prefetcher.close)
    await devices.open(policy, open_driver)
    if isinstance(arena, SharedArena) and arena.directory is not None:
        await _publish(context, arena, arena.directory, empty_because)
    context.tasks.spawn(_prefault(context), "cascade-prefault")
    if config.scrub_bandwidth is not None and not config.read_only:
        context.scrubber = Scrubber(context, claim.path)
        context.tasks.spawn(context.scrubber.run(), "cascade-scrubber")
    if config.adopt_seconds is not None and not config.read_only:
        context.tasks.spawn(adopter.run(config.adopt_seconds), "cascade-adopter")
    context.stripe = stripe
    if joining is not None:
        await joining.complete(context, undo.push)
    context.closers = undo.steps
    return Store(context, getter, Putter(context, getter), space, prefetcher)


async def _open_arena(config: StoreConfig, root: Root) -> tuple[SharedArena, str | None]:
    """The arena, and why it is empty if it might not be."""
    path = os.path.join(config.shm_dir, arena_name(config))
    if not config.warm_restart or config.read_only:
        return await open_arena(path, config.shm_bytes), None
    return await open_kept_arena(path, DirectoryIdentity(config.shm_bytes, root.store, root.digest))


async def _publish(
    context: StoreContext, arena: SharedArena, directory: ArenaDirectory, empty_because: str | None
) -> None:
    """Take over what the arena holds and let other processes find what it will hold."""
    publisher = Publisher(arena, directory, context.catalog, context.config.digest)
    unwritten: list[Copy] = []
    context.rewarmed.empty_because = empty_because
    if arena.keep:
        unwritten = await rewarm(context, publisher, directory)
        report = context.rewarmed
        logger.info("%d blocks of %s were in the arena %s", report.blocks, format_size(report.bytes), arena.path)
    else:
        level = logging.INFO if empty_because == NO_ARENA else logging.WARNING  # a warm start was to be expected
        logger.log(level, "the arena %s starts empty: %s", arena.path, empty_because)
    publisher.start()
    context.publisher = publisher
    context.tasks.spawn(publisher.run(), "cascade-publisher")
    if unwritten:
        context.tasks.spawn(write_unwritten(context, unwritten), "cascade-unwritten")


async def _stripe(config: StoreConfig, path: str) -> str:
    """Stripe new segments where the file system can; what came of it, for ``statistics``."""
    if config.stripe == "off":
        return "off"
    defaults = StoreConfig(config.root)
    asked = (config.stripe_count, config.stripe_bytes) != (defaults.stripe_count, defaults.stripe_bytes)
    report = await prepare_directory(path, config.stripe_count, config.stripe_bytes, asked=asked)
    if report.warning is not None:
        warnings.warn(report.warning, RuntimeWarning, stacklevel=2)
    if report.striped:
        return f"{config.stripe_count} stripes of {format_size(config.stripe_bytes)}"
    return report.warning or f"plain files on {report.file_system}"


async def _prefault(context: StoreContext) -> None:
    await context.shm.prefault(context.room.freed)
    context.prefaulted.set()


def _fitted(config: StoreConfig) -> StoreConfig:
    """Segments small enough that a disk budget can be kept by removing whole ones."""
    if config.disk_bytes is None:
        return config
    largest = max(_SEGMENT_BYTES_MIN, config.disk_bytes // SEGMENTS_PER_BUDGET // PAGE_BYTES * PAGE_BYTES)
    least = _SEGMENT_BYTES_MIN * SEGMENTS_PER_BUDGET_MIN
    if config.disk_bytes < least:
        raise ConfigError(f"disk_bytes={config.disk_bytes} is too small for a store; use at least {least}")
    return dataclasses.replace(config, segment_bytes=min(config.segment_bytes, largest))
