"""What the page, the metrics and ``cascade-aio top`` show: one snapshot of a service, and its recent past.

Taken on the service's loop, JSON-ready, read-only afterwards, so other threads may render it. The tree of
prefixes is built in steps, because a store may have millions of blocks.
"""

from __future__ import annotations

import asyncio
import collections
import heapq
import itertools
import time
from typing import Any

from cascade_aio.daemon.node import Node

SAMPLE_SECONDS = 1.0
HISTORY_SAMPLES = 300
"""Five minutes."""
TREE_SECONDS = 10.0
TREE_ROOTS_MAX = 20
TREE_CHILDREN_MAX = 6
TREE_DEPTH_MAX = 4
TREE_BLOCKS_MAX = 1 << 17
"""Blocks looked at for one tree; of a larger store it is the tree of its first ones, and says so."""
_TREE_STEP = 512


class Sampler:
    """Takes a sample every second. ``latest`` is a new object each time; never changed afterwards."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.latest: dict[str, Any] = {}
        self._history: collections.deque[dict[str, float]] = collections.deque(maxlen=HISTORY_SAMPLES)
        self._before: tuple[float, dict[str, float]] | None = None
        self._tree: dict[str, Any] = {"roots": [], "complete": True}
        self.sample()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        tree_s = loop.time() - TREE_SECONDS
        while True:
            if loop.time() - tree_s >= TREE_SECONDS:
                self._tree = await largest_prefixes(self._node)
                tree_s = loop.time()
            self.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    def sample(self) -> None:
        """Now."""
        statistics = self._node.statistics()
        now_s = time.monotonic()
        counted = _counted(statistics)
        if self._before is not None:
            before_s, before = self._before
            self._history.append(_rates(counted, before, max(1e-6, now_s - before_s)))
        self._before = (now_s, counted)
        self.latest = {
            "time": time.time(),
            "taken_s": now_s,
            "failure": self._node.failure,
            "statistics": statistics,
            "tiers": _tiers(statistics),
            "history": list(self._history),
            "prefixes": self._tree,
            "latency": self._node.latency_counts(),
            "lag": self._node.lag.snapshot(),
            "errors": [*self._node.errors, *statistics["damage"][-20:]][-40:],
        }


def _counted(statistics: dict[str, Any]) -> dict[str, float]:
    store, node = statistics["store"], statistics["service"]
    return {
        "shm_hits": store["shm_hits"] + node["shared_hits"],
        "disk_hits": store["disk_hits"],
        "misses": store["misses"],
        "put_bytes": store["put_bytes"],
        "read_bytes": statistics["disk"].get("read_bytes", 0),
        "requests": node["requests"],
    }


def _rates(now: dict[str, float], before: dict[str, float], seconds: float) -> dict[str, float]:
    """Per second; and the share of blocks asked for that were there."""
    change = {name: max(0.0, value - before[name]) for name, value in now.items()}
    hits = change["shm_hits"] + change["disk_hits"]
    asked = hits + change["misses"]
    return {
        "hit_rate": hits / asked if asked else -1.0,  # -1: nobody asked
        **{name: value / seconds for name, value in change.items()},
    }


def _tiers(statistics: dict[str, Any]) -> list[dict[str, Any]]:
    shm, disk = statistics["shm"], statistics["disk"]
    return [
        {
            "tier": "shm",
            "used_bytes": shm["allocated_bytes"],
            "capacity_bytes": shm["capacity_bytes"],
            "blocks": shm["blocks"],
        },
        {
            "tier": "disk",
            "used_bytes": disk.get("used_bytes", 0),
            "capacity_bytes": disk.get("budget_bytes"),
            "blocks": statistics["blocks"],
        },
    ]


async def largest_prefixes(node: Node) -> dict[str, Any]:
    """Prompts by their first block, largest first: blocks and bytes below each, and the largest children.

    Blocks have their ids, never their prefix keys. The store may change meanwhile: then so may the tree.
    """
    index = node.store.parts.context.catalog.index
    parents: dict[int, int] = {}
    nbytes: dict[int, int] = {}
    names: dict[int, str] = {}
    step = [0]
    while step and len(parents) < TREE_BLOCKS_MAX:
        step = list(itertools.islice(index.rows(step[-1] + 1 if parents else 0), _TREE_STEP))
        for row in step:
            parents[row] = index.parent_row(row)
            nbytes[row] = sum(index.lengths(row))
            names[row] = str(index.block_id(row))
        await asyncio.sleep(0)
    forest = await asyncio.to_thread(Forest, parents, nbytes)
    trees = [forest.tree(root, TREE_DEPTH_MAX) for root in forest.largest(-1, TREE_ROOTS_MAX)]
    return {"roots": [_named(names, tree) for tree in trees], "complete": not step}


def _named(names: dict[int, str], tree: dict[str, Any]) -> dict[str, Any]:
    children = [_named(names, child) for child in tree["children"]]
    return {"block": names[tree["row"]], **tree, "children": children}


class Forest:
    """Sums over subtrees. ``parents``: row → parent row, one that is not there or -1 for a root."""

    def __init__(self, parents: dict[int, int], nbytes: dict[int, int]) -> None:
        self._children: dict[int, list[int]] = collections.defaultdict(list)
        for row, parent in parents.items():
            self._children[parent if parent in parents and parent != row else -1].append(row)
        self.blocks = dict.fromkeys(parents, 1)
        self.bytes = dict(nbytes)
        order = list(self._children[-1])
        for row in order:  # grows while it is walked: every parent before its children; cycles are never reached
            order += self._children.get(row, ())
        for row in reversed(order):
            parent = parents[row]
            if parent in self.blocks and parent != row:
                self.blocks[parent] += self.blocks[row]
                self.bytes[parent] += self.bytes[row]

    def largest(self, row: int, count: int) -> list[int]:
        """The ``count`` largest children of ``row`` (-1: roots), largest first."""
        return heapq.nlargest(count, self._children.get(row, ()), key=self.bytes.__getitem__)

    def tree(self, row: int, depth: int) -> dict[str, Any]:
        """``row`` and what is largest below it, ``depth`` levels in all; runs of single children are one level."""
        length = 1
        end = row
        while len(self._children.get(end, ())) == 1:
            end = self._children[end][0]
            length += 1
        children = self.largest(end, TREE_CHILDREN_MAX) if depth > 1 else []
        return {
            "row": row,
            "run": length,
            "blocks": self.blocks[row],
            "bytes": self.bytes[row],
            "children": [self.tree(child, depth - 1) for child in children],
        }
