"""The life-cycle table: what is in it, what is refused, what the picture shows."""

from __future__ import annotations

import pytest

from cascade_aio.core.lifecycle import PERMITS, TRANSITIONS, CopyEvent, CopyState, advance, render_mermaid
from cascade_aio.errors import InternalError


def test_the_usual_life_ends_where_it_began() -> None:
    state = CopyState.ABSENT
    seen = []
    for event in (
        CopyEvent.RESERVE,
        CopyEvent.SEAL,
        CopyEvent.COPY,
        CopyEvent.COPIED,
        CopyEvent.EVICT,
        CopyEvent.EVICTED,
    ):
        state = advance(state, event)
        seen.append(state.value)
    assert seen == ["filling", "sealed", "copying", "sealed", "evicting", "absent"]


@pytest.mark.parametrize("state", CopyState)
@pytest.mark.parametrize("event", CopyEvent)
def test_everything_outside_the_table_is_refused_by_name(state: CopyState, event: CopyEvent) -> None:
    if (state, event) in TRANSITIONS:
        assert advance(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(InternalError, match=f"{state.value!r} cannot {event.value!r}"):
            advance(state, event)


def test_only_complete_copies_are_readable_and_no_state_is_a_trap() -> None:
    assert {state for state in CopyState if PERMITS[state].readable} == {CopyState.SEALED, CopyState.COPYING}
    assert {state for state in CopyState if not PERMITS[state].counted} == {CopyState.ABSENT}
    for state in CopyState:
        reached = {state}
        while more := {target for (origin, _), target in TRANSITIONS.items() if origin in reached} - reached:
            reached |= more
        assert reached == set(CopyState), f"from {state} not everything can be reached"


def test_readable_begins_only_with_a_seal_or_a_called_off_eviction() -> None:
    entering = {
        event
        for (origin, event), target in TRANSITIONS.items()
        if PERMITS[target].readable and not PERMITS[origin].readable
    }
    assert entering == {CopyEvent.SEAL, CopyEvent.KEEP}


def test_the_diagram_shows_every_transition_once() -> None:
    text = render_mermaid()
    assert text.startswith("stateDiagram-v2\n")
    arrows = [line.strip() for line in text.splitlines() if "-->" in line and "[*]" not in line]
    drawn = set()
    for arrow in arrows:
        ends, _, names = arrow.partition(": ")
        origin, target = ends.split(" --> ")
        drawn |= {(origin, name, target) for name in names.split(" / ")}
    assert drawn == {(origin.value, event.value, target.value) for (origin, event), target in TRANSITIONS.items()}
    assert len(arrows) == len(set(arrows))
