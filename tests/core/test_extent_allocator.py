"""ExtentAllocator: rules one by one, against a model, and how well it packs mixed sizes."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cascade_aio.core.extents import ExtentAllocator

KIB = 1024
MIB = 1024 * KIB


def test_best_fit_takes_the_smallest_hole_that_fits_and_the_lowest_among_equals() -> None:
    extents = ExtentAllocator()
    extents.add_region(0, 64 * 4096)
    offsets = [extents.allocate(4096 * pages) for pages in (4, 1, 2, 1, 2, 1, 8, 1)]
    assert offsets == [4096 * at for at in (0, 4, 5, 7, 8, 10, 11, 19)]
    for hole in (0, 5, 8, 11):
        extents.free(hole * 4096)
    assert extents.allocate(2 * 4096 - 1) == 5 * 4096
    assert extents.allocate(2 * 4096) == 8 * 4096
    assert extents.allocate(4096) == 0
    assert extents.allocate(45 * 4096) is None
    assert extents.allocate(44 * 4096) == 20 * 4096


def test_regions_arrive_in_any_order_and_join() -> None:
    extents = ExtentAllocator(granule_bytes=2 * MIB)
    extents.add_region(8 * MIB, 4 * MIB)
    extents.add_region(0, 4 * MIB)
    assert (extents.extents, extents.largest_free_bytes, extents.fragmentation) == (2, 4 * MIB, 0.5)
    extents.add_region(4 * MIB, 4 * MIB)
    assert (extents.extents, extents.largest_free_bytes, extents.fragmentation) == (1, 12 * MIB, 0.0)
    assert extents.allocate(12 * MIB) == 0
    assert (extents.free_bytes, extents.allocated_bytes, extents.fragmentation) == (0, 12 * MIB, 0.0)
    extents.add_region(12 * MIB, 2 * MIB)
    assert extents.free(0) == 12 * MIB
    assert extents.largest_free_bytes == extents.capacity_bytes == 14 * MIB


def test_programmer_errors_are_assertions() -> None:
    extents = ExtentAllocator()
    extents.add_region(0, MIB)
    offset = extents.allocate(1)
    assert offset == 0
    assert extents.nbytes_at(0) == 4096
    with pytest.raises(AssertionError, match="offset 4096"):
        extents.free(4096)
    with pytest.raises(AssertionError, match="offset 1"):
        extents.free(1)
    extents.free(0)
    with pytest.raises(AssertionError, match="offset 0"):
        extents.free(0)
    with pytest.raises(AssertionError, match="overlaps"):
        extents.add_region(MIB - 4096, 8192)
    with pytest.raises(AssertionError, match="granules"):
        extents.add_region(2 * MIB, 100)


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator against a set of granules."""

    REGION_GRANULES = 16
    REGIONS = 8

    def __init__(self) -> None:
        super().__init__()
        self.extents = ExtentAllocator()
        self.missing = list(range(self.REGIONS))
        self.free: set[int] = set()
        self.live: dict[int, int] = {}

    def runs(self) -> list[tuple[int, int]]:
        """Maximal free runs of the model as (size, start)."""
        runs: list[tuple[int, int]] = []
        for granule in sorted(self.free):
            if runs and sum(runs[-1]) == granule:
                runs[-1] = (runs[-1][0] + 1, runs[-1][1])
            else:
                runs.append((1, granule))
        return runs

    @precondition(lambda self: self.missing)
    @rule(data=st.data())
    def add_region(self, data: st.DataObject) -> None:
        region = self.missing.pop(data.draw(st.integers(0, len(self.missing) - 1)))
        start = region * self.REGION_GRANULES
        self.extents.add_region(start * 4096, self.REGION_GRANULES * 4096)
        self.free |= set(range(start, start + self.REGION_GRANULES))

    @rule(size=st.one_of(st.integers(1, 6), st.integers(1, 40)), slack=st.integers(0, 4095))
    def allocate(self, size: int, slack: int) -> None:
        fitting = sorted(run for run in self.runs() if run[0] >= size)
        offset = self.extents.allocate(size * 4096 - slack)
        if not fitting:
            assert offset is None
            return
        assert offset == fitting[0][1] * 4096
        start = offset // 4096
        self.free -= set(range(start, start + size))
        self.live[start] = size

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_one(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.live)))
        size = self.live.pop(start)
        assert self.extents.free(start * 4096) == size * 4096
        self.free |= set(range(start, start + size))

    @invariant()
    def agrees(self) -> None:
        runs = self.runs()
        expected = [(start * 4096, size * 4096, False) for size, start in runs]
        expected += [(start * 4096, size * 4096, True) for start, size in self.live.items()]
        assert list(self.extents.iter_extents()) == sorted(expected)
        assert self.extents.free_bytes == len(self.free) * 4096
        assert self.extents.allocated_bytes == sum(self.live.values()) * 4096
        assert self.extents.capacity_bytes == self.extents.free_bytes + self.extents.allocated_bytes
        assert self.extents.largest_free_bytes == max((size for size, _ in runs), default=0) * 4096

    def teardown(self) -> None:
        for start in sorted(self.live):
            self.extents.free(start * 4096)
        regions = [set(range(r * 16, r * 16 + 16)) for r in range(self.REGIONS) if r not in self.missing]
        self.free = set().union(*regions)
        assert [extent.nbytes for extent in self.extents.iter_extents()] == [size * 4096 for size, _ in self.runs()]


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_sizes_with_random_frees_stay_packable(seed: int) -> None:
    """64 KiB to 80 MiB in 2 GiB, random frees whenever nothing fits: the arena stays well used.

    Measured over 20 seeds: mean use when an allocation failed 0.90-0.92, lowest single 0.71.
    """
    rng = random.Random(seed)
    sizes = (64 * KIB, 256 * KIB, MIB, 2 * MIB, 16 * MIB, 80 * MIB)
    capacity = 2048 * MIB
    extents = ExtentAllocator()
    extents.add_region(0, capacity)
    live: list[int] = []
    use_when_full: list[float] = []
    for _ in range(20_000):
        size = rng.choice(sizes)
        while (offset := extents.allocate(size)) is None:
            use_when_full.append(extents.allocated_bytes / capacity)
            assert live, "an empty arena refused a block smaller than itself"
            victim = rng.randrange(len(live))
            live[victim], live[-1] = live[-1], live[victim]
            extents.free(live.pop())
        live.append(offset)
    assert sum(use_when_full) / len(use_when_full) > 0.85
    assert min(use_when_full) > 0.6
    for offset in live:
        extents.free(offset)
    assert extents.extents == 1
    assert extents.largest_free_bytes == capacity
