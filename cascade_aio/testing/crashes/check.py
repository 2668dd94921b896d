"""Opening a root whose writers were killed, and comparing everything in it with what they had promised.

As many stores are opened at once as there are directories of dead writers, and race to adopt them. One of them then
reads every block and every name; after they are closed another one finds the same, and nothing left to recover. What
it must not know: how the writers died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cascade_aio as ca
from cascade_aio.config import MIB
from cascade_aio.segments.layout import CHECKPOINT_FILE, WRITERS
from cascade_aio.testing.crashes.figures import CampaignError, Figures
from cascade_aio.testing.crashes.model import (
    BLOCK_BYTES_MAX,
    NAMES_PER_BLOCK,
    Expectation,
    Oracle,
    block_id_of,
    contents,
    name_of,
)

CHECK_SECONDS_MAX = 180.0
"""A check that has not ended by then hangs."""

SHM_BYTES = 8 * MIB
READER_ARENA = "reader"
"""In use, or left by a reader that was killed with its writers, which takes it over when it is started again."""

KNOWN_FILES = ("cascade.json", "cascade.json.lock", "lock", "writer.json", "checkpoint")
"""Besides the segments, what a root may hold when nobody uses it."""


class RootCheck:
    """One check of one root. ``state``, afterwards, is what the next generation starts from: block → names."""

    def __init__(
        self,
        root: Path,
        shm_dir: Path,
        figures: Figures,
        *,
        segment_bytes: int,
        io_backend: str,
        disk_bytes: int | None,
        keep_checkpoints: bool,
    ) -> None:
        self.state: dict[int, frozenset[int]] = {}
        self._adopters = 1
        self._root = root
        self._shm_dir = shm_dir
        self._figures = figures
        self._segment_bytes = segment_bytes
        self._io_backend = io_backend
        self._disk_bytes = disk_bytes
        self._keep_checkpoints = keep_checkpoints

    def run(self, oracles: Sequence[Oracle], *, reader_lives: bool) -> None:
        """Open, compare, close, look for leftovers. Raises ``CampaignError``."""
        self._adopters = len(list(self._root.glob(f"{WRITERS}/*"))) - reader_lives
        descriptors = len(os.listdir("/proc/self/fd"))
        try:
            asyncio.run(self._run(oracles))
        except TimeoutError as error:
            raise CampaignError("hang", f"the check has not ended after {CHECK_SECONDS_MAX:g} s") from error
        except ca.CorruptionError as error:
            raise CampaignError("damage", f"damage without a cause: {error!r}") from error
        except (ca.CascadeError, OSError) as error:
            raise CampaignError("error", f"the root could not be checked: {error!r}") from error
        left = len(os.listdir("/proc/self/fd")) - descriptors
        if left > 0:  # fewer: somebody else's garbage was collected meanwhile
            raise CampaignError("leak", f"{left} descriptors are left open by closed stores")
        self._check_leftovers()
        self._figures.checks += 1

    async def _run(self, oracles: Sequence[Oracle]) -> None:
        async with asyncio.timeout(CHECK_SECONDS_MAX):
            async with contextlib.AsyncExitStack() as stack:
                opening = [
                    stack.enter_async_context(self._open(arena_of(n))) for n in range(max(self._adopters, len(oracles)))
                ]
                stores = await asyncio.gather(*opening)
                await self._adopt(stores)
                self._check_recovery(stores)
                store = stores[0]
                await store.refresh()
                await self._check_blocks(store, oracles)
                await self._check_damage(store)
                for other in stores[1:]:
                    _expect_no_damage(other)
                known = {info.block_id for info in store.blocks()}
            await self._open_again(known)

    async def _open_again(self, known: set[ca.BlockId]) -> None:
        """All are closed: nothing is left to recover, and the next one finds the same, with checkpoints or without."""
        for checkpoint in self._root.glob(f"{WRITERS}/*/{CHECKPOINT_FILE}"):
            if not self._keep_checkpoints:
                checkpoint.unlink()
        async with self._open("last") as last:
            recovery = last.statistics()["disk"]["recovery"]
            if recovery["scanned"] or recovery["unreadable"]:
                raise CampaignError("error", f"the next opening still scans: {recovery}")
            _expect_no_damage(last)
            found = {info.block_id for info in last.blocks()}
            if self._disk_bytes is None and found != known:
                told = f"missing {sorted(known - found)}, new {sorted(found - known)}"
                raise CampaignError("lost" if known - found else "resurrected", f"the next opening differs: {told}")

    def _open(self, arena: str) -> Any:
        return ca.open_store(
            self._root,
            shm_dir=str(self._shm_dir),
            arena=arena,
            shm_bytes=SHM_BYTES,
            segment_bytes=self._segment_bytes,
            io_backend=self._io_backend,
            workers=2,
        )

    async def _adopt(self, stores: Sequence[ca.Store]) -> None:
        """All race for the dead; each of them is adopted once."""
        reports = await asyncio.gather(*(store.adopt() for store in stores))
        adopted = [writer for report in reports for writer in report.writers]
        if len(set(adopted)) < len(adopted):
            raise CampaignError("error", f"adopted more than once: {reports}")
        self._figures.writers_adopted += len(adopted)

    def _check_recovery(self, stores: Sequence[ca.Store]) -> None:
        for store in stores:
            recovery = store.statistics()["disk"]["recovery"]
            self._figures.torn_records += recovery["torn_records"]
            self._figures.segments_sealed += recovery["sealed"]
            self._figures.segments_removed += recovery["removed"]
            bad = {name: recovery[name] for name in ("damaged", "seal_failures") if recovery[name]}
            if bad:
                raise CampaignError("damage", f"recovery on a sound disk met {bad}: {recovery}")

    async def _check_blocks(self, store: ca.Store, oracles: Sequence[Oracle]) -> None:
        self.state = {}
        strangers = {info.block_id for info in store.blocks()}
        for oracle in oracles:
            for block in oracle.blocks():
                await self._check_block(store, oracle, block)
                strangers.discard(block_id_of(block))
        if strangers:
            raise CampaignError("resurrected", f"gone at the last check, not put since, and there: {sorted(strangers)}")

    async def _check_block(self, store: ca.Store, oracle: Oracle, block: int) -> None:
        """Its state is what the next generation starts from."""
        expected = oracle.expect(block)
        there = await self._read(store, block)
        names = await self._names(store, block)
        self._figures.blocks_checked += 1
        self._figures.names_checked += NAMES_PER_BLOCK
        _compare(
            expected,
            there,
            names,
            f"block {block} ({block_id_of(block)}), names {sorted(names)}",
            oracle.history(block),
        )
        if self._disk_bytes is not None and expected.may_be_there:
            # Evicted is not deleted: as long as its segment is there, another writer directory's index may know it.
            self.state[block] = expected.names_may
        elif there:
            self.state[block] = frozenset(names)

    async def _read(self, store: ca.Store, block: int) -> bool:
        try:
            async with store.get(block_id_of(block)) as found:
                if (bytes(found.key), bytes(found.value)) != contents(block):
                    raise CampaignError("wrong", f"block {block} ({block_id_of(block)}) has other bytes")
        except ca.BlockNotFoundError:
            return False
        self._figures.bytes_checked += sum(map(len, contents(block)))
        return True

    async def _names(self, store: ca.Store, block: int) -> set[int]:
        names: set[int] = set()
        for name in range(NAMES_PER_BLOCK):
            if store.lookup([name_of(block, name)]):
                async with store.get(name_of(block, name)) as named:
                    if named.block_id != block_id_of(block):
                        raise CampaignError("wrong", f"name {name} of block {block} names {named.block_id}")
                names.add(name)
        return names

    async def _check_damage(self, store: ca.Store) -> None:
        report = await store.verify()
        self._figures.bytes_verified += report.bytes
        if report.damage:
            raise CampaignError("damage", f"damage without a cause: {[*map(str, report.damage)]}")
        _expect_no_damage(store)

    def _check_leftovers(self) -> None:
        left = set(os.listdir(self._shm_dir)) - {READER_ARENA}
        if left:
            raise CampaignError("leak", f"arenas left behind: {sorted(left)}")
        # A writer directory whose creation was cut short stays as it is: whose host it is cannot be told.
        strange = [
            str(path.relative_to(self._root))
            for path in self._root.rglob("*")
            if path.is_file()
            and (path.parent.parent.name != WRITERS or (path.parent / "writer.json").exists())
            and path.suffix != ".seg"
            and path.name not in KNOWN_FILES
        ]
        if strange:
            raise CampaignError("leak", f"files left behind: {strange}")


def arena_of(writer: int) -> str:
    """Arena of the n-th writer of a generation, and of the n-th store of the check, which takes it over."""
    return f"writer-{writer}"


def split_state(state: Mapping[int, frozenset[int]], first: int, count: int) -> dict[int, frozenset[int]]:
    """What of ``state`` belongs to the blocks ``first`` … ``first + count - 1``."""
    return {block: names for block, names in state.items() if first <= block < first + count}


def _expect_no_damage(store: ca.Store) -> None:
    damage = store.statistics()["damage"]
    if damage:
        raise CampaignError("damage", f"damage without a cause: {damage}")


def _compare(expected: Expectation, there: bool, names: set[int], told: str, history: str) -> None:
    for broken, kind, what in (
        (expected.must_be_there and not there, "lost", "acknowledged and lost"),
        (there and not expected.may_be_there, "resurrected", "deleted or never put, and there"),
        (not expected.names_must <= names, "lost", "names acknowledged and lost"),
        (not names <= expected.names_may, "resurrected", "names deleted or never bound, and there"),
    ):
        if broken:
            raise CampaignError(kind, f"{what}: {told}, {expected}, {history}")


assert BLOCK_BYTES_MAX < SHM_BYTES, "the checking store's arena holds any block"
