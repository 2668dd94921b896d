"""A ``CascadeTier`` whose reads fail while a file says so; for ``test_vllm.py``, loaded in vLLM's scheduler process."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

from cascade_aio.integrations.vllm import CascadeTier
from cascade_aio.store import Store

HANG_SECONDS = 6.0


class FaultyTier(CascadeTier):
    """``fault_file`` holds ``errors`` (reads fail), ``hang`` (reads come late) or nothing."""

    def __init__(self, *args: Any, fault_file: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        store = self._polled.store
        assert isinstance(store, Store)
        storage = store.parts.context.platform.storage
        read = storage.read
        path = Path(fault_file)

        async def faulty(*arguments: Any, **options: Any) -> Any:
            fault = path.read_text() if path.exists() else ""
            if fault == "errors":
                raise OSError(errno.EIO, "injected")
            if fault == "hang":
                await asyncio.sleep(HANG_SECONDS)
            return await read(*arguments, **options)

        storage.read = faulty  # type: ignore[method-assign]
