"""The prefetch plan against a device and a consumer made of arithmetic."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_aio.core.prefetch import BLOCKS_MIN, START_BYTES, Act, Action, PrefetchPlanner, WindowBounds

MIB = 1 << 20
WIDE = WindowBounds(8 * MIB, 512 * MIB)


def describe_all(planner: PrefetchPlanner, nbytes: int, now_s: float = 0.0) -> list[int]:
    """Describe while the planner asks; the positions it started."""
    started: list[int] = []
    while (position := planner.next_position()) is not None:
        started += [at for act, at in planner.describe(position, nbytes, resident=False, now_s=now_s)]
    return started


class Bench:
    """One device of ``rate`` bytes/s that serves in order, one consumer that computes ``compute_s`` a block."""

    def __init__(self, count: int, nbytes: int, compute_s: float, *, rate: float, bounds: WindowBounds = WIDE) -> None:
        self.planner = PrefetchPlanner(count, bounds, streaming=True)
        self.nbytes = nbytes
        self.count = count
        self.compute_s = compute_s
        self.read_s = nbytes / rate
        self.free_s = 0.0
        self.queue: list[tuple[float, int]] = []
        self.landed: set[int] = set()
        self.ahead_max = 0

    def start(self, actions: list[Action], now_s: float) -> None:
        for act, position in actions:
            if act is Act.START:
                self.free_s = max(self.free_s, now_s) + self.read_s
                heapq.heappush(self.queue, (self.free_s, position))

    def fill(self, now_s: float) -> None:
        while (position := self.planner.next_position()) is not None:
            self.start(self.planner.describe(position, self.nbytes, resident=False, now_s=now_s), now_s)
        self.ahead_max = max(self.ahead_max, self.planner.ahead_bytes)

    def until(self, end_s: float) -> None:
        while self.queue and self.queue[0][0] <= end_s:
            at_s, position = heapq.heappop(self.queue)
            self.landed.add(position)
            self.start(self.planner.landed(position, at_s), at_s)
            self.fill(at_s)

    def run(self) -> float:
        now_s = 0.0
        self.fill(now_s)
        for position in range(self.count):
            self.until(now_s)
            if position not in self.landed:
                self.start(self.planner.asked(position, now_s), now_s)
                while position not in self.landed:
                    now_s = self.queue[0][0]
                    self.until(now_s)
            self.start(self.planner.taken(position, self.nbytes, now_s), now_s)
            self.fill(now_s)
            now_s += self.compute_s
            self.until(now_s)
        return now_s


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("block_mib", [1, 16, 80])
def test_total_time_is_that_of_the_slower_side(block_mib: int, ratio: float) -> None:
    nbytes, rate = block_mib * MIB, 3e9
    compute_s = ratio * nbytes / rate
    count = 64
    bench = Bench(count, nbytes, compute_s, rate=rate)
    ideal_s = count * max(compute_s, nbytes / rate) + min(compute_s, nbytes / rate)
    assert bench.run() <= 1.0001 * ideal_s
    assert bench.ahead_max <= WIDE.bytes_max


def test_the_window_grows_while_the_consumer_waits_and_bandwidth_follows_and_not_beyond() -> None:
    bench = Bench(2000, MIB, 0.0, rate=3e9)
    bench.run()
    # Reading in order at a fixed rate: the first growth brings nothing, so there is no second.
    assert bench.planner.window_bytes == 2 * START_BYTES
    assert bench.planner.bandwidth_bytes_per_s == pytest.approx(3e9, rel=0.01)


def test_the_window_shrinks_to_its_lower_bound_for_a_slow_consumer() -> None:
    bench = Bench(2000, MIB, 10 * MIB / 3e9, rate=3e9)
    bench.run()
    assert bench.planner.window_bytes == WIDE.bytes_min


def test_two_of_the_largest_fit_but_not_more_than_the_upper_bound() -> None:
    planner = PrefetchPlanner(10, WindowBounds(MIB, 200 * MIB), streaming=True)
    assert describe_all(planner, 80 * MIB) == [0, 1]
    assert planner.window_bytes == BLOCKS_MIN * 80 * MIB
    tight = PrefetchPlanner(10, WindowBounds(MIB, 100 * MIB), streaming=True)
    assert describe_all(tight, 80 * MIB) == [0]
    one = PrefetchPlanner(10, WindowBounds(MIB, MIB), streaming=True)
    assert describe_all(one, 80 * MIB) == [0]  # one block may always be under way


def test_a_full_window_is_filled_again_in_steps_unless_the_consumer_waits() -> None:
    planner = PrefetchPlanner(1000, WindowBounds(8 * MIB, 32 * MIB), streaming=True)
    full = len(describe_all(planner, MIB))
    assert full == 32
    for position in range(full):
        planner.landed(position, 0.0)
    started: list[int] = []
    for position in range(12):
        actions = planner.taken(position, MIB, 0.0)
        more = [at for act, at in actions if act is Act.START]
        started.append(len(more + describe_all(planner, MIB)))
    assert started == [0, 0, 0, 4] * 3, "four neighbours at a time"
    assert planner.taken(12, MIB, 0.0) + describe_all(planner, MIB) == []
    assert [at for _, at in planner.asked(13, 0.0)] == [full + 12], "nothing is saved up while somebody waits"


def test_without_a_consumer_only_what_is_being_read_counts() -> None:
    planner = PrefetchPlanner(100, WindowBounds(2 * MIB, 2 * MIB), streaming=False)
    assert describe_all(planner, MIB) == [0, 1]
    assert planner.landed(0, 1.0) == []
    assert describe_all(planner, MIB) == [2]  # what has landed makes room, taken or not
    assert not planner.exhausted


def test_asking_hurries_what_is_under_way_and_skips_what_was_not_started() -> None:
    planner = PrefetchPlanner(10, WindowBounds(MIB, 2 * MIB), streaming=True)
    assert describe_all(planner, MIB) == [0, 1]
    assert planner.asked(0, 1.0) == [Action(Act.HURRY, 0)]
    assert planner.asked(5, 1.0) == []
    planner.taken(0, MIB, 2.0)
    planner.taken(1, MIB, 2.0)
    assert planner.next_position() == 6
    assert planner.stalls == 2


def test_a_stream_ends_behind_what_cannot_be_had() -> None:
    planner = PrefetchPlanner(10, WIDE, streaming=True)
    assert describe_all(planner, MIB) == list(range(10))
    planner.landed(7, 1.0)
    actions = planner.failed(5, 1.0)
    assert sorted(actions, key=lambda action: action.position) == [
        Action(Act.CANCEL, 6),
        Action(Act.DROP, 7),
        Action(Act.CANCEL, 8),
        Action(Act.CANCEL, 9),
    ]
    assert planner.next_position() is None
    planner.taken(5, MIB, 2.0)  # it could be had after all
    assert planner.next_position() == 6


def test_refused_room_pauses_until_there_is_some() -> None:
    planner = PrefetchPlanner(4, WIDE, streaming=True)
    describe_all(planner, MIB)
    assert [action.act for action in planner.refused(1, 1.0)] == [Act.CANCEL, Act.CANCEL]
    assert planner.next_position() is None
    planner.room(2.0)
    assert describe_all(planner, MIB, 2.0) == [1, 2, 3]


def test_what_was_given_up_for_others_halves_the_window() -> None:
    planner = PrefetchPlanner(40, WIDE, streaming=True)
    describe_all(planner, MIB)
    planner.landed(31, 1.0)
    planner.lost(31, 1.0)
    assert planner.window_bytes == START_BYTES // 2


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans())
def test_any_order_of_events_keeps_the_books(data: st.DataObject, streaming: bool) -> None:  # noqa: C901 (a machine)
    bounds = WindowBounds(2 * MIB, 6 * MIB)
    planner = PrefetchPlanner(30, bounds, streaming=streaming)
    now_s = 0.0
    started: set[int] = set()
    landed: set[int] = set()
    largest = 0

    def perform(actions: list[Action]) -> None:
        for act, position in actions:
            if act is Act.START:
                assert position not in started | landed
                started.add(position)
            elif act is Act.DROP:
                landed.remove(position)
            elif act is Act.CANCEL:
                started.remove(position)
            else:
                assert position in started

    sizes: dict[int, int] = {}
    for _ in range(data.draw(st.integers(0, 60))):
        now_s += data.draw(st.sampled_from([0.0, 0.001, 1.0]))
        event = data.draw(
            st.sampled_from(["describe", "landed", "failed", "refused", "taken", "asked", "lost", "room"])
        )
        position = planner.next_position()
        if event == "describe" and position is not None:
            kind = data.draw(st.sampled_from(["absent", "resident", "disk", "disk", "disk"]))
            nbytes = sizes.setdefault(position, data.draw(st.sampled_from([4096, MIB, 4 * MIB])))
            if kind == "absent":
                planner.absent(position)
            else:
                largest = max(largest, nbytes)
                if kind == "resident" and streaming:
                    landed.add(position)
                perform(planner.describe(position, nbytes, resident=kind == "resident", now_s=now_s))
        elif event in ("landed", "failed", "refused") and started:
            at = data.draw(st.sampled_from(sorted(started)))
            started.remove(at)
            if event == "landed" and streaming:
                landed.add(at)
            perform(getattr(planner, event)(at, now_s))
        elif event == "taken" and landed:
            at = data.draw(st.sampled_from(sorted(landed)))
            landed.remove(at)
            perform(planner.taken(at, sizes[at], now_s))
        elif event == "asked" and started:
            perform(planner.asked(data.draw(st.sampled_from(sorted(started))), now_s))
        elif event == "lost" and landed:
            at = max(landed)
            landed.remove(at)
            planner.lost(at, now_s)
        elif event == "room":
            perform(planner.room(now_s))
        assert planner.in_flight_bytes == sum(sizes[at] for at in started)
        assert planner.ahead_bytes == sum(sizes[at] for at in started | landed)
        assert planner.window_bytes <= bounds.bytes_max
        if len(started | landed) > 1:
            assert planner.ahead_bytes <= bounds.bytes_max + largest
    perform(planner.cancel())
    assert not started
    assert not landed
    assert planner.exhausted
    assert planner.ahead_bytes == 0
