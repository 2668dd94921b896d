"""The scheduler's half of ``CascadeOffloadingSpec``: what is a hit, and what is to be stored.

vLLM lets no worker say that a load has failed. So a chunk is a hit only while this process has leases on every worker's
part of it (``_leases``), and it is held until all workers have loaded it: they find it in shared memory, verified,
also when the node service dies meanwhile.

Invariants: never blocks but in ``reset_cache`` and ``shutdown``; after ``reset_cache`` nothing that was stored before
is found. Touches no KV.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence

from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

from cascade_aio.integrations._leases import Leases
from cascade_aio.integrations._opening import Place
from cascade_aio.integrations._polled import PolledStore
from cascade_aio.integrations._vllm_chunks import StoredChunks
from cascade_aio.integrations._vllm_names import in_order
from cascade_aio.model import PrefixKey

STORING_MAX = 4096
"""Chunks being stored at a time; more are refused, and offered again by vLLM, until some have ended."""

_RESULTS = {True: LookupResult.HIT, False: LookupResult.MISS, None: LookupResult.RETRY}


class Manager(OffloadingManager):  # type: ignore[misc]
    """See the module's docstring. All calls come from the scheduler's thread.

    ``touch`` and ``take_events`` are vLLM's defaults: hits of the KV cache are no uses of ours, and what is stored and
    evicted is the service's to tell, which other engines fill, too.
    """

    def __init__(self, place: Place, roots: Sequence[bytes]) -> None:
        """``roots[rank]`` begins the names of that worker's chunks. Blocks until the service is connected."""
        self._roots = list(roots)
        self._storing: set[OffloadKey] = set()
        self._polled = PolledStore(place)
        self._leases = Leases(self._polled, self._names_of)

    def _names_of(self, key: bytes) -> list[PrefixKey]:
        """Of all workers' parts, by rank."""
        return [PrefixKey(hashlib.sha256(root + key).digest()) for root in self._roots]

    def _chunks_of(self, keys: Sequence[OffloadKey], *, ordered: bool) -> StoredChunks:
        names = [self._names_of(key) for key in keys]
        return StoredChunks([[parts[rank] for parts in names] for rank in range(len(self._roots))], ordered)

    # -- loads

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """``RETRY`` while the chunk is being leased, which promotes it from disk; ``HIT`` once it is."""
        return _RESULTS[self._leases.lookup(key)]

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """vLLM asks in the turn of the scheduler in which ``lookup`` said ``HIT``: leases expire only between turns."""
        self._leases.take(keys)
        return self._chunks_of(list(keys), ordered=False)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        self._leases.give_back(keys)

    # -- stores

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        """What is neither in shared memory nor being stored; workers leave out what turns out to be on disk.

        The store makes room by itself: no key is ever evicted for others here. ``None``: too many are being stored.
        """
        wanted = [key for key in keys if key not in self._storing and not self._is_shared(key)]
        if len(self._storing) + len(wanted) > STORING_MAX:
            return None
        self._storing.update(wanted)
        return PrepareStoreOutput(wanted, self._chunks_of(wanted, ordered=in_order(wanted, req_context)), [])

    def _is_shared(self, key: OffloadKey) -> bool:
        names = self._names_of(key)
        return self._polled.call(lambda store: all(name in store for name in names))

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """A chunk that a worker could not store is a miss when it is looked up."""
        self._storing.difference_update(keys)
        self._leases.stored(keys)

    # -- turns and the end

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._leases.expire()
        self._polled.poll()

    def has_pending_work(self) -> bool:
        """Until leases that nobody used have been given back."""
        return self._leases.holding

    def reset_cache(self) -> None:
        """For weights that were changed in place: everything has another name from now on, in this engine alone.

        Chunks that are being loaded now stay leased until ``shutdown``: vLLM does not tell when their loads end.
        """
        self._storing.clear()
        self._leases.forget()
        salt = secrets.token_bytes(32)
        self._roots = [hashlib.sha256(root + salt).digest() for root in self._roots]

    def shutdown(self) -> None:
        """Give everything back and end the connection. Blocks; repeated calls do nothing."""
        if not self._polled.closed:
            self._leases.close()
            self._polled.close()
