"""``CascadeOffloadingSpec``: a node service's arena in place of vLLM's CPU tier (interface of vLLM 0.32).

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "CascadeOffloadingSpec",
        "spec_module_path": "cascade_aio.integrations.vllm_spec", "service": "/run/user/1000/cascade.sock"}}'

With ``CascadeTier`` vLLM keeps a copy of everything in host memory of its own; here there is none: chunks move between
the KV cache and the arena that all engines of the node share. The scheduler holds what is about to be loaded
(``_vllm_manager``), each worker moves its own part of a chunk (``_vllm_mover``), under a name of its rank.

Besides ``service`` it takes ``revision`` (of a model that is no local directory), ``salt`` (separates tenants),
``reconnect_seconds_max``, ``workers``, and vLLM's own settings (``block_size`` or ``blocks_per_chunk``, …).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade_aio.errors import ConfigError
from cascade_aio.integrations._opening import place_of

try:
    from vllm.v1.kv_offload.base import OffloadingManager, OffloadingSpec, OffloadingWorker

    from cascade_aio.integrations._vllm_chunks import LAYOUT
    from cascade_aio.integrations._vllm_manager import Manager
    from cascade_aio.integrations._vllm_mover import Mover
    from cascade_aio.integrations._vllm_names import namespace_of
except ImportError as error:
    raise ImportError(
        f"cascade_aio.integrations.vllm_spec needs vLLM 0.32 ({error}); see examples/vllm/README.md"
    ) from error

from cascade_aio.integrations._vllm_pages import Pages
from cascade_aio.model import prefix_root

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import CanonicalKVCaches
    from vllm.v1.kv_offload.config import OffloadingConfig

_OF_VLLM = frozenset(
    {
        "spec_name",
        "spec_module_path",
        "block_size",
        "blocks_per_chunk",
        "canonical_layout",
        "offload_prompt_only",
        "self_describing_kv_events",
    }
)
"""Settings beside ours that vLLM reads itself."""

_OURS = ("revision", "salt")


class CascadeOffloadingSpec(OffloadingSpec):  # type: ignore[misc]
    """See the module's docstring. Made in the scheduler's process and in each worker's.

    Raises ``ConfigError`` for wrong settings; ``get_manager`` and ``get_worker`` raise ``ServiceUnavailableError``.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        settings = {name: value for name, value in config.extra_config.items() if name not in _OF_VLLM}
        self._own = {name: settings.pop(name, "") for name in _OURS}
        self._place = place_of(settings, who="CascadeOffloadingSpec", own=_OURS)
        if not self._place.is_shared:
            raise ConfigError(
                'CascadeOffloadingSpec needs "service", the socket of a node service (cascade-aio serve): scheduler '
                "and workers share its arena"
            )
        if config.canonical_layout:
            raise ConfigError(
                "CascadeOffloadingSpec stores each worker's pages as they are; leave out canonical_layout, or use "
                "CascadeTier"
            )
        self._manager: Manager | None = None
        self._worker: Mover | None = None

    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            spaces = [
                namespace_of(self.config, layout=LAYOUT, rank=rank, **self._own)
                for rank in range(self.config.parallel.world_size)
            ]
            self._manager = Manager(self._place, [prefix_root(space) for space in spaces])
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            pages = Pages(kv_caches, self.blocks_per_chunk)
            self._worker = Mover(self.config.parallel.rank, pages, self.blocks_per_chunk, self._place)
        return self._worker
