"""A full arena whose owner was killed: how soon the next one serves, and what of it without a disk read.

Each repetition is two fresh processes on a fresh root: one fills the arena, makes it durable and kills itself; the
other opens root and arena, gets a block (the clock stops) and then gets and compares all of them. The time
contains the recovery of the segments that the killed writer left open.
"""

from __future__ import annotations

from bench.adopting import POOL_BLOCKS, Adopted, adopt, fill
from bench.figures import Case
from bench.results import BenchError, Row, Scalar, Target, make_series
from bench.scale import GIB, MIB, Scale
from bench.session import OURS, Line, Session

ARENA_BYTES = 4 * GIB
ARENA_BYTES_QUICK = 16 * MIB
FILLED_SHARE = 0.97


def cases(scale: Scale) -> list[Case]:
    """Rows "until serving" and "served without a disk read"."""
    size = scale.block_bytes(MIB)
    arena = ARENA_BYTES_QUICK if scale.quick else ARENA_BYTES
    title = f"adoption of an arena of {arena // MIB:,} MiB after kill -9"
    return [
        Case(
            (
                Line("arena_adoption", f"{title}, until serving", size, "", Target("value", 1.0, at_least=False)),
                Line("arena_served", f"{title}, without a disk read", size, "", Target("value", 0.99, at_least=True)),
            ),
            _measure,
        )
    ]


async def _measure(session: Session, lines: tuple[Line, ...]) -> list[Row]:
    time_line, share_line = lines
    quick = session.scale.quick
    size = time_line.block_bytes
    arena_bytes = ARENA_BYTES_QUICK if quick else ARENA_BYTES
    rounds = max(1, int(arena_bytes * FILLED_SHARE) // (size + (8 << 10)) // POOL_BLOCKS)
    settings: dict[str, Scalar] = {"shm_bytes": arena_bytes, "warm_restart": True, "io_backend": session.io_backend}
    runs: list[Adopted] = []
    for number in range(session.repeats):
        given = {**settings, "arena": session.new_arena_name()}
        seed = session.seed + number
        try:
            with session.root("adoption") as root:
                fill(root, given, block_bytes=size, rounds=rounds, seed=seed)
                runs.append(adopt(root, given, block_bytes=size, rounds=rounds, seed=seed))
        finally:
            session.remove_arena(str(given["arena"]))
    blocks = rounds * POOL_BLOCKS
    if any(run.blocks != blocks for run in runs):
        raise BenchError(f"{blocks} blocks were stored and {[run.blocks for run in runs]} found: the figure is void")
    session.note_opened(runs[-1].statistics, settings)
    checked = f"two fresh processes per repetition; {blocks} durable blocks, SIGKILL; every byte compared after opening"
    verified = sum(run.verified_bytes for run in runs)
    return [
        session.row(
            time_line,
            ours=make_series(OURS, "s", [run.seconds for run in runs]),
            temperature="none",
            checked=checked,
            verified_bytes=verified,
            notes="from open_store to the first block in hand; includes the recovery of segments left open",
        ),
        session.row(
            share_line,
            ours=make_series(OURS, "share", [1 - run.served_from_disk / blocks for run in runs]),
            temperature="hot",
            checked=checked,
            verified_bytes=verified,
        ),
    ]
