"""A store driven by polls of a thread without an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_aio import BlockNotFoundError, ClosedError, ConfigError
from cascade_aio.integrations._opening import Place, place_of
from cascade_aio.integrations._polled import PolledStore
from cascade_aio.model import PrefixKey

NAME = PrefixKey(bytes(range(32)))
POLL_SECONDS_MAX = 60


def place(root: str, **settings: Any) -> Place:
    return place_of({"root": root, "shm_bytes": "16MiB", "segment_bytes": "16MiB", **settings}, who="test")


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "root")


@pytest.fixture
def polled(root: str) -> Iterator[PolledStore]:
    store = PolledStore(place(root))
    yield store
    store.close()


def poll_until(polled: PolledStore, done: Callable[[], bool]) -> None:
    end_s = time.monotonic() + POLL_SECONDS_MAX
    while not done():
        assert time.monotonic() < end_s, "polls bring nothing to its end"
        polled.poll()


def test_what_is_submitted_runs_in_polls_only(polled: PolledStore) -> None:
    value = bytes(range(256)) * 4096
    putting = polled.submit(polled.store.put(b"", value, prefix=NAME))
    time.sleep(0.02)
    assert not putting.done
    assert polled.pending == 1
    assert not polled.call(lambda store: NAME in store)
    poll_until(polled, lambda: putting.done)
    assert putting.error is None
    assert polled.pending == 0
    assert polled.call(lambda store: NAME in store)
    target = bytearray(len(value))
    reading = polled.submit(polled.store.read_into(NAME, bytearray(), target))
    poll_until(polled, lambda: reading.done)
    assert target == value


def test_what_was_put_is_there_in_the_next_process(root: str, polled: PolledStore) -> None:
    polled.submit(polled.store.put(b"k", b"v" * 100_000, prefix=NAME))
    polled.close()
    polled.close()
    again = PolledStore(place(root))
    target = bytearray(100_000)
    again.submit(again.store.read_into(NAME, bytearray(1), target))
    again.drain()
    assert target == b"v" * 100_000
    again.close()


def test_errors_are_kept_for_who_asks(polled: PolledStore) -> None:
    reading = polled.submit(polled.store.read_into(NAME, bytearray(), bytearray(1)))
    polled.drain()
    assert isinstance(reading.error, BlockNotFoundError)
    with pytest.raises(BlockNotFoundError):
        reading.result  # noqa: B018 - raises


def test_closed_and_misused(root: str, polled: PolledStore) -> None:
    async def inside() -> None:
        with pytest.raises(ConfigError, match="event loop runs in this thread"):
            PolledStore(place(root + "2"))

    asyncio.run(inside())
    polled.close()
    with pytest.raises(ClosedError):
        polled.submit(polled.store.flush())
