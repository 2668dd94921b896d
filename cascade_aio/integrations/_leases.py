"""Blocks that are held for an engine between its question whether they are there and the end of their load.

For engines whose loads must not fail: a block is a hit only once this process has a lease on every part of it, so that
it is in shared memory, verified, listed for other processes, and stays there until the load has ended. Driven by the
polls of ``_polled``.

Invariants: never blocks but in ``forget`` and ``close``; what is being loaded is never given back before its load has
ended or the store closes; what nobody asks for any more is given back after ``HELD_SECONDS``. Knows no server.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from cascade_aio.errors import BlockNotFoundError, LeaseError, ServiceUnavailableError, TierFullError
from cascade_aio.integrations._opening import AnyStore
from cascade_aio.integrations._polled import PolledStore, Submitted, check_expected
from cascade_aio.model import PrefixKey
from cascade_aio.store.block import Block

logger = logging.getLogger("cascade_aio.integrations")

ASKED_MAX = 256
"""Blocks being promoted or asked for at a time. Engines scan a prompt from its start: what is beyond this many is asked
for when the first of them are known."""

ANSWER_SECONDS_MAX = 2.0
"""An engine waits at most so long for a block; then it is a miss, until it has come."""

HELD_SECONDS = 1.0
"""A block that nobody loads is held for so long after it was last asked for."""

MISSING_SECONDS = 1.0
"""A block that was not there or did not fit is a miss for so long: a scan that waits for others asks again at once."""

FAILED_SECONDS = 60.0
"""A block that could not be read or was damaged is a miss for so long."""


@dataclasses.dataclass(slots=True)
class _Held:
    """One key's blocks on their way, held (``until_s``: at least so long), or known to be missing until then."""

    leasing: Submitted[list[Block]]
    answer_by_s: float
    until_s: float | None = None
    missing: bool = False
    loads: int = 0


class Leases:
    """See the module's docstring. All calls come from the thread that polls."""

    def __init__(self, polled: PolledStore, names_of: Callable[[bytes], Sequence[PrefixKey]]) -> None:
        """``names_of(key)``: what the parts of the block are stored under; it is there if all of them are."""
        self._polled = polled
        self._names_of = names_of
        self._held: dict[bytes, _Held] = {}
        self._forgotten: list[_Held] = []
        self._asking = 0
        self._silent_until_s = 0.0
        self._expire_at_s = 0.0

    def __len__(self) -> int:
        """Keys that are held, asked for, or known to be missing."""
        return len(self._held)

    @property
    def holding(self) -> bool:
        """Whether anything is held or asked for: then ``expire`` is to be called until it is not."""
        return any(not held.missing for held in self._held.values())

    def lookup(self, key: bytes) -> bool | None:
        """Whether the block is held for a load; ``None``: ask again after a poll. Microseconds, no I/O of its own."""
        held = self._held.get(key)
        now_s = time.monotonic()
        if held is None:
            return self._ask(key, now_s)
        if not held.leasing.done:
            return None if now_s < held.answer_by_s else False
        if held.until_s is None:
            held.until_s = now_s + self._settled(held)
        elif held.missing and now_s >= held.until_s:
            del self._held[key]
            return self._ask(key, now_s)
        if not held.missing:
            held.until_s = now_s + HELD_SECONDS
        return not held.missing

    def _ask(self, key: bytes, now_s: float) -> bool | None:
        if now_s < self._silent_until_s:
            return False
        if self._asking < ASKED_MAX:
            self._asking += 1
            leasing = self._polled.submit(self._lease(self._polled.store, self._names_of(key)))
            self._held[key] = _Held(leasing, now_s + ANSWER_SECONDS_MAX)
        return None

    async def _lease(self, store: AnyStore, names: Sequence[PrefixKey]) -> list[Block]:
        """All parts or none."""
        blocks: list[Block] = []
        try:
            for name in names:
                blocks.append(await store.get(name))
                if name not in store:  # a lease by message: it ends with the service, and nobody else finds the block
                    raise LeaseError(f"block {name} is not listed in the arena's directory, which may be full")
        except BaseException:
            _release(blocks)
            raise
        finally:
            self._asking -= 1
        return blocks

    def _settled(self, held: _Held) -> float:
        """The answer is there: for how many seconds it stands."""
        error = held.leasing.error
        held.missing = error is not None
        if error is None:
            return HELD_SECONDS
        check_expected(error)
        if isinstance(error, BlockNotFoundError | TierFullError):
            return MISSING_SECONDS
        logger.warning("cascade_aio could not load a block: %s", error)
        if isinstance(error, ServiceUnavailableError):
            self._silent_until_s = time.monotonic() + MISSING_SECONDS
            return MISSING_SECONDS
        return FAILED_SECONDS

    def take(self, keys: Iterable[bytes]) -> None:
        """A load of ``keys`` begins, each of which ``lookup`` said to be held in this same turn of the engine."""
        for key in keys:
            held = self._held[key]
            assert held.until_s is not None, "only what was looked up can be loaded"
            assert not held.missing, "only what is held can be loaded"
            held.loads += 1

    def give_back(self, keys: Iterable[bytes]) -> None:
        """A load of ``keys`` has ended. What no other load needs is let go."""
        for key in keys:
            held = self._held.get(key)
            if held is None or not held.loads:  # of a time before ``forget``
                continue
            held.loads -= 1
            if not held.loads:
                del self._held[key]
                self._let_go(held)

    def stored(self, keys: Iterable[bytes]) -> None:
        """``keys`` were just stored: what was known to be missing is asked for again."""
        for key in keys:
            held = self._held.get(key)
            if held is not None and held.leasing.done and held.leasing.error is not None:
                del self._held[key]

    def expire(self) -> None:
        """Let go of what nobody asks for any more. To be called often; looks a few times a second."""
        now_s = time.monotonic()
        if now_s < self._expire_at_s:
            return
        self._expire_at_s = now_s + HELD_SECONDS / 4
        for key, held in list(self._held.items()):
            if held.until_s is None and held.leasing.done:  # the engine gave up before it had the answer
                held.until_s = now_s + self._settled(held)
            elif held.until_s is not None and now_s >= held.until_s and not held.loads:
                del self._held[key]
                self._let_go(held)

    def _let_go(self, held: _Held) -> None:
        if held.leasing.error is None:
            blocks = held.leasing.result
            self._polled.call(lambda store: _release(blocks))

    def forget(self) -> None:
        """Hold nothing any more, but what is being loaded until ``close``. Blocks until all that was asked is known."""
        self._polled.drain()
        held, self._held = self._held, {}
        for each in held.values():
            if each.loads:
                self._forgotten.append(each)
            else:
                self._let_go(each)

    def close(self) -> None:
        """Give everything back, however it is used. Blocks as ``forget``; the store stays open."""
        self.forget()
        forgotten, self._forgotten = self._forgotten, []
        for each in forgotten:
            self._let_go(each)


def _release(blocks: Iterable[Block]) -> None:
    for block in blocks:
        block.release()
