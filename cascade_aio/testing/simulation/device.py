"""The simulated ring: the engine of ``io``, with a device behind it that is slow, moody and sometimes wrong.

What it is: ``TransferEngine`` itself (cutting, order of service, bounds, resuming of short transfers, deadlines,
cancellation) over the pages of a ``MemoryDisk``. Each request is answered after a time of its own, so answers are
late and out of order; ``Medium`` decides what else happens to it. Bytes are moved at the moment of the answer, not
before: whoever reuses a buffer too early, or changes one that is being written, is found out.

What it must not know: the store, or why anything happens to a request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from typing import TYPE_CHECKING, Protocol

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.io.engine import EngineLimits, TransferEngine
from cascade_aio.io.transfer import Kind, Request

if TYPE_CHECKING:
    from cascade_aio.testing.memory import MemoryFile

_CANCELLED = -errno.ECANCELED


@dataclasses.dataclass(slots=True)
class Treatment:
    """What becomes of one request. ``code``: errno it ends with, 0 for none. ``move_bytes``: how much of it is
    moved at most, the rest is left to a next one. ``stubborn``: it is not given up when the engine asks.
    ``lost`` and ``misdirected_to`` (an offset in the file): the write is acknowledged and is not there. ``flipped_bit``
    of what a read gives: the medium is sound, this one answer is not."""

    delay_s: float = 0.0
    code: int = 0
    move_bytes: int | None = None
    stubborn: bool = False
    lost: bool = False
    misdirected_to: int | None = None
    flipped_bit: int | None = None


class Medium(Protocol):
    """Decides about requests, and is told what it did to the medium."""

    def treat(self, kind: Kind, file: MemoryFile, offset: int, nbytes: int) -> Treatment: ...

    def hurt(self, path: str, what: str, offset: int, nbytes: int) -> None: ...

    def written(self, path: str, offset: int, nbytes: int) -> None: ...


class SimulatedEngine(TransferEngine):
    """One process's queue of I/O. ``kill`` ends all requests, some of them half done."""

    backend = "simulated"

    def __init__(self, limits: EngineLimits, medium: Medium) -> None:
        super().__init__(limits)
        self._medium = medium
        self._timers: dict[int, tuple[asyncio.TimerHandle, Request, Treatment]] = {}
        self._given_up: list[int] = []
        self._snapshots: dict[int, tuple[dict[int, bytes], int]] = {}
        self._killed = False
        self.requests_in_flight_worst = 0
        self.bytes_in_flight_worst = 0

    # -- what the engine asks of a device

    def _launch(self, request: Request) -> None:
        if self._killed:
            self._loop.call_soon(self._answer_dead, request.token)
            return
        transfer = request.transfer
        file = _memory_file(request)
        treatment = self._medium.treat(transfer.kind, file, request.offset, request.nbytes)
        if transfer.kind is Kind.SYNC:
            self._snapshots[request.token] = file.inode.snapshot()
        timer = self._loop.call_later(treatment.delay_s, self._answer, request.token)
        self._timers[request.token] = (timer, request, treatment)
        self.requests_in_flight_worst = max(self.requests_in_flight_worst, len(self._timers))
        in_flight = sum(other.nbytes for _, other, _ in self._timers.values())
        self.bytes_in_flight_worst = max(self.bytes_in_flight_worst, in_flight)

    def _push(self) -> None:
        """A launched request is on its way already."""

    def _interrupt(self, request: Request) -> None:
        if not self._given_up:
            self._loop.call_soon(self._give_up)
        self._given_up.append(request.token)

    async def _release(self) -> None:
        """Nothing to free."""

    # -- the device

    def _give_up(self) -> None:
        tokens, self._given_up = sorted(self._given_up), []
        answers = []
        for token in tokens:
            timer, _, treatment = self._timers.get(token, (None, None, None))
            if timer is not None and treatment is not None and not treatment.stubborn:
                timer.cancel()
                del self._timers[token]
                self._snapshots.pop(token, None)
                answers.append((token, _CANCELLED))
        self._complete(answers)

    def _answer_dead(self, token: int) -> None:
        self._complete([(token, -errno.EIO)])

    def _answer(self, token: int) -> None:
        _, request, treatment = self._timers.pop(token)
        self._complete([(token, self._act(request, treatment))])

    def _act(self, request: Request, treatment: Treatment) -> int:
        kind, file = request.transfer.kind, _memory_file(request)
        if kind is Kind.SYNC:
            covered, size = self._snapshots.pop(request.token)
            if treatment.code:
                file.inode.lose(covered)
                return -treatment.code
            file.inode.harden(covered, size)
            return 0
        if treatment.code:
            return -treatment.code
        nbytes = request.nbytes if treatment.move_bytes is None else min(request.nbytes, treatment.move_bytes)
        if kind is Kind.READ:
            return _read(request, file, nbytes, treatment.flipped_bit)
        return self._write(request, file, nbytes, treatment)

    def _write(self, request: Request, file: MemoryFile, nbytes: int, treatment: Treatment) -> int:
        growth = request.offset + nbytes - file.inode.allocated_bytes
        disk = file.disk
        if growth > 0 and disk.allocated_bytes + growth > disk.capacity_bytes:
            return -errno.ENOSPC
        data = b"".join(request.views())[:nbytes]
        if treatment.lost or treatment.misdirected_to is not None:
            file.inode.lie(request.offset, data)
            self._medium.hurt(file.path, "lost", request.offset, nbytes)
            if treatment.misdirected_to is not None:
                file.inode.rot(treatment.misdirected_to, data)
                self._medium.hurt(file.path, "misdirected", treatment.misdirected_to, nbytes)
        else:
            file.inode.write(request.offset, data)
            self._medium.written(file.path, request.offset, nbytes)
        return nbytes

    def kill(self, done_share: float) -> None:
        """The process is gone: of its requests, the first ``done_share`` (0 to 1) of each write still happens."""
        self._killed = True
        for token, (timer, request, treatment) in list(self._timers.items()):
            timer.cancel()
            if request.transfer.kind is Kind.WRITE and not treatment.code:
                nbytes = int(request.nbytes * done_share) // PAGE_BYTES * PAGE_BYTES
                if nbytes and _memory_file(request).inode.allocated_bytes >= request.offset + nbytes:
                    self._write(request, _memory_file(request), nbytes, treatment)
            self._loop.call_soon(self._answer_dead, token)
        self._timers.clear()
        self._snapshots.clear()


def _memory_file(request: Request) -> MemoryFile:
    file: MemoryFile = request.transfer.file  # type: ignore[assignment]
    return file


def _read(request: Request, file: MemoryFile, nbytes: int, flipped_bit: int | None) -> int:
    data = file.inode.read(request.offset, nbytes)
    if flipped_bit is not None and data:
        wrong = bytearray(data)
        wrong[flipped_bit // 8 % len(wrong)] ^= 1 << flipped_bit % 8
        data = bytes(wrong)
    position = 0
    for view in request.views():
        piece = data[position : position + len(view)]
        view[: len(piece)] = piece
        position += len(piece)
    return len(data)
