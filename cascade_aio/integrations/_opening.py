"""Which store an integration was told to use, from the flat settings that servers hand to their plug-ins.

Either ``root`` and the settings of ``open_store``: a store of this process; or ``service``, the socket of a node
service, which several servers and all workers of a node share. The arena of a store of one's own has no name unless
it is to be found again (``arena``, ``warm_restart``): nobody else maps it, so nothing is left in ``/dev/shm`` however
the server ends, and any number of engines may open one root.

Knows no server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from cascade_aio.config import StoreConfig, make_config
from cascade_aio.daemon import ServiceStore, connect
from cascade_aio.errors import ConfigError
from cascade_aio.store import Store, open_store
from cascade_aio.store.opening import open_with
from cascade_aio.tiers.arena import open_unnamed_arena

AnyStore: TypeAlias = Store | ServiceStore

RECONNECT_SECONDS_MAX = 5.0
"""How long a call waits for a service that was lost; after that it fails, which servers take for a miss."""

_SERVICE_SETTINGS = frozenset({"service", "reconnect_seconds_max", "wait_seconds", "workers"})
_STORE_SETTINGS = frozenset(field.name for field in dataclasses.fields(StoreConfig))


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A store to be opened: exactly one of the two is given."""

    config: StoreConfig | None = None
    service: str | None = None
    connecting: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_shared(self) -> bool:
        """Whether other processes change the store while it is open here."""
        return self.service is not None

    async def opened(self) -> AnyStore:
        """Raises as ``open_store`` or ``connect``."""
        if self.service is not None:
            return await connect(self.service, **self.connecting)
        assert self.config is not None
        config = self.config
        if config.read_only or config.warm_restart or config.arena is not None:
            return await open_store(config)
        arena = await open_unnamed_arena(config.shm_dir, config.shm_bytes)
        try:
            return await open_with(config, arena=arena)
        except BaseException:
            arena.close()
            raise


def place_of(settings: Mapping[str, Any], *, who: str, own: Collection[str] = ()) -> Place:
    """The store that ``settings`` describe; ``who`` reads them and has settings of its ``own`` besides.

    Raises ``ConfigError`` naming what is unknown, missing, contradictory or wrong.
    """
    root, service = settings.get("root"), settings.get("service")
    if (root is None) == (service is None):
        raise ConfigError(
            f'{who} needs either "root", the directory of a store, or "service", the socket of a node service '
            f"(cascade-aio serve); it has {'both' if root is not None else 'neither'}"
        )
    known = _STORE_SETTINGS if service is None else _SERVICE_SETTINGS
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(
            f"{who} has no settings {', '.join(map(repr, unknown))} with {'root' if service is None else 'service'}; "
            f"there are {', '.join(sorted({*known, *own}))}"
        )
    for name, value in (("root", root), ("service", service)):
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{who}: {name}={value!r} must be a path")
    if service is None:
        return Place(config=make_config(**settings))
    connecting = {name: value for name, value in settings.items() if name != "service"}
    connecting.setdefault("reconnect_seconds_max", RECONNECT_SECONDS_MAX)
    return Place(service=service, connecting=connecting)
