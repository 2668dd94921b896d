"""A short fuzz of every parser in every run; ``make fuzz SECONDS=600`` runs the long form."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_aio.abc.storage import PAGE_BYTES
from cascade_aio.segments import format as fmt
from tests.fuzz import guard
from tests.fuzz.mutations import Decisions, mutated
from tests.fuzz.seeds import golden_seeds
from tests.fuzz.targets import TARGETS, Target

EXAMPLES = int(os.environ.get("CASCADE_TEST_FUZZ", "1"))
"""Multiplies the examples of the default run."""

SLOW = {"recovery": 60, "small_files": 60, "checkpoint": 100, "opening": 40}
INPUT_BYTES_MAX = 200
REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_data_or_a_clean_error(name: str) -> None:
    @settings(
        max_examples=EXAMPLES * SLOW.get(name, 300),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.binary(max_size=INPUT_BYTES_MAX))
    def fuzz(data: bytes) -> None:
        guard.run_guarded(TARGETS[name], data)

    fuzz()


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_broke_something_once(name: str) -> None:
    for data in FOUND.get(name, ()):
        guard.run_guarded(TARGETS[name], data)


FOUND: dict[str, list[bytes]] = {"metadata": [b"@\x00\x01\x06\x00\x08"]}
"""Inputs by target, kept for ever."""


def test_unchanged_seeds_parse() -> None:
    """The fuzz starts from what is valid: a decision for no edits gives a seed as it is."""
    seeds = [bytes(parts.content[:PAGE_BYTES]) for parts in golden_seeds().segments.values()]
    for number, seed in enumerate(seeds):
        content = mutated(seeds, Decisions(bytes([number])))
        assert content == seed
        assert fmt.decode_segment_header(memoryview(content), path="x") is not None


def test_the_guard_sees_endless_loops_and_excess(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(data: bytes) -> None:
        while True:
            pass

    def excess(data: bytes) -> None:
        bytearray(guard.ALLOCATION_BYTES_FREE + (1 << 20))

    def rude(data: bytes) -> None:
        raise KeyError(data)

    monkeypatch.setattr(guard, "CPU_SECONDS_MAX", 0.05)
    cases: list[tuple[Target, type[BaseException]]] = [
        (endless, guard.EndlessLoopError),
        (excess, AssertionError),
        (rude, KeyError),
    ]
    for target, error in cases:
        with pytest.raises(error):
            guard.run_guarded(target, b"")
    assert not tracemalloc.is_tracing()


def test_the_long_form_runs() -> None:
    """A second of it; with atheris where that is installed."""
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "1", "--target", "segment_header"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_coverage_guided_harness_runs() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install atheris runs the coverage-guided fuzz")
    command = [sys.executable, "-m", "tests.fuzz.guided", "footer", "1", "0"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
