"""The one suite that every adapter must pass, whatever it drives: ``protocol`` in the form of checks.

Runs inside the peer's own process. Each check opens the system anew in the folder it is given, on a handful of small
blocks, and raises ``PeerError`` with what is wrong. What a system says that it lacks must really be refused. Speed is
no business of it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from bench.peers import driving
from bench.peers.protocol import (
    FEATURES,
    AsyncPeer,
    Batching,
    CannotRunError,
    Feature,
    Job,
    PeerError,
)
from bench.peers.session import Session

BLOCK_BYTES = 64 << 10
BLOCKS = 8
MEMORY_BYTES = 64 << 20
IN_FLIGHT = 4
SEED = 11
GONE_SECONDS_MAX = 10.0
GONE_POLL_SECONDS = 0.05
UNKNOWN = "0123456789abcdef" * 2

Check = Callable[[Session, Mapping[str, Any]], Awaitable[None]]


async def run(system: str, check: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run ``check`` on ``system`` in the empty directory ``request["folder"]``; which features it lacks.

    ``request`` may name other ``block_bytes``, ``count`` and ``memory_bytes``. Raises what is wrong.
    """
    async with _opened(system, request) as session:
        lacks = dict(session.peer.describe().lacks)
        await CHECKS[check](session, request)
        return {"lacks": lacks}


@contextlib.asynccontextmanager
async def _opened(
    system: str, request: Mapping[str, Any], endpoint: Mapping[str, Any] | None = None
) -> AsyncIterator[Session]:
    count = request.get("count", BLOCKS)
    session = Session(
        system,
        {
            "block_bytes": BLOCK_BYTES,
            "count": count,
            "blocks_max": 4 * count,
            "memory_bytes": MEMORY_BYTES,
            "in_flight_max": IN_FLIGHT,
            "durable": True,
            "seed": SEED,
            **request,
            "endpoint": endpoint,
        },
    )
    await session.open()
    try:
        yield session
    finally:
        await session.close()


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise PeerError(what)


def _lacks(session: Session, feature: Feature) -> bool:
    return feature in session.peer.describe().lacks


async def _refuses(session: Session, verb: str) -> None:
    """A verb for a feature that is in ``lacks`` says so instead of doing something else."""
    try:
        await driving.call(session.peer, verb)
    except CannotRunError as error:
        _require(bool(str(error)), f"{verb} refuses without a reason")
        return
    raise PeerError(f"{verb} works although the feature is in lacks")


async def _misses(session: Session, verb: str, *arguments: Any) -> None:
    try:
        await driving.call(session.peer, verb, *arguments)
    except KeyError:
        return
    raise PeerError(f"{verb} of a block that is not there raises no KeyError")


async def _put(session: Session, stamp: int, *, flush: bool = False) -> None:
    await session.put([stamp], session.source.count, IN_FLIGHT, flush=flush)


async def _same(session: Session, stamp: int, in_flight: int = IN_FLIGHT) -> None:
    measure = await session.get([stamp], session.source.count, in_flight, via="copy", expect="any")
    _require(measure.verified_bytes == session.source.total_bytes, "not all bytes were compared")


async def _describes(session: Session, request: Mapping[str, Any]) -> None:
    found = session.peer.describe()
    for field in ("version", "module", "tuning", "medium"):
        _require(bool(getattr(found, field)), f"describe() has no {field}")
    _require(not found.module.startswith("/"), f"module {found.module} is an absolute path")
    _require(set(found.lacks) <= set(FEATURES), f"lacks names unknown features: {sorted(found.lacks)}")
    _require(all(found.lacks.values()), "a feature is lacking without a reason")
    _require(
        bool(found.durability) != ("durable" in found.lacks), "durability says what flush waits for, or it lacks it"
    )
    _require(not session.peer.processes() or bool(found.server), "a server was started and its version is not told")


async def _returns_bytes(session: Session, request: Mapping[str, Any]) -> None:
    for stamp, in_flight in ((0, 1), (1, IN_FLIGHT)):
        await session.put([stamp], session.source.count, in_flight, flush=False)
        await _same(session, stamp, in_flight)
        await _same(session, stamp, in_flight)
    await _same(session, 0)
    _require(all(await session.contains(0, range(session.source.count))), "contains() does not see what was put")


async def _knows_misses(session: Session, request: Mapping[str, Any]) -> None:
    room = session.settings.target[: session.source.block_bytes]
    _require(
        await driving.call(session.peer, "contains", UNKNOWN) is False, "contains() of an unknown block is not False"
    )
    await _misses(session, "get", UNKNOWN, room)
    await _misses(session, "delete", UNKNOWN)
    await _put(session, 0)
    await _misses(session, "get", UNKNOWN, room)


async def _keeps_its_own_copy(session: Session, request: Mapping[str, Any]) -> None:
    """What was put does not change with the memory it came from; what was got not with the store."""
    await _put(session, 0)
    room = session.settings.target[: session.source.block_bytes]
    session.source.stamp(99)
    found = bytes(await driving.call(session.peer, "get", session.source.name(0, 0), room))
    session.source.stamp(0)
    _require(session.source.matches(0, [found]), "a block changed with the memory from which it was put")
    found = await driving.call(session.peer, "get", session.source.name(0, 0), room)
    await session.delete(0, [0])
    await session.put([1], session.source.count, IN_FLIGHT, flush=False)
    session.source.stamp(0)
    _require(session.source.matches(0, [found]), "bytes that were got changed after delete and put")


async def _deletes(session: Session, request: Mapping[str, Any]) -> None:
    await _put(session, 0)
    await session.delete(0, [1, 2])
    _require(await session.contains(0, [0, 1, 2, 3]) == [True, False, False, True], "delete() removes something else")
    room = session.settings.target[: session.source.block_bytes]
    await _misses(session, "get", session.source.name(0, 1), room)
    await _misses(session, "delete", session.source.name(0, 1))
    await session.delete(0, [0, *range(3, session.source.count)])
    await _put(session, 0)
    await _same(session, 0)


async def _takes_batches(session: Session, request: Mapping[str, Any]) -> None:
    peer = session.peer
    if isinstance(peer, AsyncPeer) or not isinstance(peer, Batching):
        return
    source, block_bytes = session.source, session.source.block_bytes
    source.stamp(0)
    jobs = [Job(source.name(0, index), source.block(index)) for index in range(source.count)]
    peer.put_many(jobs, 3)  # a number that does not divide the batch
    rooms = [session.settings.target[i * block_bytes : (i + 1) * block_bytes] for i in range(source.count)]
    found = peer.get_many([Job(job.name, room) for job, room in zip(jobs, rooms, strict=True)], 3)
    _require(len(found) == source.count, "get_many() gives another number of results")
    _require(all(source.matches(index, [one]) for index, one in enumerate(found)), "get_many() gives other bytes")
    try:
        peer.get_many([Job(jobs[0].name, rooms[0]), Job(UNKNOWN, rooms[1])], 2)
    except KeyError:
        return
    raise PeerError("get_many() with a block that is not there raises no KeyError")


async def _leases(session: Session, request: Mapping[str, Any]) -> None:
    if _lacks(session, "lease"):
        return
    await _put(session, 0)
    measure = await session.get([0], session.source.count, IN_FLIGHT, via="lease", expect="any")
    _require(measure.verified_bytes == session.source.total_bytes, "not all leased bytes were compared")
    await _same(session, 0)


async def _reads_cold(session: Session, request: Mapping[str, Any]) -> None:
    if _lacks(session, "durable"):
        await _refuses(session, "flush")
    if _lacks(session, "cold"):
        await _refuses(session, "drop_caches")
        return
    await _put(session, 0, flush=not _lacks(session, "durable"))
    _require(await session.drop_caches() >= session.source.total_bytes // 2, "files() do not hold the blocks")
    await session.get([0], session.source.count, IN_FLIGHT, via="copy", expect="cold")
    await _put(session, 1)
    await _same(session, 0)
    await _same(session, 1)


async def _overflows(session: Session, request: Mapping[str, Any]) -> None:
    """Only the claim: that the memory tier is really exceeded is the workload's business."""
    if _lacks(session, "overflow"):
        return
    _require(not _lacks(session, "cold"), "a system with a disk below its memory can read it cold")


async def _restarts(session: Session, request: Mapping[str, Any]) -> None:
    if _lacks(session, "restart"):
        return
    await _put(session, 0, flush=True)
    await session.close()
    async with _opened(session.peer.system, request) as again:
        await _same(again, 0)


async def _shares(session: Session, request: Mapping[str, Any]) -> None:
    if _lacks(session, "clients"):
        return
    await _put(session, 0, flush=not _lacks(session, "durable"))
    async with _opened(session.peer.system, request, session.peer.endpoint()) as second:
        await _same(second, 0)
        await _put(second, 1, flush=not _lacks(session, "durable"))
        await _same(session, 1)
    await _same(session, 0)


async def _ends(session: Session, request: Mapping[str, Any]) -> None:
    await _put(session, 0)
    processes = list(session.peer.processes())
    await session.close()
    await driving.call(session.peer, "close")
    _wait_gone(processes)


def _wait_gone(processes: Sequence[int]) -> None:
    deadline = driving.clock() + GONE_SECONDS_MAX
    while alive := [process for process in processes if _is_alive(process)]:
        _require(driving.clock() < deadline, f"{len(alive)} processes of the system outlive close()")
        time.sleep(GONE_POLL_SECONDS)


def _is_alive(process: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    if state == "Z":
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, os.WNOHANG)
    return state != "Z"


CHECKS: dict[str, Check] = {
    "describes": _describes,
    "returns bytes": _returns_bytes,
    "knows misses": _knows_misses,
    "keeps its own copy": _keeps_its_own_copy,
    "deletes": _deletes,
    "takes batches": _takes_batches,
    "leases": _leases,
    "reads cold": _reads_cold,
    "overflows": _overflows,
    "restarts": _restarts,
    "shares": _shares,
    "ends": _ends,
}
