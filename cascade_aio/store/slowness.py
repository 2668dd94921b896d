"""A disk that does not answer: who has waited too long is a miss, and nobody else waits until it answers again.

After a read that passed ``read_seconds_max`` the disk is *slow*: blocks that only it has are misses at once. It is
probed when the kernel has given back every read that came too late, by one page at the place of the last of them;
the probe's answer, whatever it says, ends the slowness. So at most one request more waits on a disk that hangs.

What it must not know: what a read is for.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments.buffers import page_buffer
from cascade_aio.segments.facts import Location

if TYPE_CHECKING:
    from cascade_aio.store.context import StoreContext

logger = logging.getLogger("cascade_aio.store")


class SlowDisk:
    """Owned by the loader. Synchronous but for its probe."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._since_s: float | None = None
        self._late: set[asyncio.Task[None]] = set()
        self._place: Location | None = None
        self.refused = 0
        self.episodes = 0

    @property
    def is_slow(self) -> bool:
        return self._since_s is not None

    @property
    def slow_s(self) -> float:
        """For how long; 0 if it is not."""
        return 0.0 if self._since_s is None else self._context.loop.time() - self._since_s

    def late(self, reading: asyncio.Task[None], place: Location) -> None:
        """``reading`` has taken too long and is given up: its task ends when the kernel has given back the memory."""
        if self._since_s is None:
            self._since_s = self._context.loop.time()
            self.episodes += 1
            logger.warning(
                "the disk of %s does not answer: blocks that only it has are misses", self._context.config.root
            )
        self._place = place
        if reading not in self._late:
            self._late.add(reading)
            reading.add_done_callback(self._ended)

    def _ended(self, reading: asyncio.Task[None]) -> None:
        self._late.discard(reading)
        if not self._late and self.is_slow and not self._context.closed:
            self._context.tasks.spawn(self._probe(), "cascade-probe")

    async def _probe(self) -> None:
        place = self._place
        assert place is not None, "a read was late"
        page = page_buffer(PAGE_BYTES)
        try:
            async with self._context.disk.table.opened(place.segment) as file:
                await self._context.platform.storage.read(file, [page], place.page * PAGE_BYTES)
        except OSError as error:  # an answer, if not a good one: reads tell their errors themselves
            logger.warning("the disk of %s answers with an error: %s", self._context.config.root, error)
        if not self._late:
            logger.warning("the disk of %s answers again after %.1f s", self._context.config.root, self.slow_s)
            self._since_s = None

    def statistics(self) -> dict[str, object]:
        return {
            "slow": self.is_slow,
            "slow_s": self.slow_s,
            "slow_episodes": self.episodes,
            "refused_reads": self.refused,
            "late_reads_in_flight": len(self._late),
        }
