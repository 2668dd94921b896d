"""Spans for OpenTelemetry, through its API package alone: what becomes of them is the application's choice.

Without the package (extra ``service``) or without a provider a span is nothing. Names begin with
``cascade.``. Only what waits is a span; hot gets and look-ups cost microseconds and are counted instead.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

try:
    _api: Any = importlib.import_module("opentelemetry.trace")
    # Of the proxy provider: it becomes the application's when that sets one.
    _proxy: Any = _api.get_tracer("cascade_aio")
except ImportError:  # an extra
    _api = _proxy = None
tracer: Any = _proxy
"""Who makes the spans; ``None`` without the package."""

_NOTHING = contextlib.nullcontext()


def span(name: str, **attributes: str | int | float | bool) -> contextlib.AbstractContextManager[Any]:
    """A scope that is a span of the current trace; an exception that leaves it is recorded there."""
    if tracer is None or (tracer is _proxy and isinstance(_api.get_tracer_provider(), _api.ProxyTracerProvider)):
        return _NOTHING  # an empty span of the API costs as much as a tenth of a message
    scope: contextlib.AbstractContextManager[Any] = tracer.start_as_current_span(
        f"cascade.{name}", attributes=attributes
    )
    return scope
