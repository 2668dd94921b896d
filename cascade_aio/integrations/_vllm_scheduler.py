"""The scheduler's half of ``CascadeConnector``: what to load, what to save, what to take for a miss.

Invariants: never blocks but in ``close``, driven by the scheduler's own calls (``_polled``); a block is a hit only if
every worker's part of it is stored; a block whose load failed is a miss for a while. Touches no KV.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.logger import init_logger

from cascade_aio.integrations._opening import Place
from cascade_aio.integrations._polled import PolledStore, Submitted, check_expected
from cascade_aio.integrations._vllm_names import namespace_of
from cascade_aio.integrations._vllm_plan import LAYOUT, Move, Plan, name_of
from cascade_aio.model import prefix_root

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.cascade_aio")

FAILED_SECONDS = 60.0
"""A block whose load failed is a miss for so long: vLLM asks again at once."""

ANSWER_SECONDS_MAX = 2.0
"""A request waits at most so long for the service's word on what is stored; then it is computed."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Question:
    """How many blocks of a request are stored, from block ``first`` on; waited for until ``until_s``."""

    answer: Submitted[int]
    first: int
    until_s: float


class Scheduler:
    """Which blocks to load and to save. Scheduler thread only; never blocks but in ``close``."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, place: Place, revision: str, salt: str
    ) -> None:
        config = build_offloading_config(vllm_config, kv_cache_config)
        self._block_tokens: int = config.groups[0].tokens_per_block
        self._hashes_per_block: int = self._block_tokens // config.cache.tokens_per_hash
        spaces = [
            namespace_of(config, layout=LAYOUT, revision=revision, salt=salt, rank=rank)
            for rank in range(config.parallel.world_size)
        ]
        self._roots = [prefix_root(space) for space in spaces]
        self.requests: dict[str, Request] = {}
        self._first: dict[str, int] = {}
        """Blocks of each request that vLLM had when it asked."""
        self._asked: dict[str, _Question] = {}
        self._loading: dict[str, Move] = {}
        self._to_load: list[Move] = []
        self._block_ids: dict[str, list[int]] = {}
        self._saved: dict[str, int] = {}
        self._saving: set[str] = set()
        self._failed_until_s: dict[bytes, float] = {}
        self._polled = PolledStore(place)

    def _hashes(self, request: Request, first: int, stop: int) -> list[bytes]:
        """Of blocks ``first`` to ``stop``, as far as they are full: the hash of a block covers all before it."""
        step = self._hashes_per_block
        stop = min(stop, len(request.block_hashes) // step)
        return [bytes(request.block_hashes[step * (block + 1) - 1]) for block in range(first, stop)]

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """As vLLM's ``get_num_new_matched_tokens``: ``None`` while the service is asked."""
        first = computed // self._block_tokens
        hashes = self._hashes(request, first, request.num_tokens // self._block_tokens)  # vLLM computes a token itself
        hashes = hashes[: self._first_failed(hashes)]
        if not hashes or computed % self._block_tokens:
            return 0, False
        self._first[request.request_id] = first
        found = self._found(request.request_id, first, hashes)
        return (None, False) if found is None else (found * self._block_tokens, found > 0)

    def _found(self, request_id: str, first: int, hashes: list[bytes]) -> int | None:
        """How many of ``hashes``, those of blocks ``first`` and following, are stored; ``None``: not known yet."""
        self._polled.poll()
        asked = self._asked.get(request_id)
        if asked is None:
            answer = self._polled.submit(self._stored(hashes))
            self._asked[request_id] = _Question(answer, first, time.monotonic() + ANSWER_SECONDS_MAX)
            self._polled.poll()
            return None
        if not asked.answer.done:
            return 0 if time.monotonic() >= asked.until_s else None
        del self._asked[request_id]
        error = asked.answer.error
        if error is None:  # vLLM may have got some of the blocks itself since it asked
            return min(max(0, asked.first + asked.answer.result - first), len(hashes))
        check_expected(error)
        logger.warning("cascade_aio cannot look up blocks: %s", error)
        return 0

    async def _stored(self, hashes: list[bytes]) -> int:
        """Leading blocks that every worker's part is stored of; they are promoted from now on."""
        store = self._polled.store
        chains = [[name_of(root, each) for each in hashes] for root in self._roots]
        found = min([len(await store.lookup(chain)) for chain in chains])
        if found:
            store.prefetch([name for chain in chains for name in chain[:found]], priority="high")
        return found

    def _first_failed(self, hashes: list[bytes]) -> int:
        if self._failed_until_s:
            now_s = time.monotonic()
            self._failed_until_s = {each: until_s for each, until_s in self._failed_until_s.items() if until_s > now_s}
        return next((place for place, each in enumerate(hashes) if each in self._failed_until_s), len(hashes))

    def begin_load(self, request: Request, block_ids: list[int], tokens: int) -> None:
        """``tokens`` external ones of the prompt go to ``block_ids``, behind the blocks that vLLM had itself."""
        first = self._first[request.request_id]
        count = tokens // self._block_tokens
        move = Move(request.request_id, block_ids[first : first + count], self._hashes(request, first, first + count))
        self._loading[request.request_id] = move
        self._to_load.append(move)

    def plan(self, output: SchedulerOutput) -> Plan:
        loads, self._to_load = self._to_load, []
        plan = Plan(self._roots, loads, preempted=bool(output.preempted_req_ids))
        for new in output.scheduled_new_reqs:
            self._block_ids[new.req_id] = list(new.block_ids[0])
            self._plan_save(plan, new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, more, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self._block_ids[request_id] = []
            if more is not None:
                self._block_ids.setdefault(request_id, []).extend(more[0])
            self._plan_save(plan, request_id, computed, output)
        return plan

    def _plan_save(self, plan: Plan, request_id: str, computed: int, output: SchedulerOutput) -> None:
        """Blocks that this step fills. What was computed before was saved, or loaded, before."""
        request = self.requests.get(request_id)
        if request is None:
            return
        first = self._saved.setdefault(request_id, computed // self._block_tokens)
        stop = (computed + output.num_scheduled_tokens[request_id]) // self._block_tokens
        hashes = self._hashes(request, first, min(stop, len(self._block_ids[request_id])))
        if hashes:
            block_ids = self._block_ids[request_id][first : first + len(hashes)]
            above = self._hashes(request, first - 1, first)[0] if first else None
            plan.saves.append(Move(request_id, block_ids, hashes, above))
            self._saved[request_id] = first + len(hashes)
            self._saving.add(request_id)

    def note_output(self, output: KVConnectorOutput) -> None:
        for move in self._loading.values():
            for block_id, block_hash in zip(move.block_ids, move.hashes, strict=True):
                if block_id in output.invalid_block_ids:
                    self._failed_until_s[block_hash] = time.monotonic() + FAILED_SECONDS
        for request_id in output.finished_recving or ():
            self._loading.pop(request_id, None)

    def forget(self, request_id: str) -> bool:
        """A request has ended; whether workers still save its blocks."""
        self.requests.pop(request_id, None)
        self._block_ids.pop(request_id, None)
        self._saved.pop(request_id, None)
        self._asked.pop(request_id, None)
        self._first.pop(request_id, None)
        saving = request_id in self._saving
        self._saving.discard(request_id)
        return saving

    def close(self) -> None:
        self._polled.close()
