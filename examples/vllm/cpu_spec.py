"""vLLM's tiering offload on its CPU platform, for tests and for trying out: the "GPU" side is host memory, too.

vLLM 0.32 has no offloading worker for CPUs: its own wants CUDA streams. This spec replaces that worker by one that
copies between the KV cache and the shared primary region at once. Not for use with a GPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostWorker(OffloadingWorker):
    """Copies blocks when asked; every transfer has finished when it was submitted."""

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion, blocks_per_chunk: int) -> None:
        assert blocks_per_chunk == 1, "give the connector the block size of the KV cache"
        self._region = region
        self._blocks = [tensor.tensor.view(torch.int8).view(-1, tensor.page_size_bytes) for tensor in kv_caches.tensors]
        self._rows = [region.create_next_worker_view(tensor.page_size_bytes) for tensor in kv_caches.tensors]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._blocks, src_spec.block_ids, self._rows, dst_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._rows, src_spec.block_ids, self._blocks, dst_spec.block_ids)

    def _copy(self, job_id: int, sources: Any, source_ids: Any, targets: Any, target_ids: Any) -> bool:
        start = time.monotonic()
        nbytes = 0
        for source, target in zip(sources, targets, strict=True):
            for source_id, target_id in zip(source_ids.tolist(), target_ids.tolist(), strict=True):
                target[target_id].copy_(source[source_id])
                nbytes += source.shape[1]
        self._finished.append(TransferResult(job_id, True, nbytes, time.monotonic() - start))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        self._rows.clear()
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """``TieringOffloadingSpec`` whose worker is a ``HostWorker``."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = HostWorker(kv_caches, region, self.blocks_per_chunk)
        return self._worker
