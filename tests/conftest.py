"""How random tests are run here: the same examples every time, and judged by what they find, never by the clock.
And what is skipped where /dev/shm is small.

Hypothesis measures time by default: an example that takes 200 ms is a failure, and so is data that is made slowly. Both
say something about the machine's other work. ``pytest --hypothesis-profile=explore`` draws new examples in each run.
"""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("repeatable", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``shm(mib)`` where /dev/shm has less room than that."""
    for mark in item.iter_markers("shm"):
        free_mib = shutil.disk_usage("/dev/shm").free >> 20
        if free_mib < mark.args[0]:
            pytest.skip(f"takes {mark.args[0]} MiB of /dev/shm, {free_mib} are free: mount -o remount,size=1g /dev/shm")
