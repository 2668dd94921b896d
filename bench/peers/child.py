"""The process of a peer: ``python -m bench.peers.child SYSTEM``, driven by lines of JSON.

One request a line on stdin, ``{"do": …, …}``; one answer a line on stdout: ``{"ok": …}``, ``{"cannot": reason}``
(not run), or ``{"failed": what, "trace": …}``. Whatever the system itself prints to stdout goes to stderr. The end of
stdin closes the peer and ends the process, so that nothing is left when the suite dies.

Requests: ``open`` (the fields of ``Settings``; ``count`` blocks of memory, ``seed``, ``content``), then the verbs of
``Session`` with their arguments, ``conform`` (one check of ``conformance``), ``close``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import IO, Any

from bench.peers import conformance
from bench.peers.protocol import CannotRunError
from bench.peers.session import Session

VERBS = ("put", "flush", "get", "mix", "contains", "delete", "drop_caches", "bound_page_cache", "replay")
TRACE_CHARS_MAX = 4000


class Child:
    """The peer of this process, opened and closed as often as asked."""

    def __init__(self, system: str) -> None:
        self._system = system
        self._session: Session | None = None

    async def answer(self, request: dict[str, Any]) -> Any:
        """What one request gives. Raises whatever went wrong."""
        verb = request.pop("do")
        if verb == "open":
            assert self._session is None, "it is open already"
            session = Session(self._system, request)
            described = await session.open()
            self._session = session
            return {
                "description": _plain(dataclasses.asdict(described)),
                "endpoint": dict(session.peer.endpoint()),
                "import_s": session.import_s,
                "opening_s": session.opening_s,
            }
        if verb == "close":
            await self.close()
            return None
        if verb == "conform":
            return await conformance.run(self._system, request["check"], request)
        assert verb in VERBS, f"there is no request {verb}"
        assert self._session is not None, f"{verb} before open"
        outcome = await getattr(self._session, verb)(**request)
        return dataclasses.asdict(outcome) if dataclasses.is_dataclass(outcome) else outcome  # type: ignore[arg-type]

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


async def serve(system: str, answers: IO[str]) -> None:
    """Answer requests until stdin ends."""
    child = Child(system)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            try:
                reply = {"ok": await child.answer(json.loads(line))}
            except CannotRunError as error:
                reply = {"cannot": str(error)}
            except Exception as error:
                sys.stderr.write(traceback.format_exc())
                reply = {
                    "failed": f"{type(error).__name__}: {error}",
                    "trace": traceback.format_exc()[-TRACE_CHARS_MAX:],
                }
            answers.write(json.dumps(reply) + "\n")
            answers.flush()
    finally:
        await child.close()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return value


def main() -> None:
    """The command. Keeps the real stdout for answers and points fd 1 at stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(serve(sys.argv[1], answers))


if __name__ == "__main__":
    main()
