"""``store.stream``: leases on wanted blocks in order, the next ones promoted meanwhile.

A ``BlockStream`` is the consumer's side of one ``Pump``: it takes the blocks that have landed, waits
for the one that has not (as a demand, which hurries the load that is under way), and says what it has
done with. The pump never refers to the stream, so that a stream that is dropped in the middle of a
loop is collected at once and takes its prefetch with it.
"""

from __future__ import annotations

from types import TracebackType
from typing import Literal, Self

from cascade_aio.errors import BlockNotFoundError, CascadeError, CorruptionError, TierFullError
from cascade_aio.model import Tier
from cascade_aio.store.block import Block
from cascade_aio.store.catalog import Copy
from cascade_aio.store.prefetching import Name, Prefetcher, PrefetchPriority, Pump

StreamEnd = Literal["exhausted", "missing", "damaged", "full", "unreadable", "closed"]


class BlockStream:
    """``async for block in stream``; better within ``async with stream:``, which ends it for certain.

    Each lease is released when the next is asked for, or at the end, unless the stream was made with
    ``keep=True``: then they are the caller's. After a plain ``break`` the last lease is the caller's, too.
    One consumer at a time.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        names: list[Name],
        *,
        window_bytes: int | None,
        priority: PrefetchPriority,
        keep: bool,
        early: bool,
    ) -> None:
        self._prefetcher = prefetcher
        self._getter = prefetcher.getter
        self._names = names
        self._keep = keep
        self._early = early
        self._pump = Pump(
            prefetcher, names, streaming=True, priority=priority, window_bytes=window_bytes, layered=early
        )
        self._started = False
        self._asking = False
        self._position = 0
        self._last: tuple[Block, Copy] | None = None
        self.ended_because: StreamEnd | None = None
        """``exhausted``: all blocks were given; else what was wrong with the block at ``position``. ``None`` before."""
        self.error: Exception | None = None
        """The error behind ``ended_because``."""

    @property
    def position(self) -> int:
        """How many blocks were given so far."""
        return self._position

    @property
    def window_bytes(self) -> int:
        """The window now."""
        return self._pump.planner.window_bytes

    @property
    def stalls(self) -> int:
        """How often the consumer asked for a block before it had landed."""
        return self._pump.planner.stalls

    def _start(self) -> None:
        if not self._started and self.ended_because is None:
            self._prefetcher.context.check()
            self._started = True
            self._prefetcher.begin(self._pump)

    def __aiter__(self) -> Self:
        self._start()
        return self

    async def __anext__(self) -> Block:
        """The next lease. Raises ``StopAsyncIteration`` before the first block that cannot be had."""
        if self._asking:
            raise CascadeError("this stream is waiting for a block already; it serves one consumer at a time")
        self._start()
        self._give_back()
        if self.ended_because is not None:
            raise StopAsyncIteration
        self._prefetcher.context.check()
        if self._position == len(self._names):
            self._end("exhausted", None)
            raise StopAsyncIteration
        self._asking = True
        try:
            block = await self._take(self._names[self._position])
        except BlockNotFoundError as error:
            before = self._pump.errors.get(self._position)
            if isinstance(before, CorruptionError):  # damaged blocks are forgotten once that is known
                self._end("damaged", before)
            else:
                self._end("missing", error)
        except CorruptionError as error:
            self._end("damaged", error)
        except TierFullError as error:
            self._end("full", error)
        except OSError as error:
            self._end("unreadable", error)
        else:
            return block
        finally:
            self._asking = False
        raise StopAsyncIteration

    async def _take(self, name: Name) -> Block:
        position = self._position
        block = self._getter.try_hot(name)
        if block is None:
            self._pump.asked(position)
            block = await self._getter.load(name, claim=self._pump.claim, early=self._early)
        copy = block.leased_copy
        assert isinstance(copy, Copy), "this store's own"
        self._pump.taken(position, copy.extent.nbytes, brought=block.tier is not Tier.SHM)
        self._position += 1
        if not self._keep:
            self._last = (block, copy)
        return block

    def _give_back(self) -> None:
        if self._last is not None:
            (block, copy), self._last = self._last, None
            if not block.released:
                block.release()
            self._pump.consumed(self._position - 1, copy)

    def _end(self, why: StreamEnd, error: Exception | None) -> None:
        self.ended_because = why
        self.error = error
        self._pump.stop()

    async def aclose(self) -> None:
        """Release the last lease and cancel what is on its way for this stream alone. Repeated calls do nothing."""
        self.stop()

    def stop(self) -> None:
        """``aclose`` for code that does not wait."""
        self._give_back()
        if self.ended_because is None:
            self._end("closed", None)

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        pump = getattr(self, "_pump", None)
        if pump is not None and not pump.finished.is_set():
            loop = self._prefetcher.context.loop
            if not loop.is_closed():
                loop.call_soon_threadsafe(pump.stop)
