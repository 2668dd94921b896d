"""The service's figures as Prometheus text, made from one snapshot.

Uses ``prometheus_client`` (extra ``service``). Names begin with ``cascade_``; times are in seconds, sizes
in bytes; what only grows ends in ``_total``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cascade_aio.daemon.lag import BOUNDS_S

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS = {
    "puts": ("store", "puts", "Blocks put."),
    "put_bytes": ("store", "put_bytes", "Bytes put."),
    "puts_bound": ("store", "puts_bound", "Puts whose prefix was bound already: nothing was copied."),
    "dedup_blocks": ("store", "puts_deduplicated", "Puts whose content was there already."),
    "dedup_bytes": ("store", "deduplicated_bytes", "Bytes that were not stored a second time."),
    "damaged": ("store", "damaged", "Damaged records found."),
    "evicted_blocks": ("shm", "evicted_blocks", "Copies evicted from shared memory."),
    "evicted_bytes": ("shm", "evicted_bytes", "Bytes evicted from shared memory."),
    "waits_for_room": ("shm", "waits_for_room", "Requests that waited for room in shared memory."),
    "requests": ("service", "requests", "Messages with an answer."),
    "failed_requests": ("service", "failed_requests", "Requests answered with an error, misses included."),
    "protocol_errors": ("service", "protocol_errors", "Connections cut off or refused because of what they sent."),
    "connections": ("service", "connections", "Connections accepted."),
    "refreshes": ("service", "refreshes", "Looks for blocks of other writers."),
}
_GAUGES = {
    "leases": ("shm", "leases", "Leases out."),
    "leased_bytes": ("shm", "leased_bytes", "Shared memory that leases pin."),
    "pinned_bytes": ("shm", "pinned_bytes", "Shared memory that may not be evicted now."),
    "loading": ("shm", "loading", "Blocks on their way from disk."),
    "clients": ("service", "clients", "Clients connected."),
    "requests_in_flight": ("service", "requests_in_flight", "Requests not answered yet."),
    "reserved_bytes": ("service", "reserved_bytes", "Shared memory that clients are filling."),
    "lingering": ("service", "lingering", "Lost connections whose memory is kept from reuse."),
    "announced": ("service", "announced", "Announced prompts that wait or are promoted."),
    "prefetch_active": ("prefetch", "active", "Prefetches and streams under way."),
    "uptime_seconds": ("service", "uptime_seconds", "Since the service started."),
}


class _Snapshot(Collector):
    def __init__(self, sample: dict[str, Any]) -> None:
        self._sample = sample

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape, as ``prometheus_client`` asks for them. From any thread; does not block."""
        sample = self._sample
        statistics = sample["statistics"]
        hits = CounterMetricFamily("cascade_hits", "Blocks found, by tier.", labels=["tier"])
        node, store = statistics["service"], statistics["store"]
        hits.add_metric(["shm"], store["shm_hits"] + node["shared_hits"])
        hits.add_metric(["disk"], store["disk_hits"])
        yield hits
        yield CounterMetricFamily("cascade_misses", "Blocks asked for that no tier held.", value=store["misses"])
        used = GaugeMetricFamily("cascade_tier_used_bytes", "Bytes in use, by tier.", labels=["tier"])
        capacity = GaugeMetricFamily("cascade_tier_capacity_bytes", "Bytes of a tier that is bounded.", labels=["tier"])
        blocks = GaugeMetricFamily("cascade_tier_blocks", "Blocks, by tier.", labels=["tier"])
        for tier in sample["tiers"]:
            used.add_metric([tier["tier"]], tier["used_bytes"])
            blocks.add_metric([tier["tier"]], tier["blocks"])
            if tier["capacity_bytes"]:
                capacity.add_metric([tier["tier"]], tier["capacity_bytes"])
        yield from (used, capacity, blocks)
        for name, (part, key, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"cascade_{name}", text, value=statistics[part][key])
        for name, (part, key, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"cascade_{name}", text, value=statistics[part][key])
        latency = HistogramMetricFamily(
            "cascade_request_seconds", "Time from a request to its answer, in the service.", labels=["request"]
        )
        for request, histogram in sample["latency"].items():
            latency.add_metric([request], _buckets(histogram["counts"]), histogram["total_seconds"])
        yield latency
        lag = HistogramMetricFamily("cascade_loop_lag_seconds", "Lateness of the event loop.")
        lag.add_metric([], _buckets(sample["lag"]["counts"]), sample["lag"]["total_seconds"])
        yield lag


def _buckets(counts: list[int]) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip([*map(str, BOUNDS_S), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


def render(sample: dict[str, Any]) -> bytes:
    """The exposition of one snapshot. Milliseconds: not on the service's loop."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(sample))
    return generate_latest(registry)
