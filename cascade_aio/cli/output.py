"""What commands print and how they run: JSON for programs, rich for people, one line for errors."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine, Iterator
from typing import Any, Never, TypeVar

import msgspec
from rich.console import Console
from rich.markup import escape

from cascade_aio.errors import CascadeError, ConfigError

T = TypeVar("T")

SIGNAL_EXIT = 128
"""A command ended by signal n has exit code 128 + n, as in a shell."""

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


class UsageError(ConfigError):
    """The command was called wrongly: exit code 2."""

    is_usage = True


def print_json(record: Any) -> None:
    """``record`` as indented JSON on stdout; bytes subclasses (ids) as hex, other values by ``str``."""
    raw = msgspec.json.encode(_plain(record))
    sys.stdout.write(msgspec.json.format(raw, indent=2).decode() + "\n")


def _plain(record: Any) -> Any:
    if isinstance(record, dict):
        return {str(key): _plain(entry) for key, entry in record.items()}
    if isinstance(record, list | tuple | set | frozenset):
        return [_plain(entry) for entry in record]
    if isinstance(record, bytes):
        return record.hex()
    if record is None or isinstance(record, bool | int | float | str):
        return record
    return str(record)


def flatten(error: BaseException) -> Iterator[BaseException]:
    """The leaves of an exception group, depth first; a plain exception is its own leaf."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from flatten(inner)
    else:
        yield error


def print_error(error: BaseException) -> list[BaseException]:
    """One line on stderr per distinct cause; returns the causes."""
    leaves = list(flatten(error))
    for line in dict.fromkeys(describe_error(leaf) for leaf in leaves):
        err.print(f"[bold red]cascade-aio:[/] {escape(line)}")
    return leaves


def describe_error(error: BaseException) -> str:
    """One line: the message; kernel errors with their text and file, other kinds with their name."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CascadeError | OSError) and text else f"{type(error).__name__}: {text}"


def fail(message: str, code: int = 1) -> Never:
    """Print ``message`` as the error and end the command with ``code``."""
    err.print(f"[bold red]cascade-aio:[/] {escape(message)}")
    raise SystemExit(code)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` to its end. SIGINT and SIGTERM cancel it, so that its scopes are left in order."""
    return asyncio.run(_interruptible(coroutine))


async def _interruptible(coroutine: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(coroutine)
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    with contextlib.ExitStack() as handlers:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
            handlers.callback(loop.remove_signal_handler, number)
        try:
            return await task
        except asyncio.CancelledError:
            if not received:
                raise
            err.print("interrupted")
            raise SystemExit(SIGNAL_EXIT + received[0]) from None
