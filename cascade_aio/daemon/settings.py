"""What can be set about a service, and where its socket is when nobody says."""

from __future__ import annotations

import dataclasses
import grp
import os

from cascade_aio.config import StoreConfig, arena_name, make_config
from cascade_aio.errors import ConfigError

SOCKET_PATH_BYTES_MAX = 107
"""``sun_path`` of Linux has 108 bytes, the last one is zero."""
SOCKET_SUFFIX = ".sock"


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Settings of one service; building one validates it (``ConfigError`` names the key)."""

    socket: str | None = None
    """Path of the socket; ``None``: ``default_socket`` of the store's configuration."""
    group: str | None = None
    """Members of this group may connect as well as the owner; they can read every block."""
    http: str | None = None
    """``host:port`` of the metrics and the status page; ``None``: none."""
    clients_max: int = 1024
    leases_per_client_max: int = 1 << 16
    """Leases by number of one client: of what the shared directory does not list."""
    pinned_bytes_per_client_max: int | None = None
    """Arena that one client may lease; ``None``: half of the arena."""
    reserved_bytes_per_client_max: int | None = None
    """Arena that one client may have reserved and not sealed; ``None``: a quarter. One block is always allowed."""
    requests_per_client_max: int = 1024
    """Requests in flight of one connection; more wait in its process, or in its socket. Two at least: one that waits,
    and one that ends what it waits for."""
    streams_per_client_max: int = 64
    verify_seals: bool = True
    """Digest what clients have filled in the service; else clients digest and are believed."""
    refresh_seconds: float = 0.5
    """How often new blocks of other writers of the root are looked for; 0: never."""
    linger_seconds_max: float = 30.0
    """How long memory that a living process used over a broken connection is kept from reuse."""
    shutdown_seconds_max: float = 60.0
    """After SIGTERM, how long the last flush may take."""

    def __post_init__(self) -> None:
        for name in ("clients_max", "leases_per_client_max", "requests_per_client_max", "streams_per_client_max"):
            number, least = getattr(self, name), 2 if name == "requests_per_client_max" else 1
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= 1 << 20:
                raise ConfigError(f"{name}={number!r} must be a number between {least} and {1 << 20}")
        for name in ("pinned_bytes_per_client_max", "reserved_bytes_per_client_max"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(f"{name}={size!r} must be a number of bytes, 1 or more")
        for name in ("refresh_seconds", "linger_seconds_max", "shutdown_seconds_max"):
            seconds = getattr(self, name)
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 86400:
                raise ConfigError(f"{name}={seconds!r} must be a number of seconds between 0 and 86400")
        if self.http is not None:
            parse_address(self.http)
        if self.group is not None:
            group_id(self.group)


def default_socket(config: StoreConfig) -> str:
    """Beside the arena: on this node even if the root is shared, there in batch jobs too, and as short-lived."""
    return arena_path(config) + SOCKET_SUFFIX


def arena_path(config: StoreConfig) -> str:
    """Where a service with ``config`` has its arena."""
    kept = dataclasses.replace(config, warm_restart=True)
    return os.path.join(config.shm_dir, arena_name(kept))


def socket_path_of(root: str | os.PathLike[str]) -> str:
    """Where a service on ``root`` listens on this node, if it was not told where (``--socket``, ``--arena``,
    ``--shm-dir``). Whether one does is not looked at. Raises ``ConfigError`` for a root that is no directory.
    """
    config = make_config(root)
    if not os.path.isdir(config.root):
        raise ConfigError(f"root={config.root!r} is no directory; name the root of a service: cascade-aio serve ROOT")
    return default_socket(config)


def check_socket_path(path: str) -> None:
    """Raises ``ConfigError`` for a path that the kernel takes for no socket."""
    nbytes = len(os.fsencode(path))
    if not path or "\0" in path or nbytes > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"socket={path!r:.200} has {nbytes} bytes; the path of a socket has 1 to {SOCKET_PATH_BYTES_MAX}: "
            "choose a shorter one, such as one in /dev/shm or in $XDG_RUNTIME_DIR"
        )


def parse_address(text: str) -> tuple[str, int]:
    """``host:port`` (``[::1]:9400`` for IPv6, ``:9400`` for loopback). Raises ``ConfigError``."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"http={text!r} is no address; write host:port, such as 127.0.0.1:9400")
    return host.strip("[]") or "127.0.0.1", int(port)


def group_id(name: str) -> int:
    """The number of a group given by name or number. Raises ``ConfigError``."""
    try:
        return int(name) if name.isdigit() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"group={name!r} is unknown here; see getent group") from None
