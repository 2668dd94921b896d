"""Blocks that are held between an engine's question and the end of its load."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_aio.config import make_config
from cascade_aio.daemon.settings import arena_path
from cascade_aio.integrations import _leases
from cascade_aio.integrations._leases import Leases
from cascade_aio.integrations._opening import place_of
from cascade_aio.integrations._polled import PolledStore
from cascade_aio.model import PrefixKey
from tests.integrations.vllm_drive import node_service, remove_arena

ANSWER_SECONDS = 60
PARTS = 2


def names_of(key: bytes) -> list[PrefixKey]:
    return [PrefixKey(key * 31 + bytes([part])) for part in range(PARTS)]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may depend on the machine's load."""
    monkeypatch.setattr(_leases, "ANSWER_SECONDS_MAX", ANSWER_SECONDS)


@pytest.fixture
def polled(tmp_path: Path) -> Iterator[PolledStore]:
    settings = {"root": str(tmp_path / "root"), "shm_bytes": "16MiB", "segment_bytes": "16MiB"}
    store = PolledStore(place_of(settings, who="test"))
    yield store
    store.close()


@pytest.fixture
def leases(polled: PolledStore) -> Iterator[Leases]:
    made = Leases(polled, names_of)
    yield made
    made.close()
    assert leased(polled) == 0


def leased(polled: PolledStore) -> int:
    statistics: Any = polled.call(lambda store: store.statistics())
    return int(statistics["shm"]["leases"])


def put(polled: PolledStore, key: bytes, parts: int = PARTS) -> None:
    for name in names_of(key)[:parts]:
        putting = polled.submit(polled.store.put(b"", key * 5000 + name, prefix=name))
        polled.drain()
        assert putting.error is None


def answer(leases: Leases, polled: PolledStore, key: bytes) -> bool:
    """What ``lookup`` says in the end."""
    end_s = time.monotonic() + ANSWER_SECONDS
    while (found := leases.lookup(key)) is None:
        assert time.monotonic() < end_s, "no answer"
        polled.poll()
    return found


def test_a_block_is_a_hit_once_all_of_its_parts_are_leased(leases: Leases, polled: PolledStore) -> None:
    put(polled, b"a")
    put(polled, b"b", parts=1)
    assert leases.lookup(b"a") is None
    assert answer(leases, polled, b"a") is True
    assert leased(polled) == PARTS
    assert leases.holding
    assert answer(leases, polled, b"b") is False
    assert leased(polled) == PARTS


def test_a_loaded_block_stays_until_its_last_load_has_ended(leases: Leases, polled: PolledStore) -> None:
    put(polled, b"a")
    assert answer(leases, polled, b"a")
    leases.take([b"a"])
    leases.take([b"a"])
    leases.give_back([b"a"])
    assert leased(polled) == PARTS
    leases.give_back([b"a"])
    assert leased(polled) == 0
    assert len(leases) == 0
    leases.give_back([b"a"])  # a result that comes late is none


def test_what_nobody_asks_for_any_more_is_given_back(
    leases: Leases, polled: PolledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_leases, "HELD_SECONDS", 0.0)
    put(polled, b"a")
    put(polled, b"b")
    for key in (b"a", b"b"):
        assert answer(leases, polled, key)
    leases.take([b"a"])
    leases.expire()
    assert leased(polled) == PARTS
    assert len(leases) == 1
    assert leases.lookup(b"a") is True
    leases.give_back([b"a"])
    assert leased(polled) == 0


def test_a_miss_is_remembered_until_the_block_is_stored(
    leases: Leases, polled: PolledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_leases, "MISSING_SECONDS", ANSWER_SECONDS)
    assert answer(leases, polled, b"a") is False
    assert not leases.holding
    put(polled, b"a")
    assert leases.lookup(b"a") is False
    leases.stored([b"a"])
    assert answer(leases, polled, b"a") is True


def test_only_so_many_are_asked_for_at_a_time(
    leases: Leases, polled: PolledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_leases, "ASKED_MAX", 1)
    for key in (b"a", b"b"):
        put(polled, key)
    for key in (b"a", b"b"):
        assert leases.lookup(key) is None
    assert len(leases) == 1
    assert answer(leases, polled, b"a") is True
    assert answer(leases, polled, b"b") is True


def test_an_answer_that_does_not_come_is_a_miss(
    leases: Leases, polled: PolledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_leases, "ANSWER_SECONDS_MAX", 0.0)
    put(polled, b"a")
    assert leases.lookup(b"a") is None
    assert leases.lookup(b"a") is False  # no poll in between
    polled.drain()
    assert leases.lookup(b"a") is True


@pytest.mark.shm(192)
def test_what_a_client_of_a_service_holds_others_find_when_that_was_killed(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    try:
        with node_service(root) as (service, path):
            settings = {"service": path, "wait_seconds": ANSWER_SECONDS, "reconnect_seconds_max": 0.1}
            place = place_of(settings, who="test")
            scheduler, worker = PolledStore(place), PolledStore(place)
            leases = Leases(scheduler, names_of)
            put(scheduler, b"a")
            assert answer(leases, scheduler, b"a")
            leases.take([b"a"])
            service.end(signal.SIGKILL)
            assert load(worker, b"a") == [b"a" * 5000 + name for name in names_of(b"a")]
            assert answer(leases, scheduler, b"b") is False
            leases.give_back([b"a"])
        with node_service(root):  # its arena was kept
            later = PolledStore(place)
            held = Leases(later, names_of)
            assert answer(held, later, b"a") is True
            for each in (leases, held):
                each.close()
            for store in (scheduler, worker, later):
                store.close()
    finally:
        remove_arena(Path(arena_path(make_config(str(root)))))


def load(polled: PolledStore, key: bytes) -> list[bytes]:
    async def read() -> list[bytes]:
        parts = []
        for name in names_of(key):
            async with polled.store.get(name) as block:
                parts.append(bytes(block.value))
        return parts

    reading = polled.submit(read())
    polled.drain()
    return reading.result


def test_what_is_forgotten_while_it_is_loaded_stays_leased_until_the_end(leases: Leases, polled: PolledStore) -> None:
    put(polled, b"a")
    put(polled, b"b")
    for key in (b"a", b"b"):
        assert answer(leases, polled, key)
    leases.take([b"a"])
    leases.forget()
    assert len(leases) == 0
    assert leased(polled) == PARTS  # of what is loaded
    leases.give_back([b"a"])
    assert leased(polled) == PARTS
    leases.close()
    assert leased(polled) == 0
