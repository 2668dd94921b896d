"""Store settings as command-line options, made from ``StoreConfig`` so that they cannot drift from it.

``store_command`` adds ``--root``, ``--config`` and one option per setting to a function and hands it
the merged ``StoreConfig``. Commands that only look at a root for a moment use ``private_arena``:
they take a small nameless arena of their own, so that they work beside a running owner of the shared one
and leave nothing behind when they are killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cascade_aio.cli.output import UsageError
from cascade_aio.config import (
    ALIGNMENT_BYTES,
    CONFIG_KEYS,
    MIB,
    SHM_BYTES_MIN,
    SWITCHES,
    StoreConfig,
    format_size,
    load_config,
)
from cascade_aio.errors import ConfigError
from cascade_aio.store.opening import open_with
from cascade_aio.store.store import Store
from cascade_aio.tiers.arena import PrivateArena

SETTING_HELP = {
    "root": "Directory of the segment files.",
    "shm_bytes": "Size of the arena, such as 64GiB.",
    "gpu_bytes": "Size of the arena in the memory of each GPU; none: no GPU.",
    "gpu_devices": "GPUs with an arena, such as 0,1.",
    "disk_bytes": "Budget of the segment files, such as 1TiB; none: what is free.",
    "when_full": "evict or refuse: what a file system without room leads to.",
    "compaction_bandwidth": "Bytes per second that compaction copies; 0: none.",
    "arena": "Name of the arena file; a command that needs one only for a moment makes its own.",
    "shm_dir": "Directory of the arena file.",
    "io_backend": "auto, uring or threads.",
    "digest": "sha256 or blake3: what block ids are made of.",
    "segment_bytes": "Size at which a segment file is sealed.",
    "request_bytes_max": "Largest single read or write.",
    "requests_in_flight_max": "Bound of I/O requests in flight.",
    "bytes_in_flight_max": "Bound of I/O bytes in flight.",
    "tail_bytes_max": "Puts wait above so many unwritten bytes; none: half of the arena.",
    "tail_seconds_max": "Age at which what was put is written and synced.",
    "put_wait_seconds_max": "How long to wait for arena room.",
    "scrub_bandwidth": "Bytes per second read in search of damage; none: not at all.",
    "adopt_seconds": "How often segments of dead writers are looked for; none: never.",
    "read_seconds_max": "Deadline of a disk read; none: no deadline.",
    "remote_seconds_max": "Under MPI: a rank that is silent for so long is left alone for a while.",
    "stall_seconds_max": "A write or sync that takes longer: the storage hangs.",
    "workers": "Threads that copy and hash; none: all usable CPUs.",
    "stripe_count": "Lustre stripes of new files; -1: all targets.",
    "stripe_bytes": "Lustre stripe size.",
    "stripe": "auto or off.",
    "index_blocks_max": "Blocks the index may hold, of all writers of the root.",
    "eviction": "hit-density or prefix-lru: which blocks leave a full tier.",
    "read_only": "Only look: write nothing (what ls, get, stat and verify do anyway).",
    "may_lose_unflushed": "Evict unwritten blocks without writing them.",
    "warm_restart": "Keep the arena at the end, and start with what it holds; 'serve' always does.",
    "register_buffers": "Register the arena with io_uring.",
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(StoreConfig)}
_COMMON = ("root", "shm_bytes", "disk_bytes", "io_backend", "digest")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _parameters() -> list[inspect.Parameter]:
    config_file = Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings.", show_default=False)
    ]
    made = [_keyword("config", config_file)]
    for key in CONFIG_KEYS:
        panel = None if key in _COMMON else "More settings"
        flag = f"--{key.replace('_', '-')}"
        kind: Any = bool | None if key in SWITCHES else str | None
        names = f"{flag}/--no-{flag[2:]}" if key in SWITCHES else flag
        option = typer.Option(
            names, help=SETTING_HELP[key] + _default_of(key), show_default=False, rich_help_panel=panel
        )
        made.append(_keyword(key, Annotated[kind, option]))
    return made


def _default_of(key: str) -> str:
    """``" [default: 64 MiB]"``; nothing for what has none, whose help says what that means."""
    default = _DEFAULTS[key]
    if default is None or default is dataclasses.MISSING:
        return ""
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, tuple):
        shown = ",".join(map(str, default))
    elif "bytes" in key or key.endswith("bandwidth"):
        shown = format_size(default)
    else:
        shown = f"{default:g} s" if "seconds" in key else str(default)
    return f" [default: {shown}]"


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def store_command(function: Callable[..., None]) -> Callable[..., None]:
    """``function(settings, …)`` as a command with the store's options; ``settings`` is a ``Settings``."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "settings"]
    added = _parameters()

    @functools.wraps(function)
    def command(**arguments: Any) -> None:
        config_file = arguments.pop("config")
        given = {key: arguments.pop(key) for key in CONFIG_KEYS}
        function(Settings(given, config_file), **arguments)

    signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added)
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line said; nothing is read or checked before ``config``."""

    given: dict[str, str | bool | None]
    config_file: Path | None

    def config(self, root: Path | str | None = None, *, default_root: str | None = None) -> StoreConfig:
        """Merge with variables and file; ``root`` is a positional one, ``default_root`` for when nobody gives one.

        Raises ``UsageError``.
        """
        given = dict(self.given)
        if root is not None:
            if given["root"] is not None:
                raise UsageError(f"root is given twice: {root} and --root {given['root']}; give it once")
            given["root"] = os.fspath(root)
        try:
            return load_config(given, config_file=self.config_file, default_root=default_root)
        except ConfigError as error:
            raise UsageError(str(error)) from None

    def reading(self, root: Path | str | None, shm_bytes: int) -> StoreConfig:
        """A configuration that only looks at a root, in memory of ``shm_bytes`` or what ``--shm-bytes`` says."""
        config = self.private(root, shm_bytes)
        if not os.path.isdir(config.root):
            raise UsageError(f"root {config.root} is not a directory; 'cascade-aio put' makes one")
        return dataclasses.replace(config, read_only=True)

    def private(self, root: Path | str | None, shm_bytes: int) -> StoreConfig:
        """A configuration for ``open_private``: a variable or file that sizes the shared arena does not count."""
        config = self.config(root)
        return config if self.given["shm_bytes"] is not None else dataclasses.replace(config, shm_bytes=shm_bytes)


@contextlib.asynccontextmanager
async def open_private(config: StoreConfig) -> AsyncIterator[Store]:
    """The store, in nameless memory of this process, unless the configuration names an arena."""
    arena = None if config.arena is not None else PrivateArena(config.shm_bytes)
    store = await open_with(config, arena=arena)
    try:
        yield store
    finally:
        await store.aclose()


def remove_arena(shm_dir: str, name: str) -> None:
    """Remove an arena file of ours; no error if the store has done so."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(shm_dir, name))


def arena_bytes_for(block_bytes: int, *, copies: int = 2) -> int:
    """An arena that holds ``copies`` blocks of ``block_bytes`` with their headers."""
    return max(SHM_BYTES_MIN, copies * (-(-block_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + MIB))
