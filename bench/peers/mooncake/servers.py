"""Mooncake's servers: its master, and a client process that holds memory; started, asked for their version, ended.

The files are those of the wheel. The version is what the master's file says of itself (``mooncake_client`` says none);
that it serves is what its health page says. Mooncake's own client refuses a master of another version in ``setup``.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence

from bench.peers.protocol import CannotRunError, PeerError

HOST = "127.0.0.1"
START_SECONDS_MAX = 20.0
END_SECONDS_MAX = 10.0
POLL_SECONDS = 0.05
LEASE_MS = 1000
"""A get protects its object so long; no copy may be dropped before. Mooncake's default of 10 s only adds waiting."""


class Server:
    """One started program. ``close`` ends it."""

    def __init__(self, program: pathlib.Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        if not program.exists():
            raise CannotRunError(f"the wheel has no {program.name}")
        self._process = subprocess.Popen(
            [str(program), *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def process(self) -> int:
        return self._process.pid

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Return when ``ready``. Raises ``PeerError`` if the program ends before, or takes too long."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while not ready():
            if self._process.poll() is not None:
                raise PeerError(f"{what} ended with {self._process.returncode} while it started")
            if time.monotonic() > deadline:
                raise PeerError(f"{what} did not answer within {START_SECONDS_MAX:g} s")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def start_master(folder: pathlib.Path, *, offload: bool) -> tuple[Server, str]:
    """The master, serving, and its address. Raises ``CannotRunError`` if it cannot be started here."""
    rpc_port, http_port = free_ports(2)
    arguments = [
        *("--rpc_address", HOST, "--rpc_port", str(rpc_port), "--metrics_host", HOST),
        *("--metrics_port", str(http_port), "--default_kv_lease_ttl", str(LEASE_MS)),
        f"--enable_offload={str(offload).lower()}",
    ]
    server = Server(folder / "mooncake_master", arguments, {})
    try:
        server.wait(lambda: _serves(http_port), "mooncake_master")
    except BaseException:
        server.close()
        raise
    return server, f"{HOST}:{rpc_port}"


def start_holder(folder: pathlib.Path, master: str, memory_bytes: int, environment: Mapping[str, str]) -> Server:
    """A process whose memory the store may use."""
    (port,) = free_ports(1)
    arguments = [
        *("--host", HOST, "--port", str(port), "--metadata_server", "P2PHANDSHAKE"),
        *("--master_server_address", master, "--protocol", "tcp", "--global_segment_size", str(memory_bytes)),
    ]
    server = Server(folder / "mooncake_client", arguments, environment)
    try:
        server.wait(lambda: _listens(port), "mooncake_client")
    except BaseException:
        server.close()
        raise
    return server


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def master_version(folder: pathlib.Path) -> str:
    """What the master's file says of itself. Raises ``CannotRunError`` if a library is missing."""
    program = folder / "mooncake_master"
    said = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=False, timeout=30)
    if "error while loading shared libraries" in said.stderr:
        raise CannotRunError(said.stderr.strip().rpartition("error while loading shared libraries: ")[2])
    found = re.search(r"version (\S+)", said.stdout)
    if found is None:
        raise PeerError(f"{program.name} --version tells no version")
    return found.group(1)


def _serves(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=1.0) as answer:
            return bool(json.load(answer).get("service_ready"))
    except OSError:
        return False


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), 1.0).close()
    except OSError:
        return False
    return True
