"""``CascadeTier``: this store as a secondary tier of vLLM's tiering offload (interface of vLLM 0.32).

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 4294967296,
        "secondary_tiers": [{"type": "CascadeTier", "module_path": "cascade_aio.integrations.vllm",
                             "root": "/scratch/kv", "shm_bytes": "8GiB"}]}}'

The tier lives in vLLM's scheduler process and is driven by its polls (``_polled``): no thread of ours, lookups
without I/O. Rows of vLLM's primary region are stored as values, named by prefix keys made from vLLM's block hash in
a namespace of everything known to change KV bytes. Every row is verified before it is handed over; a failed or
damaged load is reported for its keys and is a miss from then on, so vLLM recomputes instead of asking again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from cascade_aio.errors import ConfigError, ServiceUnavailableError
from cascade_aio.integrations._opening import place_of
from cascade_aio.integrations._polled import PolledStore, Submitted, check_expected
from cascade_aio.integrations._vllm_names import in_order, namespace_of
from cascade_aio.model import BlockMeta, PrefixKey, prefix_root

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
    from vllm.logger import init_logger
    from vllm.v1.kv_offload.base import (
        LookupResult,
        Medium,
        OffloadingCounterMetadata,
        OffloadingEvent,
        OffloadingMetricMetadata,
        OffloadKey,
        ReqContext,
        RequestOffloadingContext,
    )
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
except ImportError as error:
    raise ImportError(
        f"cascade_aio.integrations.vllm needs vLLM 0.32 with tiered offloading ({error}); see examples/vllm/README.md"
    ) from error

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

logger = init_logger("vllm.cascade_aio")

LAYOUT = "vllm/row/1"
"""Name and version of what a value holds: one row (chunk) of the primary region as vLLM lays it out."""

STORES_AT_ONCE = 8
"""Rows being stored at a time: loads, which requests wait for, always find room in the queues."""

FAILED_SECONDS = 60.0
"""A key whose load failed is a miss for so long, or until it is stored anew: vLLM asks again at once."""

FLUSH_SECONDS = 1.0
"""At most so long after it was stored is a row durable, as long as the engine polls."""

ASKED_MAX = 4096
"""Questions to a node service on their way; what finds no place is a miss."""

SILENT_SECONDS = 5.0
"""A node service that was not there is not asked for so long: requests do not wait for it again and again."""

_METRICS = {
    "stored_blocks": ("vllm:cascade_aio_stored_blocks", "Blocks that cascade_aio took."),
    "stored_failures": ("vllm:cascade_aio_store_failures", "Blocks that cascade_aio could not store."),
    "loaded_blocks": ("vllm:cascade_aio_loaded_blocks", "Blocks that cascade_aio loaded, each verified."),
    "loaded_failures": ("vllm:cascade_aio_load_failures", "Blocks that cascade_aio lost, found damaged or late."),
}


@dataclasses.dataclass(slots=True)
class _Job:
    """A transfer vLLM waits for: one coroutine for each of its keys."""

    job_id: int
    loading: bool
    keys: list[OffloadKey]
    parts: list[Submitted[None]]
    begun_s: float

    @property
    def done(self) -> bool:
        return all(part.done for part in self.parts)


class CascadeTier(SecondaryTierManager):  # type: ignore[misc]
    """See the module's docstring. All calls come from the scheduler's thread; none but ``drain_jobs`` and
    ``shutdown`` blocks."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        revision: str = "",
        salt: str = "",
        enable_kv_events: bool = False,
        backpressure_detector: BackpressureDetector | None = None,
        **settings: Any,
    ) -> None:
        """``settings``: ``root`` and the settings of ``open_store``, or ``service``, the socket of a node service that
        several servers share. ``revision`` names the model's revision where the model is no local directory;
        ``salt`` separates tenants.

        Raises ``ConfigError`` for a setting that is unknown or wrong, and what opening raises.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        place = place_of(settings, who="CascadeTier", own=("revision", "salt", "enable_kv_events"))
        rows = primary_kv_view if primary_kv_view.contiguous else None
        if rows is None:
            raise ConfigError("the primary region is not contiguous; CascadeTier stores whole rows of it")
        self._rows = rows.cast("B")
        self._row_bytes: int = self.block_size_bytes
        self._name_root = prefix_root(namespace_of(offloading_spec.config, layout=LAYOUT, revision=revision, salt=salt))
        self._jobs: dict[int, _Job] = {}
        self._failed_until_s: dict[OffloadKey, float] = {}
        self._events: list[OffloadingEvent] | None = [] if enable_kv_events else None
        self._meta = BlockMeta(layout=LAYOUT)
        self._flushing: Submitted[None] | None = None
        self._flush_at_s: float | None = None
        self._asked: dict[OffloadKey, Submitted[bool]] = {}
        self._silent_until_s = 0.0
        self._region_path = _region_path(offloading_spec)
        self._counted = dict.fromkeys(_METRICS, 0)
        self._shared = place.is_shared
        self._polled = PolledStore(place)
        self._gate = asyncio.Semaphore(STORES_AT_ONCE)

    # -- lookups

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """In memory only: microseconds. ``RETRY`` while a node service is asked for what memory does not show."""
        until_s = self._failed_until_s.get(key)
        if until_s is not None:
            if time.monotonic() < until_s:
                return LookupResult.MISS
            del self._failed_until_s[key]
        name = self._name(key)
        if self._polled.call(lambda store: name in store):
            self._asked.pop(key, None)
            return LookupResult.HIT
        return self._ask(key, name) if self._shared else LookupResult.MISS

    def _ask(self, key: OffloadKey, name: PrefixKey) -> LookupResult:
        """What the service says of a block that is not in shared memory; it answers between two polls."""
        asked = self._asked.get(key)
        if asked is not None:
            if not asked.done:
                return LookupResult.RETRY
            del self._asked[key]
            return self._answer_of(asked)
        if time.monotonic() < self._silent_until_s:
            return LookupResult.MISS
        if len(self._asked) >= ASKED_MAX:  # of requests that were given up
            self._asked = {key: asked for key, asked in self._asked.items() if not asked.done}
        if len(self._asked) >= ASKED_MAX:
            return LookupResult.MISS
        self._asked[key] = self._polled.submit(self._polled.store.contains(name))
        return LookupResult.RETRY

    def _answer_of(self, asked: Submitted[bool]) -> LookupResult:
        error = asked.error
        if error is None:
            return LookupResult.HIT if asked.result else LookupResult.MISS
        check_expected(error)
        if time.monotonic() >= self._silent_until_s:
            logger.warning("cascade_aio cannot look up blocks: %s", error)
        self._silent_until_s = time.monotonic() + SILENT_SECONDS
        return LookupResult.MISS

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """By now every worker has mapped vLLM's region, as none had to when this tier was made."""
        self._unname_region()
        return RequestOffloadingContext()

    def _unname_region(self) -> None:
        """Without a name vLLM's region ends with its processes, however they end."""
        if self._region_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._region_path)
            self._region_path = None

    def _name(self, key: OffloadKey) -> PrefixKey:
        return PrefixKey(hashlib.sha256(self._name_root + key).digest())

    # -- transfers

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to store rows of the primary region; they are read until the job is among ``get_finished_jobs``.

        A row becomes readable with its job's end and durable within ``FLUSH_SECONDS`` of it. Keys that the store has
        are finished at once. Blocks follow the order of the request, so that eviction takes suffixes first.
        """
        keys = list(job_metadata.keys)
        names = [self._name(key) for key in keys]
        parents = [None, *names[:-1]] if in_order(keys, job_metadata.req_context) else [None] * len(names)
        rows = self._rows_of(job_metadata)
        for key in keys:
            self._failed_until_s.pop(key, None)
        self._begin(
            job_metadata.job_id,
            keys,
            [self._store(name, parent, row) for name, parent, row in zip(names, parents, rows, strict=True)],
            loading=False,
        )

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begin to fill rows of the primary region; they are written until the job is among ``get_finished_jobs``.

        A row whose key failed may have been written to and holds nothing usable.
        """
        keys = list(job_metadata.keys)
        rows = self._rows_of(job_metadata)
        self._begin(
            job_metadata.job_id,
            keys,
            [self._load(self._name(key), row) for key, row in zip(keys, rows, strict=True)],
            loading=True,
        )

    def _rows_of(self, job: TransferJob) -> list[memoryview]:
        size = self._row_bytes
        return [self._rows[int(row) * size : (int(row) + 1) * size] for row in job.chunk_ids]

    def _begin(self, job_id: int, keys: list[OffloadKey], coroutines: list[Any], *, loading: bool) -> None:
        parts = [self._polled.submit(coroutine) for coroutine in coroutines]
        self._jobs[job_id] = _Job(job_id, loading, keys, parts, time.monotonic())
        self._polled.poll()  # requests leave for the kernel now, not at the next poll

    async def _store(self, name: PrefixKey, parent: PrefixKey | None, row: memoryview) -> None:
        async with self._gate:
            await self._polled.store.put(b"", row, prefix=name, parent=parent, meta=self._meta)
        if self._flush_at_s is None:
            self._flush_at_s = time.monotonic() + FLUSH_SECONDS

    async def _load(self, name: PrefixKey, row: memoryview) -> None:
        await self._polled.store.read_into(name, bytearray(), row)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._polled.poll()
        self._flush_when_due()
        finished = [job for job in self._jobs.values() if job.done]
        return [self._result_of(self._jobs.pop(job.job_id)) for job in finished]

    def _result_of(self, job: _Job) -> JobResult:
        good = [key for key, part in zip(job.keys, job.parts, strict=True) if part.error is None]
        for key, part in zip(job.keys, job.parts, strict=True):
            if part.error is not None:
                self._note_failure(job, key, part.error)
        if not job.loading and good and self._events is not None:
            self._events.append(OffloadingEvent(keys=good, medium=self.medium, removed=False))
        kind = "loaded" if job.loading else "stored"
        self._counted[f"{kind}_blocks"] += len(good)
        self._counted[f"{kind}_failures"] += len(job.keys) - len(good)
        return JobResult(
            job_id=job.job_id,
            success=len(good) == len(job.keys),
            successful_keys=good if job.loading and len(good) < len(job.keys) else None,
            transfer_time=time.monotonic() - job.begun_s,
            transfer_bytes=len(good) * self._row_bytes,
        )

    def _note_failure(self, job: _Job, key: OffloadKey, error: BaseException) -> None:
        check_expected(error)
        if job.loading:
            self._failed_until_s[key] = time.monotonic() + FAILED_SECONDS
        if isinstance(error, ServiceUnavailableError):
            self._silent_until_s = time.monotonic() + SILENT_SECONDS
        logger.warning("cascade_aio could not %s a block: %s", "load" if job.loading else "store", error)

    # -- what is told

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return {name: OffloadingCounterMetadata(documentation=text) for name, text in _METRICS.values()}

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Counts since the last call, ``None`` if there are none."""
        if not any(self._counted.values()):
            return None
        stats = OffloadingConnectorStats()
        for counter, (name, _) in _METRICS.items():
            if self._counted[counter]:
                stats.increase_counter(name, self._counted[counter])
        self._counted = dict.fromkeys(_METRICS, 0)
        return stats

    # -- durability and the end

    def _flush_when_due(self) -> None:
        if self._flushing is not None:
            if not self._flushing.done:
                return
            if self._flushing.error is not None:
                logger.warning("cascade_aio could not make blocks durable: %s", self._flushing.error)
            self._flushing = None
        if self._flush_at_s is not None and time.monotonic() >= self._flush_at_s:
            self._flush_at_s = None
            self._flushing = self._polled.submit(self._polled.store.flush())

    def has_pending_work(self) -> bool:
        return bool(self._jobs) or self._flushing is not None or self._flush_at_s is not None

    def take_events(self) -> Iterable[OffloadingEvent]:
        events, self._events = self._events, [] if self._events is not None else None
        return events or ()

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Hits of faster tiers are not uses of ours: what vLLM holds itself may leave the store first."""

    def drain_jobs(self) -> None:
        self._polled.drain()

    def shutdown(self) -> None:
        """Finish transfers, flush and close. Blocks. Lets go of vLLM's region, which can then be unmapped."""
        self._unname_region()
        self._polled.close()
        self._rows.release()


def _region_path(spec: OffloadingSpec) -> str | None:
    """The file of the primary region, where the spec tells."""
    path = getattr(getattr(spec, "_scheduler_mmap", None), "mmap_path", None)
    return path if isinstance(path, str) else None
