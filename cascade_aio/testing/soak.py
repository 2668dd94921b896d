"""The node service under fire: ``python -m cascade_aio.testing.soak --clients 4 --minutes 10``.

Client processes put, get, stream, prefetch, reserve and flush, and compare every byte they read; one of them
is killed every second, the service every ``--service-seconds`` (SIGKILL and SIGTERM in turn). What a block
holds follows from its number, so every process can check any block. At the end: nothing wrong was read,
everything that a flush acknowledged is there, the service gave everything back, and its memory did not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path
from typing import Any

import numpy as np

import cascade_aio as ca
from cascade_aio.daemon import ServiceStore
from cascade_aio.errors import BlockNotFoundError, ServiceUnavailableError, TierFullError
from cascade_aio.tiers.arena import remove_arena

BLOCKS = 600
"""Different blocks; together some three arenas."""
ARENA_BYTES = 64 << 20
START_SECONDS_MAX = 120.0
"""A machine that is busy with other things takes seconds to start Python."""
SAMPLE_SECONDS = 1.0
SETTLE_TRIES = 600
"""Looks, 0.1 s apart, until everything must have been given back."""
GROWTH_SHARE_MAX = 0.25
GROWTH_BYTES_MAX = 48 << 20
"""Memory of the service may grow by this share or size from the end of its warm-up to the end of the run."""
_TASKS_PER_CLIENT = 4
_FLUSHES_KEPT = "flushed.log"


def block_of(number: int) -> tuple[bytes, bytes]:
    """The bytes of block ``number``: between 4 KiB and 1 MiB."""
    rng = np.random.default_rng(number)
    size = int(2 ** rng.uniform(12, 20))
    key_bytes = int(rng.integers(0, size))
    raw = rng.bytes(size)
    return raw[:key_bytes], raw[key_bytes:]


def key_of(number: int) -> ca.PrefixKey:
    """Its name."""
    return ca.prefix_keys([number], block_tokens=1, namespace="soak")[0]


@dataclasses.dataclass(slots=True)
class SoakReport:
    """What a run did; ``faults`` is empty if all promises were kept."""

    seed: int
    seconds: float = 0.0
    operations: int = 0
    compared_bytes: int = 0
    clients_killed: int = 0
    services_killed: int = 0
    services_stopped: int = 0
    flushed_blocks: int = 0
    service_memory_bytes: list[int] = dataclasses.field(default_factory=list)
    """Anonymous memory of the service, a second apart; it starts anew with each service."""
    faults: list[str] = dataclasses.field(default_factory=list)


# -- a client ---------------------------------------------------------------------------------------


class SoakClient:
    """One client process: several tasks on one connection, until killed."""

    def __init__(self, store: ServiceStore, folder: Path, seed: int) -> None:
        self._store = store
        self._rng = random.Random(seed)
        self._log = folder / f"client-{os.getpid()}-{uuid.uuid4().hex[:6]}.log"
        self._flushed = folder / _FLUSHES_KEPT
        self._put: set[int] = set()
        self.operations = 0
        self.compared_bytes = 0

    async def run(self) -> None:
        """For ever; what is wrong is written down and ends the process."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._report())
            for _ in range(_TASKS_PER_CLIENT):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        deeds = (self._do_put, self._do_put, self._do_get, self._do_get, self._do_get, self._do_reserve,
                 self._do_stream, self._do_prefetch, self._do_read_into, self._do_flush)  # fmt: skip
        while True:
            with contextlib.suppress(BlockNotFoundError, ServiceUnavailableError, TierFullError):
                await self._rng.choice(deeds)()
            self.operations += 1

    def _number(self) -> int:
        return self._rng.randrange(BLOCKS)

    async def _do_put(self) -> None:
        number = self._number()
        await self._store.put(*block_of(number), prefix=key_of(number))
        self._put.add(number)

    async def _do_reserve(self) -> None:
        number = self._number()
        key, value = block_of(number)
        async with self._store.reserve(key_bytes=len(key), value_bytes=len(value), prefix=key_of(number)) as slot:
            slot.key[:] = np.frombuffer(key, np.uint8)
            slot.value[:] = np.frombuffer(value, np.uint8)

    async def _do_get(self) -> None:
        number = self._number()
        async with self._store.get(key_of(number)) as block:
            self._compare(number, block)
            await asyncio.sleep(self._rng.random() / 100)
            self._compare(number, block)

    async def _do_stream(self) -> None:
        numbers = [self._number() for _ in range(8)]
        async with self._store.stream([key_of(number) for number in numbers]) as blocks:
            position = 0
            async for block in blocks:
                self._compare(numbers[position], block)
                position += 1

    async def _do_prefetch(self) -> None:
        await self._store.prefetch([key_of(self._number()) for _ in range(8)]).wait()

    async def _do_read_into(self) -> None:
        number = self._number()
        key, value = block_of(number)
        got = bytearray(len(key)), bytearray(len(value))
        await self._store.read_into(key_of(number), *got)
        if got != (bytearray(key), bytearray(value)):
            self._wrong(number)
        self.compared_bytes += len(key) + len(value)

    async def _do_flush(self) -> None:
        numbers, self._put = self._put, set()
        await self._store.flush()
        await asyncio.to_thread(self._note_flushed, " ".join(map(str, numbers)) + "\n")

    def _note_flushed(self, line: str) -> None:
        with open(self._flushed, "a") as file:
            file.write(line)

    def _compare(self, number: int, block: ca.Block) -> None:
        key, value = block_of(number)
        if block.key.tobytes() != key or block.value.tobytes() != value:
            self._wrong(number)
        self.compared_bytes += len(key) + len(value)

    def _wrong(self, number: int) -> None:
        raise AssertionError(f"wrong bytes of block {number}")

    async def _report(self) -> None:
        while True:
            self._log.write_text(json.dumps([self.operations, self.compared_bytes]))
            await asyncio.sleep(0.1)


async def run_client(path: str, folder: Path, seed: int) -> None:
    """The whole life of a client process. What goes wrong is left in a file."""
    try:
        async with ca.connect(path, client="soak", wait_seconds=START_SECONDS_MAX) as store:
            await SoakClient(store, folder, seed).run()
    except BaseException as error:
        (folder / f"fault-{os.getpid()}").write_text(repr(error) + repr(getattr(error, "exceptions", "")))
        raise


# -- the run ----------------------------------------------------------------------------------------


class Soak:
    """Starts and kills; ``run`` returns the report."""

    def __init__(self, folder: Path, *, clients: int, seconds: float, service_seconds: float, seed: int) -> None:
        self._folder = folder
        self._clients = clients
        self._seconds = seconds
        self._service_seconds = service_seconds
        self._rng = random.Random(seed)
        self._arena = f"cascade-soak-{uuid.uuid4().hex[:12]}"
        self._socket = str(folder / "s")
        self._running: list[Process] = []
        self._service: Process | None = None
        self._down = False
        """Between the end of one service and the start of the next."""
        self.report = SoakReport(seed)

    async def run(self) -> SoakReport:
        """Never raises for what the service does wrong: that is in the report."""
        began_s = time.monotonic()
        try:
            self._service = await self._start_service()
            self._running = [await self._start_client() for _ in range(self._clients)]
            async with asyncio.timeout(START_SECONDS_MAX):
                for process in self._running:
                    await self._at_work(process)
            async with asyncio.TaskGroup() as tasks:
                loops = (self._kill_clients(), self._kill_services(), self._watch_memory())
                running = [tasks.create_task(loop) for loop in loops]
                await asyncio.sleep(self._seconds)
                for task in running:
                    task.cancel()
            await self._finish()
        finally:
            for process in [*self._running, *([] if self._service is None else [self._service])]:
                if process.returncode is None:
                    process.kill()
                await process.wait()
            await asyncio.to_thread(remove_arena, f"/dev/shm/{self._arena}")
        self.report.seconds = time.monotonic() - began_s
        self._collect()
        return self.report

    async def _start_service(self) -> Process:
        command = [sys.executable, "-m", "cascade_aio", "serve", str(self._folder / "kv"), "--shm", str(ARENA_BYTES)]
        log = open(self._folder / "service.log", "ab")  # noqa: ASYNC230, SIM115
        with log:
            process = await asyncio.create_subprocess_exec(
                *command, "--arena", self._arena, "--socket", self._socket, stdout=log, stderr=log
            )
        try:
            await (await ca.connect(self._socket, client="soak start", wait_seconds=START_SECONDS_MAX)).aclose()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        return process

    async def _start_client(self) -> Process:
        seed = self._rng.randrange(1 << 30)
        command = [sys.executable, "-m", "cascade_aio.testing.soak", "--child", self._socket]
        return await asyncio.create_subprocess_exec(
            *command, "--folder", str(self._folder), "--seed", str(seed), stdout=DEVNULL
        )

    async def _at_work(self, process: Process) -> None:
        works = False
        while not works:
            await asyncio.sleep(0.05)
            works = self._works(process)

    def _works(self, process: Process) -> bool:
        return any(self._folder.glob(f"client-{process.pid}-*.log"))

    async def _kill_clients(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            place = self._rng.randrange(self._clients)
            process = self._running[place]
            if process.returncode is None:
                if not self._works(process):  # a busy machine: let it come up first
                    continue
                process.kill()
            await process.wait()
            self.report.clients_killed += 1
            self._running[place] = await self._start_client()

    async def _kill_services(self) -> None:
        hard = True
        while True:
            await asyncio.sleep(self._service_seconds)
            assert self._service is not None, "started"
            self._down = True
            if self._service.returncode is not None:
                self.report.faults.append(f"the service ended by itself with code {self._service.returncode}")
            elif hard:
                self._service.kill()
                self.report.services_killed += 1
            else:
                self._service.send_signal(signal.SIGTERM)
                self.report.services_stopped += 1
            code = await self._service.wait()
            if not hard and code:
                self.report.faults.append(f"SIGTERM ended the service with code {code}")
            hard = not hard
            self._service = await self._start_service()
            self._down = False

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            assert self._service is not None, "started"
            with contextlib.suppress(OSError, ValueError):
                self.report.service_memory_bytes.append(_anonymous_bytes(self._service.pid))

    async def _finish(self) -> None:
        """No more clients: everything comes back; what was flushed is there, byte for byte."""
        for process in self._running:
            if process.returncode is None:
                process.kill()
            await process.wait()
        if self._down:  # time was up in the middle of a restart
            assert self._service is not None, "started"
            await self._service.wait()
            self._service = await self._start_service()
        try:
            async with ca.connect(self._socket, client="soak end", wait_seconds=START_SECONDS_MAX) as store:
                await self._all_given_back(store)
                await self._compare_all(store)
        except (ca.CascadeError, OSError, TimeoutError) as error:
            self.report.faults.append(f"the service could not be asked at the end: {error!r}")
        assert self._service is not None, "started"
        if self._service.returncode is None:
            self._service.send_signal(signal.SIGTERM)
            async with asyncio.timeout(START_SECONDS_MAX):
                code = await self._service.wait()
            if code:
                self.report.faults.append(f"SIGTERM at the end gave code {code}")

    async def _all_given_back(self, store: ServiceStore) -> None:
        held: dict[str, Any] = {}
        for _ in range(SETTLE_TRIES):
            await store.flush()
            statistics = await store.statistics()
            shm, service = statistics["shm"], statistics["service"]
            held = {
                "other clients": service["clients"] - 1,
                "leases": shm["leases"],
                "pinned": shm["pinned_bytes"],
                "reserved": service["reserved_bytes"],
                "lingering": service["lingering"],
                "extents": shm["allocated_bytes"] - shm["copy_bytes"],
            }
            if not any(held.values()):
                return
            await asyncio.sleep(0.1)
        self.report.faults.append(f"not given back at the end: {held}")

    async def _compare_all(self, store: ServiceStore) -> None:
        log = self._folder / _FLUSHES_KEPT
        flushed = {int(word) for word in (log.read_text() if log.exists() else "").split()}
        self.report.flushed_blocks = len(flushed)
        for number in sorted(flushed):
            try:
                async with store.get(key_of(number)) as block:
                    if (block.key.tobytes(), block.value.tobytes()) != block_of(number):
                        self.report.faults.append(f"block {number} has wrong bytes at the end")
                    self.report.compared_bytes += block.key.nbytes + block.value.nbytes
            except BlockNotFoundError:
                self.report.faults.append(f"block {number} was flushed and is gone")

    def _collect(self) -> None:
        for fault in self._folder.glob("fault-*"):
            self.report.faults.append(fault.read_text())
        for log in self._folder.glob("client-*.log"):
            with contextlib.suppress(ValueError):  # killed while writing it
                operations, compared = json.loads(log.read_text())
                self.report.operations += operations
                self.report.compared_bytes += compared
        growth = memory_growth(self.report.service_memory_bytes)
        if growth > 0:
            self.report.faults.append(f"the memory of the service grew by {growth} bytes")


def memory_growth(samples: list[int]) -> int:
    """How far the end is above the level after warm-up, beyond what is allowed; 0 for too short a run."""
    if len(samples) < 60:
        return 0
    third = len(samples) // 3
    middle, end = max(samples[third : 2 * third]), max(samples[2 * third :])
    allowed = max(GROWTH_BYTES_MAX, int(GROWTH_SHARE_MAX * middle))
    return max(0, end - middle - allowed)


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no RssAnon")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--service-seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", metavar="SOCKET", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.child is not None:
        asyncio.run(run_client(arguments.child, arguments.folder, arguments.seed))
        return
    with contextlib.ExitStack() as scopes:
        folder = arguments.folder or Path(scopes.enter_context(tempfile.TemporaryDirectory(prefix="cascade-soak-")))
        soak = Soak(
            folder,
            clients=arguments.clients,
            seconds=60 * arguments.minutes,
            service_seconds=arguments.service_seconds,
            seed=arguments.seed,
        )
        report = asyncio.run(soak.run())
    sys.stdout.write(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    sys.exit(1 if report.faults else 0)


if __name__ == "__main__":
    main()
