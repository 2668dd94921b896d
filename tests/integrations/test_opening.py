"""Which store the settings of a plug-in mean, and what is left of it in shared memory."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade_aio import ConfigError
from cascade_aio.config import StoreConfig, arena_name
from cascade_aio.integrations._opening import place_of
from cascade_aio.model import PrefixKey

NAME = PrefixKey(bytes(32))
SMALL: dict[str, Any] = {"shm_bytes": "16MiB", "segment_bytes": "16MiB"}

CHILD = """
import asyncio, sys
from cascade_aio.integrations._opening import place_of

async def main():
    place = place_of({"root": sys.argv[1], "shm_bytes": "16MiB", "segment_bytes": "16MiB"}, who="child")
    store = await place.opened()
    await store.put(b"", b"x" * 70_000)
    await store.flush()
    print("open", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def arenas(root: Path) -> list[str]:
    ours = arena_name(StoreConfig(root=str(root)))
    return [name for name in os.listdir("/dev/shm") if name.startswith(ours)]


async def test_several_stores_open_one_root_and_none_has_a_file(tmp_path: Path) -> None:
    place = place_of({"root": str(tmp_path), **SMALL}, who="test")
    first, second = await place.opened(), await place.opened()
    try:
        await first.put(b"", b"x" * 70_000, prefix=NAME)
        await first.flush()
        await second.refresh()
        assert await second.contains(NAME)
        assert not arenas(tmp_path)
    finally:
        await first.aclose()
        await second.aclose()


async def test_an_arena_that_was_asked_for_by_name_has_it(tmp_path: Path) -> None:
    name = f"{arena_name(StoreConfig(root=str(tmp_path)))}-named"
    store = await place_of({"root": str(tmp_path), "arena": name, **SMALL}, who="test").opened()
    assert arenas(tmp_path) == [name]
    await store.aclose()
    assert not arenas(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_killed_leaves_nothing_in_shared_memory(tmp_path: Path, number: signal.Signals) -> None:
    before = set(os.listdir("/dev/shm"))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        child.send_signal(number)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if str(child.pid) in name]
    assert not arenas(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither"),
        ({"root": "/r", "service": "/s"}, "both"),
        ({"root": ""}, "root='' must be a path"),
        ({"root": 3}, "root=3 must be a path"),
        ({"root": "/r", "shm_byte": 1}, "'shm_byte' with root"),
        ({"service": "/s", "shm_bytes": 1}, "'shm_bytes' with service"),
        ({"root": "/r", "shm_bytes": "lots"}, "shm_bytes='lots'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_of(settings, who="plug-in", own=("salt",))


def test_a_directory_that_takes_no_arena_is_named(tmp_path: Path) -> None:
    place = place_of({"root": str(tmp_path), "shm_dir": str(tmp_path / "nowhere"), **SMALL}, who="test")
    with pytest.raises(ConfigError, match="nowhere"):
        asyncio.run(place.opened())
