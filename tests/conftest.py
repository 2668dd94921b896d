"""How random tests are run here: the same examples every time, and judged by what they find, never by the clock.

Hypothesis measures time by default: an example that takes 200 ms is a failure, and so is data that is made slowly. Both
say something about the machine's other work. ``pytest --hypothesis-profile=explore`` draws new examples in each run.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("repeatable", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")
