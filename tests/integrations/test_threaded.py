"""A store in a thread of its own, used from others."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cascade_aio import BlockNotFoundError, ClosedError, ConfigError
from cascade_aio.integrations._opening import AnyStore, Place, place_of
from cascade_aio.integrations._threaded import ThreadedStore
from cascade_aio.model import PrefixKey

WAIT_S = 60


def place(root: Path, **settings: Any) -> Place:
    return place_of({"root": str(root), "shm_bytes": "16MiB", "segment_bytes": "16MiB", **settings}, who="test")


def name(number: int) -> PrefixKey:
    return PrefixKey(number.to_bytes(32, "little"))


@pytest.fixture
def threaded(tmp_path: Path) -> Iterator[ThreadedStore]:
    store = ThreadedStore(place(tmp_path / "root"))
    yield store
    store.close()


def test_many_threads_use_one_store(threaded: ThreadedStore) -> None:
    def work(number: int) -> bytes:
        value = bytes([number]) * 70_000
        threaded.submit(lambda store: store.put(b"", value, prefix=name(number))).result(WAIT_S)
        target = bytearray(70_000)
        threaded.submit(lambda store: store.read_into(name(number), bytearray(), target)).result(WAIT_S)
        return bytes(target)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(40)))
    assert found == [bytes([number]) * 70_000 for number in range(40)]


def test_who_asked_to_be_told_is_told_in_the_loops_thread(threaded: ThreadedStore) -> None:
    told: list[tuple[str, BaseException | None]] = []
    event = threading.Event()

    def on_done(future: Future[None]) -> None:
        told.append((threading.current_thread().name, future.exception()))
        event.set()

    threaded.submit(lambda store: store.read_into(name(1), bytearray(), bytearray(1)), on_done)
    assert event.wait(WAIT_S)
    thread, error = told[0]
    assert thread == "cascade-store"
    assert isinstance(error, BlockNotFoundError)


def test_closing_finishes_what_was_submitted(tmp_path: Path, threaded: ThreadedStore) -> None:
    async def put(store: AnyStore, number: int) -> None:
        await store.put(b"", bytes([number]) * 99_999, prefix=name(number))

    futures = [threaded.submit(functools.partial(put, number=number)) for number in range(30)]
    threaded.close()
    threaded.close()
    assert all(future.exception() is None for future in futures)
    with pytest.raises(ClosedError):
        threaded.submit(lambda store: store.flush())
    assert not [thread for thread in threading.enumerate() if thread.name == "cascade-store"]

    async def count(store: AnyStore) -> int:
        return len(store)

    again = ThreadedStore(place(tmp_path / "root"))
    assert again.submit(count).result(WAIT_S) == 30
    again.close()


def test_a_store_that_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("no directory")
    with pytest.raises((ConfigError, OSError)):
        ThreadedStore(place(tmp_path / "root"))
    assert not [thread for thread in threading.enumerate() if thread.name == "cascade-store"]
