"""Every peer that is installed here against the one conformance suite; and the suite against peers that are wrong."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from bench.machine import REPOSITORY
from bench.peers import conformance, meters, session
from bench.peers.catalog import entries
from bench.peers.content import Source, same_bytes
from bench.peers.protocol import (
    BlockingPeer,
    CannotRunError,
    Description,
    Feature,
    Job,
    PeerError,
    Settings,
    published_path,
    require_version,
)
from bench.results import BenchError
from bench.results import CannotRunError as NotHereError
from bench.suite import environments
from bench.suite.client import Client, SystemFailedError

SYSTEMS = (
    "cascade",
    "cascade-service",
    "files",
    "files-direct",
    "limit-disk",
    "limit-memory",
    "redis-tcp",
    "redis-unix",
    "redis-plain",
    "redis-pipelined",
    "redis-async",
    "redis-aof",
    "hdf5-contiguous",
    "hdf5-gzip",
)
SERVICE_CHECKS = ("returns bytes", "knows misses", "leases", "reads cold", "shares", "ends")
"""A service takes a second to start, so these few; `python -m bench conform cascade-service` runs all."""


@pytest.mark.usefixtures("cold_reads")
@pytest.mark.parametrize("name", SYSTEMS)
async def test_a_peer_conforms(tmp_path: pathlib.Path, name: str) -> None:
    try:
        python = environments.interpreter(name)
    except NotHereError as error:
        pytest.skip(str(error))
    async with Client.started(name, python, tmp_path) as client:
        for number, check in enumerate(SERVICE_CHECKS if name == "cascade-service" else conformance.CHECKS):
            folder = tmp_path / str(number)
            folder.mkdir()
            try:
                await client.ask("conform", check=check, folder=str(folder))
            except NotHereError as error:
                pytest.skip(str(error))
            except SystemFailedError as error:
                pytest.fail(f"{check}: {error}")


class MemoryPeer(BlockingPeer):
    """A right one, in a dict; the wrong ones below change one thing each."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self.blocks: dict[str, bytes] = {}

    def open(self, settings: Settings) -> None:
        pass

    def describe(self) -> Description:
        lacks: dict[Feature, str] = dict.fromkeys(
            ("durable", "lease", "cold", "restart", "clients", "overflow"), "in memory"
        )
        return Description(version="1", module="tests", tuning="none", lacks=lacks)

    def put(self, name: str, data: memoryview) -> None:
        self.blocks[name] = bytes(data)

    def flush(self) -> None:
        raise CannotRunError("in memory")

    def get(self, name: str, into: memoryview) -> memoryview | bytes:
        into[:] = self.blocks[name]
        return into

    def contains(self, name: str) -> bool:
        return name in self.blocks

    def delete(self, name: str) -> None:
        del self.blocks[name]

    def drop_caches(self) -> None:
        raise CannotRunError("in memory")

    def close(self) -> None:
        self.blocks.clear()


class KeepsTheCallersMemory(MemoryPeer):
    def put(self, name: str, data: memoryview) -> None:
        self.blocks[name] = data  # type: ignore[assignment]


class FlipsOneBit(MemoryPeer):
    def get(self, name: str, into: memoryview) -> memoryview | bytes:
        into[:] = self.blocks[name]
        into[len(into) // 2] ^= 1
        return into


class InventsBlocks(MemoryPeer):
    def get(self, name: str, into: memoryview) -> memoryview | bytes:
        return self.blocks.get(name, bytes(len(into)))


class ForgetsToDelete(MemoryPeer):
    def delete(self, name: str) -> None:
        self.blocks[name]


class PretendsToFlush(MemoryPeer):
    def flush(self) -> None:
        pass


class DeliversOnce(MemoryPeer):
    """Trusts that what it delivered is still where it put it."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self.delivered: set[str] = set()

    def get(self, name: str, into: memoryview) -> memoryview | bytes:
        if name not in self.delivered:
            self.delivered.add(name)
            into[:] = self.blocks[name]
        return into


class SaysNothing(MemoryPeer):
    def describe(self) -> Description:
        return Description(version="", module="tests", tuning="none", lacks=super().describe().lacks)


class GivesShortBatches(MemoryPeer):
    def put_many(self, jobs: Sequence[Job], in_flight: int) -> None:
        for job in jobs:
            self.put(job.name, job.data)

    def get_many(self, jobs: Sequence[Job], in_flight: int) -> Sequence[memoryview | bytes]:
        return [self.get(job.name, job.data) for job in jobs[: len(jobs) // in_flight * in_flight]]


async def passes(kind: type[MemoryPeer], folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checks that a peer of ``kind`` does not pass."""
    monkeypatch.setattr(session, "make_peer", kind)
    failed = []
    for check in conformance.CHECKS:
        try:
            await conformance.run("memory", check, {"folder": str(folder)})
        except (PeerError, ValueError):  # a shorter batch does not fit what was asked for
            failed.append(check)
    return failed


async def test_a_right_peer_passes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await passes(MemoryPeer, tmp_path, monkeypatch) == []


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (KeepsTheCallersMemory, "keeps its own copy"),
        (FlipsOneBit, "returns bytes"),
        (DeliversOnce, "returns bytes"),
        (InventsBlocks, "knows misses"),
        (ForgetsToDelete, "deletes"),
        (PretendsToFlush, "reads cold"),
        (SaysNothing, "describes"),
        (GivesShortBatches, "takes batches"),
    ],
)
async def test_a_wrong_peer_is_caught(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: type[MemoryPeer], check: str
) -> None:
    assert check in await passes(kind, tmp_path, monkeypatch)


async def test_a_read_of_the_wrong_temperature_voids_the_sample(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that serves from memory what should come from its file is found out by the kernel's counters."""
    data = tmp_path / "data"
    data.write_bytes(bytes(conformance.BLOCKS * conformance.BLOCK_BYTES))

    class Cheats(MemoryPeer):
        def describe(self) -> Description:
            return Description(version="1", module="tests", tuning="none", durability="none")

        def flush(self) -> None:
            pass

        def drop_caches(self) -> None:
            pass

        def files(self) -> Sequence[pathlib.Path]:
            return [data]

    monkeypatch.setattr(session, "make_peer", Cheats)
    with pytest.raises((PeerError, CannotRunError), match=r"of a cold read came from|stay in the page cache"):
        await conformance.run("memory", "reads cold", {"folder": str(tmp_path)})


async def test_a_child_that_dies_is_a_failure_with_its_last_words(tmp_path: pathlib.Path) -> None:
    async with Client.started("files", pathlib.Path(sys.executable), tmp_path) as client:
        with pytest.raises(SystemFailedError, match="before open"):
            await client.ask("drop_caches")
    async with Client.started("no-such-system", pathlib.Path(sys.executable), tmp_path) as client:
        with pytest.raises(SystemFailedError, match="KeyError"):
            await client.ask("conform", check="describes", folder=str(tmp_path))


def test_nothing_but_numpy_is_imported_on_the_peers_side() -> None:
    """What runs in a peer's environment must not need the engine or the suite's libraries."""
    modules = "bench.peers.child, bench.peers.files.peer"
    code = f"import {modules}, sys; print(*({{'cascade_aio', 'msgspec', 'rich', 'typer'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_peer_has_pins_and_a_name_of_its_own() -> None:
    for name, entry in entries().items():
        assert name == entry.system.name
        if entry.system.own_environment:
            lines = [line for line in entry.requirements.read_text().splitlines() if line and not line.startswith("#")]
            assert all("==" in line for line in lines), name


def test_an_environment_that_is_not_there_or_of_other_pins_is_a_reason(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environments.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(NotHereError, match="run `python -m bench install hdf5`"):
        environments.interpreter("hdf5-gzip")
    (tmp_path / "hdf5").mkdir()
    (tmp_path / "hdf5" / environments.STAMP).write_text("h5py==1.0\n")
    with pytest.raises(NotHereError, match="other requirements"):
        environments.interpreter("hdf5-gzip")
    with pytest.raises(BenchError, match="there is no peer files to install; there are hdf5"):
        environments.install("files")
    assert environments.interpreter("files") == pathlib.Path(sys.executable)


def test_a_version_that_is_not_pinned_is_refused(tmp_path: pathlib.Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text("# apt: redis-server\nredis==5.2.1\n# no-deps: nixl==1.5.1 other==2\n")
    assert require_version("redis", "5.2.1", pins) == "5.2.1"
    assert require_version("other", "2", pins) == "2"
    with pytest.raises(PeerError, match=r"redis 6.0 was imported, .* pins 5.2.1"):
        require_version("redis", "6.0", pins)
    with pytest.raises(PeerError, match="does not pin numpy"):
        require_version("numpy", "2", pins)


def test_published_paths_name_no_machine() -> None:
    inside = pathlib.Path(sys.prefix) / "lib" / "site-packages" / "h5py" / "__init__.py"
    assert published_path(str(inside)) == "site-packages/h5py/__init__.py"
    with pytest.raises(PeerError, match="outside of the peer's own environment"):
        published_path("/elsewhere/site-packages/h5py/__init__.py")
    assert published_path(__file__) == "tests/bench/test_peers.py"
    assert published_path(None) == "unknown"


def test_bytes_are_compared_to_the_last_one_and_to_the_length() -> None:
    expected = memoryview(bytes(range(256)) * 32)
    assert same_bytes(expected, [bytes(expected)])
    assert same_bytes(expected, [expected[:100], bytes(expected[100:])])
    assert not same_bytes(expected, [expected[:-1]])
    assert not same_bytes(expected, [bytes(expected) + b"x"])
    assert not same_bytes(expected, [bytes(len(expected))])
    changed = bytearray(expected)
    changed[-1] ^= 1
    assert not same_bytes(expected, [changed])  # type: ignore[list-item]


def test_a_source_takes_its_bytes_from_a_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "content"
    content = np.random.default_rng(1).bytes(4 * 8192)
    path.write_bytes(content)
    with Source(8192, 4, seed=1, path=path) as source:
        assert bytes(source.view) == content
        source.stamp(3)
        assert source.matches(2, [source.block(2)])
        assert not source.matches(2, [content[2 * 8192 : 3 * 8192]])
        assert source.name(3, 2) != source.name(2, 2)
    with pytest.raises(EOFError, match="too short for 5 blocks"):
        Source(8192, 5, seed=1, path=path)


def test_meters_count_processes_and_say_when_one_is_gone(tmp_path: pathlib.Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        before = meters.usage([child.pid])
        sum(range(200_000))
        assert meters.usage([child.pid]).since(before).cpu_s > 0
        meters.reset_peaks([child.pid])
        assert meters.peak_bytes([child.pid]) > meters.peak_bytes([]) > 1 << 20
        child.kill()
        child.wait()
        with pytest.raises(PeerError, match="is gone"):
            meters.usage([child.pid])
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    assert meters.allocated_bytes([file]) <= 100_000


@pytest.mark.usefixtures("cold_reads")
def test_a_page_cache_is_bounded_to_what_was_written_last(tmp_path: pathlib.Path) -> None:
    files = [tmp_path / f"{number}" for number in range(4)]
    for number, file in enumerate(files):
        file.write_bytes(os.urandom(1 << 20))
        os.utime(file, ns=(number, number))
    assert meters.bound_page_cache(files[::-1], 3 << 19) == 5 << 19
    before = meters.usage([])
    assert len(files[0].read_bytes()) == 1 << 20
    assert meters.usage([]).since(before).read_bytes >= 1 << 20
    assert meters.bound_page_cache(files, 4 << 20) == 0
