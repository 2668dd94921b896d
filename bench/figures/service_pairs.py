"""A service and its clients against the same work in one embedded store, in turns on the same machine.

``read_into``: two client processes side by side / one embedded process. Cold get and put: one client / one
embedded store. All sides of a pair use the same settings and their own arena.
"""

from __future__ import annotations

import asyncio
import pathlib
import time
from typing import Any

import cascade_aio as ca
from bench.blocks import AnyStore, compare_and_release, in_flight, lease_all, put_all
from bench.data import Pool, scratch_memory
from bench.figures import Case
from bench.results import BenchError, Row, Target, make_series
from bench.scale import MIB, Scale
from bench.service import Helper, serving, socket_of
from bench.session import OURS, Line, Session
from bench.turns import Side, Turns, take_turns

GB = 1e9
SIZE_BYTES = 16 * MIB
BLOCKS = 12
"""Per round: twice the caches, and small enough that a repetition of both sides is a second."""
READERS = 2
PASSES = 8
IN_FLIGHT = 8
MEASURED, FILLER = 0, 1
DISK_ROUNDS = 4
"""Rounds of puts that a root may hold; older ones are evicted."""


def cases(scale: Scale) -> list[Case]:
    """Rows of the three pairs."""
    size = scale.block_bytes(SIZE_BYTES)

    def line(title: str, variant: str, target: float) -> tuple[Line]:
        return (Line("service", title, size, variant, Target("ratio", target, at_least=True)),)

    return [
        Case(line("service: hot read_into of 2 clients / embedded in 1 process", "read_into", 0.90), _read_into),
        Case(line("service: cold get by a client, 8 in flight / embedded", "cold", 0.95), _cold),
        Case(line("service: put until readable by a client, 8 in flight / embedded", "put", 0.90), _put),
    ]


def _row(session: Session, line: Line, turns: Turns, temperature: str, checked: str, verified: int) -> Row:
    return session.row(
        line,
        turns=turns,
        ours=make_series(OURS, "GB/s", turns.samples[OURS]),
        other=make_series("embedded", "GB/s", turns.samples["embedded"]),
        temperature="cold" if temperature == "cold" else "hot",
        checked=checked,
        verified_bytes=verified,
    )


# -- read_into -------------------------------------------------------------------------------------


async def _read_into(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    size, half = line.block_bytes, line.block_bytes // 2
    verified = 0
    with session.root("service-read") as root, Pool(size, BLOCKS, session.seed) as pool:
        memory = scratch_memory(size)
        shm_bytes = session.arena_bytes(size, BLOCKS)
        async with (
            session.open(_made(root / "embedded"), shm_bytes=shm_bytes) as embedded,
            serving(session, _made(root / "served"), shm_bytes=shm_bytes) as store,
        ):
            ids = await put_all(embedded, pool, IN_FLIGHT)
            if await put_all(store, pool, IN_FLIGHT) != ids:
                raise BenchError("service and embedded store named the same blocks differently: the figure is void")
            names = [str(name) for name in ids]
            path = socket_of(store)
            async with (
                Helper.started("read", path, str(size), *names) as one,
                Helper.started("read", path, str(size), *names) as two,
            ):

                async def ours(repetition: int) -> float:
                    nonlocal verified
                    spans = await asyncio.gather(one.ask(str(PASSES)), two.ask(str(PASSES)))
                    for index, name in enumerate(ids):
                        await store.read_into(name, memory[:half], memory[half:])
                        if not pool.equals(index, memory[:half], memory[half:]):
                            raise BenchError(f"block {index} was read with other bytes: the figure is void")
                        verified += size
                    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
                    return READERS * PASSES * pool.total_bytes / seconds / GB

                async def inside(repetition: int) -> float:
                    started = time.perf_counter()
                    for _ in range(READERS * PASSES):
                        for name in ids:
                            await embedded.read_into(name, memory[:half], memory[half:])
                    return READERS * PASSES * pool.total_bytes / (time.perf_counter() - started) / GB

                turns = await take_turns([Side(OURS, ours), Side("embedded", inside)], session.repeats)
    checked = "hot: every block is in both arenas; one at a time in each process; after each repetition compared"
    return [_row(session, line, turns, "hot", checked, verified)]


# -- cold get --------------------------------------------------------------------------------------


async def _cold(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    verified = 0
    with session.root("service-cold") as root, Pool(line.block_bytes, BLOCKS, session.seed) as pool:
        shm_bytes = session.arena_bytes(line.block_bytes, BLOCKS)
        ids: dict[int, list[ca.BlockId]] = {}
        async with session.open(root, shm_bytes=shm_bytes) as store:
            for stamp in (FILLER, MEASURED):
                pool.stamp(stamp)
                ids[stamp] = await put_all(store, pool, IN_FLIGHT)
                await store.flush()

        async def once(store: AnyStore) -> float:
            """The arena is full of other blocks when the clock starts."""
            nonlocal verified

            async def touch(name: ca.BlockId) -> None:
                (await store.get(name)).release()

            await in_flight(IN_FLIGHT, ids[FILLER], touch)
            started = time.perf_counter()
            leases = await lease_all(store, ids[MEASURED], IN_FLIGHT)
            seconds = time.perf_counter() - started
            warm = sum(block.tier is not ca.Tier.DISK for _, block in leases)
            verified += compare_and_release(leases, pool)
            if warm:
                raise BenchError(f"{warm} blocks were not cold: the figure is void")
            return pool.total_bytes / seconds / GB

        async def ours(repetition: int) -> float:
            async with serving(session, root, shm_bytes=shm_bytes) as store:
                return await once(store)

        async def inside(repetition: int) -> float:
            async with session.open(root, shm_bytes=shm_bytes) as store:
                return await once(store)

        turns = await take_turns([Side(OURS, ours), Side("embedded", inside)], session.repeats)
    checked = "cold: new arena per repetition, full of other blocks; every lease says tier disk; every byte compared"
    return [_row(session, line, turns, "cold", checked, verified)]


# -- put -------------------------------------------------------------------------------------------


async def _put(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    (line,) = lines
    verified = 0
    with session.root("service-put") as root, Pool(line.block_bytes, BLOCKS, session.seed) as pool:
        shm_bytes = session.arena_bytes(line.block_bytes, 2 * BLOCKS)
        settings: dict[str, Any] = {
            "disk_bytes": max(64 * MIB, DISK_ROUNDS * 2 * shm_bytes),
            "tail_bytes_max": shm_bytes,
        }

        async def once(store: AnyStore, repetition: int) -> float:
            nonlocal verified
            pool.stamp(repetition)
            started = time.perf_counter()
            ids = await put_all(store, pool, IN_FLIGHT)
            seconds = time.perf_counter() - started
            await store.flush()
            verified += compare_and_release(await lease_all(store, ids, IN_FLIGHT), pool)
            return pool.total_bytes / seconds / GB

        async with (
            session.open(_made(root / "embedded"), shm_bytes=shm_bytes, **settings) as embedded,
            serving(session, _made(root / "served"), shm_bytes=shm_bytes, **settings) as store,
        ):
            await once(embedded, -1 & 0xFFFF)
            await once(store, -1 & 0xFFFF)
            turns = await take_turns(
                [Side(OURS, lambda repetition: once(store, repetition)),
                 Side("embedded", lambda repetition: once(embedded, repetition))],
                session.repeats,
            )  # fmt: skip
    checked = "reserve, fill, seal with the digest computed by the service; flushed and every byte compared untimed"
    return [_row(session, line, turns, "hot", checked, verified)]


def _made(path: pathlib.Path) -> pathlib.Path:
    path.mkdir()
    return path
