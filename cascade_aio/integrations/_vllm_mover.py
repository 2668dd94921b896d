"""A worker's half of ``CascadeOffloadingSpec``: moves chunks between its KV cache and a node service's arena.

Driven by the worker's own calls (``_polled``): no thread has to wait for the GIL, which the engine's loop holds while
requests wait. Bytes move in those calls, ``TURN_BYTES`` at a time, in the thread and, on a device, in the stream in
which the model computes: so they are ordered with it.

Invariants: blocks of the KV cache are read or written only between ``submit_*`` and the transfer's result; a transfer
has a result only when all of its bytes are there. A load that failed in spite of the scheduler's leases raises, which
ends the engine: vLLM has no way to compute such blocks again, and wrong tokens are worse. Decides nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult

from cascade_aio.errors import CascadeError, ServiceUnavailableError
from cascade_aio.integrations._opening import Place
from cascade_aio.integrations._polled import PolledStore, Submitted, check_expected
from cascade_aio.integrations._vllm_chunks import LAYOUT, StoredChunks
from cascade_aio.integrations._vllm_pages import Pages, Piece, pieces_of
from cascade_aio.model import BlockMeta, PrefixKey

logger = init_logger("vllm.cascade_aio")

STORES_AT_ONCE = 8
"""Chunks that one worker stores at a time: what they have reserved keeps loads of others from the arena."""

LOADS_AT_ONCE = 1
"""Chunks that one worker leases at a time. One is always within a client's quota; more could be refused."""

TURN_BYTES = 8 << 20
"""Bytes that one transfer moves before others, and the engine, go on: some milliseconds."""

SILENT_SECONDS = 5.0
"""A service that was not there is asked to store nothing for so long: ``wait`` does not add up its absence."""

_FAILURES = (CascadeError, OSError)


@dataclasses.dataclass(frozen=True, slots=True)
class _Transfer:
    """``moving`` ends with the bytes that moved."""

    moving: Submitted[int]
    loading: bool
    begun_s: float


class Mover(OffloadingWorker):  # type: ignore[misc]
    """See the module's docstring. All calls come from the worker's thread; none but ``wait`` and ``shutdown`` waits."""

    def __init__(self, rank: int, pages: Pages, blocks_per_chunk: int, place: Place) -> None:
        """Blocks until the service is connected."""
        self._rank = rank
        self._pages = pages
        self._blocks_per_chunk = blocks_per_chunk
        self._meta = BlockMeta(layout=LAYOUT)
        self._transfers: dict[int, _Transfer] = {}
        self._storing = asyncio.Semaphore(STORES_AT_ONCE)
        self._loading = asyncio.Semaphore(LOADS_AT_ONCE)
        self._moved_in_turn = 0
        self._silent_until_s = 0.0
        self._polled = PolledStore(place)

    # -- what vLLM calls

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._begin(job_id, src_spec, dst_spec, loading=False)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._begin(job_id, dst_spec, src_spec, loading=True)

    def _begin(self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, loading: bool) -> bool:
        assert isinstance(chunks, StoredChunks)
        names = chunks.names[self._rank]
        pieces = pieces_of(blocks.block_ids, blocks.group_sizes, blocks.block_indices, self._blocks_per_chunk)
        assert len(pieces) == len(names), "one piece of the KV cache for each chunk"
        moving = self._load(names, pieces) if loading else self._store(names, pieces, ordered=chunks.ordered)
        self._transfers[job_id] = _Transfer(self._polled.submit(moving), loading, time.monotonic())
        self._polled.poll()  # requests leave now, not at the next poll
        return True

    def get_finished(self) -> list[TransferResult]:
        """Raises what a load has failed with."""
        self._polled.poll()
        ended = [job_id for job_id, transfer in self._transfers.items() if transfer.moving.done]
        return [self._result_of(job_id, self._transfers.pop(job_id)) for job_id in ended]

    def _result_of(self, job_id: int, transfer: _Transfer) -> TransferResult:
        error = transfer.moving.error
        if error is not None:
            if transfer.loading:
                check_expected(error)
                raise CascadeError(
                    f"cascade_aio lost a chunk that it had promised to vLLM ({error}), which cannot compute it again: "
                    "restart the engine, and look why the node service gave up its arena"
                ) from error
            raise error
        seconds = time.monotonic() - transfer.begun_s
        return TransferResult(job_id, True, transfer.moving.result, seconds)

    def wait(self, job_ids: set[int]) -> None:
        """Blocks until these transfers have ended: their blocks are about to be given to others."""
        if any(job_id in self._transfers for job_id in job_ids):
            self._polled.drain()

    def shutdown(self) -> None:
        """Finish what was begun and end the connection. Blocks; repeated calls do nothing."""
        self._polled.close()

    # -- transfers

    async def _load(self, names: Iterable[PrefixKey], pieces: Iterable[Piece]) -> int:
        moved = 0
        for name, piece in zip(names, pieces, strict=True):
            async with self._loading, self._polled.store.get(name) as block:
                self._pages.scatter(block.value, piece)
                nbytes = block.value.nbytes
            moved += nbytes
            await self._yield_after(nbytes)
        return moved

    async def _store(self, names: list[PrefixKey], pieces: list[Piece], *, ordered: bool) -> int:
        parents = [None, *names[:-1]] if ordered else [None] * len(names)
        stores = [self._store_one(*one) for one in zip(names, parents, pieces, strict=True)]
        return sum(await asyncio.gather(*stores))

    async def _store_one(self, name: PrefixKey, parent: PrefixKey | None, piece: Piece) -> int:
        """Bytes that were stored: none if the store has them, could not take them, or is away."""
        nbytes = self._pages.chunk_bytes(piece.group)
        store = self._polled.store
        try:
            async with self._storing:
                if time.monotonic() < self._silent_until_s or await store.contains(name):
                    return 0
                async with store.reserve(
                    key_bytes=0, value_bytes=nbytes, prefix=name, parent=parent, meta=self._meta
                ) as slot:
                    self._pages.gather(piece, slot.value)
                await self._yield_after(nbytes)
        except _FAILURES as error:
            logger.warning("cascade_aio could not store a chunk: %s", error)
            if isinstance(error, ServiceUnavailableError):
                self._silent_until_s = time.monotonic() + SILENT_SECONDS
            return 0
        return nbytes

    async def _yield_after(self, nbytes: int) -> None:
        """Let others go on after ``TURN_BYTES``."""
        self._moved_in_turn += nbytes
        if self._moved_in_turn >= TURN_BYTES:
            self._moved_in_turn = 0
            await asyncio.sleep(0)
