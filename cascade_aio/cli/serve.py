"""``serve``: the node service in the foreground, for systemd, for a batch job, or for a terminal."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cascade_aio.cli.blocks import PositionalRoot
from cascade_aio.cli.options import Json, Settings, store_command
from cascade_aio.cli.output import UsageError, out, print_json
from cascade_aio.config import StoreConfig, format_size, parse_size
from cascade_aio.daemon import Service, ServiceConfig
from cascade_aio.daemon.running import run_service
from cascade_aio.daemon.settings import arena_path
from cascade_aio.errors import ConfigError
from cascade_aio.tiers.arena import remove_arena

_PANEL = "Clients"
_DEFAULTS = ServiceConfig()


@store_command
def serve(
    settings: Settings,
    directory: PositionalRoot = None,
    shm: Annotated[str | None, typer.Option("--shm", help="Size of the arena; the same as --shm-bytes.")] = None,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="Where to listen; default: beside the arena.")
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            "--http", metavar="HOST:PORT", help="Metrics and status page, such as 127.0.0.1:9400; default: none."
        ),
    ] = None,
    refresh_seconds: Annotated[
        float, typer.Option(help="How often to look for blocks of other writers of the root; 0: never.")
    ] = _DEFAULTS.refresh_seconds,
    shutdown_seconds_max: Annotated[
        float, typer.Option(help="How long the last flush may take.")
    ] = _DEFAULTS.shutdown_seconds_max,
    group: Annotated[
        str | None, typer.Option(help="Let members of this group in, too; they can read all.", rich_help_panel=_PANEL)
    ] = None,
    clients_max: Annotated[int, typer.Option(help="Clients at once.", rich_help_panel=_PANEL)] = _DEFAULTS.clients_max,
    leases_per_client_max: Annotated[
        int,
        typer.Option(
            help="Leases by message of one client; those in shared memory are bounded by their bytes.",
            rich_help_panel=_PANEL,
        ),
    ] = _DEFAULTS.leases_per_client_max,
    pinned_bytes_per_client_max: Annotated[
        str | None, typer.Option(help="Arena that one client may lease; default: half.", rich_help_panel=_PANEL)
    ] = None,
    reserved_bytes_per_client_max: Annotated[
        str | None, typer.Option(help="Arena that one client may fill at a time.", rich_help_panel=_PANEL)
    ] = None,
    verify_seals: Annotated[
        bool, typer.Option(help="Digest here what clients have filled; else they are believed.", rich_help_panel=_PANEL)
    ] = _DEFAULTS.verify_seals,
    cold: Annotated[bool, typer.Option("--cold", help="Forget the arena that the last run left, start empty.")] = False,
    create: Annotated[bool, typer.Option("--create", help="Make missing directories above the root, too.")] = False,
    json: Json = False,
) -> None:
    """Lend one store to all processes of this node, until SIGTERM; then flush, seal and report."""
    if shm is not None:
        if settings.given["shm_bytes"] is not None:
            raise UsageError("--shm and --shm-bytes are the same; give one of them")
        settings.given["shm_bytes"] = shm
    config = settings.config(directory)
    try:
        service = ServiceConfig(
            socket=None if socket is None else str(socket),
            group=group,
            http=http,
            clients_max=clients_max,
            leases_per_client_max=leases_per_client_max,
            pinned_bytes_per_client_max=_size(pinned_bytes_per_client_max),
            reserved_bytes_per_client_max=_size(reserved_bytes_per_client_max),
            verify_seals=verify_seals,
            refresh_seconds=refresh_seconds,
            shutdown_seconds_max=shutdown_seconds_max,
        )
    except ConfigError as error:
        raise UsageError(str(error)) from None
    parent = os.path.dirname(os.path.abspath(config.root))
    if not create and not os.path.isdir(parent):
        raise UsageError(
            f"{config.root} cannot be made: {parent} does not exist either. Check the path; if it is right, make the "
            "directory, or say --create"
        )
    if cold:
        remove_arena(arena_path(config))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    report = asyncio.run(run_service(config, service, on_ready=lambda running: _announce(config, running)))
    if json:
        print_json(report)
        return
    store, node = report["store"], report["service"]
    gets = store["gets"] + node["shared_hits"]  # what clients found and pinned themselves took no get of this process
    out.print(
        f"served {node['connections']} connections: {gets} gets, {store['misses']} misses, "
        f"{store['puts']} puts of {format_size(store['put_bytes'])}; {report['blocks']} blocks are safe in "
        f"{config.root}; {format_size(config.shm_bytes)} of memory stay with the arena {arena_path(config)} for the "
        f"next start (where there is to be none: rm {arena_path(config)}*)",
        markup=False,
        soft_wrap=True,
    )


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)


def _announce(config: StoreConfig, running: Service) -> None:
    """On stderr: stdout is for the report."""
    size = format_size(config.shm_bytes)
    logging.getLogger("cascade_aio.service").info("serving %s with %s at %s", config.root, size, running.socket_path)
