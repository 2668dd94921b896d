"""The simulated world: whole stores under weather, damage and death, judged by what they promised.

``simulate(seed)`` is one run; ``python -m cascade_aio.testing.simulation`` runs many. What is promised, and what is
exempt and why: ``oracle``. Reading order: ``plan`` (what will happen), ``world`` (where), ``clients`` (who), ``oracle``
(what must come of it), ``runner``.
"""

from cascade_aio.testing.simulation.runner import Outcome, simulate

__all__ = ["Outcome", "simulate"]
