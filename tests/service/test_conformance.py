"""One suite over both faces of the store: embedded, and as a client of a node service."""

from __future__ import annotations

import uuid
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import cascade_aio as ca
from cascade_aio.testing.store import AnyStore, StoreConformance
from tests.service.conftest import served


class TestEmbedded(StoreConformance):
    def open(self, root: Path, **settings: Any) -> AbstractAsyncContextManager[AnyStore]:
        return ca.open_store(root, arena=f"cascade-test-{uuid.uuid4().hex[:12]}", **settings)


class TestClient(StoreConformance):
    def open(self, root: Path, **settings: Any) -> AbstractAsyncContextManager[AnyStore]:
        return served(root, **settings)


class TestClientThatIsBelieved(StoreConformance):
    """The service takes the client's digests."""

    def open(self, root: Path, **settings: Any) -> AbstractAsyncContextManager[AnyStore]:
        return served(root, service={"verify_seals": False}, **settings)
