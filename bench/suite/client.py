"""One process of a peer, seen from the suite: started, asked, ended with everything that it started.

A client runs in a session of its own, so that Ctrl-C reaches the suite alone and the suite can end a whole process
group (servers included) when a client hangs or dies. Its stderr goes to a log file in the scratch folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from typing import Any

from bench.machine import REPOSITORY
from bench.results import BenchError, CannotRunError

REQUEST_SECONDS_MAX = 600.0
END_SECONDS_MAX = 60.0
LINE_BYTES_MAX = 64 << 20
LOG_CHARS_SHOWN = 600
SHM = pathlib.Path("/dev/shm")


class SystemFailedError(BenchError):
    """A system did what it must not: wrong bytes, a miss, a crash, no answer. Its sample is void."""


class Client:
    """See the module's text. Requests are answered one at a time, in order."""

    def __init__(self, system: str, process: Process, log: pathlib.Path) -> None:
        self.system = system
        self._process = process
        self._log = log

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, system: str, python: pathlib.Path, scratch: pathlib.Path) -> AsyncIterator[Client]:
        """A running process of ``system``; at the end nothing of it is left, in memory or in ``/dev/shm``."""
        log = scratch / f"{system}.log"
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                str(python),
                "-m",
                "bench.peers.child",
                system,
                stdin=PIPE,
                stdout=PIPE,
                stderr=stderr,
                limit=LINE_BYTES_MAX,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            )
        try:
            yield cls(system, process, log)
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS_MAX):
                    await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            _sweep(process.pid)

    async def ask(self, verb: str, **arguments: Any) -> Any:
        """What the client answers. Raises ``CannotRunError`` with its reason, ``SystemFailedError`` for the rest."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": verb, **arguments}).encode() + b"\n")
            await self._process.stdin.drain()
            async with asyncio.timeout(REQUEST_SECONDS_MAX):
                line = await self._process.stdout.readline()
        except TimeoutError as error:
            raise SystemFailedError(f"no answer to {verb} after {REQUEST_SECONDS_MAX:.0f} s") from error
        except ConnectionError:
            line = b""
        if not line:
            code = await self._process.wait()
            raise SystemFailedError(f"its process ended with code {code} during {verb}: {self._last_words()}")
        reply = json.loads(line)
        if "cannot" in reply:
            raise CannotRunError(reply["cannot"])
        if "failed" in reply:
            raise SystemFailedError(reply["failed"])
        return reply["ok"]

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_CHARS_SHOWN:].strip().replace(str(REPOSITORY), "…")


def _sweep(process: int) -> None:
    """Remove what a killed process left in shared memory."""
    for left in SHM.glob(f"cascade-bench-{process}-*"):
        left.unlink(missing_ok=True)
