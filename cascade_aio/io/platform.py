"""The real world in one call: files, byte work and time."""

from __future__ import annotations

from cascade_aio.abc.storage import Platform
from cascade_aio.io.clock import SystemClock
from cascade_aio.io.engine import EngineLimits
from cascade_aio.io.ring import RingFactory
from cascade_aio.io.storage import open_storage
from cascade_aio.io.workers import ByteWorkers


def open_platform(
    *,
    io_backend: str = "auto",
    worker_threads: int | None = None,
    worker_nice: int | None = None,
    limits: EngineLimits | None = None,
    ring_factory: RingFactory | None = None,
) -> Platform:
    """A ``Platform`` for the running loop; the caller closes ``engine`` and ``storage``.

    ``worker_threads`` and ``worker_nice`` default as in ``ByteWorkers``; the rest as in ``open_storage``,
    whose ``ConfigError`` it raises.
    """
    engine = ByteWorkers(worker_threads, nice=worker_nice)
    try:
        storage = open_storage(io_backend, limits=limits, ring_factory=ring_factory)
    except BaseException:
        engine.abandon()
        raise
    return Platform(storage=storage, engine=engine, clock=SystemClock())
