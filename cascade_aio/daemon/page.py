"""The status page and the metrics endpoint: read-only, served from a thread of their own.

Starlette behind uvicorn (extra ``service``). The service's loop takes one snapshot a second
(``samples``); this thread renders them, so that slow or many readers cost the store nothing. There are
no assets from elsewhere, no cookies, no forms; only GET is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.resources
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec

from cascade_aio.daemon.node import Node
from cascade_aio.daemon.samples import SAMPLE_SECONDS, Sampler
from cascade_aio.daemon.settings import parse_address
from cascade_aio.errors import ConfigError

logger = logging.getLogger("cascade_aio.service")

VIEWERS_MAX = 32
"""Pages that are updated at a time; more are told to come back later."""
STOP_SECONDS_MAX = 5.0
UNHEALTHY_SECONDS = 10.0
"""A service whose loop has taken no snapshot for so long does not answer its clients either."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@contextlib.contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """A scope in which ``address`` is taken; port 0 takes a free one. Before the store is opened, whose arena stays
    behind when something fails later.

    Raises ``ConfigError`` without the extra ``service`` or for an address that cannot be had.
    """
    try:
        for name in ("uvicorn", "prometheus_client", "starlette"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"http={address!r} needs {error.name}, which is not installed: pip install 'cascade_aio[service]'"
        ) from None
    with _listen(address) as listener:
        yield listener


@contextlib.asynccontextmanager
async def page(node: Node, listener: socket.socket) -> AsyncIterator[str]:
    """A scope in which ``listener`` is answered; gives the URL."""
    uvicorn = importlib.import_module("uvicorn")
    sampler = Sampler(node)
    sampling = asyncio.get_running_loop().create_task(sampler.run(), name="cascade-service-samples")
    config = uvicorn.Config(
        application(sampler), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=_run, args=(server, listener), name="cascade-service-page", daemon=True)
    thread.start()
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    logger.info("status page and metrics at %s", url)
    try:
        yield url
    finally:
        server.should_exit = True
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        await asyncio.to_thread(thread.join, STOP_SECONDS_MAX)


def _run(server: Any, listener: socket.socket) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.serve(sockets=[listener]))


def _listen(address: str) -> socket.socket:
    host, port = parse_address(address)
    try:
        family, kind, number, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"http={address!r} cannot be listened at: {error.strerror}; choose another address") from None
    return listener


def application(sampler: Sampler) -> Any:
    """The Starlette application: ``/`` page, ``/metrics``, ``/status.json``, ``/events``, ``/healthz``."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    from cascade_aio.daemon.metrics import CONTENT_TYPE, render

    files = importlib.resources.files("cascade_aio.daemon") / "assets"
    viewers = asyncio.Semaphore(VIEWERS_MAX)

    async def asset(request: Request) -> Response:
        name = {"/": "status.html", "/status.js": "status.js"}[request.url.path]
        kind = "text/html" if name.endswith("html") else "text/javascript"
        return Response((files / name).read_bytes(), media_type=kind, headers=_HEADERS)

    async def metrics(_: Request) -> Response:
        return Response(render(sampler.latest), headers={**_HEADERS, "Content-Type": CONTENT_TYPE})

    async def status(_: Request) -> Response:
        return Response(_json(sampler.latest), media_type="application/json", headers=_HEADERS)

    async def health(_: Request) -> Response:
        wrong = illness(sampler.latest, time.monotonic())
        return Response(wrong or "ok\n", status_code=503 if wrong else 200, media_type="text/plain", headers=_HEADERS)

    async def events(request: Request) -> Response:
        if viewers.locked():
            return Response("too many pages are open", status_code=503, headers=_HEADERS)
        return StreamingResponse(_events(request), media_type="text/event-stream", headers=_HEADERS)

    async def _events(request: Request) -> AsyncIterator[bytes]:
        async with viewers:
            told: object = None
            while not await request.is_disconnected():
                latest = sampler.latest
                if latest is not told:
                    told = latest
                    yield b"data: " + _json(latest) + b"\n\n"
                await asyncio.sleep(SAMPLE_SECONDS / 4)

    routes = [
        Route("/", asset),
        Route("/status.js", asset),
        Route("/metrics", metrics),
        Route("/status.json", status),
        Route("/events", events),
        Route("/healthz", health),
    ]
    return Starlette(routes=[*routes])


def illness(latest: dict[str, Any], now_s: float) -> str | None:
    """Why a service with this snapshot serves nobody, for who would start it again; ``None``: it serves. Pure."""
    if latest["failure"] is not None:
        return f"a background task of the store failed: {latest['failure']}\n"
    age_s = now_s - latest["taken_s"]
    return f"the service has not answered for {age_s:.0f} s\n" if age_s > UNHEALTHY_SECONDS else None


def _json(record: Any) -> bytes:
    return msgspec.json.encode(record, enc_hook=str)
