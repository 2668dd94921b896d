"""The one thread that makes all MPI calls of a store.

What it is: a bounded queue into the thread, a list of callbacks and an eventfd out of it. The thread drives the
operations of ``core.remote_operations``: it issues gets as requests and tests them, does swaps and puts with a
flush, and sleeps when there is nothing to do. One-sided calls may block inside the call (they do on
shared-memory transports), so none is ever made on the loop's thread.

Invariants: buffers of a request stay referenced until MPI has completed it, whatever became of the caller; a
command that takes longer than ``seconds_max`` is reported lost and its request kept aside. After ``join``
nothing is collective until all ranks have left: then the windows are freed.

Must not know: how MPI is called (``mpi_windows``), blocks, directories, what is worth reading.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cascade_aio.core.remote_operations import Command, Get, Operation, Put, Swap
from cascade_aio.errors import BrokenTierError, CascadeError, ClosedError, ThrottledError
from cascade_aio.io.daemon_threads import DaemonThreads
from cascade_aio.tiers.remote.group import FACTS_BYTES_MAX, Call, Regions
from cascade_aio.tiers.remote.mpi_windows import OPEN_SECONDS_MAX, MpiWindows

logger = logging.getLogger("cascade_aio.remote")

T = TypeVar("T")

CHECKERS = 2
"""Threads that look at what has landed: one keeps up with a copy at memory speed, two with what cores there are."""

CALLS_MAX = 4096
"""Operations under way; beyond, new ones fail at once (and the next tier serves)."""

BYTES_IN_FLIGHT_MAX = 64 << 20
"""Bytes of gets under way; a larger single get goes alone."""

CLOSE_SECONDS_MAX = 2.0
"""How long closing waits for the others to close, too; the windows stay for them if they do not."""

EXIT_WARNING_SECONDS = 30.0
"""After so long the end of the interpreter tells that it waits for the others, as ``MPI_Finalize`` would."""

_SMALL_BYTES = 64 << 10
"""Larger gets are issued one a turn: a call may take as long as the copy."""

IDLE_SECONDS = 0.005
"""Between two looks into MPI while nothing is under way: transports without hardware RMA make progress there."""

_SPINS = 50
"""Fruitless tests before the thread sleeps between them …"""

_NAP_SECONDS_MIN = 20e-6
_NAP_SECONDS_MAX = 500e-6
"""… for so long, doubling."""


class _Running:
    """An operation in the thread: commands still to be issued, requests that are out."""

    __slots__ = ("aside", "call", "ended", "pending", "requests")

    def __init__(self, call: Call[Any]) -> None:
        self.call = call
        self.pending: collections.deque[Command] = collections.deque()
        self.requests: list[tuple[Any, Get, float]] = []
        self.aside: list[tuple[Any, Get]] = []
        self.ended = False


class MpiGroup:
    """``RmaGroup`` over mpi4py. Make it on the loop's thread; with thread level SERIALIZED nobody else may call MPI
    while it lives."""

    def __init__(self, comm: Any, *, seconds_max: float) -> None:
        self._windows = MpiWindows(comm)
        self.rank = self._windows.rank
        self.size = self._windows.size
        self._seconds_max = seconds_max
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition(threading.Lock())
        self._incoming: collections.deque[Call[Any] | Callable[[], None]] = collections.deque()
        self._outgoing: collections.deque[Callable[[], None]] = collections.deque()
        self._running: list[_Running] = []
        self._aside: set[_Running] = set()
        self._bytes_in_flight = 0
        self._under_way: set[Call[Any]] = set()
        self._leaving = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._left = False
        self._lost_any = False
        self._freed = threading.Event()
        self.messages = self.got_bytes = self.swaps = self.puts = 0
        self._fd_lock = threading.Lock()
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop.add_reader(self._event_fd, self._deliver)
        self.checks: Executor = DaemonThreads(CHECKERS, "cascade-remote-check")
        self._thread = threading.Thread(target=self._main, name="cascade-mpi", daemon=True)
        self._thread.start()

    # -- the loop's side ----------------------------------------------------------------------

    async def join(self, arena_bytes: int, control_bytes: int) -> Regions:
        """See ``RmaGroup``. Cannot be interrupted: a cancelled caller leaves the thread to finish it."""
        return await self._in_thread(lambda: self._windows.make(arena_bytes, control_bytes))

    async def agree(self, facts: bytes) -> list[bytes]:
        """See ``RmaGroup``."""
        assert len(facts) <= FACTS_BYTES_MAX, len(facts)
        return await self._in_thread(lambda: self._windows.vote(facts, willing=True))

    async def refuse(self, reason: str) -> None:
        """See ``RmaGroup``."""
        with contextlib.suppress(BrokenTierError):  # that somebody did not come, or refuses, too
            await self._in_thread(lambda: self._windows.vote(reason.encode()[:FACTS_BYTES_MAX], willing=False))

    def submit(self, operation: Operation[T]) -> Call[T]:
        """See ``RmaGroup``."""
        call = Call(operation, self._loop)
        refusal: Exception | None = None
        if self._left:
            refusal = ClosedError("the store is closed")
        elif self._failure is not None:
            refusal = BrokenTierError(f"the MPI thread has ended: {self._failure!r}; open the store again")
        elif len(self._under_way) >= CALLS_MAX:
            refusal = ThrottledError(f"{CALLS_MAX} remote operations are under way; ask for less at once")
        if refusal is not None:
            operation.close()
            call.outcome.set_exception(refusal)
            call.settled.set_result(None)
            return call
        self._under_way.add(call)
        self._send(call)
        return call

    def statistics(self) -> dict[str, Any]:
        """Counts, JSON-ready."""
        return {
            "messages": self.messages,
            "got_bytes": self.got_bytes,
            "swaps": self.swaps,
            "puts": self.puts,
            "under_way": len(self._under_way),
            "kept_aside": len(self._aside),
        }

    async def aclose(self) -> None:
        """See ``RmaGroup``. Waits ``CLOSE_SECONDS_MAX`` for the others; if they go on, so does the thread, until they
        have left or this process ends."""
        if self._left:
            return
        self._left = True
        if not self._windows.open or self._failure is not None:
            self._stop()
            await asyncio.to_thread(self._thread.join, CLOSE_SECONDS_MAX)
        else:
            atexit.register(self._at_exit)
            if self._windows.arena_viewed:
                # Reads that failed or were cancelled leave cycles (task, exception, frame) with views of the arena;
                # until a collection finds them, this rank would not leave, and all others would wait for it.
                await asyncio.to_thread(gc.collect)
            self._send(self._leave)
            await asyncio.to_thread(self._freed.wait, CLOSE_SECONDS_MAX)
        self.checks.shutdown()
        self._deliver()
        for call in list(self._under_way):
            self._fail(call, ClosedError("the store was closed"))
        self._loop.remove_reader(self._event_fd)
        with self._fd_lock:
            fd, self._event_fd = self._event_fd, -1
            os.close(fd)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run ``work`` between two steps of the thread."""
        future: asyncio.Future[T] = self._loop.create_future()

        def settle(outcome: T | BaseException) -> None:
            if future.done():
                return
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        def run() -> None:
            try:
                outcome: T | BaseException = work()
            except Exception as error:
                outcome = error if isinstance(error, CascadeError) else BrokenTierError(f"MPI: {error}")
            self._tell(lambda: settle(outcome))

        self._send(run)
        try:
            async with asyncio.timeout(2 * OPEN_SECONDS_MAX):
                return await future
        except TimeoutError:
            raise BrokenTierError(
                "a collective call of MPI does not return: a rank has probably died; restart the job"
            ) from None

    def _send(self, item: Call[Any] | Callable[[], None]) -> None:
        with self._wake:
            self._incoming.append(item)
            self._wake.notify()

    def _deliver(self) -> None:
        """What the thread has to tell, on the loop."""
        if self._event_fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event_fd)
        while self._outgoing:
            self._outgoing.popleft()()

    def _fail(self, call: Call[Any], error: Exception) -> None:
        """No outcome will come, and nobody knows when its buffers are free."""
        self._under_way.discard(call)
        if not call.outcome.done():
            call.outcome.set_exception(error)

    def _fail_all(self) -> None:
        for call in list(self._under_way):
            self._fail(call, BrokenTierError(f"the MPI thread has ended: {self._failure!r}; open the store again"))

    def _ended(self, call: Call[Any], outcome: object, error: Exception | None, *, settled: bool) -> None:
        if not call.outcome.done():
            if error is None:
                call.outcome.set_result(outcome)
            else:
                call.outcome.set_exception(error)
        if settled:
            self._settled(call)

    def _settled(self, call: Call[Any]) -> None:
        self._under_way.discard(call)
        if not call.settled.done():
            call.settled.set_result(None)

    # -- the thread ---------------------------------------------------------------------------

    def _tell(self, what: Callable[[], None]) -> None:
        self._outgoing.append(what)
        with self._fd_lock:
            if self._event_fd >= 0:
                os.eventfd_write(self._event_fd, 1)

    def _main(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._failure = error
            logger.error("the MPI thread has ended", exc_info=error)
            self._tell(self._fail_all)
        finally:
            self._freed.set()

    def _serve(self) -> None:
        fruitless = 0
        nap_s = _NAP_SECONDS_MIN
        while not self._stopping:
            with self._wake:
                if not self._incoming and not self._stopping:
                    if not self._running:
                        self._wake.wait(IDLE_SECONDS if self._windows.open else None)
                    elif fruitless > _SPINS:
                        self._wake.wait(nap_s)
                        nap_s = min(2 * nap_s, _NAP_SECONDS_MAX)
                incoming, self._incoming = self._incoming, collections.deque()
            for item in incoming:
                if isinstance(item, Call):
                    running = _Running(item)
                    if self._advance(running):
                        self._running.append(running)
                else:
                    item()
            if self._step() or incoming:
                fruitless, nap_s = 0, _NAP_SECONDS_MIN
            else:
                fruitless += 1
            if self._aside:
                self._look_aside()
            if not self._running and self._windows.open:
                self._idle()

    def _step(self) -> bool:
        """Issue, test, resume: each running operation once. Whether anything moved."""
        moved = False
        for running in list(self._running):
            moved |= self._issue(running)
            moved |= self._test(running)
            if not running.pending and not running.requests:
                moved = True
                if not self._advance(running):
                    self._running.remove(running)
        return moved

    def _advance(self, running: _Running) -> bool:
        """Resume the operation; ``False`` when it has ended."""
        call = running.call
        outcome: object = None
        error: Exception | None = None
        try:
            while not running.pending:
                if call.abandoned:
                    call.operation.close()
                    error = ClosedError("the operation was given up")
                    break
                running.pending.extend(next(call.operation))
            else:
                return True
        except StopIteration as end:
            outcome = end.value
        except Exception as unforeseen:
            error = BrokenTierError(f"a remote operation failed: {unforeseen!r}; please report this")
        running.ended = True
        settled = not running.aside
        self._tell(lambda: self._ended(call, outcome, error, settled=settled))
        return False

    def _issue(self, running: _Running) -> bool:
        """Issue what may be issued: all small commands, one large one a turn, so that nobody waits for long."""
        issued = False
        flush: set[int] = set()
        written: list[Put | Swap] = []
        words: list[tuple[Swap, NDArray[np.uint64]]] = []
        while running.pending:
            command = running.pending[0]
            if running.call.abandoned:
                command.lost = True
            elif isinstance(command, Get):
                nbytes = len(command.into)
                if self._bytes_in_flight and self._bytes_in_flight + nbytes > BYTES_IN_FLIGHT_MAX:
                    break
                self._get(running, command, nbytes)
                if nbytes > _SMALL_BYTES:
                    running.pending.popleft()
                    issued = True
                    break
            else:
                self._write(command, words)
                written.append(command)
                flush.add(command.rank)
            running.pending.popleft()
            issued = True
        for rank in flush:
            try:
                self._windows.flush(rank)
            except Exception as error:
                self._lose_all([item for item in written if item.rank == rank], error)
        for swap, word in words:
            swap.found = int(word[0])
        return issued

    def _get(self, running: _Running, command: Get, nbytes: int) -> None:
        self.messages += 1
        self.got_bytes += nbytes
        try:
            request = self._windows.get(command)
        except Exception as error:
            self._lose_all([command], error)
            return
        self._bytes_in_flight += nbytes
        running.requests.append((request, command, time.monotonic() + self._seconds_max))

    def _write(self, command: Put | Swap, words: list[tuple[Swap, NDArray[np.uint64]]]) -> None:
        self.messages += 1
        try:
            if isinstance(command, Put):
                self.puts += 1
                self._windows.put(command)
            else:
                self.swaps += 1
                words.append((command, self._windows.swap(command)))
        except Exception as error:
            self._lose_all([command], error)

    def _lose_all(self, commands: list[Put | Swap] | list[Get], error: Exception) -> None:
        for command in commands:
            command.lost = True
        self._lost_any = True
        logger.warning("MPI could not reach rank %d: %s", commands[0].rank, error)

    def _test(self, running: _Running) -> bool:
        """Look at the requests of one operation; those that take too long are kept aside."""
        if not running.requests:
            return False
        left: list[tuple[Any, Get, float]] = []
        now_s = time.monotonic()
        for request, command, deadline_s in running.requests:
            if self._is_complete(request, command):
                if command.tell is not None and not command.lost:
                    command.tell()
            elif now_s > deadline_s:
                command.lost = self._lost_any = True
                running.aside.append((request, command))
                self._aside.add(running)
            else:
                left.append((request, command, deadline_s))
        moved = len(left) < len(running.requests)
        running.requests = left
        return moved

    def _is_complete(self, request: Any, command: Get) -> bool:
        try:
            if not request.Test():
                return False
        except Exception as error:
            self._lose_all([command], error)
        self._bytes_in_flight -= len(command.into)
        return True

    def _idle(self) -> None:
        """Nothing is running: let MPI serve others, and leave when all have."""
        self._windows.progress()
        if self._leaving and self._windows.leave():
            self._stopping = True
            atexit.unregister(self._at_exit)

    def _look_aside(self) -> None:
        """Requests of ranks that did not answer in time: their buffers are free once they have."""
        for running in list(self._aside):
            running.aside = [item for item in running.aside if not self._is_complete(*item)]
            if running.ended and not running.aside:
                self._aside.discard(running)
                self._tell(lambda call=running.call: self._settled(call))  # type: ignore[misc]

    # -- leaving ------------------------------------------------------------------------------

    def _leave(self) -> None:
        """From now on wait for the others, so that nobody touches anybody's memory any more. With a rank lost that
        would never end: then the windows stay as they are."""
        self._leaving = not self._lost_any
        self._stopping = self._lost_any

    def _stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def _at_exit(self) -> None:
        """Before ``MPI_Finalize``, after which no call may be made: give the others their time, then end the thread."""
        if not self._lost_any:
            gc.collect()  # a store that nobody has any more may view its arena still, in a cycle
            while not self._freed.wait(EXIT_WARNING_SECONDS):
                logger.warning(
                    "rank %d waits for all other ranks to close their stores, as MPI_Finalize does; if one has died, "
                    "end the job, or this process with MPI_Abort or os._exit",
                    self.rank,
                )
        self._stop()
        self._thread.join(1.0)
