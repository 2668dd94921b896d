"""One module per family of figures; each lists its cases, and a case measures its lines.

``families()`` is the registry, in the order of the README table. A case is what runs as a whole and
is resumed as a whole; most cases have one line, one row of the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.results import Row
    from bench.scale import Scale
    from bench.session import Line, Session


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """``measure`` gives one row per line, in order, or raises ``BenchError`` for "cannot run here"."""

    lines: tuple[Line, ...]
    measure: Callable[[Session, tuple[Line, ...]], Coroutine[Any, Any, list[Row]]]


Family = Callable[["Scale"], list[Case]]


def families() -> dict[str, Family]:
    """Name → cases of every family, in the order in which they run and are printed."""
    from bench.figures import (
        arena_adoption,
        bound_put,
        cold_get,
        compaction,
        hot_get,
        index,
        loop_lag,
        prefetch,
        put_flush,
        put_readable,
        read_into,
        service_churn,
        service_hot,
        service_pairs,
        small_put,
    )

    return {
        "cold_get": cold_get.cases,
        "put_flush": put_flush.cases,
        "put_readable": put_readable.cases,
        "read_into": read_into.cases,
        "hot_get": hot_get.cases,
        "bound_put": bound_put.cases,
        "small_put": small_put.cases,
        "loop_lag": loop_lag.cases,
        "cold_get_cpu": cold_get.cpu_cases,
        "index": index.cases,
        "prefetch": prefetch.cases,
        "compaction": compaction.cases,
        "service_hot": service_hot.cases,
        "service_pairs": service_pairs.cases,
        "service_churn": service_churn.cases,
        "arena_adoption": arena_adoption.cases,
    }
