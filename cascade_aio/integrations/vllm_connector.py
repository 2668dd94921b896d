"""``CascadeConnector``: a vLLM KV connector whose workers read and write a node service's arena (vLLM 0.32).

    --kv-transfer-config '{"kv_connector": "CascadeConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "cascade_aio.integrations.vllm_connector", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"service": "/run/user/1000/cascade.sock"}}'

The scheduler asks the service how much of a prompt is stored and tells the workers which blocks to load and to save;
each worker moves its own bytes, between the KV cache and the arena, in threads, while the engine goes on with other
requests. A block of the store is one block of the KV cache: the pages of all layers, one after the other. A block is
a hit only if every worker's part of it is there. Blocks that could not be loaded are reported to vLLM, which
recomputes them, and are misses for a while.

KV caches in host memory only (vLLM on CPUs): with a GPU use ``CascadeTier``. Models whose layers are all of one cache
group, which excludes those that mix attention with sliding windows or recurrent state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cascade_aio.errors import ConfigError
from cascade_aio.integrations._opening import place_of

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

    from cascade_aio.integrations._vllm_plan import Plan
    from cascade_aio.integrations._vllm_scheduler import Scheduler
    from cascade_aio.integrations._vllm_worker import Worker
except ImportError as error:
    raise ImportError(
        f"cascade_aio.integrations.vllm_connector needs vLLM 0.32 ({error}); see examples/vllm/README.md"
    ) from error

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class CascadeConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module's docstring. ``kv_connector_extra_config``: ``service``, and optionally ``salt`` (separates
    tenants), ``revision`` (of a model that is no local directory), ``reconnect_seconds_max``, ``workers``.

    Raises ``ConfigError`` for wrong settings and for models that it cannot serve, ``ServiceUnavailableError``.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
        own = {name: settings.pop(name, "") for name in ("revision", "salt")}
        place = place_of(settings, who="CascadeConnector", own=tuple(own))
        if not place.is_shared:
            raise ConfigError(
                'CascadeConnector needs "service", the socket of a node service (cascade-aio serve): scheduler and '
                "workers are processes of their own and share its arena"
            )
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ConfigError(
                f"the model has {len(kv_cache_config.kv_cache_groups)} KV cache groups and CascadeConnector serves "
                "models with one; use CascadeTier"
            )
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = Scheduler(vllm_config, kv_cache_config, place, **own)
        else:
            rank = vllm_config.parallel_config.rank
            self._worker = Worker(rank, kv_cache_config, place)

    # -- scheduler

    @property
    def _deciding(self) -> Scheduler:
        assert self._scheduler is not None, "called on a worker"
        return self._scheduler

    def on_new_request(self, request: Request) -> None:
        self._deciding.requests[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._deciding.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._deciding.begin_load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Plan:
        return self._deciding.plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._deciding.note_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._deciding.forget(request.request_id), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._deciding.forget(request.request_id), None

    # -- worker

    @property
    def _moving(self) -> Worker:
        assert self._worker is not None, "called on the scheduler"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._moving.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Plan) -> None:
        if kv_connector_metadata.preempted:
            self._moving.finish_saves()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        plan = self._get_connector_metadata()
        self._moving.begin_loads(plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A request runs only when its blocks are loaded: there is nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole, after the forward pass that filled them."""

    def wait_for_save(self) -> None:
        """Begins the saves. Their blocks stay until ``get_finished`` names the request."""
        plan = self._get_connector_metadata()
        self._moving.begin_saves(plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._moving.finished(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._moving.take_failed()

    def shutdown(self) -> None:
        """Finish what was begun and end the connection. Blocks."""
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()
