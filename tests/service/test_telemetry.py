"""Spans through the OpenTelemetry API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_aio import telemetry
from cascade_aio.errors import BlockNotFoundError
from tests.service.conftest import KEYS, served


class Recorder:
    """What ``telemetry`` uses of the API; keeps names and errors."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def start_as_current_span(self, name: str, *, attributes: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.spans.append((name, type(error).__name__))
            raise
        self.spans.append((name, ""))


async def test_calls_are_spans_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(telemetry, "tracer", recorder)
    async with served(tmp_path / "kv") as store:
        await store.put(b"key", b"value", prefix=KEYS[0])
        async with store.get(KEYS[0]):
            pass
        with pytest.raises(BlockNotFoundError):
            await store.get(KEYS[1])
    seen = set(recorder.spans)
    assert {("cascade.client.Reserve", ""), ("cascade.service.Seal", "")} <= seen
    assert ("cascade.client.Get", "BlockNotFoundError") in seen
    assert ("cascade.service.Get", "BlockNotFoundError") in seen
    assert len([name for name, _ in recorder.spans if name == "cascade.client.Get"]) == 1, "hot gets are no spans"


async def test_the_real_api_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="the extra 'service' is not installed")
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        assert telemetry.span("nobody listens") is telemetry.span("nobody listens"), "costs nothing"
    monkeypatch.setattr(telemetry, "_proxy", None)  # as if somebody listened
    async with served(tmp_path / "kv") as store:
        await store.put(b"key", b"value")


def test_without_the_package_a_span_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "tracer", None)
    with telemetry.span("anything", number=1):
        pass
