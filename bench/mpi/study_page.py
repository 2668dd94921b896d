# ruff: noqa: E501 (paragraphs of Markdown with numbers in them)
"""The page ``docs/remote-scaling.md``: tables and sentences, every number from the result file."""

from __future__ import annotations

from collections.abc import Sequence

from bench.mpi import scaling
from bench.mpi.scaling import Point, Size, Study
from cascade_aio.core.remote_directory import REPLICAS_MAX


def render(study: Study) -> str:
    """The whole page."""
    parameters, costs = study.parameters, study.costs
    says = "\n".join(f"* *{workload.name}*: {workload.says}" for workload in scaling.WORKLOADS)
    return f"""# The remote tier on many nodes: a simulation

**Nothing on this page was measured on a cluster.** It is a simulation of the protocol of [`remote.md`](remote.md):
the tier's own code (`core/rendezvous.py`, `core/remote_directory.py`, `core/remote_operations.py`) decides everything,
in virtual time, over a modelled network, in which a command waits behind the payload that its target was asked for before.
`python -m bench mpi scaling` makes the result file,
`python -m bench mpi scaling-page` this page; a test compares the two.

Costs ({study.costs_from}): {costs["latency_s"] * 1e6:.2f} µs there and back, {costs["origin_s"] * 1e6:.2f} µs of the MPI
thread and {costs["target_s"] * 1e6:.2f} µs of the target's link for each command, {costs["bytes_per_s"] / 1e9:.1f} GB/s
for each link and direction. A real network has other figures (`--latency-us`, `--origin-us`, `--target-us`,
`--gb-per-s`); messages, bytes, balance and memory do not depend on them.

Work per node, the same at every size: {parameters["prompts_per_node"]} prompt of {parameters["prompt_blocks"]} blocks of
{parameters["block_bytes"] / (1 << 20):g} MiB put, {parameters["requests_per_node"]} prompts asked for at random times, so
that even load would occupy {100 * parameters["link_load"]:.0f} % of each link. A request is one lookup and then a verified
read of each block that the node does not hold.

{says}

Not simulated: the disk behind a miss, MPI's own memory and connections, congestion inside the network, failures.

## What a get costs

Commands for one block that the node does not hold: its share of the lookup, the read (generation, pieces, generation)
and listing the reader's own copy. In the reader's own memory some cost nothing.

{_commands(study.points)}

## Load and time

Largest over mean, over nodes: what a node serves, and the commands that its part of the directory takes. Times are
virtual.

{_balance(study.points)}

## Memory and opening, for each node

{_sizes(study.sizes)}

## Where it bends, and why

{_bends(study)}
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _commands(points: Sequence[Point]) -> str:
    rows = []
    for point in points:
        network = {kind: count for kind, count in point.messages_per_get.items() if kind != "own memory"}
        control = sum(nbytes for kind, nbytes in point.bytes_per_get.items() if kind != "payload")
        rows.append([
            point.workload, f"{point.nodes:,}", f"{sum(network.values()):.2f}",
            *(f"{network.get(kind, 0.0):.2f}" for kind in ("bucket", "generation", "payload", "swap", "entry")),
            f"{control:,.0f}", f"{100 * control / max(point.bytes_per_get.get('payload', 0.0), 1.0):.2f} %",
            f"{point.stale / max(point.remote + point.missed, 1):.3f}",
        ])  # fmt: skip
    head = [
        "workload", "nodes", "messages", "buckets", "generations", "payload", "swaps", "entries", "control bytes",
        "of payload", "stale",
    ]  # fmt: skip
    return _table(head, rows)


def _balance(points: Sequence[Point]) -> str:
    rows = [
        [
            point.workload, f"{point.nodes:,}", _uneven(point.served_bytes.maximum, point.served_bytes.mean),
            _uneven(point.directory_messages.maximum, point.directory_messages.mean),
            _uneven(point.directory_entries.maximum, point.directory_entries.mean),
            f"{point.lookup_s.p50 * 1e6:,.0f} / {point.lookup_s.p99 * 1e6:,.0f}",
            f"{point.get_s.p50 * 1e6:,.0f} / {point.get_s.p99 * 1e6:,.0f}",
            f"{100 * point.busiest_link:.0f} %", f"{point.unlisted:,}",
        ]
        for point in points
    ]  # fmt: skip
    head = [
        "workload", "nodes", "bytes served", "directory commands", "directory entries", "lookup p50 / p99 µs",
        "get p50 / p99 µs", "busiest link", "names unlisted",
    ]  # fmt: skip
    return _table(head, rows)


def _uneven(maximum: float, mean: float) -> str:
    return f"{maximum / mean:.2f}" if mean else "–"


def _sizes(sizes: Sequence[Size]) -> str:
    rows = [
        [
            f"{size.nodes:,}", f"{size.directory_bytes / (1 << 20):.1f} MiB",
            f"{100 * size.directory_bytes / scaling.ARENA_BYTES:.3f} %", f"{size.membership_bytes / 1024:.1f} KiB",
            f"{size.opening_bytes / 1024:,.0f} KiB", f"{size.shards_of_lookup:.1f}", f"{size.place_lookup_s * 1e6:,.0f}",
        ]
        for size in sizes
    ]  # fmt: skip
    head = [
        "nodes", "generations and directory", "of a 64 GiB arena", "what it knows of others", "heard at opening",
        f"nodes asked by a lookup of {scaling.TIMED_NAMES}", "processor time to place it, µs (measured)",
    ]  # fmt: skip
    return _table(head, rows)


def _bends(study: Study) -> str:
    """Each sentence with the numbers of its own table."""
    small, large = study.sizes[0], study.sizes[-1]
    of = {(point.workload, point.nodes): point for point in study.points}

    def uneven(workload: str, nodes: int) -> float:
        served = of[workload, nodes].served_bytes
        return served.maximum / served.mean

    even, skewed, unshared, churn = (workload.name for workload in scaling.WORKLOADS)
    first, last = small.nodes, large.nodes
    return f"""* **A lookup fans out.** {scaling.TIMED_NAMES} names live with {small.shards_of_lookup:.0f} nodes of {first} and with
  {large.shards_of_lookup:.0f} of {last:,}: beyond about as many nodes as names, every name is a message of its own, and the
  number stays there. One round trip all the same.
* **Placing names is linear in the nodes.** Rendezvous hashing looks at every node for every name:
  {small.place_lookup_s * 1e6:.0f} µs on the event loop for {first} nodes, {large.place_lookup_s * 1e6:.0f} µs for {last:,}.
* **Own memory stops helping.** With {first} nodes a part of the directory is one's own:
  {of[even, first].messages_per_get.get("own memory", 0.0):.2f} commands a get stay at home, with {last:,} nodes
  {of[even, last].messages_per_get.get("own memory", 0.0):.2f}.
* **Hot prompts.** Even load stays even ({uneven(even, last):.1f} times the mean at the busiest of {last:,} nodes). With Zipf's
  weights the busiest node serves {uneven(skewed, last):.1f} times the mean at {last:,} nodes ({uneven(skewed, first):.1f} at
  {first}); if readers' copies were not listed it would be {uneven(unshared, last):.1f}. Demand for the hottest prompt grows
  with the nodes, listed copies are at most {REPLICAS_MAX}, and whoever has looked a prompt up reads all of it from the copies
  that it saw.
* **Churn.** Where every read evicts, {_share(of[churn, last])} of the reads at {last:,} nodes find their copy gone
  ({_share(of[churn, first])} at {first}): an entry lives until its owner's withdrawal has travelled, and a prompt's lookup is as
  old as the reading of the prompt takes.
* **Memory does not bend**: generations and directory follow the arena, not the number of nodes; what is linear in the
  nodes is {large.membership_bytes / last:.0f} bytes each, and {large.opening_bytes / last:,.0f} bytes once, at opening.
"""


def _share(point: Point) -> str:
    return f"{100 * point.stale / max(point.remote + point.missed + point.stale, 1):.1f} %"
