"""A node service for a figure: a process of its own on the session's root, and the client that measures it.

The service is the command that a user runs, with an arena of its own that is removed at the end. Helper
processes (readers, clients that are killed) are started here too, so that a figure only says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence

import cascade_aio as ca
from bench.results import BenchError, Scalar
from bench.session import Session

START_SECONDS_MAX = 60.0
END_SECONDS_MAX = 120.0


@contextlib.asynccontextmanager
async def serving(
    session: Session, root: pathlib.Path, *, shm_bytes: int, options: Sequence[str] = (), **settings: Scalar
) -> AsyncIterator[ca.ServiceStore]:
    """A client of a service on ``root`` whose arena is populated, and which may lease all of it."""
    arena = session.new_arena_name()
    path = f"/dev/shm/{arena}.sock"
    settings = {"shm_bytes": shm_bytes, "io_backend": session.io_backend, **settings}
    given = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    quota = ["--pinned-bytes-per-client-max", str(shm_bytes), "--reserved-bytes-per-client-max", str(shm_bytes)]
    command = [sys.executable, "-m", "cascade_aio", "serve", str(root), "--arena", arena, "--socket", path]
    process = await asyncio.create_subprocess_exec(*command, *given, *quota, *options, stdout=DEVNULL, stderr=DEVNULL)
    try:
        async with ca.connect(path, wait_seconds=START_SECONDS_MAX) as store:
            await store.wait_ready()
            session.note_opened(await store.statistics(), settings)
            yield store
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(END_SECONDS_MAX):
            if await process.wait():
                raise BenchError(f"the service ended with code {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        session.remove_arena(arena)


def socket_of(store: ca.ServiceStore) -> str:
    """Where ``store``'s service listens."""
    return str(store.statistics()["socket"])


class Helper:
    """``python -m bench.service_child DEED …``: says ``ready``, then answers each line with one of JSON."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, deed: str, *words: str) -> AsyncIterator[Helper]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.service_child", deed, *words, stdin=PIPE, stdout=PIPE
        )
        try:
            helper = cls(process)
            if await helper._line() != "ready":
                raise BenchError(f"the helper process of {deed} did not start")
            yield helper
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def ask(self, question: str) -> list[float]:
        """One line out, one line of JSON back."""
        assert self._process.stdin is not None
        self._process.stdin.write(question.encode() + b"\n")
        answer: list[float] = json.loads(await self._line())
        return answer

    async def _line(self) -> str:
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode().strip()
        if not line:
            raise BenchError(f"a helper process ended with code {await self._process.wait()}")
        return line
