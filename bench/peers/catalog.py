"""Which systems there are: every folder of ``bench/peers`` lists its own, and nobody else needs to know.

Imports the folders' ``__init__`` only (plain data); adapters and what they need are imported where they run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import pkgutil

from bench.peers.protocol import Peer, System

FOLDER = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A system and the folder (the peer) that it belongs to."""

    peer: str
    system: System

    @property
    def requirements(self) -> pathlib.Path:
        """The pinned requirements of the peer's own environment."""
        return FOLDER / self.peer / "requirements.txt"


@functools.cache
def entries() -> dict[str, Entry]:
    """All systems by name, in the order of the folders' names."""
    found: dict[str, Entry] = {}
    for module in sorted(pkgutil.iter_modules([str(FOLDER)]), key=lambda module: module.name):
        if module.ispkg:
            package = importlib.import_module(f"bench.peers.{module.name}")
            for system in package.SYSTEMS:
                assert system.name not in found, f"two systems are called {system.name}"
                found[system.name] = Entry(module.name, system)
    return found


def make_peer(name: str) -> Peer:
    """The adapter of system ``name``, not opened. Raises ``ImportError`` where its environment lacks something."""
    module, _, attribute = entries()[name].system.adapter.partition(":")
    peer: Peer = getattr(importlib.import_module(module), attribute)(name)
    return peer
