"""A redis-server of our own: started in a folder, asked for its version and its process, ended.

No persistence, or an append-only file synced every second (``flush`` asks for more). Nothing is evicted: a full
memory is an error of ``put``. Rewriting the file is off, so that no forked process competes with what is measured.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping

import redis

from bench.peers.protocol import CannotRunError, PeerError, Scalar, Settings

SOCKET = "redis.sock"
LOG = "redis.log"
START_SECONDS_MAX = 120.0
"""Long enough to load an append-only file of some GB."""
END_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02
OVERHEAD = 1.5
"""Redis counts its own bookkeeping and rounding up of values as memory of the data …"""
FLOOR_BYTES = 64 << 20
"""… and what it needs when empty, and …"""
BUFFERS = 4
"""… buffers of clients, so many blocks for each operation in flight."""


class RedisServer:
    """Started by the first client; others only know where it is."""

    def __init__(self, settings: Settings, *, tcp: bool, append_only: bool) -> None:
        self.tcp = tcp
        self.append_only = append_only
        self._folder = settings.folder
        self._folder_fd = os.open(settings.folder, os.O_PATH | os.O_DIRECTORY)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self.version = ""
        try:
            if settings.endpoint is not None:
                self._port = int(settings.endpoint["port"] or 0)
            else:
                self._start(settings)
            self._await_answer()
        except BaseException:
            self.end()
            raise

    def endpoint(self) -> Mapping[str, Scalar]:
        return {"port": self._port}

    def processes(self) -> list[int]:
        return [self._process.pid] if self._process else []

    def files(self) -> list[pathlib.Path]:
        return sorted((self._folder / "appendonlydir").glob("*.aof")) if self.append_only else []

    def address(self) -> dict[str, str | int]:
        """Arguments of a client. The socket is reached through an open directory: its path may be of any length."""
        if self.tcp:
            return {"host": "127.0.0.1", "port": self._port}
        return {"unix_socket_path": f"/proc/self/fd/{self._folder_fd}/{SOCKET}"}

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(END_SECONDS_MAX)
            finally:
                process.kill()
                process.wait()
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1

    def _start(self, settings: Settings) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise CannotRunError("redis-server is not installed (Debian: apt-get install redis-server)")
        if self.tcp:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = probe.getsockname()[1]
        options = {
            "port": str(self._port),
            "bind": "127.0.0.1",
            "unixsocket": "" if self.tcp else SOCKET,
            "save": "",
            "appendonly": "yes" if self.append_only else "no",
            "appendfsync": "everysec",
            "auto-aof-rewrite-percentage": "0",
            "maxmemory": str(_allowance(settings)),
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": LOG,
        }
        words = [word for name, value in options.items() if value or name == "save" for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [program, *words], cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    def _await_answer(self) -> None:
        """Wait until it serves and has loaded its file; make sure that it is ours."""
        deadline = time.monotonic() + START_SECONDS_MAX
        client = redis.Redis(**self.address())
        try:
            while True:
                try:
                    client.ping()
                    break
                except (redis.ConnectionError, redis.exceptions.BusyLoadingError) as error:
                    if self._process is not None and self._process.poll() is not None:
                        log = (self._folder / LOG).read_text()[-500:]
                        raise CannotRunError(
                            f"redis-server ended with code {self._process.returncode}: {log}"
                        ) from error
                    if time.monotonic() > deadline:
                        raise PeerError(f"redis-server does not answer after {START_SECONDS_MAX:.0f} s") from error
                    time.sleep(POLL_SECONDS)
            told = client.info("server")
        finally:
            client.close()
        if self._process is not None and told["process_id"] != self._process.pid:
            raise PeerError(f"process {told['process_id']} answers, and not the redis-server that was started")
        self.version = str(told["redis_version"])


def _allowance(settings: Settings) -> int:
    """``maxmemory`` such that ``memory_bytes`` of blocks fit."""
    buffers = BUFFERS * settings.in_flight_max * settings.block_bytes
    return int(settings.memory_bytes * OVERHEAD) + FLOOR_BYTES + buffers
