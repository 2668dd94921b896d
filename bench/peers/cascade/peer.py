"""cascade_aio through its public interface: an embedded store, or a client of ``cascade-aio serve``.

A block is put as key and value of half its bytes each, under a prefix key made of its name. ``get`` is ``read_into`` (a
copy into the caller's memory), ``lease`` is ``get`` (no copy). Checksums are verified and digests computed as always.
Every opening has an arena of its own that is removed at the end; ``drop_caches`` is a new opening with an empty arena.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence

import cascade_aio as ca
from bench.peers.protocol import (
    AsyncPeer,
    CannotRunError,
    Description,
    PeerError,
    Scalar,
    Settings,
    published_path,
)

START_SECONDS_MAX = 60.0
END_SECONDS_MAX = 120.0
EXTENT_OVERHEAD_BYTES = 2 * 4096
"""Header page and padding of a block in the arena: the same payload as others is allowed."""
MIB = 1 << 20

_numbers = itertools.count()


class _CascadePeer(AsyncPeer):
    """What does not depend on how the store is reached."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._store: ca.Store | ca.ServiceStore | None = None
        self._settings: Settings | None = None
        self._arena = ""
        self._half = 0

    @property
    def store(self) -> ca.Store | ca.ServiceStore:
        assert self._store is not None, "not open"
        return self._store

    @property
    def settings(self) -> Settings:
        assert self._settings is not None, "not open"
        return self._settings

    def _begin(self, settings: Settings) -> None:
        self._settings = settings
        self._half = settings.block_bytes // 2
        self._arena = f"cascade-bench-{os.getpid()}-{next(_numbers)}"

    def _shm_bytes(self) -> int:
        blocks = -(-self.settings.memory_bytes // self.settings.block_bytes)
        wanted = self.settings.memory_bytes + blocks * EXTENT_OVERHEAD_BYTES
        return -(-wanted // MIB) * MIB

    def _remove_arena(self) -> None:
        for left in pathlib.Path("/dev/shm").glob(f"{self._arena}*"):
            left.unlink(missing_ok=True)

    def files(self) -> Sequence[pathlib.Path]:
        return sorted(self.settings.folder.rglob("*.seg"))

    async def put(self, name: str, data: memoryview) -> None:
        await self.store.put(data[: self._half], data[self._half :], prefix=_key(name))

    async def flush(self) -> None:
        await self.store.flush()

    async def get(self, name: str, into: memoryview) -> memoryview:
        try:
            await self.store.read_into(_key(name), into[: self._half], into[self._half :])
        except ca.BlockNotFoundError:
            await self._look_again(name)
            await self.store.read_into(_key(name), into[: self._half], into[self._half :])
        return into

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Sequence[memoryview]]:
        try:
            block = await self.store.get(_key(name))
        except ca.BlockNotFoundError as error:
            raise KeyError(name) from error
        with block:
            yield [memoryview(block.key), memoryview(block.value)]

    async def contains(self, name: str) -> bool:
        return await self.store.contains(_key(name))

    async def delete(self, name: str) -> None:
        try:
            await self.store.delete(_key(name))
        except ca.BlockNotFoundError as error:
            raise KeyError(name) from error

    async def _look_again(self, name: str) -> None:
        """After a miss: another writer of the root may have stored it meanwhile. Raises ``KeyError`` if not."""
        await self.store.refresh()
        if not await self.store.contains(_key(name)):
            raise KeyError(name)


class EmbeddedPeer(_CascadePeer):
    """Systems ``cascade`` and ``cascade-blake3``."""

    async def open(self, settings: Settings) -> None:
        self._begin(settings)
        store = await ca.open_store(
            settings.folder,
            arena=self._arena,
            shm_bytes=self._shm_bytes(),
            digest="blake3" if self.system == "cascade-blake3" else "sha256",
        )
        self._store = store
        if settings.settled:
            await store.wait_ready()

    def describe(self) -> Description:
        assert isinstance(self.store, ca.Store)
        io = self.store.statistics()["io"]
        return Description(
            version=f"cascade_aio {ca.__version__}",
            module=published_path(ca.__file__),
            tuning="defaults; the arena is populated before the clock starts",
            durability="flush: one fdatasync of the segment file for all that was put",
            medium="shared memory",
            configuration={
                "io_backend": str(io["backend"]),
                "shm_bytes": self._shm_bytes(),
                "digest": "blake3" if self.system == "cascade-blake3" else "sha256",
            },
        )

    async def drop_caches(self) -> None:
        settings = self.settings
        await self.close()
        await self.open(settings)

    async def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            await store.aclose()
        if self._arena:
            self._remove_arena()


class ServicePeer(_CascadePeer):
    """System ``cascade-service``: the first client starts ``cascade-aio serve``, all of them connect."""

    def __init__(self, system: str) -> None:
        super().__init__(system)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = ""

    async def open(self, settings: Settings) -> None:
        self._begin(settings)
        if settings.endpoint is None:
            self._start()
        else:
            self._socket = str(settings.endpoint["socket"])
        store = await ca.connect(self._socket, wait_seconds=START_SECONDS_MAX)
        self._store = store
        if settings.settled:
            await store.wait_ready()
        self._server = await store.statistics()

    def _start(self) -> None:
        self._socket = f"/dev/shm/{self._arena}.sock"
        size = str(self._shm_bytes())
        command = [sys.executable, "-m", "cascade_aio", "serve", str(self.settings.folder)]
        command += ["--arena", self._arena, "--socket", self._socket, "--shm-bytes", size]
        command += ["--pinned-bytes-per-client-max", size, "--reserved-bytes-per-client-max", size]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def describe(self) -> Description:
        return Description(
            version=f"cascade_aio {ca.__version__}",
            module=published_path(ca.__file__),
            server=f"cascade-aio serve {ca.__version__}",
            tuning="defaults; the arena is populated before the clock starts, each client may lease all of it",
            durability="flush: one fdatasync of the segment file for all that was put",
            medium="shared memory",
            configuration={"io_backend": str(self._server["io"]["backend"]), "shm_bytes": self._shm_bytes()},
        )

    def endpoint(self) -> Mapping[str, Scalar]:
        return {"socket": self._socket}

    def processes(self) -> Sequence[int]:
        return [self._process.pid] if self._process else []

    async def drop_caches(self) -> None:
        if self._process is None:
            raise PeerError("only the client that started the service can start it anew")
        settings = self.settings
        await self.flush()
        await self.close()
        await self.open(settings)

    async def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            await store.aclose()
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(END_SECONDS_MAX)
        finally:
            process.kill()
            process.wait()
            self._remove_arena()
        if code != 0:
            raise PeerError(f"the service ended with code {code}")


class MpiPeer(_CascadePeer):
    """System ``cascade-mpi``: a name for what one client on one node cannot measure."""

    async def open(self, settings: Settings) -> None:
        raise CannotRunError("needs several ranks: `mpiexec -n 4 python -m bench mpi run`")

    def describe(self) -> Description:
        raise PeerError("not open")

    async def drop_caches(self) -> None:
        raise PeerError("not open")

    async def close(self) -> None:
        pass


def _key(name: str) -> ca.PrefixKey:
    return ca.PrefixKey(bytes.fromhex(name) * 2)
