"""The real LMCache stores into, looks up in and loads from a cascade_aio root."""

from __future__ import annotations

import ctypes
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmcache", reason="LMCache is not installed; see examples/lmcache/README.md")

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig, _create_plugin_adapter

from cascade_aio import ConfigError

WAIT_MS = 60_000
SIZE = 300_000


class Memory:
    """What an adapter sees of LMCache's memory objects."""

    def __init__(self, content: bytes) -> None:
        self._array = (ctypes.c_ubyte * len(content)).from_buffer_copy(content)

    @property
    def byte_array(self) -> memoryview:
        return memoryview(self._array)

    def __bytes__(self) -> bytes:
        return bytes(self._array)


def key(number: int, **changes: Any) -> ObjectKey:
    fields = {"chunk_hash": number.to_bytes(32, "big"), "model_name": "some/model", "kv_rank": 0}
    return ObjectKey(**{**fields, **changes})


def content(number: int) -> bytes:
    return bytes([number % 251, 7]) * (SIZE // 2)


def make(root: Path) -> Any:
    params = {"root": str(root), "shm_bytes": "16MiB", "segment_bytes": "16MiB"}
    module = "cascade_aio.integrations.lmcache"
    config = {"module_path": module, "class_name": "CascadeL2Adapter", "adapter_params": params}
    return _create_plugin_adapter(PluginL2AdapterConfig.from_dict(config))


def wait(fd: int, query: Callable[[], Any]) -> Any:
    """The answer of ``query`` once the event says that there is one."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(WAIT_MS), "no event"
    os.eventfd_read(fd)
    return query()


def store(adapter: Any, keys: list[ObjectKey], contents: list[bytes]) -> Any:
    task = adapter.submit_store_task(keys, [Memory(item) for item in contents])
    return wait(adapter.get_store_event_fd(), adapter.pop_completed_store_tasks)[task]


def lookup(adapter: Any, keys: list[ObjectKey]) -> list[bool]:
    task = adapter.submit_lookup_and_lock_task(keys, {})
    bitmap = wait(adapter.get_lookup_and_lock_event_fd(), lambda: adapter.query_lookup_and_lock_result(task))
    assert adapter.query_lookup_and_lock_result(task) is None
    return [bitmap.test(place) for place in range(len(keys))]


def load(adapter: Any, keys: list[ObjectKey]) -> tuple[list[bool], list[bytes]]:
    targets = [Memory(bytes(SIZE)) for _ in keys]
    task = adapter.submit_load_task(keys, targets)
    bitmap = wait(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
    adapter.submit_unlock(keys)
    return [bitmap.test(place) for place in range(len(keys))], [bytes(item) for item in targets]


def test_objects_survive_a_restart_and_damage_is_a_miss(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    keys = [key(number) for number in range(20)]
    adapter = make(root)
    result = store(adapter, keys, [content(number) for number in range(20)])
    assert result.is_successful()
    assert result.bytes_transferred() == 20 * SIZE
    adapter.close()

    adapter = make(root)
    assert lookup(adapter, [*keys, key(99)]) == [True] * 20 + [False]
    there, found = load(adapter, keys)
    assert all(there)
    assert found == [content(number) for number in range(20)]
    assert adapter.report_status()["is_healthy"]
    adapter.close()

    segment = max(root.glob("writers/*/*.seg"), key=lambda path: path.stat().st_size)
    raw = bytearray(segment.read_bytes())
    place = raw.index(content(5)[:64])
    raw[place + 1000] ^= 1
    segment.write_bytes(raw)
    adapter = make(root)
    there, found = load(adapter, keys)
    assert there == [number != 5 for number in range(20)]
    assert all(found[number] == content(number) for number in range(20) if number != 5)
    assert lookup(adapter, keys[4:6]) == [True, False]  # not offered again
    assert store(adapter, [keys[5]], [content(5)]).is_successful()
    assert load(adapter, [keys[5]]) == ([True], [content(5)])
    adapter.delete([keys[5]])
    assert lookup(adapter, keys[4:6]) == [True, False]
    adapter.close()
    adapter.close()


def test_keys_that_differ_in_anything_are_different_objects(tmp_path: Path) -> None:
    adapter = make(tmp_path / "kv")
    assert store(adapter, [key(1)], [content(1)]).is_successful()
    others = [
        key(1, model_name="some/mode"),
        key(1, kv_rank=1),
        key(1, object_group_id=1),
        key(1, cache_salt="tenant"),
        key(2),
    ]
    assert lookup(adapter, [key(1), *others]) == [True] + [False] * 5
    adapter.close()


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    module = "cascade_aio.integrations.lmcache"
    for params, message in (({}, "root"), ({"root": str(tmp_path), "shm_byte": 1}, "shm_byte")):
        config = {"module_path": module, "class_name": "CascadeL2Adapter", "adapter_params": params}
        with pytest.raises(ConfigError, match=message):
            _create_plugin_adapter(PluginL2AdapterConfig.from_dict(config))


def test_lmcaches_own_benchmark_finds_every_byte(tmp_path: Path) -> None:
    params = {"root": str(tmp_path / "kv"), "shm_bytes": "64MiB"}
    module = "cascade_aio.integrations.lmcache"
    adapter = {"type": "plugin", "module_path": module, "class_name": "CascadeL2Adapter", "adapter_params": params}
    command = [str(Path(sys.executable).parent / "lmcache"), "bench", "l2", "--l2-adapter", json.dumps(adapter)]
    sizes = ["--num-keys", "16", "--data-size-kb", "1024", "--l1-align-bytes", "4096", "--rounds", "2"]
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    done = subprocess.run(
        [*command, *sizes, "--no-skip-verify", "--lookup-max-hit-rate", "1.0"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    successes = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("Total success:")]
    assert successes == ["32", "32", "32"], done.stdout
