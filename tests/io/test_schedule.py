"""The order of service: priority, and a share for whoever waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cascade_aio.abc.storage import Priority
from cascade_aio.io.schedule import SHARES, ServiceQueues

MIB = 1 << 20


def serve(queues: ServiceQueues[int], nbytes: int) -> Priority | None:
    chosen = queues.choose()
    if chosen is not None:
        queues.charge(chosen, nbytes)
        queues.pop(chosen)
    return chosen


def test_empty_queues_have_nothing_to_serve() -> None:
    assert ServiceQueues[int]().choose() is None


def test_first_come_first_served_within_a_class() -> None:
    queues = ServiceQueues[int]()
    for item in range(3):
        queues.push(Priority.WRITE, item)
    assert [queues.pop(Priority.WRITE) for _ in range(3)] == [0, 1, 2]
    assert len(queues) == 0


def test_a_demand_read_passes_all_background_work() -> None:
    queues = ServiceQueues[int]()
    for item in range(200):
        queues.push(Priority.BACKGROUND, item)
        queues.push(Priority.WRITE, item)
    queues.push(Priority.DEMAND, 0)
    assert serve(queues, MIB) is Priority.DEMAND
    assert serve(queues, MIB) is not Priority.DEMAND


def test_blocked_classes_are_passed_over() -> None:
    queues = ServiceQueues[int]()
    queues.push(Priority.DEMAND, 0)
    queues.push(Priority.BACKGROUND, 0)
    assert queues.choose([Priority.DEMAND]) is Priority.BACKGROUND
    assert queues.choose([Priority.DEMAND, Priority.BACKGROUND]) is None


@given(sizes=st.lists(st.sampled_from([4096, 65536, MIB, 4 * MIB]), min_size=1, max_size=20))
def test_waiting_classes_get_their_share_and_no_more(sizes: list[int]) -> None:
    queues = ServiceQueues[int]()
    turns = 64 * len(sizes)
    for item in range(turns):
        for priority in Priority:
            queues.push(priority, item)
    served = dict.fromkeys(Priority, 0)
    for turn in range(turns):
        nbytes = sizes[turn % len(sizes)]
        chosen = serve(queues, nbytes)
        assert chosen is not None
        served[chosen] += nbytes
    slack = 2 * max(sizes) + 65536
    higher = 0
    for priority in Priority:
        if priority is not Priority.DEMAND:
            assert served[priority] <= SHARES[priority] * higher + slack
            assert served[priority] >= SHARES[priority] * higher - slack
        higher += served[priority]
