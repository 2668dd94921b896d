"""Which engine: io_uring or threads, by an explicit setting, with the reason when it is not the ring."""

from __future__ import annotations

from cascade_aio.errors import ConfigError
from cascade_aio.io.engine import EngineLimits, TransferEngine
from cascade_aio.io.errors import ring_failure
from cascade_aio.io.ring import Ring, RingFactory
from cascade_aio.io.threads import ThreadEngine

IO_BACKENDS = ("auto", "uring", "threads")


def open_engine(
    io_backend: str = "auto",
    *,
    limits: EngineLimits | None = None,
    ring_factory: RingFactory | None = None,
) -> tuple[TransferEngine, tuple[str, ...]]:
    """The engine for the running loop, and notes on why it is not the ring ("auto" only).

    Raises ``ConfigError`` for an unknown backend, and for "uring" where the kernel refuses the ring.
    """
    if io_backend not in IO_BACKENDS:
        raise ConfigError(f"io_backend={io_backend!r} is unknown; use one of {', '.join(IO_BACKENDS)}")
    if io_backend == "threads":
        return ThreadEngine.open(limits=limits), ()
    try:
        return Ring.open(limits=limits, ring_factory=ring_factory), ()
    except OSError as error:
        reason = ring_failure(error)
        if io_backend == "uring":
            raise ConfigError(f'io_backend="uring" cannot be had: {reason}; or use io_backend="threads"') from error
        return ThreadEngine.open(limits=limits), (f"threads instead of io_uring: {reason}",)
